"""Dead letters: the story is always told, always short, and a letter can always be brought back."""

from __future__ import annotations

import json
import random
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossdock import codec, letters
from crossdock.codec import Envelope, Failure
from crossdock.errors import CodecError, InvalidArguments
from crossdock.letters import Story, read_story, revive
from crossdock.spi import MAX_STORY_BYTES, DeadLetter, Message, Priority, Reason

NOW_MS = 1_767_225_600_000
ENVELOPE = Envelope(1, "shop.pay", msgspec.Raw(b"\x80"), NOW_MS - 5000, attempt=3, replays=1)


def raised(error: BaseException) -> BaseException:
    """The error with a traceback, as if a handler had raised it."""
    try:
        raise error
    except BaseException as caught:
        return caught


def letter_of(
    error: BaseException | None,
    *,
    envelope: Envelope | None = ENVELOPE,
    reason: Reason = Reason.ATTEMPTS_EXHAUSTED,
    worker: str = "w-1",
    **rest: Any,
) -> DeadLetter:
    """The letter of a message that died of an error."""
    message = Message("m-1", "money", Priority.HIGH, codec.encode(ENVELOPE), generation=4)
    return letters.write(message, envelope, reason, error=error, now_ms=NOW_MS, worker=worker, delivery_count=2, **rest)


# --- the story ------------------------------------------------------------------------------------


def test_a_letter_tells_the_story() -> None:
    """Who died of what, where, when, at which attempt, with everything before."""
    history = [Failure(1, 1, "ValueError", "first", "w-0"), Failure(2, 2, "ValueError", "second", "w-1")]
    envelope = msgspec.structs.replace(ENVELOPE, failures=history)
    letter = letter_of(raised(OSError("disk full")), envelope=envelope, failed=True)
    story = read_story(letter)
    assert (letter.reason, letter.died_ms, letter.task, letter.error_type) == (
        Reason.ATTEMPTS_EXHAUSTED,
        NOW_MS,
        "shop.pay",
        "OSError",
    )
    assert letter.message.id == "m-1"
    assert len(letter.fingerprint) == 12
    assert story.text == "disk full"
    assert story.traceback.startswith("Traceback (most recent call last):\n")
    assert story.traceback.endswith("OSError: disk full\n")
    assert (story.attempt, story.delivery_count, story.worker, story.origin) == (3, 2, "w-1", "money")
    assert (story.enqueued_ms, story.replays) == (NOW_MS - 5000, 1)
    assert story.attempts == [*history, Failure(3, NOW_MS, "OSError", "disk full", "w-1")]


def test_a_letter_without_an_error_tells_its_reason() -> None:
    """A given text, else the reason's own word; no failed attempt is invented."""
    expired = letter_of(None, reason=Reason.EXPIRED, text="received 1.5 s after it had expired")
    assert read_story(expired).text == "received 1.5 s after it had expired"
    assert read_story(letter_of(None, reason=Reason.POISON)).text == "poison"
    assert (expired.error_type, expired.fingerprint, read_story(expired).traceback, read_story(expired).attempts) == (
        "",
        "",
        "",
        [],
    )


def test_a_letter_of_bytes_that_nobody_could_read() -> None:
    """The body stays as it is; task and fingerprint say what is known."""
    letter = letter_of(raised(CodecError("no envelope")), envelope=None, reason=Reason.UNDECODABLE)
    assert (letter.task, letter.error_type) == ("", "crossdock.errors.CodecError")
    assert read_story(letter).text == "no envelope"


def test_a_story_written_by_somebody_else_is_read_as_empty() -> None:
    """A letter from another program is no error."""
    letter = msgspec.structs.replace(letter_of(None), story=b"\xc1 not ours")
    assert read_story(letter) == Story()
    assert read_story(msgspec.structs.replace(letter, story=b"")) == Story()


def recurse() -> NoReturn:
    recurse()


def chain(length: int) -> BaseException:
    error: BaseException = ValueError("the first")
    for number in range(length):
        following = RuntimeError(f"number {number} " + "x" * 500)
        following.__cause__ = raised(error)
        error = following
    return raised(error)


def deep() -> BaseException:
    try:
        recurse()
    except RecursionError as error:
        return error


