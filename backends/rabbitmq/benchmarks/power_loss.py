"""Measures what a power cut costs: `python backends/rabbitmq/benchmarks/power_loss.py [--server VERSION ...] [--type TYPE ...]`.

A RabbitMQ of its own has its data on a file system in an image, mounted by a loop device. While tasks are enqueued and confirmed, the
server is frozen and the image copied: the copy has what was on the disk, and nothing that only the kernel had. Then the server is killed
and started on the copy, and all that it has is read. What was confirmed and is not there was lost. That needs root, and losetup, mount
and mkfs.ext4 on the PATH.

`--how kill` kills the server in place of the cut, and starts it on the image itself.

The kernel writes back by itself after 5 to 30 seconds: keep `--seconds` below that, else what the server left to the kernel looks safe.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))  # rabbitmq_nodes.py, rabbitmq_traffic.py

from rabbitmq_nodes import Node
from rabbitmq_traffic import lanes_of, make_broker, message

from crossdock.errors import BrokerError
from crossdock.spi import Ack, Broker, QueueSpec
from crossdock_conformance.servers import find_servers
from crossdock_conformance.servers.finding import BinarySource

IMAGE_MB = 600
BATCH = 10
PRODUCERS = 4
EMPTY_FOR = 5.0
"""Seconds for which a queue has to say that it is empty."""
READ_WITHIN = 60.0
"""Seconds without a message after which nothing more is expected from a server that does not say that it has none."""


class Image:
    """A file with an ext4 file system in it, mounted where a server keeps its data."""

    def __init__(self, file: Path, place: Path) -> None:
        self._file = file
        self._place = place

    def make(self) -> None:
        """Make and mount it."""
        with self._file.open("wb") as opened:
            opened.truncate(IMAGE_MB << 20)
        _run("mkfs.ext4", "-q", "-F", str(self._file))
        self.mount()
        os.chmod(self._place, 0o755)

    def mount(self) -> None:
        """Have it in its place."""
        _run("mount", "-o", "loop", str(self._file), str(self._place))

    def sync(self) -> None:
        """Have all on the disk that was written until now."""
        _run("sync", "--file-system", str(self._place))

    def unmount(self) -> None:
        """Have it there no more. Nobody may use it."""
        _run("umount", str(self._place))

    def replace(self, by: Path) -> None:
        """Be another file from now on."""
        self.unmount()
        self._file = by
        self.mount()

    def copy(self, to: Path) -> None:
        """What is on the disk now, into another file."""
        _run("cp", "--sparse=always", str(self._file), str(to))


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


@dataclass
class Notes:
    """What became of one run."""

    confirmed: dict[str, float] = field(default_factory=dict[str, float])
    """When each message was confirmed, by id."""
    cut: float = 0.0
    there: set[str] = field(default_factory=set[str])
    usable: bool = True
    """Whether the queue could be read afterwards."""

    @property
    def lost(self) -> list[str]:
        """Confirmed, and not there."""
        return [id for id, at in self.confirmed.items() if at <= self.cut and id not in self.there]

    def said(self) -> str:
        """In a line."""
        counted = sum(at <= self.cut for at in self.confirmed.values())
        oldest = max((self.cut - self.confirmed[id] for id in self.lost), default=0.0)
        text = f"{counted:6} confirmed, {len(self.lost):6} lost"
        if self.lost:
            text += f", the oldest {oldest:.2f} s before the cut"
        return text + ("" if self.usable else "; the queue cannot be read")


async def measure(source: BinarySource, type: str, how: str, seconds: float, old: bool) -> Notes:
    """One cut, or kill, after so many seconds of enqueues into a queue that was declared long ago, or just now."""
    notes = Notes()
    namespace = "p" + secrets.token_hex(4)
    with _node(source) as (node, image, folder):
        url = f"{node.url}?queue_type={type}&timeout=10"
        broker = make_broker(url, namespace)
        await broker.open()
        await broker.declare([QueueSpec("q")])
        if old:
            await asyncio.to_thread(image.sync)
        producing = [asyncio.ensure_future(_produce(broker, notes, number)) for number in range(PRODUCERS)]
        await asyncio.sleep(seconds)
        if how == "power":
            await asyncio.to_thread(node.pause)
            notes.cut = time.monotonic()
            await asyncio.to_thread(image.copy, folder / "copy")
            await asyncio.to_thread(node.kill)
            await asyncio.to_thread(image.replace, folder / "copy")
        else:
            notes.cut = time.monotonic()
            await asyncio.to_thread(node.kill)
        for task in producing:
            task.cancel()
        await asyncio.wait(producing)
        await broker.close()
        await asyncio.to_thread(node.start)
        notes.usable = await _read(make_broker(url, namespace), notes)
    return notes


@contextlib.contextmanager
def _node(source: BinarySource) -> Iterator[tuple[Node, Image, Path]]:
    """A server whose data are in an image, and a folder for copies."""
    with tempfile.TemporaryDirectory(prefix="crossdock-power-") as name, Node(source) as node:
        image = Image(Path(name) / "image", node.folder / "data")
        image.make()
        try:
            node.start()
            image.sync()
            yield node, image, Path(name)
        finally:
            node.kill()
            image.unmount()


async def _produce(broker: Broker, notes: Notes, producer: int) -> None:
    number = 0
    with contextlib.suppress(BrokerError):  # the cut
        while True:
            batch = [message(f"{producer}-{number + i}", body=b"x" * 200) for i in range(BATCH)]
            number += BATCH
            refused = {refusal.index for refusal in await broker.enqueue(batch)}
            now = time.monotonic()
            notes.confirmed.update((each.id, now) for index, each in enumerate(batch) if index not in refused)


async def _read(broker: Broker, notes: Notes) -> bool:
    """Take all that there is. Returns whether the server said that this is all."""
    await broker.open()
    try:
        heard = time.monotonic()
        while time.monotonic() < heard + READ_WITHIN:
            try:
                await broker.declare([QueueSpec("q")])
                deliveries = await broker.receive(lanes_of("q", quota=100), 1000, 1)
                if not deliveries and not (await broker.stats(["q"]))[0].ready and time.monotonic() > heard + EMPTY_FOR:
                    return True
                await broker.settle([Ack(delivery) for delivery in deliveries])
            except BrokerError:
                await asyncio.sleep(0.5)
                continue
            if deliveries:
                heard = time.monotonic()
            notes.there.update(delivery.message.id for delivery in deliveries)
        return False
    finally:
        await broker.close()


def main() -> None:
    """Measure, and print a line for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--server", nargs="+", default=[None], metavar="VERSION", help="such as 3.10 (default: the first that is found)"
    )
    parser.add_argument("--type", nargs="+", choices=("quorum", "classic"), default=["quorum", "classic"], help="of queue")
    parser.add_argument("--how", choices=("power", "kill"), default="power", help="what ends the server (default power)")
    parser.add_argument("--seconds", type=float, default=6.0, help="of enqueues before it (default 6)")
    parser.add_argument("--new-queue", action="store_true", help="do not have the queue on the disk before the enqueues begin")
    parser.add_argument("--runs", type=int, default=1, help="of each (default 1)")
    chosen = parser.parse_args()
    for version in chosen.server:
        sources = [source for source in find_servers("rabbitmq", version) if isinstance(source, BinarySource)]
        if not sources:
            raise SystemExit(f"there is no RabbitMQ {version or ''} on this machine")
        for type in chosen.type:
            for _ in range(chosen.runs):
                notes = asyncio.run(measure(sources[0], type, chosen.how, chosen.seconds, not chosen.new_queue))
                print(f"RabbitMQ {sources[0].version:8} {type:8} {chosen.how:6} {notes.said()}", flush=True)


if __name__ == "__main__":
    main()
