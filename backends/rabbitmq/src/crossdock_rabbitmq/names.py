"""Names: what everything is called in the server. Pure.

All names of a namespace begin with `cd.<namespace>.`, those that all namespaces of a virtual host share with `cd.delay`; a point can stand
in neither a namespace nor a queue.
"""

from __future__ import annotations

import re
from typing import Final

from crossdock.spi import Priority

DELAY_IN: Final = "cd.delay"
"""The exchange by which a message enters the delay."""
DELAY_OUT: Final = "cd.delay.out"
"""The exchange by which it leaves it."""
LOST: Final = "cd.delay.lost"
"""Exchange and queue for what fell due when its queue was gone."""


_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")


def is_name(text: str) -> bool:
    """Whether a queue may be called so."""
    return _NAME.fullmatch(text) is not None


def ready(namespace: str, queue: str, priority: Priority) -> str:
    """The queue of one level."""
    return f"cd.{namespace}.q.{queue}.p{priority:d}"


def dead(namespace: str, queue: str) -> str:
    """The queue of dead letters."""
    return f"cd.{namespace}.dead.{queue}"


def dead_lock(namespace: str, queue: str) -> str:
    """The exclusive queue whose owner may look at the dead letters."""
    return f"cd.{namespace}.dead.{queue}.lock"


def queue_lock(namespace: str, queue: str) -> str:
    """The exclusive queue whose owner may make and delete the queues of a queue."""
    return f"cd.{namespace}.q.{queue}.lock"


def delay_level(level: int) -> str:
    """The queue in which messages wait for 125 ms << level."""
    return f"cd.delay.{level}"


def delay_hop(level: int) -> str:
    """The exchange that takes what has waited there."""
    return f"cd.delay.x{level}"


def due_key(namespace: str, queue: str, priority: Priority) -> str:
    """The end of a routing key in the delay: where the message is to go."""
    return f"{namespace}.{queue}.p{priority:d}"
