"""crossdock: a task queue for Python that runs on the broker you already have.

    from crossdock import App

    app = App("sqlite:///tasks.db")

    @app.task
    async def greet(name: str) -> None:
        print(f"Hello, {name}!")

`await greet.enqueue("Ada")` stores a call; `crossdock worker run module:app` runs it.
"""

import logging

from crossdock.app import App
from crossdock.context import Context, current_context
from crossdock.errors import (
    AppNotFound,
    BackendLoadError,
    BrokerClosed,
    BrokerError,
    BrokerUnavailable,
    CodecError,
    ConfigurationError,
    CrossdockError,
    EnqueueError,
    EnqueueFailed,
    EnqueueManyError,
    EnqueueUnknown,
    InvalidArguments,
    InvalidName,
    InvalidTask,
    LeaseLost,
    MessageTooLarge,
    NotFound,
    QueueFull,
    QueueHeld,
    SettleUnknown,
    SyncInAsyncContext,
    TaskCancelled,
    TaskError,
    TaskTimeout,
    Undecodable,
    UnknownBackend,
    UnknownTask,
    UnsupportedCapability,
    UnsupportedVersion,
)
from crossdock.events import Event, EventName
from crossdock.middleware import EnqueueNext, Middleware, RunNext
from crossdock.outcome import Reject, RetryLater, Snooze, TaskOutcome
from crossdock.queues import Queue
from crossdock.retry import RetryPolicy
from crossdock.spi import Priority
from crossdock.task import AsyncTask, Handle, Options, Outgoing, SyncTask, Task
from crossdock.worker import Worker, WorkerOptions, WorkerReport

__version__ = "0.1.0"

# A library stays silent until the program configures logging; worker processes do (crossdock.logs).
logging.getLogger("crossdock").addHandler(logging.NullHandler())

__all__ = [
    # the program
    "App",
    "AsyncTask",
    "Context",
    "Handle",
    "Options",
    "Outgoing",
    "Priority",
    "Queue",
    "Reject",
    "RetryLater",
    "RetryPolicy",
    "Snooze",
    "SyncTask",
    "Task",
    "TaskOutcome",
    "current_context",
    # around it
    "EnqueueNext",
    "Event",
    "EventName",
    "Middleware",
    "RunNext",
    "Worker",
    "WorkerOptions",
    "WorkerReport",
    # errors
    "AppNotFound",
    "BackendLoadError",
    "BrokerClosed",
    "BrokerError",
    "BrokerUnavailable",
    "CodecError",
    "ConfigurationError",
    "CrossdockError",
    "EnqueueError",
    "EnqueueFailed",
    "EnqueueManyError",
    "EnqueueUnknown",
    "InvalidArguments",
    "InvalidName",
    "InvalidTask",
    "LeaseLost",
    "MessageTooLarge",
    "NotFound",
    "QueueFull",
    "QueueHeld",
    "SettleUnknown",
    "SyncInAsyncContext",
    "TaskCancelled",
    "TaskError",
    "TaskTimeout",
    "Undecodable",
    "UnknownBackend",
    "UnknownTask",
    "UnsupportedCapability",
    "UnsupportedVersion",
    "__version__",
]
