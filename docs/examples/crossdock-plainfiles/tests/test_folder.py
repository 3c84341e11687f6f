"""What is special to a folder: whose it is, who may read it, and what happens if somebody else touches it."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from crossdock_plainfiles.broker import PlainFilesBroker

from crossdock.clock import SystemClock
from crossdock.errors import BrokerUnavailable, ConfigurationError, CrossdockError, InvalidName
from crossdock.spi import (
    LEVELS,
    BrokerEvent,
    BrokerSettings,
    Connected,
    Disconnected,
    Lane,
    Message,
    Priority,
    QueueSpec,
    State,
    StateLost,
)

LANES = [Lane("q", level, 0) for level in LEVELS]


def message(id: str) -> Message:
    """Make a message."""
    return Message(id, "q", Priority.NORMAL, b"body")


def use(folder: Path, story: Callable[[PlainFilesBroker], Awaitable[None]]) -> list[BrokerEvent]:
    """Open a Broker on a folder, do something with it, and return what it reported."""
    events: list[BrokerEvent] = []

    async def told() -> None:
        url = f"plainfiles:///{folder}"
        broker = PlainFilesBroker(BrokerSettings(url=url, clock=SystemClock(), report=events.append))
        await broker.open()
        try:
            await story(broker)
        finally:
            await broker.close()

    asyncio.run(told())
    return events


async def nothing(broker: PlainFilesBroker) -> None:
    """Do nothing."""


def test_foreign_folders_are_refused(tmp_path: Path) -> None:
    """A folder with other things in it, a file, and a folder in a folder that is not there are left as they are."""
    (tmp_path / "thesis.txt").write_text("all of it")
    for folder in (tmp_path, tmp_path / "thesis.txt", tmp_path / "no" / "such"):
        with pytest.raises(ConfigurationError, match="cannot be used"):
            use(folder, nothing)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("url", ["plainfiles://", "plainfiles:///", "plainfiles://host/folder", "plainfiles:///folder#part"])
def test_urls_that_name_no_folder(url: str) -> None:
    """They are refused before anything is touched."""
    with pytest.raises(ConfigurationError, match="names no folder"):
        PlainFilesBroker(BrokerSettings(url=url, clock=SystemClock()))


def test_names_that_lead_elsewhere(tmp_path: Path) -> None:
    """No queue, namespace or id leads out of its directory."""

    async def lead_astray(broker: PlainFilesBroker) -> None:
        with pytest.raises(InvalidName):
            await broker.declare([QueueSpec("../../elsewhere")])
        (refusal,) = await broker.enqueue([message("../../../elsewhere")])
        assert isinstance(refusal.error, CrossdockError)

    use(tmp_path / "store", lead_astray)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    with pytest.raises(InvalidName):
        PlainFilesBroker(BrokerSettings(url=f"plainfiles:///{tmp_path}/store", namespace="..", clock=SystemClock()))


def test_nobody_else_may_read(tmp_path: Path) -> None:
    """Files have mode 0600 and directories 0700."""

    async def fill(broker: PlainFilesBroker) -> None:
        await broker.declare([QueueSpec("q", lease=5)])
        await broker.enqueue([message("a"), message("b")])
        await broker.receive(LANES, 1, 0)

    use(tmp_path / "store", fill)
    modes = {(path.is_dir(), path.stat().st_mode & 0o777) for path in [tmp_path / "store", *(tmp_path / "store").rglob("*")]}
    assert modes == {(True, 0o700), (False, 0o600)}


def test_a_folder_that_goes_away(tmp_path: Path) -> None:
    """It is reported once, nothing is made in its place, and when it is back all goes on."""
    store = tmp_path / "store"

    async def remove_and_return(broker: PlainFilesBroker) -> None:
        await broker.enqueue([message("a")])
        store.rename(tmp_path / "aside")
        for _ in range(2):
            with pytest.raises(BrokerUnavailable, match="removed"):
                await broker.enqueue([message("b")])
        assert not store.exists()
        (tmp_path / "aside").rename(store)
        assert [delivery.message.id for delivery in await broker.receive(LANES, 9, 0)] == ["a"]

    assert list(map(type, use(store, remove_and_return))) == [Disconnected, Connected]


def test_a_queue_that_goes_away(tmp_path: Path) -> None:
    """It is declared again as it was, and that is reported once."""

    async def remove(broker: PlainFilesBroker) -> None:
        await broker.declare([QueueSpec("q", max_ready=1)])
        shutil.rmtree(tmp_path / "default" / "q")
        assert len(await broker.enqueue([message("a"), message("b")])) == 1
        assert len(await broker.enqueue([message("c")])) == 1

    assert list(map(type, use(tmp_path, remove))) == [StateLost]


def test_a_damaged_file(tmp_path: Path) -> None:
    """It is named, nothing is taken while it is there, and once it is away the others come, counted once."""

    async def damage(broker: PlainFilesBroker) -> None:
        await broker.enqueue([message("a"), message("b")])
        (file,) = tmp_path.glob("default/q/ready/*.b.json")
        file.write_bytes(b"{")
        with pytest.raises(BrokerUnavailable, match=r"\.b\.json"):
            await broker.receive(LANES, 9, 0)
        file.unlink()
        (delivery,) = await broker.receive(LANES, 9, 0)
        assert (delivery.message.id, delivery.delivery_count) == ("a", 1)

    use(tmp_path, damage)


def test_strange_files_are_left_alone(tmp_path: Path) -> None:
    """What an editor or a backup left beside messages is no message, and stays."""

    async def leave(broker: PlainFilesBroker) -> None:
        await broker.enqueue([message("a")])
        for name in (".a.swp", "a.json~", "1.2.3.4.5.6.7.8.9.json"):
            (tmp_path / "default" / "q" / "ready" / name).write_text("?")
        assert len((await broker.peek("q", State.READY)).entries) == 1

    use(tmp_path, leave)
    assert len(list((tmp_path / "default" / "q" / "ready").iterdir())) == 4