HUGE: dict[str, Callable[[], BaseException]] = {
    "text": lambda: raised(ValueError("x" * 2_000_000)),
    "text of four bytes a character": lambda: raised(ValueError("💥" * 500_000)),
    "many lines": lambda: raised(ValueError("\n" * 500_000)),
    "recursion": deep,
    "chain": lambda: chain(60),
    "group": lambda: raised(ExceptionGroup("many", [raised(ValueError("💥" * 1000)) for _ in range(200)])),
    "nested groups": lambda: raised(
        BaseExceptionGroup("a", [ExceptionGroup("b", [chain(5), ValueError("💥")]), KeyboardInterrupt()])
    ),
    "notes": lambda: with_notes(raised(ValueError("x")), ["💥" * 10_000] * 10),
    "class name": lambda: raised(type("E" * 100_000, (Exception,), {})("x")),
    "syntax error": lambda: raised(SyntaxError("x" * 100_000, ("💥" * 10_000, 1, 1, "💥" * 10_000))),
}


def with_notes(error: BaseException, notes: list[str]) -> BaseException:
    for note in notes:
        error.add_note(note)
    return error


@pytest.mark.parametrize("history", ["none", "ours", "foreign"])
@pytest.mark.parametrize("make", HUGE.values(), ids=HUGE.keys())
def test_a_story_always_fits(make: Callable[[], BaseException], history: str) -> None:
    """At most 16 KiB, whatever the error, and whatever history another program put into the envelope; the text is always there."""
    ours = Failure(1, 1, "E" * 230, "💥" * 230, "w" * 100)
    foreign = Failure(1, 1, "E" * 100_000, "💥" * 100_000, "w" * 100_000)
    failures = {"none": [], "ours": [ours] * 20, "foreign": [foreign] * 20}[history]
    letter = letter_of(make(), envelope=msgspec.structs.replace(ENVELOPE, failures=failures), failed=True)
    assert len(letter.story) <= MAX_STORY_BYTES
    assert len(letter.error_type) < 300
    story = read_story(letter)
    assert story.text
    assert story.traceback
    assert story.attempt == 3


def test_a_long_story_loses_old_attempts_before_its_traceback() -> None:
    """The least telling parts go first."""
    failures = [Failure(n, n, "ValueError", "💥" * 200, "w-1") for n in range(1, 20)]
    envelope = msgspec.structs.replace(ENVELOPE, failures=failures, attempt=20)
    story = read_story(letter_of(chain(5), envelope=envelope, failed=True))
    assert [failure.attempt for failure in story.attempts] == [1, 17, 18, 19, 20]
    assert "number 4" in story.traceback
    assert "the first" in story.traceback


@given(st.lists(st.text(max_size=3000), max_size=25), st.text(max_size=20_000))
def test_any_texts_fit(texts: list[str], text: str) -> None:
    """For arbitrary texts, half surrogate pairs among them, there is a story that can be read."""
    history = [Failure(1, 1, "E", text.encode("utf-8", "replace").decode()) for text in texts]
    error = raised(ValueError(text))
    letter = letter_of(error, envelope=msgspec.structs.replace(ENVELOPE, failures=history), failed=True)
    assert len(letter.story) <= MAX_STORY_BYTES
    assert read_story(letter).attempt == 3


# --- nasty exceptions -----------------------------------------------------------------------------


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text for you")


class Exits(Exception):
    def __str__(self) -> str:
        raise SystemExit(3)


class NotText(Exception):
    def __str__(self) -> str:
        return 5  # type: ignore[return-value]


class Falsy(Exception):
    def __bool__(self) -> bool:
        return False


class Empty(Exception):
    def __len__(self) -> int:
        return 0


class Undecided(Exception):
    def __bool__(self) -> bool:
        raise RuntimeError("neither")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("nor equal")

    __hash__ = None  # type: ignore[assignment]


class OddText(str):
    def encode(self, *_: object) -> bytes:  # type: ignore[override]
        raise RuntimeError("never")


class Odd(Exception):
    def __str__(self) -> str:
        return OddText("odd")


