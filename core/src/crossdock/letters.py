"""Dead letters: writing the story of a failed task, reading it, and bringing the task back. Pure."""

from __future__ import annotations

import hashlib
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import msgspec

from crossdock import codec
from crossdock.codec import Envelope, Failure
from crossdock.errors import CodecError, InvalidArguments
from crossdock.spi import MAX_STORY_BYTES, DeadLetter, Message, Reason

MAX_TEXT: Final = 2000
"""Most characters kept of an error's text."""
MAX_TRACEBACK: Final = 10_000
"""Most characters kept of a traceback, from its two ends."""
MAX_FAILURES: Final = 20
"""Most failed attempts kept in an envelope: the first and the latest."""
MAX_FAILURE_TEXT: Final = 200
"""Most characters kept of the text of an earlier failure, and of the name of an error's class."""

_OURS: Final = Path(__file__).parent


class Story(msgspec.Struct, frozen=True, omit_defaults=True):
    """What core writes into `DeadLetter.story`."""

    text: str = ""
    """What happened, in a sentence: the error's text, or the reason's."""
    traceback: str = ""
    attempt: int = 1
    """The attempt that was the last."""
    delivery_count: int = 1
    attempts: list[Failure] = []
    """Every failed attempt with its time, the last included; of very many, the first and the latest."""
    worker: str = ""
    enqueued_ms: int = 0
    origin: str = ""
    """Queue it died in."""
    replays: int = 0
    """How often it had been replayed before."""


def error_type(error: BaseException) -> str:
    """Qualified name of an error's class, without `builtins`."""
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return _clean(name, MAX_FAILURE_TEXT)


def error_text(error: BaseException, limit: int = MAX_TEXT) -> str:
    """An error's text, whatever its `__str__` does; the name of its class if it has none."""
    try:
        return _clean(str(error) or error_type(error), limit)
    except BaseException:
        return f"<{error_type(error)}, whose text cannot be made>"


def _clean(text: str, limit: int) -> str:
    text = text.encode("utf-8", "replace").decode()
    if len(text) <= limit:
        return text
    return f"{text[: limit // 2]}\n... {len(text) - limit:,} characters left out ...\n{text[-limit // 2 :]}"


def _traceback(error: BaseException) -> str:
    try:
        return _clean("".join(traceback.format_exception(type(error), error, _without_ours(error.__traceback__))), MAX_TRACEBACK)
    except BaseException:
        return f"<the traceback of {error_type(error)} cannot be made>"


def _without_ours(frames: TracebackType | None) -> TracebackType | None:
    """Leave out crossdock's own frames before the first one that is not: they tell the reader nothing."""
    start = frames
    while start is not None and Path(start.tb_frame.f_code.co_filename).parent == _OURS:
        start = start.tb_next
    return start or frames


def fingerprint(task: str, error: BaseException) -> str:
    """Equal for errors of one task of one type raised in one place; 12 hexadecimal digits."""
    place = ""
    if error.__traceback__ is not None:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        place = f"{frame.f_code.co_filename}:{frame.f_code.co_name}"
    return hashlib.blake2s(f"{task}\0{error_type(error)}\0{place}".encode("utf-8", "replace"), digest_size=6).hexdigest()


def failure(envelope: Envelope, error: BaseException, now_ms: int, worker: str) -> Failure:
    """The record of one failed attempt."""
    return Failure(envelope.attempt, now_ms, error_type(error), error_text(error, MAX_FAILURE_TEXT), worker)


def add_failure(failures: Sequence[Failure], latest: Failure) -> list[Failure]:
    """Append to a history and keep it bounded."""
    history = [*failures, latest]
    return history if len(history) <= MAX_FAILURES else [history[0], *history[-(MAX_FAILURES - 1) :]]


