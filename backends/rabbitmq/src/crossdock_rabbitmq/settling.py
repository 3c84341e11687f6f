"""Settling: the ends of deliveries. What is stored anew is confirmed before the old message is acked, so it is nowhere at no moment."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

from crossdock.errors import BrokerError, ConfigurationError, LeaseLost, SettleUnknown
from crossdock.spi import Ack, Dead, Delivery, Nack, Refusal, Settlement
from crossdock_rabbitmq.lane import Held, Lane, State
from crossdock_rabbitmq.publisher import Fate, Outcome
from crossdock_rabbitmq.receiving import Receiving
from crossdock_rabbitmq.storing import Parcel, Storing, delay_ms

_ACK: Final = "ack"
_LEAVE_WITHIN: Final = 1.0
"""Seconds that a closing Broker takes to leave its deliveries to others."""


class Settling:
    """Ends deliveries.

    Args:
        storing: Stores what is left of them.
        now: Tells the time of leases.
        give_backs_count: Whether a give-back would count: on RabbitMQ before 4.3, and on classic queues, which call it redelivered. Then it
            is stored anew.
        buried: Called with the names of queues that got dead letters.
    """

    def __init__(
        self,
        storing: Storing,
        now: Callable[[], float],
        give_backs_count: bool,
        buried: Callable[[set[str]], None],
    ) -> None:
        self._storing = storing
        self._now = now
        self._give_backs_count = give_backs_count
        self._buried = buried
        self.receiving: Receiving

    # --- extend ---

    def extend(self, deliveries: Sequence[Delivery]) -> list[Refusal]:
        """As `Broker.extend`. Nothing is sent: for the server, a delivery is ours until it ends."""
        refusals: list[Refusal] = []
        now = self._now()
        for index, delivery in enumerate(deliveries):
            held = self._held(delivery)
            if held is None or held.state is not State.LEASED or self._is_over(held, now):
                refusals.append(Refusal(index, lease_lost(delivery)))
            else:
                held.until = now + self.receiving.lease_of(held.lane.queue)
        return refusals

    def held_for(self, deliveries: Sequence[Delivery]) -> dict[str, float]:
        """By queue, for how many seconds the oldest of these has been in our hands."""
        oldest: dict[str, float] = {}
        now = self._now()
        for held in map(self._held, deliveries):
            if held is not None:
                queue = held.lane.queue
                oldest[queue] = max(oldest.get(queue, 0.0), now - held.at)
        return oldest

    def _held(self, delivery: Delivery) -> Held | None:
        receipt = delivery.receipt
        return receipt if type(receipt) is Held and receipt.owner is self.receiving else None

    def _is_over(self, held: Held, now: float) -> bool:
        if held.until > now:
            return False
        self.receiving.expire(held)
        return True

    # --- settle ---

    async def settle(self, settlements: Sequence[Settlement]) -> list[Refusal]:
        """As `Broker.settle`."""
        with self.receiving.settling():
            return await self._settle(settlements)

    async def _settle(self, settlements: Sequence[Settlement]) -> list[Refusal]:
        refusals: list[Refusal] = []
        acks: dict[Lane, list[int]] = {}
        stores: list[tuple[int, Settlement, Held]] = []
        waits: list[tuple[int, Settlement, Held]] = []
        await self.receiving.make_sure(each.delivery.receipt for each in settlements)
        await self._make_way(settlements)
        now = self._now()
        for index, settlement in enumerate(settlements):
            held = self._held(settlement.delivery)
            if held is None:
                refusals.append(Refusal(index, lease_lost(settlement.delivery)))
            elif held.state is State.LEASED and not self._is_over(held, now):
                lane = held.lane
                if type(settlement) is Ack:
                    lane.end(held, State.SETTLED)
                    held.ending = _ACK
                    try:
                        acks[lane].append(held.tag)
                    except KeyError:
                        acks[lane] = [held.tag]
                elif (
                    type(settlement) is Nack
                    and settlement.replacement is None
                    and not settlement.delay
                    and not self._give_backs_count
                ):
                    lane.end(held, State.SETTLED)
                    held.ending = _ending(settlement)
                    lane.put_back([held.tag], counted=False)
                else:
                    held.state = State.SETTLING
                    held.ending = _ending(settlement)
                    held.settling = asyncio.get_running_loop().create_future()
                    stores.append((index, settlement, held))
            elif held.ending != _ending(settlement):
                refusals.append(Refusal(index, lease_lost(settlement.delivery)))
            elif held.state is State.SETTLING:
                waits.append((index, settlement, held))
            elif held.state is not State.SETTLED:
                refusals.append(Refusal(index, lease_lost(settlement.delivery)))
        self.receiving.ack(acks)
        if stores:
            refusals += await self._store(stores)
        for index, settlement, held in waits:
            refusals += await self._wait(index, settlement, held)
        return refusals

    async def _make_way(self, settlements: Sequence[Settlement]) -> None:
        """What is given back while nobody receives here is for others: it must not come straight back to us."""
        if not self.receiving.is_active:
            helds = [self._held(each.delivery) for each in settlements if type(each) is Nack and not each.delay]
            await self.receiving.rest({held.lane for held in helds if held is not None})

    async def _wait(self, index: int, settlement: Settlement, held: Held) -> list[Refusal]:
        """Have the outcome of the same settlement, which somebody else has said and which is under way."""
        if held.settling is not None and not held.settling.done():
            await asyncio.wait([held.settling])
        if held.state is State.SETTLED:
            return []
        return [Refusal(index, refusal.error) for refusal in await self._settle([settlement])]

    async def _store(self, stores: Sequence[tuple[int, Settlement, Held]]) -> list[Refusal]:
        parcels = [self._parcel(settlement, held) for _, settlement, held in stores]
        outcomes: dict[int, Outcome] | None = None
        refusals: list[Refusal] = []
        try:
            outcomes = await self._storing.store(parcels)
        except (BrokerError, ConfigurationError) as error:
            outcomes = dict.fromkeys(range(len(stores)), Outcome(Fate.FAILED, str(error).rstrip(".")))
        finally:
            if outcomes is None:  # cancelled: perhaps it is stored, and it is still ours to say so again
                outcomes = dict.fromkeys(range(len(stores)), Outcome(Fate.UNKNOWN, "the call was cancelled"))
            refusals = self._finish(stores, outcomes)
        return refusals

    def _finish(self, stores: Sequence[tuple[int, Settlement, Held]], outcomes: dict[int, Outcome]) -> list[Refusal]:
        refusals: list[Refusal] = []
        acks: dict[Lane, list[int]] = {}
        buried: set[str] = set()
        for number, (index, settlement, held) in enumerate(stores):
            outcome = outcomes.get(number)
            if outcome is None:
                if held.state is State.SETTLING:
                    held.lane.end(held, State.SETTLED)
                    acks.setdefault(held.lane, []).append(held.tag)
                else:  # the old message is on its way to somebody else; the new one is stored all the same
                    held.state = State.SETTLED
                if type(settlement) is Dead:
                    buried.add(held.lane.queue)
            else:
                refusals.append(Refusal(index, _not_settled(settlement.delivery, held, outcome)))
                held.ending = None
                if held.state is State.SETTLING:
                    held.state = State.LEASED
            if held.settling is not None:
                held.settling.set_result(None)
                held.settling = None
        self.receiving.ack(acks, moved=True)
        if buried:
            self._buried(buried)
        return refusals

    def _parcel(self, settlement: Settlement, held: Held) -> Parcel:
        match settlement:
            case Nack(delay=delay, replacement=None):
                return self._storing.parcel(held.message, delay_ms(delay), held.count - 1)
            case Nack(delay=delay, replacement=replacement):
                assert replacement is not None
                return self._storing.parcel(replacement, delay_ms(delay))
            case Dead(letter=letter):
                return self._storing.letter(letter)
            case _:
                raise TypeError(settlement)

    # --- give back ---

    async def give_back(self, helds: Sequence[Held]) -> None:
        """Have messages that no receive returned delivered again, with their counts unchanged."""
        helds = [held for held in helds if held.state is State.BUFFERED]
        counted = [held for held in helds if self._give_backs_count]
        for held in helds:
            if not self._give_backs_count:
                held.lane.end(held, State.SETTLED)
                held.lane.put_back([held.tag], counted=False)
        if counted:
            await self._store_again([(held, self._storing.parcel(held.message, 0, held.count - 1)) for held in counted])

    async def leave(self, helds: Sequence[Held]) -> None:
        """Have messages delivered again when the leases are over that their holder does not care for any more."""
        now = self._now()
        parcels = [(held, self._storing.parcel(held.message, round((held.until - now) * 1000) + 40, held.count)) for held in helds]
        try:
            async with asyncio.timeout(_LEAVE_WITHIN):
                await self._store_again(parcels)
        except TimeoutError:
            pass

    async def _store_again(self, parcels: Sequence[tuple[Held, Parcel]]) -> None:
        for held, _ in parcels:
            held.state = State.SETTLING
        try:
            outcomes = await self._storing.store([parcel for _, parcel in parcels], create=False)
        except (BrokerError, ConfigurationError) as error:
            outcomes = dict.fromkeys(range(len(parcels)), Outcome(Fate.FAILED, str(error)))
        acks: dict[Lane, list[int]] = {}
        for number, (held, _) in enumerate(parcels):
            if held.state is not State.SETTLING:
                continue
            held.lane.end(held, State.LOST)
            if number in outcomes:  # the server counts it, which is allowed, and loses nothing, which is not
                held.lane.put_back([held.tag], counted=True)
            else:
                acks.setdefault(held.lane, []).append(held.tag)
        self.receiving.ack(acks, moved=True)


def _ending(settlement: Settlement) -> object:
    """What makes two settlements the same."""
    match settlement:
        case Nack(delay=delay, replacement=replacement):
            return (delay, replacement)
        case Dead(letter=letter):
            return letter
        case _:
            return _ACK


def lease_lost(delivery: Delivery) -> LeaseLost:
    """The error for a delivery that is not ours any more."""
    message = delivery.message
    return LeaseLost(
        f"The lease on message {message.id!r} of queue {message.queue!r} is over: it was settled, given to somebody else, or never ours."
    )


def _not_settled(delivery: Delivery, held: Held, outcome: Outcome) -> LeaseLost | SettleUnknown:
    message = delivery.message
    if held.state is State.LOST and outcome.fate is not Fate.UNKNOWN:
        return lease_lost(delivery)
    return SettleUnknown(
        f"Message {message.id!r} of queue {message.queue!r} is perhaps not settled: {outcome.why}. Settle it again."
    )
