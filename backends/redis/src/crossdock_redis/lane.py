"""Lane: a stream of requests to one server, strictly one after the other, each answered exactly once whatever happens to connections.

Each request that changes something bears a token: six characters of its lane, six digits of its number. The server remembers the last
token of a lane and what it answered, so the same request may be sent again over a new connection after an answer was lost; and a
double that was under way in the old connection does nothing when it arrives late.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import string
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Final

from crossdock_redis import replies
from crossdock_redis.link import Command, Link, LinkBroken, LinkRefused, Outcome
from crossdock_redis.replies import ServerError

_ALPHABET: Final = string.ascii_letters + string.digits
_LAST: Final = 16**6 - 1
_FIRST_PAUSE: Final = 0.02
_LONGEST_PAUSE: Final = 1.0


class NoAnswer(Exception):
    """No answer came in time. `__cause__` tells why, where that is known."""

    def __init__(self, reason: str, *, written: bool) -> None:
        super().__init__(reason)
        self.written = written
        """Whether the server may have done as it was told."""


class _Request:
    """Commands on their way, and what has become of them so far."""

    __slots__ = ("_asked", "_replicas", "commands", "is_elsewhere", "is_for_later", "reason", "written")

    def __init__(self, commands: Sequence[Command], replicas: int, wait_timeout: float) -> None:
        self.commands = [*commands, ("WAIT", replicas, round(wait_timeout * 1000))] if replicas else commands
        self._asked = len(commands)
        self._replicas = replicas
        self.written = False
        """Whether the server may have done as it was told."""
        self.reason: LinkBroken | ServerError | None = None
        """Why there is no good answer yet."""
        self.is_for_later = 0
        """How many commands the server wants to be asked again."""
        self.is_elsewhere = False
        """Whether another server is to be asked."""

    def told(self, answers: list[Any]) -> list[Any]:
        """The answers to the commands; takes note of those that are none yet."""
        told = answers[: self._asked] if self._replicas else answers
        self.is_for_later, self.is_elsewhere = 0, False
        for answer in told:
            if isinstance(answer, ServerError) and answer.code in replies.LATER:
                self.is_for_later += 1
                self.is_elsewhere = self.is_elsewhere or answer.code in replies.ELSEWHERE
                self.reason = answer
        return told

    def is_replicated(self, answers: list[Any]) -> bool:
        """Whether as many replicas have it as must; True where nothing was done that they could have."""
        if not self._replicas or all(isinstance(answer, ServerError) for answer in answers[: self._asked]):
            return True
        replicas = answers[self._asked]
        if isinstance(replicas, ServerError):
            self.reason = replicas
            return False
        self.reason = LinkBroken(f"fewer than {self._replicas} replicas have it")
        return bool(replicas >= self._replicas)


class Lane:
    """Sends requests, and sends them again until they are answered.

    Args:
        connect: Makes a link to the server.
        look_again: Called when the server says that another one serves now.
        replicas: How many replicas must have what is to be replicated.
        wait_timeout: Seconds the server waits for them, each time it is asked.
        up: Told when there is a connection.
        down: Told why there is none (any more).
    """

    def __init__(
        self,
        connect: Callable[[], Awaitable[Link]],
        *,
        look_again: Callable[[], Awaitable[None]],
        replicas: int,
        wait_timeout: float,
        up: Callable[[], None],
        down: Callable[[str], None],
    ) -> None:
        self._connect = connect
        self._look_again = look_again
        self._replicas = replicas
        self._wait_timeout = wait_timeout
        self._up = up
        self._down = down
        self._link: Link | None = None
        self._turn = asyncio.Lock()
        self._closed = False
        self._pursuit: asyncio.Task[None] | None = None
        self._begin_anew()

    def _begin_anew(self) -> None:
        self.name = "".join(secrets.choice(_ALPHABET) for _ in range(6))
        self._number = 0

    def token(self) -> str:
        """The token of the next request: 12 characters. Requests must be sent in the order of their tokens."""
        if self._number == _LAST:
            self._begin_anew()
        self._number += 1
        return f"{self.name}{self._number:06x}"

    async def call(self, make: Callable[[], Sequence[Command]], timeout: float | None, *, replicated: bool = False) -> list[Any]:
        """Send a request, when it is its turn, and return the answers to its commands. An error is returned in its place.

        Args:
            make: Builds the commands, with tokens of this lane, at most one for each queue.
            timeout: Seconds after which to give up; None = never.
            replicated: Count it as answered only when as many replicas have it as the URL asks for.

        Raises:
            NoAnswer: Time is over. The lane has begun anew: should the request be done later, it disturbs no other.
            LinkRefused: The server will not have us.
        """
        begun = asyncio.get_running_loop().time()
        await self._take_turn(timeout)
        try:
            request = _Request(make(), self._replicas if replicated else 0, self._wait_timeout)
            try:
                # The usual case needs no timer: the first answer is the last, and the link itself does not wait for ever.
                if self._link is not None and (answers := await self._try(request)) is not None:
                    return answers
                async with asyncio.timeout_at(None if timeout is None else begun + timeout):
                    return await self._keep_trying(request)
            except TimeoutError as error:
                self._give_up("no answer came in time")
                reason = request.reason
                why = replies.explain(reason) if isinstance(reason, ServerError) else str(reason or "no answer came in time")
                raise NoAnswer(why, written=request.written) from reason or error
            except asyncio.CancelledError:
                self._give_up("")
                raise
        finally:
            self._turn.release()

    async def _take_turn(self, timeout: float | None) -> None:
        if not self._turn.locked():
            await self._turn.acquire()
            return
        try:
            async with asyncio.timeout(timeout):
                await self._turn.acquire()
        except TimeoutError as error:
            raise NoAnswer("no answer came in time to what was asked before", written=False) from error

    def post(
        self, make: Callable[[], Sequence[Command]], done: Callable[[list[Any] | NoAnswer | LinkRefused], None], *, replicated: bool
    ) -> None:
        """`call` without a timeout and, where all goes well, without a coroutine: for a lane with one user, who waits for his turn.

        Args:
            make: As for `call`.
            done: Called once, from within the event loop, with the answers or with the error.
            replicated: As for `call`.
        """
        request = _Request(make(), self._replicas if replicated else 0, self._wait_timeout)
        if self._link is None:
            self._pursue(request, done)
        else:
            request.written = True
            self._link.post(request.commands, partial(self._posted, request, done))

    def _posted(self, request: _Request, done: Callable[[list[Any] | NoAnswer | LinkRefused], None], outcome: Outcome) -> None:
        answers = self._judge(request, outcome, written_before=False)
        if answers is not None:
            done(answers)
        else:
            self._pursue(request, done)

    def _pursue(self, request: _Request, done: Callable[[list[Any] | NoAnswer | LinkRefused], None]) -> None:
        async def pursue() -> None:
            try:
                outcome: list[Any] | NoAnswer | LinkRefused = await self._keep_trying(request)
            except (NoAnswer, LinkRefused) as error:
                outcome = error
            except asyncio.CancelledError:
                outcome = NoAnswer("it was closed", written=request.written)
            self._pursuit = None
            done(outcome)

        self._pursuit = asyncio.get_running_loop().create_task(pursue(), name="crossdock-redis-lane")

    async def _keep_trying(self, request: _Request) -> list[Any]:
        pause = _FIRST_PAUSE if request.reason is not None else 0.0
        while True:
            if request.is_elsewhere:
                await self._look_again()
            if pause:
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            if (answers := await self._try(request)) is not None:
                return answers
            pause = min(2 * pause, _LONGEST_PAUSE) or _FIRST_PAUSE

    async def _try(self, request: _Request) -> list[Any] | None:
        """Ask once. None: there is no good answer yet; the request knows why."""
        if self._closed:
            raise NoAnswer("it was closed", written=request.written)
        written_before = request.written
        try:
            if self._link is None:
                self._link = await self._connect()
                if self._is_closed():  # meanwhile
                    self._drop("")
                    return None
                self._up()
            request.written = True
            outcome: Outcome = await self._link.exchange(request.commands)
        except LinkBroken as error:
            outcome = error
        if isinstance(outcome, LinkRefused) and not request.written:
            self._drop(str(outcome))
            raise outcome
        return self._judge(request, outcome, written_before=written_before)

    def _judge(self, request: _Request, outcome: Outcome, *, written_before: bool) -> list[Any] | None:
        """The answers, if they are final. Else the request knows why not, and a link that is of no use is gone."""
        request.is_elsewhere = False
        if isinstance(outcome, LinkBroken):
            request.reason = outcome
            self._drop(str(outcome))
            return None
        told = request.told(outcome)
        if not request.is_for_later:
            return told if request.is_replicated(outcome) else None
        if request.is_for_later == len(told):
            request.written = written_before  # nothing was done
        if request.is_elsewhere:
            self._drop(str(request.reason))
        return None

    def _is_closed(self) -> bool:
        return self._closed

    def _give_up(self, reason: str) -> None:
        self._begin_anew()
        self._drop(reason)

    def _drop(self, reason: str) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.close()
        if reason:
            self._down(reason)

    def close(self) -> None:
        """Disconnect. A request that is under way is told that no answer came."""
        self._closed = True
        if self._pursuit is not None:
            self._pursuit.cancel()
        self._drop("")