def write(
    message: Message,
    envelope: Envelope | None,
    reason: Reason,
    *,
    error: BaseException | None = None,
    text: str = "",
    failed: bool = False,
    now_ms: int,
    worker: str,
    delivery_count: int,
) -> DeadLetter:
    """Write a dead letter.

    Args:
        message: As received.
        envelope: As decoded; None if it could not be.
        reason: Why it is given up.
        error: What was raised, if anything.
        text: What to say where there is no error.
        failed: Whether this was a failed attempt, to be listed among them.
        now_ms: When.
        worker: Who.
        delivery_count: As delivered.
    """
    known = envelope or Envelope(1, "")
    attempts: Sequence[Failure] = known.failures
    if error is not None and failed:
        attempts = add_failure(known.failures, failure(known, error, now_ms, worker))
    story = Story(
        text=text or (reason.value if error is None else error_text(error)),
        traceback="" if error is None or error.__traceback__ is None else _traceback(error),
        attempt=known.attempt,
        delivery_count=delivery_count,
        attempts=list(attempts),
        worker=worker,
        enqueued_ms=known.enqueued_ms,
        origin=message.queue,
        replays=known.replays,
    )
    return DeadLetter(
        message,
        reason,
        now_ms,
        task=known.task,
        error_type="" if error is None else error_type(error),
        fingerprint="" if error is None else fingerprint(known.task, error),
        story=_fit(story),
    )


def _fit(story: Story) -> bytes:
    """Encode, giving up the least telling parts first until it fits."""
    encoded = msgspec.msgpack.encode(story)
    cuts: tuple[dict[str, Any], ...] = (
        {"attempts": [*story.attempts[:1], *story.attempts[-4:]]},
        {"traceback": _clean(story.traceback, MAX_TRACEBACK // 8)},
        {"text": _clean(story.text, MAX_TEXT // 8)},
        {"attempts": []},  # their texts are ours and short, unless another program wrote the envelope
    )
    for shorter in cuts:
        if len(encoded) <= MAX_STORY_BYTES:
            break
        story = msgspec.structs.replace(story, **shorter)
        encoded = msgspec.msgpack.encode(story)
    return encoded


def read_story(letter: DeadLetter) -> Story:
    """Read a letter's story; an empty one if another program wrote something else there."""
    try:
        return msgspec.msgpack.decode(letter.story, type=Story)
    except (msgspec.MsgspecError, ValueError):
        return Story()


def revive(
    letter: DeadLetter,
    *,
    now_ms: int,
    queue: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    eta_ms: int = 0,
) -> Message:
    """Make the message that brings a dead task back: attempt 1, no history, a new generation, not expired, its time to give up anew.

    Args:
        letter: The dead letter.
        now_ms: When, in milliseconds since the Unix epoch.
        queue: Another queue to run it from; None = where it died.
        arguments: Arguments to change, merged over its own.
        eta_ms: Not before this instant; 0 = now.

    Raises:
        CodecError: Arguments are to be changed, and the body is no envelope or would exceed a limit. Without changes any body
            goes back as it is.
        InvalidArguments: A changed argument cannot be encoded.
    """
    message = letter.message
    body = message.body
    try:
        envelope = codec.decode(body)
    except CodecError:
        if arguments:
            raise
    else:
        changes: dict[str, Any] = {
            "attempt": 1,
            "enqueued_ms": now_ms,
            "failures": [],
            "unknown_since_ms": 0,
            "replays": envelope.replays + 1,
        }
        if letter.reason is Reason.EXPIRED or 0 < envelope.expires_ms <= now_ms:
            changes["expires_ms"] = 0
        if arguments:
            changes["args"] = {**codec.arguments(body), **arguments}
        try:
            body = codec.revise(body, **changes)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise InvalidArguments(f"the arguments of task {envelope.task!r} cannot be sent: {error}") from error
        if arguments:
            codec.check_limits(body, enqueued=True)
    return Message(message.id, queue or message.queue, message.priority, body, eta_ms, 0, message.generation + 1)
