"""Link: one connection to a server.

It speaks through hiredis, the parser of the Redis project, straight on an asyncio transport: a request is one write and its answers one
future. redis-py's connection, which goes through a stream and several coroutines, costs twice the time of a whole round trip (measured:
`docs/adr/0006-redis-layout.md`). Nothing is repeated here, because only `lane` knows what may be.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import hiredis

from crossdock_redis import scripts
from crossdock_redis.address import Address
from crossdock_redis.replies import ServerError, explain, is_forbidden

Command = Sequence[str | bytes | int | float]

_pack_command = cast("Callable[[tuple[str | bytes | int | float, ...]], bytes]", cast("Any", hiredis).pack_command)


class LinkBroken(Exception):
    """The connection could not be made, or is lost. `__cause__` is the error of the system, where there is one."""


class LinkRefused(LinkBroken):
    """The server is there and will not have us: wrong password, missing permission, too many clients."""


Outcome = list[Any] | LinkBroken
"""What comes of a request: the answers to its commands, or why there are none."""


class Link(asyncio.Protocol):
    """A connection. Made by `to`."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._reader: Any = hiredis.Reader(protocolError=LinkBroken, replyError=ServerError)
        self._transport: asyncio.Transport | None = None
        self._answers: list[Any] = []
        self._expected = 0
        self._commands: Sequence[Command] = ()
        self._done: Callable[[Outcome], None] | None = None
        self._deadline = 0.0
        self._watch: asyncio.TimerHandle | None = None
        self._lost: BaseException | None = None

    @classmethod
    async def to(cls, address: Address, host: str, port: int) -> Link:
        """Connect. For a socket of this host `host` and `port` mean nothing.

        Raises:
            LinkBroken: Nobody answers in time, or it is no such server.
            LinkRefused: It refuses us.
        """
        loop = asyncio.get_running_loop()
        link: Link | None = None
        try:
            async with asyncio.timeout(address.timeout):
                if address.kind == "socket":
                    _, link = await loop.create_unix_connection(lambda: cls(address.timeout), address.path)
                else:
                    context = address.tls.context if address.tls is not None else None
                    _, link = await loop.create_connection(lambda: cls(address.timeout), host, port, ssl=context)
                await link._introduce(address)
        except TimeoutError as error:
            _abort(link)
            hint = "; does it speak TLS, as the URL says?" if address.tls is not None else ""
            raise LinkBroken(f"no answer within {address.timeout:g} s{hint}") from error
        except OSError as error:
            _abort(link)
            raise LinkBroken(_why(error, address, host, port)) from error
        except BaseException:
            _abort(link)
            raise
        return link

    async def _introduce(self, address: Address) -> None:
        user, password = address.login
        commands: list[Command] = []
        if address.protocol == 3:
            login = ("AUTH", user or "default", password) if password else ()
            commands.append(("HELLO", 3, *login))
        elif password:
            commands.append(("AUTH", user, password) if user else ("AUTH", password))
        if address.database:
            commands.append(("SELECT", address.database))
        commands.append(("PING",))
        commands.append(("CLIENT", "SETNAME", "crossdock"))
        *answers, ping, _ = await self.exchange(commands)
        for answer in (*answers, ping):
            if isinstance(answer, ServerError) and not (answer is ping and answer.code == "NOPERM"):  # then at least we are let in
                raise (LinkRefused if is_forbidden(answer) else LinkBroken)(explain(answer)) from answer

    async def exchange(self, commands: Sequence[Command], patience: float | None = None) -> list[Any]:
        """Send commands in one write and return their answers. An error that the server answers is returned in its place.

        A script that the server does not know (any more) is sent as a whole, and a WAIT for it again. One call at a time; a cancelled
        one breaks the link.

        Args:
            commands: What to send.
            patience: Seconds after which an answer does not come any more; the default is the address' timeout.

        Raises:
            LinkBroken: The connection is lost, perhaps after the server did as it was told, or there is no answer.
        """
        answered: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        self.post(commands, lambda outcome: _finish(answered, outcome), patience)
        try:
            return await answered
        except asyncio.CancelledError:
            self.close()
            raise

    def post(self, commands: Sequence[Command], done: Callable[[Outcome], None], patience: float | None = None) -> None:
        """`exchange` without a coroutine: `done` is called once, with the answers or with `LinkBroken`, from within the event loop."""
        if self._lost is not None or self._transport is None:
            asyncio.get_running_loop().call_soon(done, self._why_lost())
            return
        packed = _pack(commands[0]) if len(commands) == 1 else b"".join(map(_pack, commands))
        self._answers, self._expected = [], len(commands)
        self._commands, self._done = commands, done
        loop = asyncio.get_running_loop()
        self._deadline = loop.time() + (patience or self._patience)
        if self._watch is None:  # one timer serves all requests until the first of them is overdue
            self._watch = loop.call_at(self._deadline, self._look_at_the_clock)
        self._transport.write(packed)

    def _end(self, outcome: Outcome) -> None:
        done, self._done = self._done, None
        if done is None:
            return
        if not isinstance(outcome, LinkBroken):
            unknown = [
                number for number, answer in enumerate(outcome) if isinstance(answer, ServerError) and answer.code == "NOSCRIPT"
            ]
            if unknown:
                self._send_whole(unknown, outcome, done)
                return
        done(outcome)

    def _send_whole(self, unknown: Sequence[int], answers: list[Any], done: Callable[[Outcome], None]) -> None:
        commands = self._commands
        again = [number for number, command in enumerate(commands) if number in unknown or command[0] == "WAIT"]

        def answered(outcome: Outcome) -> None:
            if isinstance(outcome, LinkBroken):
                done(outcome)
                return
            for number, answer in zip(again, outcome, strict=True):
                answers[number] = answer
            done(answers)

        self.post([_whole(commands[number]) for number in again], answered)

    def _look_at_the_clock(self) -> None:
        self._watch = None
        if self._done is not None:
            loop = asyncio.get_running_loop()
            if loop.time() >= self._deadline:
                self.close()
                self._end(LinkBroken("no answer came in time"))
            else:
                self._watch = loop.call_at(self._deadline, self._look_at_the_clock)

    def close(self) -> None:
        """Disconnect, without waiting for anything. Can be called again."""
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    # --- called by the transport ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        reader = self._reader
        answers = self._answers
        reader.feed(data)
        try:
            while (answer := reader.gets()) is not False:
                if not isinstance(answer, hiredis.PushNotification):
                    answers.append(answer)
        except LinkBroken as error:
            self.close()
            self.connection_lost(ConnectionError(f"it does not speak Redis' protocol ({error})"))
            return
        if len(answers) >= self._expected:
            self._end(answers)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        last = self._answers[-1] if self._answers else None
        if isinstance(last, ServerError) and is_forbidden(last):  # said to whoever connects, before the door is shut
            self._lost = last
        else:
            self._lost = exc or ConnectionResetError("the server closed the connection")
        self._end(self._why_lost())

    def _why_lost(self) -> LinkBroken:
        lost = self._lost or ConnectionError("the connection was closed")
        error = LinkRefused(explain(lost)) if isinstance(lost, ServerError) else LinkBroken(str(lost))
        error.__cause__ = lost
        return error


