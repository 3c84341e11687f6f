"""Run the shop: 5,000 orders, two workers, one of them killed half-way, dead letters repaired, and every order checked.

    python demo.py [--orders N] [--keep FOLDER] [--url URL]

Needs crossdock installed and nothing else, unless you name a broker. Exit code 0 if every order came to its right end, else 1.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import quote

import check
from orders import Refused, Row, read_rows

SHOP = Path(__file__).resolve().parent
COMMAND = [sys.executable, "-m", "crossdock_cli"]
PATIENCE = 120.0
"""Seconds after which waiting for anything has failed."""


class DemoFailed(Exception):
    """The demo cannot go on; the text says why."""


# --- running crossdock --------------------------------------------------------------------------


def settle_in(folder: Path, url: str) -> None:
    """Make this process, and with it the workers and commands it starts, see one broker and one folder only."""
    for name in [name for name in os.environ if name.startswith("CROSSDOCK_")]:
        del os.environ[name]
    os.environ["CROSSDOCK_URL"] = url or f"sqlite:///{quote(str(folder / 'shop.db'))}"
    os.environ["SHOP_DIR"] = str(folder)
    os.chdir(folder)


def crossdock(*arguments: str) -> tuple[str, str]:
    """Run a command, and return what it prints: the data, and the notes beside it."""
    ended = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=PATIENCE, check=False)
    if ended.returncode:
        raise DemoFailed(f"`crossdock {shlex.join(arguments)}` ended with {ended.returncode}: {ended.stderr.strip()}")
    return ended.stdout, ended.stderr


def ask(*arguments: str) -> Any:
    """Run a command with --json, and return what it answers."""
    return json.loads(crossdock(*arguments, "--json")[0])


def show(*arguments: str) -> None:
    """Run a command and print it with what it prints, as one would see it in a terminal."""
    print(f"\n    $ crossdock {shlex.join(arguments)}")
    width = shutil.get_terminal_size((150, 24)).columns - 5
    for line in "".join(crossdock(*arguments)).splitlines():
        print(f"    {line if len(line) <= width else line[: width - 3] + '...'}")


class Workers:
    """The worker processes of this run. None of them outlives it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started = 0
        self.running: list[subprocess.Popen[bytes]] = []

    def start(self) -> int:
        """Start one, and return its process id."""
        self._started += 1
        arguments = ["worker", "run", f"{SHOP / 'app.py'}:app", "--concurrency", "50"]
        with (self._folder / f"worker-{self._started}.log").open("wb") as log:
            # A group of its own: Ctrl-C reaches the demo alone, and the demo ends its workers.
            worker = subprocess.Popen([*COMMAND, *arguments], stdout=log, stderr=log, process_group=0)
        self.running.append(worker)
        return worker.pid

    def kill_one(self) -> int:
        """Kill the first one with SIGKILL, as a crash would, and return its process id."""
        worker = self.running.pop(0)
        worker.kill()
        worker.wait()
        return worker.pid

    def look(self) -> None:
        """Raise if one of them has ended."""
        for worker in self.running:
            if worker.poll() is not None:
                raise DemoFailed(f"worker {worker.pid} ended by itself with {worker.returncode}; see {self._folder}/worker-*.log")

    def stop(self) -> list[int]:
        """Ask all to finish what they hold and end; return their exit codes."""
        for worker in self.running:
            worker.send_signal(signal.SIGTERM)
        try:
            return [worker.wait(timeout=PATIENCE / 4) for worker in self.running]
        finally:
            self.running = [worker for worker in self.running if worker.poll() is None]

    def kill_all(self) -> None:
        """Leave none behind."""
        while self.running:
            self.kill_one()


# --- progress -----------------------------------------------------------------------------------


