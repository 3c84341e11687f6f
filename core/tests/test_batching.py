"""Group commit: at once when idle, together when busy, never too much at a time."""

from __future__ import annotations

import asyncio

import pytest

from crossdock.batching import MAX_BYTES, MAX_ITEMS, Batcher

pytestmark = pytest.mark.asyncio


class Sink:
    """Takes batches, one at a time, each when `let_one_through` says so."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.busy = 0
        self._gate = asyncio.Semaphore(0)
        self._begun = asyncio.Semaphore(0)

    async def flush(self, batch: list[int]) -> None:
        self.batches.append(batch)
        self.busy += 1
        assert self.busy == 1, "two flushes at once"
        self._begun.release()
        await self._gate.acquire()
        self.busy -= 1

    async def begun(self) -> None:
        """Return when a flush has begun that was not waited for yet."""
        await self._begun.acquire()

    def let_one_through(self, count: int = 1) -> None:
        """Let flushes end."""
        for _ in range(count):
            self._gate.release()


async def test_an_idle_batcher_flushes_at_once() -> None:
    """The first item goes out in the next turn of the loop: there is no timer."""
    sink = Sink()
    batcher = Batcher(sink.flush, lambda _: 1)
    batcher.add(1)
    await asyncio.sleep(0)
    assert sink.batches == [[1]]
    sink.let_one_through()
    await batcher.drained()
    batcher.add(2)
    await asyncio.sleep(0)
    assert sink.batches == [[1], [2]]
    sink.let_one_through()
    await batcher.drained()


async def test_what_comes_during_a_flush_is_collected() -> None:
    """One batch is under way at a time; what comes meanwhile makes the next, in order."""
    sink = Sink()
    batcher = Batcher(sink.flush, lambda _: 1)
    batcher.add(0)
    await sink.begun()
    batcher.extend(list(range(1, 50)))
    await asyncio.sleep(0)
    batcher.add(50)
    assert sink.batches == [[0]]
    sink.let_one_through()
    await sink.begun()
    assert sink.batches == [[0], list(range(1, 51))]
    sink.let_one_through()
    await batcher.drained()


async def test_who_flushes_his_own_item_keeps_the_rule() -> None:
    """What comes meanwhile waits, is drained too, and goes together when he is done."""
    sink = Sink()
    batcher = Batcher(sink.flush, lambda _: 1)
    with batcher.by_owner():
        assert not batcher.is_quiet
        batcher.extend([1, 2])
        await asyncio.sleep(0)
        assert sink.batches == []
        draining = asyncio.create_task(batcher.drained())
        await asyncio.sleep(0)
    await sink.begun()
    assert sink.batches == [[1, 2]]
    assert not draining.done()
    sink.let_one_through()
    await draining


async def test_it_is_quiet_while_there_seems_to_be_one_sender() -> None:
    """At first, and after a batch of one; not while something is under way, nor after a batch of several."""
    sink = Sink()
    batcher = Batcher(sink.flush, lambda _: 1)
    assert batcher.is_quiet
    for items, quiet_after in (([1, 2], False), ([3], True)):
        batcher.extend(items)
        assert not batcher.is_quiet
        sink.let_one_through()
        await batcher.drained()
        assert batcher.is_quiet is quiet_after


async def test_a_batch_has_at_most_a_thousand_items() -> None:
    """More are cut, in order."""
    sink = Sink()
    batcher = Batcher(sink.flush, lambda _: 1)
    sink.let_one_through(10)
    batcher.extend(list(range(2 * MAX_ITEMS + 1)))
    await batcher.drained()
    assert MAX_ITEMS == 1000
    assert [len(batch) for batch in sink.batches] == [1000, 1000, 1]
    assert [item for batch in sink.batches for item in batch] == list(range(2 * MAX_ITEMS + 1))


async def test_a_batch_ends_with_the_item_that_reaches_a_mebibyte() -> None:
    """Many large items do not make one huge request; a single larger one still goes."""
    sink = Sink()
    batcher: Batcher[int] = Batcher(sink.flush, lambda item: item)
    sink.let_one_through(10)
    assert MAX_BYTES == 1024 * 1024
    batcher.extend([MAX_BYTES // 2, MAX_BYTES // 2 - 1, 1, 5, MAX_BYTES, 7, 10 * MAX_BYTES, 3])
    await batcher.drained()
    assert sink.batches == [[MAX_BYTES // 2, MAX_BYTES // 2 - 1, 1], [5, MAX_BYTES], [7, 10 * MAX_BYTES], [3]]


async def test_drained_waits_for_everything() -> None:
    """It returns when nothing waits and nothing is under way, what was added meanwhile included; at once when idle."""
    sink = Sink()
    batcher = Batcher(sink.flush, lambda _: 1)
    await batcher.drained()
    batcher.add(1)
    draining = asyncio.create_task(batcher.drained())
    await sink.begun()
    batcher.add(2)
    sink.let_one_through()
    await sink.begun()
    assert not draining.done()
    sink.let_one_through()
    await draining
    assert sink.batches == [[1], [2]]
    assert sink.busy == 0
