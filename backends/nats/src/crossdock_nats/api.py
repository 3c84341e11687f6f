"""Api: JetStream's requests, one method each, many at once where many are asked. What the server answers is data here, also an error."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final, TypeVar

import msgspec

from crossdock.errors import BrokerUnavailable
from crossdock_nats import record
from crossdock_nats.link import NO_PERMISSION, SILENCE, Answer, Link
from crossdock_nats.record import Stored

T = TypeVar("T")

STREAM_MISSING: Final = 10059
CONSUMER_MISSING: Final = 10014
MESSAGE_MISSING: Final = frozenset({10037, 10043})
STREAM_EXISTS: Final = 10058
WRONG_SEQUENCE: Final = frozenset({10071, 10164})
"""What was expected of the last sequence is not so; the second one says that somebody is just writing there."""
OVERTAKEN: Final = 10070
"""What was expected of the last sequence of the whole stream is not so."""
DISABLED: Final = frozenset({10039, 10076})
NAMES_AT_ONCE: Final = 100_000
"""Subjects in one answer; the server gives no more."""
_WINDOW: Final = 1000
"""Requests in one write."""


class Problem(msgspec.Struct, frozen=True):
    """An error that the server answers."""

    code: int = 0
    err_code: int = 0
    description: str = ""


class Position(msgspec.Struct, frozen=True):
    """Where a consumer is."""

    consumer_seq: int = 0
    stream_seq: int = 0


class ConsumerInfo(msgspec.Struct, frozen=True):
    """A consumer."""

    name: str = ""
    config: dict[str, Any] = {}
    delivered: Position = Position()
    ack_floor: Position = Position()
    num_pending: int = 0
    num_ack_pending: int = 0
    created: str = ""


class StreamState(msgspec.Struct, frozen=True):
    """What is in a stream."""

    messages: int = 0
    last_seq: int = 0
    consumer_count: int = 0
    subjects: dict[str, int] | None = None
    deleted: list[int] | None = None
    """Sequences of what is gone, between the first and the last; only where they were asked for."""


class StreamInfo(msgspec.Struct, frozen=True):
    """A stream."""

    config: dict[str, Any] = {}
    state: StreamState = StreamState()
    created: str = ""
    ts: str = ""
    """The server's time; "" where it does not tell."""


class _Problems(msgspec.Struct):
    error: Problem | None = None


class _Consumers(msgspec.Struct):
    total: int = 0
    consumers: list[str] | None = None


class _Names(msgspec.Struct):
    total: int = 0
    streams: list[str] | None = None


class _Purged(msgspec.Struct):
    purged: int = 0


class _Message(msgspec.Struct):
    subject: str
    seq: int
    time: str
    hdrs: str = ""
    data: str = ""


class _Got(msgspec.Struct):
    message: _Message


_problems = msgspec.json.Decoder(_Problems)


def moment(text: str) -> float:
    """A time as the server writes it, in milliseconds since the epoch."""
    return datetime.fromisoformat(text).timestamp() * 1000


def problem(answer: Answer) -> Problem:
    """What an answer that is no success says."""
    headers, data = answer
    if headers.startswith(NO_PERMISSION):
        return Problem(403, 0, headers[len(NO_PERMISSION) :].decode(errors="replace").strip())
    if headers and (status := record.status(headers)):
        return Problem(status, 0, "nobody is there to answer" if status == 503 else headers[12:].decode(errors="replace").strip())
    try:
        return _problems.decode(data).error or Problem()
    except msgspec.DecodeError:
        return Problem(500, 0, "the answer cannot be read")