class Progress:
    """How far the orders are, read from the folder: a line that changes on a terminal, a line now and then elsewhere."""

    def __init__(self, folder: Path, orders: int) -> None:
        self._folder = folder
        self._orders = orders
        self._began = time.monotonic()
        self._next_line = 0.0
        self._terminal = sys.stdout.isatty()
        self.counts: dict[str, int] = {}

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._began

    def update(self) -> None:
        """Count the documents, and print."""
        self.counts = {
            word: sum(len(names) for _, _, names in os.walk(self._folder / place))
            for word, place in (
                ("paid", "payments"),
                ("confirmed", "outbox"),
                ("noted for the warehouse", "warehouse"),
                ("invoiced", "invoices"),
            )
        }
        if self._terminal or self.seconds >= self._next_line:
            self._next_line = self.seconds + 2.0
            self._print()

    def close(self) -> None:
        """Print the last state for good."""
        self._print()
        if self._terminal:
            print()

    def _print(self) -> None:
        parts = ", ".join(f"{count:,} {word}" for word, count in self.counts.items())
        line = f"  {self.seconds:5.1f} s  of {self._orders:,} orders: {parts}"
        print(f"\r{line}\x1b[K" if self._terminal else line, end="" if self._terminal else "\n", flush=True)


def wait(progress: Progress, workers: Workers, until: Callable[[], bool]) -> None:
    """Show progress until something is so."""
    deadline = time.monotonic() + PATIENCE
    while True:
        progress.update()
        if until():
            break
        workers.look()
        if time.monotonic() > deadline:
            raise DemoFailed(f"not finished after {PATIENCE:.0f} s")
        time.sleep(0.2)
    progress.close()


def nothing_to_do(progress: Progress) -> Callable[[], bool]:
    """Make a test that asks the broker, once a second while the documents have stopped growing, whether any task is left."""
    last: dict[str, int] = {}
    asked = 0.0

    def quiet() -> bool:
        nonlocal last, asked
        grown, last = progress.counts != last, progress.counts
        if grown or progress.seconds < asked + 1.0:
            return False
        asked = progress.seconds
        return not any(queue["ready"] or queue["scheduled"] or queue["leased"] for queue in ask("queue", "list"))

    return quiet


# --- the story ----------------------------------------------------------------------------------


async def enqueue(rows: Sequence[Row]) -> None:
    """Enqueue the orders, all fields as the texts they are: it is the worker that judges them."""
    from app import app, receive_order  # only now, as it reads $SHOP_DIR

    async with app:
        await app.enqueue_many(receive_order.options(id=row.fields["order_id"]).message(**row.fields) for row in rows)


def corrections(orders: set[str]) -> list[dict[str, str]]:
    """What customer service found out about these orders."""
    with (SHOP / "corrections.csv").open(encoding="utf-8", newline="") as file:
        return [each for each in csv.DictReader(file) if each["order_id"] in orders]


def repair(orders: set[str]) -> None:
    """Correct what can be corrected, and replay it."""
    corrected = corrections(orders)
    print("\nWhat is wrong with one of them:")
    show("dlq", "show", corrected[0]["order_id"])
    print("\nCustomer service knows better:")
    for each in corrected:
        # In JSON's quotes, or an amount would be taken for a number: all fields of a row are texts.
        show("dlq", "replay", each["order_id"], "--set", f"{each['column']}={json.dumps(each['value'])}")
    print("\nBluebird Bank answers again, so its payments are replayed:")
    Path("bluebird-is-back").touch()
    show("dlq", "replay", "--task", "shop.take_payment", "--reason", "attempts_exhausted")


