"""Middleware: wraps enqueues and executions, and may change, delay or refuse them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from crossdock.context import Context
from crossdock.errors import ConfigurationError

if TYPE_CHECKING:
    from crossdock.task import Outgoing

EnqueueNext = Callable[["Outgoing"], Awaitable[None]]
RunNext = Callable[[Context], Awaitable[Any]]


class Middleware:
    """Subclass it, override one method or both, and pass an instance to `App(middleware=[...])`. The first listed is outermost.

    A method that is not overridden costs nothing per message.
    """

    async def enqueue(self, outgoing: Outgoing, call_next: EnqueueNext) -> None:
        """Wrap the storing of one message.

        Args:
            outgoing: May be changed: headers, delay, priority, queue ... Its `id` may not.
            call_next: Goes on; raises what the enqueue raises. Not calling it refuses the message, so raise an error then.
        """
        await call_next(outgoing)

    async def run(self, context: Context, call_next: RunNext) -> Any:
        """Wrap one execution, in the worker's event loop, for sync handlers too.

        Args:
            context: The execution.
            call_next: Runs the handler and returns its result or raises its error.

        Returns:
            The result. Raising `Reject`, `RetryLater`, `Snooze` or any error counts as if the handler had raised it.
        """
        return await call_next(context)


def check_middleware(middleware: Iterable[object]) -> tuple[Middleware, ...]:
    """Return the middleware of an App. Raises `ConfigurationError` for what is no instance of `Middleware`, such as the class itself."""
    checked: list[Middleware] = []
    for each in middleware:
        if not isinstance(each, Middleware):
            raise ConfigurationError(f"middleware must be instances of crossdock.Middleware, and {each!r} is not")
        checked.append(each)
    return tuple(checked)


def compose_enqueue(middleware: Sequence[Middleware], innermost: EnqueueNext) -> EnqueueNext | None:
    """Return the chain around `innermost`, or None if nobody overrides `Middleware.enqueue`."""
    chain = innermost
    for each in reversed(middleware):
        if type(each).enqueue is not Middleware.enqueue:
            chain = _link(each.enqueue, chain)
    return None if chain is innermost else chain


def compose_run(middleware: Sequence[Middleware], innermost: RunNext) -> RunNext | None:
    """Return the chain around `innermost`, or None if nobody overrides `Middleware.run`."""
    chain = innermost
    for each in reversed(middleware):
        if type(each).run is not Middleware.run:
            chain = _link(each.run, chain)
    return None if chain is innermost else chain


def _link(
    outer: Callable[[Any, Callable[[Any], Awaitable[Any]]], Awaitable[Any]], inner: Callable[[Any], Awaitable[Any]]
) -> Callable[[Any], Awaitable[Any]]:
    def call(subject: Any) -> Awaitable[Any]:
        return outer(subject, inner)

    return call
