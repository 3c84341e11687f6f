"""Message ids."""

from __future__ import annotations

import os
import random
import re
import uuid

from crossdock import names
from crossdock.clock import SystemClock, VirtualClock
from crossdock.ids import IdSource

FORM = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


def test_an_id_is_a_uuid_of_version_7() -> None:
    """The form, version and variant of RFC 9562, and its first 48 bits are the milliseconds."""
    clock = VirtualClock(1_767_225_600_123)
    id = IdSource(clock)()
    assert FORM.fullmatch(id)
    read = uuid.UUID(id)
    assert read.variant == uuid.RFC_4122
    assert read.version == 7
    assert read.int >> 80 == 1_767_225_600_123
    assert names.check_id(id) == id


def test_ids_of_later_milliseconds_sort_later() -> None:
    """Their text sorts by time, over all powers of two of it."""
    clock = VirtualClock(0)
    new_id = IdSource(clock)
    ids: list[str] = []
    for step in range(1, 40):
        ids.append(new_id())
        clock.advance(2**step / 1000)
    assert ids == sorted(ids)


def test_ids_of_one_millisecond_differ() -> None:
    """74 random bits keep them apart."""
    new_id = IdSource(VirtualClock())
    assert len({new_id() for _ in range(20_000)}) == 20_000


def test_every_random_bit_is_used() -> None:
    """All bits but time, version and variant vary."""
    new_id = IdSource(VirtualClock(0))
    seen_one = seen_zero = 0
    for _ in range(500):
        bits = uuid.UUID(new_id()).int
        seen_one |= bits
        seen_zero |= ~bits
    fixed = ~(seen_one & seen_zero) & (2**128 - 1)
    assert fixed == (0xFFFF_FFFF_FFFF << 80) | (0xF << 76) | (0b11 << 62)


def test_a_given_source_of_randomness_repeats() -> None:
    """Same seed and time, same ids: simulations can be replayed."""
    first, second = (IdSource(VirtualClock(), random.Random(7)) for _ in range(2))
    assert [first() for _ in range(5)] == [second() for _ in range(5)]


def test_a_forked_child_draws_other_ids() -> None:
    """Parent and child that share a source make no id twice."""
    new_id = IdSource(SystemClock())
    before = new_id()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, "\n".join(new_id() for _ in range(100)).encode())
        finally:
            os._exit(0)
    os.close(writing)
    ours = [new_id() for _ in range(100)]
    with os.fdopen(reading) as stream:
        theirs = stream.read().split("\n")
    assert os.waitpid(child, 0)[1] == 0
    assert len(theirs) == 100
    # Without the time, which differs anyway if the two run at different moments.
    random_parts = [id[14:] for id in (before, *ours, *theirs)]
    assert len(set(random_parts)) == 201
