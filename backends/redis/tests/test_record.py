"""Stored values, names of keys and cursors: what is written is what is read. Nobody is connected to."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.crc import key_slot

from crossdock.errors import ConfigurationError
from crossdock.spi import LEVELS, Cursor, DeadLetter, Message, Reason, State
from crossdock_redis import cursor, keys, record
from crossdock_redis.limits import LONGEST_MS, MAX_BODY, objection

NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}", fullmatch=True)
IDS = st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True)
INSTANTS = st.integers(1, 2**52)
MESSAGES = st.builds(
    Message,
    IDS,
    NAMES,
    st.sampled_from(LEVELS),
    st.binary(max_size=200),
    eta_ms=st.one_of(st.just(0), INSTANTS),
    generation=st.integers(0, record.MAX_GENERATION),
)
LETTERS = st.builds(
    DeadLetter, MESSAGES, st.sampled_from(Reason), INSTANTS, st.text(max_size=50), st.text(), st.text(), st.binary(max_size=200)
)


@given(MESSAGES, INSTANTS)
def test_a_message_is_read_as_it_was_written(message: Message, now_ms: int) -> None:
    """Every field; a message without a due time has none, though the instant of storing is kept in its place."""
    value = record.pack(message, message.eta_ms, now_ms)
    assert record.unpack(message.id, message.queue, value) == (message, 0)
    assert value[:1] == str(int(message.priority)).encode()
    assert value[8:16] == (message.eta_ms or now_ms).to_bytes(8, "big")
    assert value[16:] == message.body


@given(LETTERS, st.integers(1, 100_000), INSTANTS)
def test_a_letter_is_read_as_it_was_written(letter: DeadLetter, count: int, now_ms: int) -> None:
    """Every field of the letter and its message, and how often that was delivered, up to 65,535."""
    value = record.pack_letter(letter, count, now_ms)
    assert record.unpack_letter(letter.message.id, letter.message.queue, value) == (letter, min(count, record.MAX_LOST))


@given(NAMES, NAMES, st.sampled_from(LEVELS))
def test_all_keys_of_a_queue_are_in_one_slot(namespace: str, queue: str, level: int) -> None:
    """The slot is what the server makes of each name, and the queue can be read off a token's."""
    prefix = keys.prefix(namespace, queue)
    assert {key_slot(key.encode()) for key in keys.fixed(prefix)} == {keys.slot(prefix)}
    assert key_slot(keys.registry(namespace).encode()) == keys.slot(keys.registry(namespace))
    assert keys.queue_and_level(keys.token(prefix, level)) == (queue, level)
    assert len(set(keys.fixed(prefix))) == len(keys.fixed(prefix))


@given(NAMES, NAMES, NAMES, NAMES)
def test_two_queues_share_no_key(namespace: str, queue: str, other_namespace: str, other_queue: str) -> None:
    """Whatever their names are, and whatever namespaces they are in."""
    mine, others = keys.fixed(keys.prefix(namespace, queue)), keys.fixed(keys.prefix(other_namespace, other_queue))
    if (namespace, queue) != (other_namespace, other_queue):
        assert not set(mine) & set(others)
        assert not any(key.startswith(keys.prefix(other_namespace, other_queue)) for key in mine)


@given(NAMES, st.sampled_from(list(State)))
def test_a_cursor_leads_back_to_its_place(queue: str, state: State) -> None:
    """In its own listing only, and it is fit for a URL."""
    place = ("9", "17") if state is State.READY else ("1700000000000", "some-id")
    written = cursor.write(queue, state, place)
    assert cursor.read(written, queue, state) == place
    assert written.isalnum()
    for wrong_queue, wrong_state in ((queue + "x", state), (queue, State.DEAD if state is not State.DEAD else State.LEASED)):
        with pytest.raises(ConfigurationError, match="is no cursor of a listing"):
            cursor.read(written, wrong_queue, wrong_state)


@pytest.mark.parametrize("text", ["", "x", "00", "5b5d", "5b22712229", "é", cursor.write("q", State.READY, ("7", "1"))])
def test_text_that_is_no_cursor(text: str) -> None:
    """One sentence."""
    with pytest.raises(ConfigurationError, match="is no cursor of a listing"):
        cursor.read(Cursor(text), "q", State.READY)


def test_what_cannot_be_stored() -> None:
    """The largest that can is not objected to; what is beyond is, and told why."""
    good = Message("a", "q", LEVELS[0], b"", delay_ms=LONGEST_MS, generation=record.MAX_GENERATION)
    assert objection(good) is None
    for wrong, words in (
        (Message("a", "q", LEVELS[0], bytes(MAX_BODY + 1)), "16777216"),
        (Message("a", "q", 5, b""), "is no level"),  # type: ignore[arg-type]
        (Message("a", "q", LEVELS[0], b"", generation=record.MAX_GENERATION + 1), "generation"),
        (Message("a", "q", LEVELS[0], b"", delay_ms=LONGEST_MS + 1), "thousand years"),
        (Message("ä", "q", LEVELS[0], b""), "breaks the rule"),
    ):
        assert words in str(objection(wrong))
