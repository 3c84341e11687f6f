"""Every error crossdock raises, in one tree.

    CrossdockError
    ├── ConfigurationError          the program or its settings are wrong; nothing was sent
    │   ├── InvalidName             a namespace, queue, id or task name breaks the rule it names
    │   ├── InvalidTask             a function cannot be a task
    │   ├── AppNotFound             `module:attribute` leads to no App
    │   ├── UnknownBackend          no installed backend serves the URL's scheme
    │   ├── BackendLoadError        a backend is installed and cannot be used
    │   └── SyncInAsyncContext      a `_sync` call inside a running event loop
    ├── BrokerError                 the broker, or the way to it
    │   ├── BrokerUnavailable       nothing was attempted: no connection, or refused
    │   ├── BrokerClosed            nothing was attempted: the Broker is not open
    │   ├── UnsupportedCapability   nothing was attempted: this broker cannot do it
    │   ├── EnqueueError
    │   │   ├── EnqueueFailed       certainly not stored
    │   │   │   ├── QueueFull       the queue is at its `max_ready`
    │   │   │   └── MessageTooLarge the encoded message is over the limit
    │   │   ├── EnqueueUnknown      it may be stored: written, and no answer came
    │   │   └── EnqueueManyError    some of a batch were not stored; says which
    │   ├── LeaseLost               the delivery belongs to somebody else by now
    │   ├── SettleUnknown           the settlement was written, and no answer came
    │   ├── NotFound                no such message in that state
    │   └── QueueHeld               another caller holds this queue's dead letters
    ├── TaskError                   about one task
    │   ├── UnknownTask             no task of that name is registered
    │   ├── InvalidArguments        the arguments do not fit the function
    │   ├── TaskTimeout             the handler ran longer than its timeout
    │   └── TaskCancelled           the handler was cancelled from outside crossdock
    └── CodecError                  bytes that are no envelope of ours
        ├── Undecodable             not MessagePack or JSON, or not an envelope, or over a limit
        └── UnsupportedVersion      an envelope of a newer major version

Every text says what happened, where, and what to do. No text carries a password: URLs are redacted before they get here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from crossdock.spi.values import Message


class CrossdockError(Exception):
    """The root of every error raised by crossdock."""


# --- the program or its settings ---------------------------------------------------------------


class ConfigurationError(CrossdockError):
    """The program or its settings are wrong. Nothing was sent anywhere."""


class InvalidName(ConfigurationError):
    """A namespace, queue, message id or task name breaks the rule that the text states."""


class InvalidTask(ConfigurationError):
    """A function cannot be registered as a task, or its annotations cannot be used."""


class AppNotFound(ConfigurationError):
    """`module:attribute` or `path.py:attribute` does not lead to an App."""


class UnknownBackend(ConfigurationError):
    """No installed backend serves the scheme of the broker URL."""


class BackendLoadError(ConfigurationError):
    """A backend plugin is installed but cannot be used: it fails to import, is incomplete or speaks another API version."""


class SyncInAsyncContext(ConfigurationError):
    """A `_sync` method was called where an event loop is running; await its asynchronous twin instead."""


# --- the broker ---------------------------------------------------------------------------------


class BrokerError(CrossdockError):
    """The broker, or the way to it, failed."""


class BrokerUnavailable(BrokerError):
    """Nothing was attempted: the broker cannot be reached, refuses us, or is busy beyond the deadline."""


class BrokerClosed(BrokerError):
    """Nothing was attempted: the Broker was not opened yet, or is closed."""


class UnsupportedCapability(BrokerError):
    """Nothing was attempted: this broker cannot do what was asked. The text names the capability and what would give it."""


class EnqueueError(BrokerError):
    """An enqueue did not end with "stored"."""

    def __init__(self, text: str, message: Message | None = None) -> None:
        super().__init__(text)
        self.message = message
        """The message concerned, or None where there is no single one."""


class EnqueueFailed(EnqueueError):
    """The message is certainly not stored and will never run."""


class QueueFull(EnqueueFailed):
    """The queue holds its `max_ready` messages. The message is certainly not stored."""


class MessageTooLarge(EnqueueFailed):
    """The encoded message is larger than the limit. Nothing was sent."""


class EnqueueUnknown(EnqueueError):
    """The message may be stored: it was written and no answer came."""

    def __init__(self, text: str, message: Message | None = None, *, safe_to_repeat: bool = False) -> None:
        super().__init__(text, message)
        self.safe_to_repeat = safe_to_repeat
        """True if enqueuing the same message (same id) again cannot store it twice on this broker."""


class EnqueueManyError(EnqueueError):
    """Some messages of a batch were not stored, or may not be."""

    def __init__(self, stored: Sequence[str], failed: Sequence[EnqueueFailed], unknown: Sequence[EnqueueUnknown]) -> None:
        first = (*failed, *unknown)[0]
        super().__init__(
            f"{len(stored)} messages were stored, {len(failed)} certainly not, {len(unknown)} perhaps; the first: {first}"
        )
        self.stored = stored
        """Ids of the messages that are stored."""
        self.failed = failed
        """One error for each message that is certainly not stored; each carries its message."""
        self.unknown = unknown
        """One error for each message that may be stored; each carries its message."""


class LeaseLost(BrokerError):
    """The lease on this delivery is over: its message was delivered to somebody else since, was settled otherwise, or was never ours."""


class SettleUnknown(BrokerError):
    """The settlement was written and no answer came. Settling the same delivery again is safe."""


class NotFound(BrokerError):
    """No message with this id is in that state in that queue."""


class QueueHeld(BrokerError):
    """Another caller is reading this queue's dead letters, and this broker serves one at a time. Try again later."""


# --- one task -----------------------------------------------------------------------------------


class TaskError(CrossdockError):
    """Something about one task."""


class UnknownTask(TaskError):
    """No task of this name is registered with the App."""


class InvalidArguments(TaskError):
    """The arguments do not fit the task's signature. The text names the parameter."""


class TaskTimeout(TaskError):
    """The handler ran longer than its timeout and was cancelled or abandoned."""


class TaskCancelled(TaskError):
    """The handler ended with `asyncio.CancelledError` though crossdock had not cancelled it."""


# --- bytes --------------------------------------------------------------------------------------


class CodecError(CrossdockError):
    """Bytes that cannot be read as an envelope."""


class Undecodable(CodecError):
    """The bytes are not MessagePack or JSON, are no envelope, or exceed a limit on size, depth or count."""


class UnsupportedVersion(CodecError):
    """The envelope has a newer major version than this crossdock reads."""