def _finish(answered: asyncio.Future[list[Any]], outcome: Outcome) -> None:
    if answered.done():
        return
    if isinstance(outcome, LinkBroken):
        answered.set_exception(outcome)
    else:
        answered.set_result(outcome)


def _abort(link: Link | None) -> None:
    if link is not None:
        link.close()


def _why(error: OSError, address: Address, host: str, port: int) -> str:
    """A sentence's end: why there is no connection, and what to do."""
    place = f"the socket {address.path}" if address.kind == "socket" else f"{host}:{port}"
    match error:
        case ssl.SSLCertVerificationError():
            return (
                f"the certificate of {place} is not trusted: {error.verify_message}; name the file of who signed it by ssl_ca_certs, "
                "and the server as its certificate does"
            )
        case ssl.SSLError():
            return (
                f"{place} and we do not agree on TLS ({error.reason or error}); does it speak TLS, and want a certificate of ours?"
            )
        case socket.gaierror():
            return f"the name {host!r} leads to no address ({error.strerror})"
        case ConnectionRefusedError() | FileNotFoundError():
            return f"nobody listens at {place}"
        case _:
            return f"{place} cannot be reached ({error.strerror or error})"


def _whole(command: Command) -> Command:
    """The same with the whole script in place of its digest."""
    if command[0] != "EVALSHA":
        return command
    return ("EVAL", scripts.by_digest()[str(command[1])].text, *command[2:])


def _pack(command: Command) -> bytes:
    try:
        return _pack_command(tuple(command))
    except UnicodeEncodeError:  # a name that nothing can have: the server then finds nothing
        return _pack_command(tuple(part.encode(errors="replace") if isinstance(part, str) else part for part in command))


async def ask(link: Link, *commands: Command) -> list[Any]:
    """`Link.exchange` where no answer may be an error; that is raised as `ServerError`."""
    answers = await link.exchange(commands)
    for answer in answers:
        if isinstance(answer, ServerError):
            raise answer
    return answers


def fields(info: bytes) -> Mapping[str, str]:
    """The `name:value` lines of INFO."""
    return dict(line.split(":", 1) for line in info.decode("utf-8", "replace").splitlines() if ":" in line)