class Unprintable(Exception):
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (Mute(), "Mute, whose text cannot be made>"),
        (Exits(), "Exits, whose text cannot be made>"),
        (NotText(), "NotText, whose text cannot be made>"),
        (Falsy("falsy"), "falsy"),
        (Empty("empty"), "empty"),
        (Undecided("undecided"), "undecided"),
        (Odd(), "Odd, whose text cannot be made>"),
        (Unprintable("unprintable"), "unprintable"),
        (ValueError("\ud800 half"), "? half"),
        (ValueError("a\x00b\x1b[31m"), "a\x00b\x1b[31m"),
        (ValueError(), "ValueError"),
        (KeyError("k"), "'k'"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (SystemExit(3), "3"),
        (GeneratorExit(), "GeneratorExit"),
        (StopIteration(7), "7"),
        (ExceptionGroup("group", [ValueError("a")]), "group (1 sub-exception)"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), "can't decode byte 0xff"),
    ],
    ids=lambda part: type(part).__name__,
)
@pytest.mark.parametrize("with_traceback", [True, False])
def test_exceptions_of_every_nasty_kind_get_their_letter(error: BaseException, text: str, with_traceback: bool) -> None:
    """Whatever an exception does when it is looked at, it is named, told and listed among the attempts."""
    error = raised(error) if with_traceback else error
    letter = letter_of(error, failed=True)
    story = read_story(letter)
    assert text in story.text
    assert letter.error_type.endswith(type(error).__name__)
    assert bool(story.traceback) == (error.__traceback__ is not None)
    assert [failure.attempt for failure in story.attempts] == [3]
    assert letter.fingerprint


def test_a_class_with_an_odd_name() -> None:
    """A name that is no UTF-8 does not stop the letter."""
    kind = type("Odd", (Exception,), {"__module__": "m"})
    kind.__qualname__ = "Od\ud800d"
    assert letter_of(raised(kind())).error_type == "m.Od?d"


# --- history --------------------------------------------------------------------------------------


def test_a_history_keeps_the_first_and_the_latest() -> None:
    """It stays at 20 entries however often a task fails."""
    history: list[Failure] = []
    for number in range(1, 1000):
        history = letters.add_failure(history, Failure(number, number, "E"))
    assert [failure.attempt for failure in history] == [1, *range(981, 1000)]


def test_a_record_of_a_failure_is_short() -> None:
    """What travels with the message at each retry is bounded."""
    record = letters.failure(ENVELOPE, raised(ValueError("x" * 100_000)), NOW_MS, "w-1")
    assert (record.attempt, record.at_ms, record.error_type, record.worker) == (3, NOW_MS, "ValueError", "w-1")
    assert len(record.text) < 260


# --- fingerprints ---------------------------------------------------------------------------------


def fails_here(text: str) -> NoReturn:
    raise ValueError(text)


def fails_there(text: str) -> NoReturn:
    raise ValueError(text)


def fails_otherwise(text: str) -> NoReturn:
    raise TypeError(text)


def fingerprint_of(function: Callable[[str], NoReturn], text: str = "x", task: str = "t") -> str:
    """The fingerprint of what a function raises."""
    try:
        function(text)
    except Exception as error:
        return letters.fingerprint(task, error)


def test_fingerprints_group_faults_of_one_place() -> None:
    """Equal for the same task, type and place, whatever the text; different where one of them differs."""
    assert fingerprint_of(fails_here, "order 1") == fingerprint_of(fails_here, "order 2")
    different = {
        fingerprint_of(fails_here),
        fingerprint_of(fails_there),
        fingerprint_of(fails_otherwise),
        fingerprint_of(fails_here, task="other"),
        letters.fingerprint("t", ValueError("never raised")),
    }
    assert len(different) == 5


def test_a_fingerprint_does_not_depend_on_the_way_there() -> None:
    """It is the place that raised, not who called it."""

    def through(text: str) -> NoReturn:
        fails_here(text)

    assert fingerprint_of(through) == fingerprint_of(fails_here)


def test_a_fingerprint_of_a_deep_traceback_costs_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """No source file is read for it: a poison batch may ask for thousands."""

    def never(*_: object, **__: object) -> NoReturn:
        raise AssertionError("a source file was looked at")

    error = deep()
    monkeypatch.setattr(traceback, "extract_tb", never)
    monkeypatch.setattr("linecache.getlines", never)
    assert letters.fingerprint("t", error) == letters.fingerprint("t", deep())


# --- revival --------------------------------------------------------------------------------------


def dead(body: bytes, reason: Reason = Reason.ATTEMPTS_EXHAUSTED) -> DeadLetter:
    """A letter with this body."""
    return DeadLetter(Message("m-1", "money", Priority.HIGH, body, generation=4), reason, NOW_MS)