def run(folder: Path, limit: int, workers: Workers) -> None:
    """All of it, up to the facts for the check in `run.json`."""
    from crossdock.spi import redact

    print(f"Reading {SHOP / 'orders.csv'} ...")
    everything = list(islice(read_rows(SHOP / "orders.csv"), limit))
    rows = [row for row in everything if isinstance(row, Row)]
    refused = [row for row in everything if isinstance(row, Refused)]
    print(f"{len(everything):,} orders. {len(refused)} rows make no order:")
    for row in refused[:5]:
        print(f"  row {row.number}: {row.why}")
    if len(refused) > 5:
        print(f"  ... and {len(refused) - 5} more")

    ask("queue", "list")  # a broker that cannot be reached, or cannot tell what is left to do, is refused before it has any task
    progress = Progress(folder, len(everything))
    pids = [workers.start(), workers.start()]
    print(f"\nWorkers {pids[0]} and {pids[1]} are started on {redact(os.environ['CROSSDOCK_URL'])}.")
    asyncio.run(enqueue(rows))
    print(f"{len(rows):,} orders are enqueued after {progress.seconds:.1f} s.")

    wait(progress, workers, lambda: progress.counts["paid"] >= len(rows) // 2)
    killed = workers.kill_one()
    print(f"\nWorker {killed} is killed with SIGKILL, in the middle of its work.")
    print(f"Worker {workers.start()} takes its place. What the dead one held is delivered again within seconds.")
    wait(progress, workers, nothing_to_do(progress))

    print(f"\nNothing is left to do. {len(ask('dlq', 'list', '--limit', '0')):,} tasks are dead letters, the first of them:")
    show("dlq", "list", "--limit", "12")
    repair({row.fields["order_id"] for row in rows})
    wait(progress, workers, nothing_to_do(progress))

    codes = workers.stop()
    if any(codes):
        raise DemoFailed(f"the workers ended with {codes} after SIGTERM, not with 0")
    print("\nBoth workers have ended with exit code 0 after SIGTERM.")
    facts = {
        "rows": len(everything),
        "killed": [killed],
        "refused": [{"row": row.number, "why": row.why} for row in refused],
        "dead": [{"order_id": each["id"].partition("_")[0], "text": each["text"]} for each in ask("dlq", "list", "--limit", "0")],
        "seconds": progress.seconds,
    }
    (folder / "run.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")


def new_folder(keep: Path | None) -> Path:
    """Make the folder to work in."""
    if keep is None:
        return Path(tempfile.mkdtemp(prefix="crossdock-shop-"))
    keep.mkdir(parents=True, exist_ok=True)
    if any(keep.iterdir()):
        raise DemoFailed(f"{keep} is not empty: name a new folder")
    return keep.resolve()


def demo(limit: int, keep: Path | None, url: str) -> None:
    """Run and check. The folder stays where that was asked for, and where something is wrong."""
    if importlib.util.find_spec("crossdock_cli") is None:
        raise DemoFailed("crossdock is not installed for this Python; in a checkout of it, `./run demo` sets up what is needed")
    folder = new_folder(keep)
    settle_in(folder, url)
    workers = Workers(folder)
    try:
        run(folder, limit, workers)
        print("\nChecking every order against the files in the folder:")
        if check.main(folder):
            raise DemoFailed("the sums are not right")
    except Exception:
        keep = folder
        raise
    finally:
        workers.kill_all()
        if keep:
            print(f"\nEverything is in {folder}.")
        else:
            os.chdir(SHOP)
            shutil.rmtree(folder)


def read_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Run the shop, kill a worker, and check every order.")
    parser.add_argument(
        "--orders", type=int, metavar="N", default=5000, help="take the first N orders, 100 to 5,000 (default: all)"
    )
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="work in this new folder and leave everything there")
    parser.add_argument("--url", default="", help="broker to use, an empty one (default: a SQLite file in the folder)")
    arguments = parser.parse_args()
    if not 100 <= arguments.orders <= 5000:
        parser.error("--orders must be from 100 to 5000")
    return arguments


def main() -> int:
    """Run the demo and return its exit code."""
    arguments = read_arguments()
    stdout: Any = sys.stdout
    stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        demo(arguments.orders, arguments.keep, arguments.url)
    except (DemoFailed, subprocess.TimeoutExpired) as error:
        print(f"\nThe demo failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped; no worker is left.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
