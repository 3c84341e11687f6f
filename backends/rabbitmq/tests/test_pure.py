"""What is decided without a server: URLs, delays, windows, frames, properties, cursors."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossdock.errors import ConfigurationError
from crossdock.spi import Cursor, DeadLetter, Lane, Message, Priority, Reason
from crossdock_rabbitmq import address, cursor, delays, names, record, topology, windows, wire

# --- URLs --------------------------------------------------------------------------------------------


def test_a_url_is_read_whole() -> None:
    """User, password, hosts, virtual host and options come out as they were meant."""
    found = address.parse(
        "amqp://us%40er:p%2Fw@one,two:5673/my%2Fhost", {"timeout": "2", "queue_type": "classic", "heartbeat": "7"}
    )
    assert (found.user, found.password, found.vhost) == ("us@er", "p/w", "my/host")
    assert found.hosts == (("one", 5672), ("two", 5673))
    assert (found.timeout, found.queue_type, found.heartbeat) == (2.0, "classic", 7)
    assert "p/w" not in repr(found) and "p%2Fw" not in found.shown


def test_a_bare_url_has_defaults() -> None:
    """Without anything it is guest at localhost and the virtual host /."""
    found = address.parse("amqps://localhost", {})
    assert (found.user, found.vhost, found.hosts) == ("guest", "/", (("localhost", 5671),))
    assert found.tls is not None


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("amqp://host/a/b", {}),
        ("amqp://:x@:y", {}),
        ("amqp://host", {"zz-top": "1"}),
        ("amqp://host", {"timeout": "0"}),
        ("amqp://host", {"heartbeat": "0"}),
        ("amqp://host", {"queue_type": "stream"}),
        ("amqp://host", {"ssl_ca_certs": "/etc/hosts"}),
        ("amqps://host", {"ssl_ca_certs": "/not/there"}),
    ],
)
def test_what_cannot_be_meant_is_refused(url: str, options: dict[str, str]) -> None:
    """A URL that cannot be used, and every unknown option or impossible value, is a `ConfigurationError`."""
    with pytest.raises(ConfigurationError):
        address.parse(url, options)


# --- delays ------------------------------------------------------------------------------------------


@given(st.integers(1, round(delays.LONGEST * 1000)))
def test_levels_make_up_the_wait(wait_ms: int) -> None:
    """The levels of a routing key add up to the wait: at most 40 ms short of it and less than a tick beyond."""
    if not delays.ticks(wait_ms):
        assert wait_ms <= 40
        return
    key = delays.routing_key(wait_ms, names.due_key("n" * 63, "q" * 63, Priority.HIGH))
    assert len(key) <= 255
    words = key.partition(f".{delays.END}.")[0].split(".")
    found = sum(delays.ttl_ms(level) for level in range(delays.LEVELS) if delays.word(level) in words)
    assert wait_ms - 40 <= found < wait_ms - 40 + delays.TICK_MS
    assert words == sorted(words, key=lambda word: -"0123456789abcdefghijklmnopqrstu".index(word[1])), "from the longest down"


def test_a_queue_s_name_is_no_level() -> None:
    """No name of a queue or namespace can be taken for a word of the delay."""
    assert all(not names.is_name(delays.word(level)) for level in range(delays.LEVELS))
    assert not names.is_name(delays.END)


def test_levels_only_lead_down() -> None:
    """Every way in the delay leads to a lower level or out, so no message goes in a circle."""
    for definition in topology.of_delay("quorum"):
        if isinstance(definition, topology.Binding) and definition.exchange.startswith("cd.delay.x"):
            assert int(definition.queue.removeprefix("cd.delay.")) < int(definition.exchange.removeprefix("cd.delay.x"))


def test_dead_letters_come_first() -> None:
    """A queue of dead letters is declared before the queues that refer to it, each of them with a limit that is never reached."""
    queues = [each for each in topology.of_queue("n", "q", "quorum", (3, 10)) if isinstance(each, topology.Queue)]
    assert queues[0].name == "cd.n.dead.q"
    assert {queue.arguments["x-delivery-limit"] for queue in queues} == {1_000_000_000}
    assert {queue.arguments.get("x-dead-letter-routing-key") for queue in queues[1:]} == {"cd.n.dead.q"}


# --- windows -----------------------------------------------------------------------------------------


def test_first_windows_are_quotas_and_a_share_of_the_rest() -> None:
    """Lanes begin with their quotas; what no quota names is divided, and each has one at least."""
    lanes = [Lane("q", Priority.HIGH, 6), Lane("q", Priority.LOW, 1)]
    assert windows.first(lanes, 10) == [6, 1]
    assert windows.first([Lane("q", Priority.HIGH, 0), Lane("q", Priority.LOW, 0)], 10) == [5, 5]
    assert windows.first(lanes * 10, 1) == [1] * 20


def test_windows_have_an_end_and_a_beginning() -> None:
    """No window is 0, which quorum queues take for 2,000, and none is larger than they take."""
    assert windows.first([Lane("q", Priority.HIGH, 10**6), Lane("q", Priority.LOW, 0)], 10**6) == [windows.MOST, 1]
    assert windows.faster(1500, 1_000_000, 10, 1e9) <= windows.MOST and windows.grown(10**6, 10**6, 1e9) == windows.MOST


def test_who_is_quick_keeps_what_was_handed_over() -> None:
    """Where receives follow each other quickly, what is in the buffer waits longer for its turn; one pause among them changes nothing."""
    quick = [number * 0.005 for number in range(windows.BRISK_AFTER)]
    assert windows.stale_after(quick, 0.01) == windows.STALE_IF_BRISK
    assert windows.stale_after([0.0, *(1.0 + each for each in quick[1:])], 0.01) == windows.STALE_IF_BRISK
    assert windows.stale_after(quick, 1.0) == windows.stale_after(quick[:5], 0.0) == windows.STALE
    assert windows.stale_after([number * 0.1 for number in range(windows.BRISK_AFTER)], 0.0) == windows.STALE


def test_a_window_grows_by_what_is_needed_where_nothing_ends() -> None:
    """Where tasks take long, exactly what is needed now is asked for; where they are quick, also what takes their place."""
    assert windows.grown(90, 10, 0.0) == 10
    assert windows.grown(90, 10, 10_000.0) == 100
    assert windows.grown(5000, 5000, 10_000.0) == windows.MOST


# --- properties and frames ---------------------------------------------------------------------------

_texts = st.text(max_size=60)


@given(
    st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True),
    st.sampled_from(list(Priority)),
    st.integers(0, (1 << 63) - 1),
    st.integers(0, 1 << 40),
)
def test_messages_survive_their_properties(id: str, priority: Priority, generation: int, losses: int) -> None:
    """What is written into the properties of a message is read from them."""
    message = Message(id, "q", priority, b"body", generation=generation)
    header = b"\0\x3c\0\0" + struct.pack(">Q", 4) + record.properties(message, losses)
    assert record.message(header, b"body", "q", priority) == (message, losses)


@given(_texts, _texts, st.binary(max_size=200), st.sampled_from(list(Reason)), st.integers(0, 1 << 50))
def test_letters_survive_their_properties(task: str, error: str, story: bytes, reason: Reason, died_ms: int) -> None:
    """What is written into the properties of a dead letter is read from them."""
    message = Message("m", "q", Priority.LOW, b"", generation=3)
    letter = DeadLetter(message, reason, died_ms, task, error, "f" * 64, story)
    header = b"\0\x3c\0\0" + struct.pack(">Q", 0) + record.letter_properties(letter)
    assert record.letter(header, b"", "q") == letter


def test_what_the_server_buried_is_recognised() -> None:
    """A message that the server dead-lettered by itself is a letter that says so."""
    death = wire.table({"queue": "cd.n.q.mail.p6", "reason": "expired"})[4:] + b"\x04timeT" + struct.pack(">Q", 1_700_000_000)
    deaths = b"F" + struct.pack(">I", len(death)) + death
    fields = b"\x07x-deathA" + struct.pack(">I", len(deaths)) + deaths
    fields += wire.table({"x-first-death-reason": "expired"})[4:]
    header = b"\0\x3c\0\0" + struct.pack(">Q", 0) + struct.pack(">H", 0x2080) + struct.pack(">I", len(fields)) + fields + b"\x01m"
    letter = record.letter(header, b"", "mail")
    assert (letter.reason, letter.died_ms, letter.message.priority) == (Reason.EXPIRED, 1_700_000_000_000, Priority.HIGH)


@given(st.binary(max_size=80))
def test_no_properties_break_the_reader(raw: bytes) -> None:
    """Whatever another program writes, a message comes of it."""
    record.message(b"\0\x3c\0\0" + bytes(8) + raw, b"", "q", Priority.LOW)
    record.letter(b"\0\x3c\0\0" + bytes(8) + raw, b"", "q")


def test_large_bodies_are_cut_into_frames() -> None:
    """A body is divided into frames of the size that was agreed, and an empty one has none."""
    frames = wire.content(5, b"\0\0", b"x" * 25, 10)
    sizes: list[int] = []
    at = 0
    while at < len(frames):
        kind, channel, size = struct.unpack_from(">BHI", frames, at)
        assert (channel, frames[at + 7 + size]) == (5, 0xCE)
        sizes += [size] if kind == wire.BODY else []
        at += size + 8
    assert sizes == [10, 10, 5]
    assert wire.content(5, b"\0\0", b"", 10).count(b"\xce") == 1


# --- cursors -----------------------------------------------------------------------------------------


def test_cursors_are_of_one_queue() -> None:
    """A cursor leads back to its place, and only in its own listing."""
    written = cursor.write("q", (12, "ä"))
    assert cursor.read(written, "q") == (12, "ä")
    for text, queue in ((written, "other"), (Cursor(""), "q"), (Cursor("zz"), "q"), (Cursor("5b5d"), "q")):
        with pytest.raises(ConfigurationError):
            cursor.read(text, queue)
