"""The interface between core and a backend: twelve verbs on `Broker`.

The docstrings are the specification; the conformance suite proves each sentence of them. Rules for all verbs:

- **Loop.** A Broker belongs to the event loop that opened it. Verbs may run concurrently there, `receive` once at a time.
- **Batches.** A verb that takes several items returns one `Refusal` per item that was not done; an empty result means that every
  item was done. Items are independent: one refused item never holds up another. An empty batch does nothing.
- **Raising.** A verb raises only if *nothing* was attempted: `BrokerClosed` before `open` and after `close`, `BrokerUnavailable`
  when there is no connection, `UnsupportedCapability` for what `capabilities` declares unsupported. No foreign exception escapes;
  the driver's own is kept as `__cause__`. No text carries a secret.
- **Cancelling** a verb means that the outcome of every item is unknown; nothing is torn: each item was done or was not.
- **No policy.** A backend knows "again, not before" and "to the dead letters, with this letter". Weights, retries, expiry, timeouts
  and limits are core's.
- **Reconnecting**, for ever and with jitter, is the backend's; it reports `Disconnected` and `Connected`. Queues that were declared
  are declared again when the server lost them, reported once as `StateLost`.

The life of a message::

                 eta in future                due
    enqueue ───────────────▶ SCHEDULED ───────────────▶ READY ──receive──▶ LEASED
       │                         ▲                        ▲                  │
       └──── eta now ────────────┼───────────────▶ READY  │                  ├─ Ack ──▶ gone
                                 │                        │                  ├─ Nack ─▶ READY or SCHEDULED
                                 └────── delay ───────────┼──────────────────┤
                                                          │                  ├─ Dead ─▶ DEAD
                                                          └─ lease expired ──┘
    DEAD ──replay──▶ READY or SCHEDULED          DEAD ──remove, purge, retention──▶ gone
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from crossdock.spi.capabilities import Capabilities
from crossdock.spi.values import (
    Cursor,
    Delivery,
    Lane,
    Message,
    Page,
    QueueSpec,
    QueueStats,
    Refusal,
    Replay,
    Settlement,
    State,
)


class Broker(ABC):
    """One connection, or a few, to one broker, in one event loop."""

    capabilities: Capabilities
    """Set by `open()`; probed, not assumed."""

    # --- life ---

    @abstractmethod
    async def open(self) -> None:
        """Connect, probe the server and set `capabilities`. A second call while open does nothing.

        A closed Broker may be opened again.

        Raises:
            BrokerUnavailable: The broker cannot be reached or refuses us. Nothing is left open.
            ConfigurationError: The URL or the server's setup cannot work, e.g. a read-only folder.
        """

    @abstractmethod
    async def close(self) -> None:
        """Disconnect. Idempotent, and harmless before `open`.

        A waiting `receive` returns with what it has, else raises `BrokerClosed`. Whatever was handed over by the server but never
        returned by `receive` is given back with its count unchanged. Deliveries that were returned keep their leases and run out.
        """

    @abstractmethod
    async def declare(self, queues: Sequence[QueueSpec]) -> None:
        """Make queues known, or change their settings. Idempotent; the last declaration of a name wins.

        New settings hold for receives, extensions and enqueues from now on; messages already stored stay. Retention is applied at
        the next dead letter and at the next look at the queue (`stats`, `peek`).
        """

    # --- messages in ---

    @abstractmethod
    async def enqueue(self, messages: Sequence[Message]) -> Sequence[Refusal]:
        """Store messages, durably in the class of `capabilities.survives`, before returning.

        A message with `eta_ms` in the future or `delay_ms` > 0 becomes SCHEDULED, any other READY, behind those of its level.
        A queue needs no declaration. If the queue already holds the id, in any state, at the same or a later generation, the item
        counts as done and changes nothing; at an earlier generation it is refused with `EnqueueFailed`.

        Refusals:
            QueueFull: The queue has `max_ready` READY messages. SCHEDULED ones are accepted, and become READY beyond the limit.
            MessageTooLarge: The body is larger than `capabilities.max_body`.
            EnqueueFailed: Certainly not stored; so too where the priority is none of `LEVELS`, or the due time is farther away than
                `capabilities.delay_longest`.
            EnqueueUnknown: Perhaps stored: it was written, and no answer came.
        """

    # --- deliveries ---

    @abstractmethod
    async def receive(self, lanes: Sequence[Lane], limit: int, wait: float) -> Sequence[Delivery]:
        """Take up to `limit` READY messages under a lease.

        Pass 1 takes up to `quota` from each lane, in the order of `lanes`; pass 2 fills up to `limit`, again lane by lane in order.
        Within a lane the oldest comes first; what was returned, retried or redelivered may come earlier or later. Lanes with quota
        0 are passed too: the set of lanes is the set of subscriptions. A push backend sizes its credit by the quotas it could not fill.

        Due SCHEDULED messages and messages whose lease expired become READY in time for this call: never before their due time,
        at most `capabilities.delay_lateness` after it while a receive waits.

        Each delivery carries two facts for core's counters: `message` (whose envelope holds the *attempt*) and `delivery_count`,
        the hand-overs since the message was last stored less those given back by `Nack` without replacement. Only a lost lease
        raises it. It may over-count, never under-count, unless `StateLost` was reported.

        Args:
            lanes: At least one; each (queue, priority) at most once.
            limit: Most deliveries to return, at least 1.
            wait: Seconds to wait for a first delivery; 0 = look once. Returns as soon as there is any, `()` after `wait`.

        Cancelling it loses nothing: what was taken for a cancelled call is given back with its count unchanged.
        """

    @abstractmethod
    async def extend(self, deliveries: Sequence[Delivery]) -> Sequence[Refusal]:
        """Renew leases: each runs for its queue's `lease` from now. `Delivery.lease_until` of the value passed does not change:
        the caller reckons its own time from *before* this call, less the same margin.

        Refusals:
            LeaseLost: Settled, expired and taken over, or never ours. A lease that expired and was not taken over may be renewed:
                nobody else has the message.
        """

    @abstractmethod
    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[Refusal]:
        """End deliveries. Idempotent per receipt: the same settlement again counts as done.

        Replacements and dead letters are stored as durably as an enqueue before it returns, in one step with the end of the delivery
        or before it: at no moment does the message exist nowhere. An `Ack` may be lost with the connection after this returned; the
        message then comes back as a delivery with a higher count.

        Refusals:
            LeaseLost: Somebody else has, or had, the message since, or this delivery was settled otherwise; nothing was changed. A
                lease that expired and was not taken over may be accepted: nobody else has the message.
            SettleUnknown: Written, and no answer came; settle it again.
        """

    # --- looking and repairing ---

    @abstractmethod
    async def stats(self, queues: Sequence[str] | None = None) -> Sequence[QueueStats]:
        """Count messages by state. Changes nothing, takes no lease, disturbs no order.

        Args:
            queues: Names to look at, answered in this order; an unknown one has zeros. None: every queue of the namespace that was
                declared or ever held a message, by name; `UnsupportedCapability` where `capabilities.list_queues` says so.
        """

    @abstractmethod
    async def peek(
        self, queue: str, state: State, *, ids: Sequence[str] = (), after: Cursor | None = None, limit: int = 100
    ) -> Page:
        """Show stored messages without taking them. Changes nothing, however often.

        READY: most urgent level first, then in order of delivery. SCHEDULED: by due time. LEASED: by end of lease. DEAD: by time
        of death, then id, with their letters.

        Args:
            ids: Only these; those that are not there are left out of the page. Then `after` and `limit` do not count.
            after: `Page.next` of the page before. An entry that stays put is shown exactly once over a listing, whatever comes
                and goes meanwhile.
            limit: Most entries in the page, 1 to 1,000.

        Raises:
            ConfigurationError: `after` is no cursor of this listing.
            QueueHeld: Another caller holds the queue's dead letters, where a server serves one at a time.
            UnsupportedCapability: The state is not in `capabilities.listable`.
        """

    @abstractmethod
    async def remove(self, queue: str, state: State, ids: Sequence[str]) -> Sequence[Refusal]:
        """Delete messages by id.

        Refusals:
            NotFound: It is not in this state now.

        Raises:
            UnsupportedCapability: The state is not in `capabilities.removable`.
        """

    @abstractmethod
    async def replay(self, queue: str, replays: Sequence[Replay]) -> Sequence[Refusal]:
        """Bring dead letters of `queue` back to life: store each new message, durably, then remove the letter; never the reverse.

        The new message may go to another queue and may be due later. Where the target already holds the id at the same or a later
        generation (the letter itself does not count), only the letter is removed. Interrupted and repeated, nothing is lost and,
        where the backend deduplicates, nothing doubled; elsewhere what was in flight may be stored twice under one (id, generation).

        Refusals:
            NotFound: No such dead letter (any more).
            EnqueueFailed, EnqueueUnknown: As for `enqueue`; the letter is still there. `max_ready` does not hold back a replay.
        """

    @abstractmethod
    async def purge(self, queue: str, state: State) -> int:
        """Delete every message of the queue that is in this state now, and return how many. Never touches LEASED ones;
        a message that becomes LEASED meanwhile stays.

        Raises:
            UnsupportedCapability: The state is not in `capabilities.purgeable`.
        """


@runtime_checkable
class SupportsErase(Protocol):
    """A Broker that can also make queues disappear. Optional, and found by `isinstance`: for tests, and for tenants that leave."""

    async def erase(self, queues: Sequence[str]) -> None:
        """Delete queues of the namespace: every message in whatever state, every letter, all that was declared and counted.

        Deliveries of theirs are lost, as if their leases were over. A queue that does not exist is no error. What is enqueued or
        declared meanwhile, by anybody, may bring a queue back.

        Raises:
            BrokerClosed, BrokerUnavailable: Nothing was attempted.
        """
