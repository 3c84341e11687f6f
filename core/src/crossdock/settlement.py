"""Settler: brings endings to the broker, in batches, until they are there. Lives in the broker's loop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from crossdock.batching import Batcher
from crossdock.errors import BrokerClosed, CrossdockError, LeaseLost, SettleUnknown
from crossdock.spi import Broker, Clock, Dead, Delivery, Nack, Settlement

RETRY_PAUSE: Final = 0.2
"""Seconds between attempts while the broker is away. Settling again is harmless: it is idempotent per receipt."""

_log = logging.getLogger("crossdock.worker")


class Settler:
    """Settles in batches, by the rule of `batching`.

    Args:
        broker: Open, in this loop.
        settled: Told of deliveries whose ending the broker has, or will never take.
        refused: Told of every delivery whose ending was refused because its lease was lost.
        clock: For pauses.
    """

    def __init__(
        self, broker: Broker, *, settled: Callable[[Iterable[Delivery]], None], refused: Callable[[Delivery], None], clock: Clock
    ) -> None:
        self._broker = broker
        self._settled = settled
        self._refused = refused
        self._clock = clock
        self._batcher: Batcher[Settlement] = Batcher(self._flush, _size)
        self._giving_up = False

    def settle(self, settlements: Sequence[Settlement]) -> None:
        """Take endings; they are sent at once, or with the next batch."""
        self._batcher.extend(settlements)

    async def drained(self) -> None:
        """Return when every ending taken so far is with the broker."""
        await self._batcher.drained()

    def give_up(self) -> None:
        """The worker has to end: a failed attempt is not repeated any more. What was not settled is delivered again."""
        self._giving_up = True

    async def _flush(self, batch: list[Settlement]) -> None:
        while batch:
            try:
                refusals = await self._broker.settle(batch)
            except BrokerClosed:
                _log.error("%d tasks ended and could not be settled any more; they will be delivered again", len(batch))
                break
            except CrossdockError as error:
                if self._giving_up:
                    _log.error("%d tasks ended and could not be settled; they will be delivered again: %s", len(batch), error)
                    break
                await self._clock.sleep(RETRY_PAUSE)
                continue
            except Exception:
                _log.exception("the backend failed to settle %d tasks; they will be delivered again", len(batch))
                break
            again: set[int] = set()
            for refusal in refusals:
                if isinstance(refusal.error, SettleUnknown) and not self._giving_up:
                    again.add(refusal.index)
                else:
                    self._explain(batch[refusal.index], refusal.error)
            self._settled([settlement.delivery for index, settlement in enumerate(batch) if index not in again])
            batch = [batch[index] for index in sorted(again)]
        self._settled([settlement.delivery for settlement in batch])

    def _explain(self, settlement: Settlement, error: CrossdockError) -> None:
        message = settlement.delivery.message
        if isinstance(error, LeaseLost):
            _log.warning(
                "message %s of queue %r ended after its lease was lost; it was, or will be, delivered again",
                message.id,
                message.queue,
            )
            self._refused(settlement.delivery)
        else:
            _log.error(
                "message %s of queue %r could not be settled; it will be delivered again: %s", message.id, message.queue, error
            )


def _size(settlement: Settlement) -> int:
    if isinstance(settlement, Nack) and settlement.replacement is not None:
        return len(settlement.replacement.body)
    if isinstance(settlement, Dead):
        return len(settlement.letter.message.body) + len(settlement.letter.story)
    return 64
