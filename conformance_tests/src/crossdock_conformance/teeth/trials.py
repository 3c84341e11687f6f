"""Every broken broker, the scenario that is there to find it out, and how to see that it does."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from crossdock.spi import Broker, BrokerSettings
from crossdock_conformance.running import run
from crossdock_conformance.scenario import Scenario, all_scenarios
from crossdock_conformance.target import Target
from crossdock_conformance.teeth import broken, connection
from crossdock_conformance.teeth.connection import FarAway, Switch
from crossdock_conformance.teeth.honest import Honest


@dataclass(frozen=True)
class Broken:
    """A broken broker and the scenario that is there to find it out."""

    kind: type[Honest]
    convicted_by: str
    """Id of the scenario."""

    @property
    def name(self) -> str:
        """Of the class."""
        return self.kind.__name__

    @property
    def fault(self) -> str:
        """What is wrong with it, in a sentence."""
        return (self.kind.__doc__ or "").partition("\n")[0]


BROKEN: Final = (
    Broken(broken.DropsOneIn500, "delivery.ten_thousand_to_fifty_receivers"),
    Broken(broken.StoresTwice, "deduplication.stored_again_counts_as_done"),
    Broken(broken.ComesEarly, "delay.never_early"),
    Broken(broken.LosesSightOfWhatFallsDue, "delay.due_messages_are_somewhere_at_every_moment"),
    Broken(broken.AcksAtReceive, "redelivery.expired_lease_is_delivered_again"),
    Broken(broken.IgnoresReceipts, "redelivery.late_settlements_are_refused"),
    Broken(broken.ForgetsLeases, "redelivery.extended_lease_lives_on"),
    Broken(broken.CountsGiveBacks, "settlement.give_back_keeps_bytes_and_count"),
    Broken(broken.CountsNoLosses, "redelivery.expired_lease_is_delivered_again"),
    Broken(broken.DeliversTheNewestFirst, "delivery.first_in_first_out"),
    Broken(broken.LosesTheCancelled, "delivery.cancelled_receive_loses_nothing"),
    Broken(broken.IgnoresQuotas, "priority.first_pass_takes_quotas"),
    Broken(broken.LosesPriorityOnRetry, "settlement.replacement_may_change_its_level"),
    Broken(broken.ListingConsumes, "dead_letters.hundred_listings_change_nothing"),
    Broken(broken.ReplayRemovesFirst, "dead_letters.cut_replays_are_completed_by_a_repeat"),
    Broken(broken.StatsOffByOne, "stats.each_state_is_counted_apart"),
    Broken(broken.LeaksNamespaces, "namespaces.queues_are_apart"),
    Broken(broken.SecondCloseHangs, "lifecycle.open_and_close_any_number_of_times"),
    Broken(broken.ForeignExceptions, "errors.absurd_messages_are_stored_or_refused"),
    Broken(broken.DeniesWhatItDoes, "stats.all_queues_are_named"),
    Broken(connection.CallsUnknownFailed, "restarts.failed_enqueues_never_arrive"),
    Broken(connection.SwallowsErrors, "restarts.stream"),
    Broken(connection.GoesDeaf, "restarts.many_restarts_leave_no_deaf_receiver"),
)


def target_of(kind: type[Honest], patience: float = 10.0) -> Target:
    """A target whose Brokers are of this kind, with a store of their own."""
    url = f"memory://teeth-{random.getrandbits(53)}"
    if not issubclass(kind, FarAway):
        return Target(url, create=kind, patience=patience)
    switch = Switch()
    create: Callable[[BrokerSettings], Broker] = lambda settings: kind(settings, switch)  # noqa: E731
    return Target(url, create=create, server=switch, cut=switch.cut, real_time=True, patience=patience)


class Trial(NamedTuple):
    """How a broken broker fared."""

    accused: Broken
    scenario: str
    """Id of the one that found it out, or that should have."""
    grounds: str
    """What the scenario said; "" if the broker got away."""


def trials() -> Iterator[Trial]:
    """Try every broken broker, each by the scenario that is there for it."""
    for accused in BROKEN:
        meant = meant_for(accused)
        found = ((each, _grounds(accused, each)) for each in meant)
        scenario, grounds = next(((each, grounds) for each, grounds in found if grounds), (meant[0], ""))
        yield Trial(accused, scenario.id, grounds)


def meant_for(accused: Broken) -> list[Scenario]:
    """The cases of the scenario that is there to find it out."""
    meant = [each for each in all_scenarios() if accused.convicted_by in (each.id, f"{each.group}.{each.name}")]
    assert meant, f"there is no scenario {accused.convicted_by}"
    return meant


def _grounds(accused: Broken, scenario: Scenario) -> str:
    try:
        run(scenario, target_of(accused.kind, patience=2.0))
    except Exception as error:
        return str(error).partition("\n")[0] or type(error).__name__
    return ""