class Api:
    """The requests.

    Args:
        link: Carries them.
        domain: JetStream domain; "" = the server's own.
    """

    def __init__(self, link: Link, domain: str) -> None:
        self._link = link
        self.prefix = f"$JS.{domain}.API." if domain else "$JS.API."

    async def ask(
        self, requests: Sequence[tuple[str, object]], kind: type[T], *, repeat: bool = True, timeout: float = 0.0
    ) -> list[T | Problem]:
        """Make requests, all in one write, and return an answer to each.

        Args:
            requests: Subjects without their prefix, and what to say as JSON; None = nothing.
            kind: What success looks like.
            repeat: As `Link.exchange` has it.
            timeout: As `Link.exchange` has it.

        Raises:
            BrokerUnavailable, BrokerClosed: Some were not answered.
        """
        found: list[T | Problem] = []
        decoder = msgspec.json.Decoder(kind)
        for start in range(0, len(requests), _WINDOW):
            some = requests[start : start + _WINDOW]
            reply = self._link.reply_to()
            frames = [
                record.plain(
                    f"{self.prefix}{subject}".encode(),
                    b"%s.%d" % (reply, index),
                    b"" if body is None else msgspec.json.encode(body),
                )
                for index, (subject, body) in enumerate(some)
            ]
            answers, answered = await self._link.exchange(reply, frames, all=True, repeat=repeat, timeout=timeout)
            if not all(answered):
                what = some[answered.index(0)][0].partition(".CD=")[0]
                text = f"JetStream gave no answer to {what}: its cluster has no quorum, or it has too much to do; try again."
                raise BrokerUnavailable(text)
            for index in range(len(some)):
                headers, data = answers[index]
                found.append(problem((headers, data)) if headers or b'"error"' in data[:200] else decoder.decode(data))
        return found

    async def ask_one(self, subject: str, body: object, kind: type[T], *, repeat: bool = True, timeout: float = 0.0) -> T | Problem:
        """Make one request; see `ask`."""
        return (await self.ask([(subject, body)], kind, repeat=repeat, timeout=timeout))[0]

    # --- streams and consumers ---

    async def streams(self, names: Sequence[str]) -> list[StreamInfo | Problem]:
        """Streams, with their figures."""
        return await self.ask([(f"STREAM.INFO.{name}", None) for name in names], StreamInfo)

    async def states(self, streams: Sequence[str], *, deleted: bool = False) -> dict[str, StreamState]:
        """What is in these streams, as far as they exist; with all that is gone between the first message and the last, if asked."""
        body = {"deleted_details": True} if deleted else None
        answers = await self.ask([(f"STREAM.INFO.{stream}", body) for stream in streams], StreamInfo)
        return {name: answer.state for name, answer in zip(streams, answers, strict=True) if isinstance(answer, StreamInfo)}

    async def stream_names(self, subject: str) -> list[str]:
        """The streams that take something of a subject."""
        found: list[str] = []
        while True:
            answer = await self.ask_one("STREAM.NAMES", {"subject": subject, "offset": len(found)}, _Names)
            if isinstance(answer, Problem):
                raise BrokerUnavailable(f"JetStream does not tell its streams: {answer.description}.")
            found += answer.streams or ()
            if not answer.streams or len(found) >= answer.total:
                return found

    async def consumer_names(self, streams: Sequence[str]) -> dict[str, set[str]]:
        """The consumers of each stream; none if there is no stream. Costs the server far less than their figures, or than making them."""
        found: dict[str, set[str]] = {stream: set() for stream in streams}
        asking = dict.fromkeys(found, 0)
        while asking:
            requests: list[tuple[str, object]] = [(f"CONSUMER.NAMES.{stream}", {"offset": at}) for stream, at in asking.items()]
            answers = dict(zip(asking, await self.ask(requests, _Consumers), strict=True))
            asking = {}
            for stream, answer in answers.items():
                if isinstance(answer, Problem):
                    if answer.err_code == STREAM_MISSING:
                        continue
                    raise BrokerUnavailable(f"JetStream does not tell the consumers of {stream}: {answer.description}.")
                found[stream].update(answer.consumers or ())
                if answer.consumers and len(found[stream]) < answer.total:
                    asking[stream] = len(found[stream])
        return found

    async def create_consumers(self, consumers: Sequence[tuple[str, dict[str, Any]]]) -> list[ConsumerInfo | Problem]:
        """Make consumers, or change those that bear the name. By stream and configuration."""
        requests: list[tuple[str, object]] = [
            (f"CONSUMER.DURABLE.CREATE.{stream}.{config['durable_name']}", {"stream_name": stream, "config": config})
            for stream, config in consumers
        ]
        return await self.ask(requests, ConsumerInfo)

    async def delete_consumer(self, stream: str, name: str) -> None:
        """Delete a consumer, if it is there."""
        await self.ask_one(f"CONSUMER.DELETE.{stream}.{name}", None, _Problems, repeat=False)

    async def consumer_infos(self, consumers: Sequence[tuple[str, str]]) -> list[ConsumerInfo | Problem]:
        """Consumers by stream and name, with their figures."""
        return await self.ask([(f"CONSUMER.INFO.{stream}.{name}", None) for stream, name in consumers], ConsumerInfo)

    # --- messages ---

    async def subjects(self, stream: str, pattern: str) -> list[str]:
        """The subjects in a stream that fit a pattern, in no order. Costs the server some microseconds for each."""
        found: list[str] = []
        while True:
            body = {"subjects_filter": pattern, "offset": len(found)}
            answer = await self.ask_one(f"STREAM.INFO.{stream}", body, StreamInfo)
            if isinstance(answer, Problem):
                return []
            some = answer.state.subjects or {}
            found += some
            if len(some) < NAMES_AT_ONCE:
                return found

    async def get(self, stream: str, wanted: Sequence[dict[str, Any]], *, exact: bool) -> list[Stored | None]:
        """Messages, each by `{"seq": ...}`, `{"last_by_subj": ...}` or `{"seq": ..., "next_by_subj": ...}`; None for what is not there.

        Args:
            stream: Where.
            wanted: Which.
            exact: Have the leader answer, where a stream has replicas: others may be behind.
        """
        if exact:
            return await self._get_from_leader(stream, wanted)
        found: list[Stored | None] = []
        for start in range(0, len(wanted), _WINDOW):
            some = wanted[start : start + _WINDOW]
            reply = self._link.reply_to()
            subject = f"{self.prefix}DIRECT.GET.{stream}".encode()
            frames = [
                record.plain(subject, b"%s.%d" % (reply, index), msgspec.json.encode(each)) for index, each in enumerate(some)
            ]
            direct, answered = await self._link.exchange(reply, frames, all=True, repeat=False, timeout=SILENCE)
            # A stream that is made anew just then may leave direct gets without an answer for ever (seen on 2.9).
            silent = [index for index in range(len(some)) if not answered[index]]
            slow = await self._get_from_leader(stream, [some[index] for index in silent]) if silent else []
            by_index = dict(zip(silent, slow, strict=True))
            found += [by_index[index] if index in by_index else read_direct(*direct[index]) for index in range(len(some))]
        return found

    async def _get_from_leader(self, stream: str, wanted: Sequence[dict[str, Any]]) -> list[Stored | None]:
        answers = await self.ask([(f"STREAM.MSG.GET.{stream}", each) for each in wanted], _Got)
        return [None if isinstance(answer, Problem) else _stored(answer.message) for answer in answers]

    async def get_many(self, stream: str, seq: int, pattern: str, limit: int) -> list[Stored]:
        """Up to `limit` messages that fit a pattern, from a sequence on, in their order: one request (2.11 or later)."""
        found: list[Stored] = []
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        inbox = b"%s.g.%s" % (self._link.inbox, self._link.reply_to().rpartition(b".")[2])

        def take(subject: bytes, reply: bytes, headers: bytes, data: bytes) -> None:
            stored = read_direct(headers, data)
            if stored is not None:
                found.append(stored)
            elif not done.done():
                done.set_result(None)

        sid = self._link.subscribe(inbox, take)
        try:
            wire = await self._link.ready()
            body = msgspec.json.encode({"seq": seq, "next_by_subj": pattern, "batch": limit})
            wire.write(record.plain(f"{self.prefix}DIRECT.GET.{stream}".encode(), inbox, body))
            await wire.until_lost_or(done, 5.0)
            if not done.done():
                raise BrokerUnavailable("JetStream gave no answer to a look at messages; try again.")
        finally:
            self._link.unsubscribe(sid)
        return found

    async def delete(self, stream: str, seqs: Sequence[int]) -> list[bool]:
        """Delete messages by sequence; says for each whether it was there."""
        requests: list[tuple[str, object]] = [(f"STREAM.MSG.DELETE.{stream}", {"seq": seq, "no_erase": True}) for seq in seqs]
        return [not isinstance(answer, Problem) for answer in await self.ask(requests, _Problems, repeat=False)]

    async def purge(self, stream: str, **which: object) -> int:
        """Delete messages by `filter`, `seq` (below it) or `keep`; returns how many."""
        answer = await self.ask_one(f"STREAM.PURGE.{stream}", which, _Purged, repeat=False)
        return 0 if isinstance(answer, Problem) else answer.purged


def read_direct(headers: bytes, data: bytes) -> Stored | None:
    """A message as a direct get answers it; None where it says that there is none."""
    if headers.startswith(b"NATS/1.0 ") or not headers:
        return None
    return Stored(
        record.field(headers, b"Nats-Subject"),
        int(record.field(headers, b"Nats-Sequence")),
        moment(record.field(headers, b"Nats-Time-Stamp").decode()),
        headers,
        data,
    )


def _stored(message: _Message) -> Stored:
    headers, data = base64.b64decode(message.hdrs), base64.b64decode(message.data)
    return Stored(message.subject.encode(), message.seq, moment(message.time), headers, data)