FIELDS = {
    "v": 1,
    "task": "shop.pay",
    "args": {"order": "o-1", "cents": 5},
    "attempt": 3,
    "failures": [{"attempt": 1, "at_ms": 1, "error_type": "E"}],
    "unknown_since_ms": 9,
    "expires_ms": NOW_MS,
    "headers": {"a": "b"},
    "new": [1, 2],
}
BODIES = pytest.mark.parametrize("body", [msgspec.msgpack.encode(FIELDS), json.dumps(FIELDS).encode()], ids=["msgpack", "json"])


@BODIES
def test_a_revived_message_starts_again(body: bytes) -> None:
    """Attempt 1, no history, a new generation, its age counted from now; all else as it was, unknown fields too."""
    message = revive(dead(body), now_ms=NOW_MS - 1)
    envelope = codec.decode(message.body)
    assert (message.id, message.queue, message.priority, message.generation) == ("m-1", "money", Priority.HIGH, 5)
    assert (message.eta_ms, message.delay_ms) == (0, 0)
    assert (envelope.attempt, envelope.failures, envelope.unknown_since_ms, envelope.replays) == (1, [], 0, 1)
    assert (envelope.expires_ms, envelope.enqueued_ms, envelope.headers) == (NOW_MS, NOW_MS - 1, {"a": "b"})
    assert codec.arguments(message.body) == {"order": "o-1", "cents": 5}
    assert codec.is_json(message.body) == codec.is_json(body)
    decoded = json.loads(message.body) if codec.is_json(body) else msgspec.msgpack.decode(message.body)
    assert decoded["new"] == [1, 2]
    assert codec.decode(revive(msgspec.structs.replace(dead(body), message=message), now_ms=NOW_MS).body).replays == 2


@BODIES
def test_a_revived_message_with_changes(body: bytes) -> None:
    """Arguments are merged over its own; it may run from another queue, and later."""
    changed = {"cents": 7, "note": "é", "more": {"a": [1, None]}}
    message = revive(dead(body), now_ms=NOW_MS, queue="repairs", arguments=changed, eta_ms=NOW_MS + 5)
    assert (message.queue, message.eta_ms) == ("repairs", NOW_MS + 5)
    assert codec.arguments(message.body) == {"order": "o-1", **changed}
    assert codec.is_json(message.body) == codec.is_json(body)


@BODIES
def test_what_died_of_its_expiry_does_not_expire_again(body: bytes) -> None:
    """Nor what would be expired by the time it is replayed."""
    assert codec.decode(revive(dead(body, Reason.EXPIRED), now_ms=NOW_MS - 1).body).expires_ms == 0
    assert codec.decode(revive(dead(body), now_ms=NOW_MS).body).expires_ms == 0


@pytest.mark.parametrize("body", [b"", b"\xc1", b"{", b'{"v": 2, "task": {}}', random.Random(1).randbytes(100)])
@pytest.mark.parametrize("reason", [Reason.UNDECODABLE, Reason.UNSUPPORTED_VERSION])
def test_bytes_that_nobody_could_read_are_replayed_as_they_are(body: bytes, reason: Reason) -> None:
    """An upgraded worker may read them; but arguments cannot be changed in them."""
    message = revive(dead(body, reason), now_ms=NOW_MS, queue="repairs")
    assert (message.body, message.queue, message.generation) == (body, "repairs", 5)
    with pytest.raises(CodecError):
        revive(dead(body, reason), now_ms=NOW_MS, arguments={"a": 1})


@BODIES
def test_changes_that_cannot_be_sent(body: bytes) -> None:
    """Values that no message can carry, and arguments beyond the limits, are refused."""
    with pytest.raises(InvalidArguments, match=r"the arguments of task 'shop.pay' cannot be sent"):
        revive(dead(body), now_ms=NOW_MS, arguments={"cents": object()})
    with pytest.raises(CodecError, match="the limit is 1,048,576"):
        revive(dead(body), now_ms=NOW_MS, arguments={"note": "x" * 1_048_576})


def test_arguments_that_are_no_map_cannot_be_changed() -> None:
    """They can be replayed, though: the task may accept them after a repair."""
    body = b'{"v": 1, "task": "t", "args": [1]}'
    assert codec.decode(revive(dead(body), now_ms=NOW_MS).body).replays == 1
    with pytest.raises(CodecError, match="no map of names to values"):
        revive(dead(body), now_ms=NOW_MS, arguments={"a": 1})
