"""Namespaces and names: nothing of one queue shows in another, however alike their names are."""

from __future__ import annotations

from crossdock.errors import LeaseLost, NotFound
from crossdock.spi import Ack, Broker, QueueSpec, State, SupportsErase
from crossdock_conformance.lab import Lab
from crossdock_conformance.scenario import BY_ID, LIST_QUEUES, scenario

_Name = tuple[str, str]
"""A queue: what follows the lab's own name in that of its namespace, and its name there."""

_PAIRS: dict[str, tuple[_Name, _Name]] = {
    "namespaces": (("-a", "q"), ("-b", "q")),
    "joined by a dash": (("-a", "b-c"), ("-a-b", "c")),
    "joined by an underscore": (("_a", "b_c"), ("_a_b", "c")),
    "joined by nothing": (("a", "bc"), ("ab", "c")),
    "case of namespaces": (("-a", "q"), ("-A", "q")),
    "case of queues": (("-a", "q"), ("-a", "Q")),
    "a prefix among namespaces": (("", "q"), ("-q", "q")),
    "a prefix among queues": (("-a", "q"), ("-a", "qq")),
    "dash and underscore": (("-a", "b-c"), ("-a", "b_c")),
    "named after a state": (("-a", "q"), ("-a", "q-dead")),
    "another state": (("-a", "ready"), ("-a-ready", "ready")),
    "namespaces named after states": (("-a", "dead"), ("-a-dead", "dead")),
    "named after a level": (("-a", "q"), ("-a", "q-9")),
    "another level": (("-a", "p0"), ("-a-p0", "0")),
    "named q": (("-q", "q"), ("-q-q", "q")),
    "ends with a dash": (("-a", "b"), ("-a-", "b")),
    "digits": (("-1", "1"), ("-1", "01")),
    "longest names": (("x" * 46, "y" * 63), ("x" * 45 + "z", "y" * 63)),
    "longest queues": (("-a", "y" * 63), ("-a", "y" * 62 + "z")),
}
"""Two queues that somebody might take for one, by what is alike in them."""


@scenario(names=_PAIRS)
async def queues_are_apart(lab: Lab, names: tuple[_Name, _Name]) -> None:
    """What is in one queue is not received, seen, counted, removed, replayed or purged in another, however alike their names."""
    (our_space, ours), (their_space, theirs) = names
    us, them = await lab.open(our_space, []), await lab.open(their_space, [])
    filled = await lab.fill(us, 2, ours)
    await lab.holds(them, {}, theirs)
    assert not await lab.take(them, queue=theirs)
    for state, ids in filled.items():
        if state in lab.capabilities.listable and BY_ID.declared(lab.capabilities):
            assert not (await them.peek(theirs, state, ids=ids)).entries
        if state in lab.capabilities.removable:
            assert lab.errors(await them.remove(theirs, state, ids)) == {0: NotFound, 1: NotFound}
        if state in lab.capabilities.purgeable:
            assert await them.purge(theirs, state) == 0
    replays = [lab.revived(lab.message(id, theirs)) for id in filled[State.DEAD]]
    assert lab.errors(await them.replay(theirs, replays)) == {0: NotFound, 1: NotFound}
    if LIST_QUEUES.declared(lab.capabilities):
        assert theirs not in [stats.queue for stats in await them.stats()]
    await lab.holds(us, filled, ours, in_order=False)


@scenario(names=_PAIRS)
async def queues_go_their_own_ways(lab: Lab, names: tuple[_Name, _Name]) -> None:
    """Two queues may hold the same ids, in other states, under other settings; whatever becomes of the one, the other stays as it is."""
    (our_space, ours), (their_space, theirs) = names
    us, them = await lab.open(our_space, []), await lab.open(their_space, [])
    filled = await lab.fill(us, 2, ours)
    await lab.declare(them, QueueSpec(theirs, lease=1.0, max_ready=0, dead_max_count=0, dead_max_age=0.0))
    await lab.holds(us, filled, ours, in_order=False)
    await lab.declare(them, QueueSpec(theirs))
    swapped = [lab.message(id, theirs) for id in (*filled[State.LEASED], *filled[State.READY], *filled[State.DEAD])]
    await lab.enqueue(them, *swapped)
    taken = await lab.take_exactly(them, 4, theirs)
    await lab.settle(them, *(lab.dead(delivery) for delivery in taken[:2]), *map(Ack, taken[2:]))
    expected = {State.READY: filled[State.DEAD], State.DEAD: filled[State.LEASED]}
    await lab.holds(them, expected, theirs)
    await lab.holds(us, filled, ours, in_order=False)
    await lab.replay(them, *(lab.revived(message) for message in swapped[:2]), queue=theirs)
    for state in lab.capabilities.purgeable:
        await them.purge(theirs, state)
    if isinstance(them, SupportsErase):
        await them.erase([theirs])
    await lab.holds(us, filled, ours, in_order=False)
    await lab.settle(us, *map(Ack, await lab.take_exactly(us, 2, ours)))
    del filled[State.READY]
    await lab.holds(us, filled, ours, in_order=False)


@scenario(names={alike: pair for alike, pair in _PAIRS.items() if "namespaces" in alike or "queues" in alike})
async def wake_ups_are_apart(lab: Lab, names: tuple[_Name, _Name]) -> None:
    """A receive that waits at one queue gets what comes there, and nothing of what came to the other in the meantime."""
    (our_space, ours), (their_space, theirs) = names
    us, them = await lab.open(our_space, []), await lab.open(their_space, [])
    async with lab.waiting(us, wait=3600, queue=ours) as receive:
        await lab.enqueue(them, lab.message("theirs", theirs))
        await lab.enqueue(us, lab.message("ours", ours))
    assert [delivery.message.id for delivery in receive.result()] == ["ours"]
    assert (await lab.take_one(them, theirs)).message.id == "theirs"
    assert not await lab.take(us, queue=ours)


@scenario()
async def a_wait_is_not_ended_by_others(broker: Broker, lab: Lab) -> None:
    """A receive that waits in one namespace goes on waiting, to its end, whatever comes to queues of that name in others."""
    wait = lab.moment / 2
    async with lab.waiting(broker, wait=wait) as receive:
        for name in ("-a", "-A", "a"):
            await lab.enqueue(await lab.open(name), lab.message())
        await lab.pass_time(wait)
    assert not receive.result()


@scenario()
async def receipts_are_apart(broker: Broker, lab: Lab) -> None:
    """A delivery of one namespace can be neither settled nor extended in another, also where that holds the same message."""
    other = await lab.open("-other")
    for each in (broker, other):
        await lab.enqueue(each, *(lab.message(kind.replace(" ", "-"), "long") for kind in lab.endings))
    kinds = range(len(lab.endings))
    deliveries = {each: await lab.take_exactly(each, len(kinds), "long") for each in (broker, other)}
    endings = [lab.ending(kind, delivery) for kind, delivery in zip(lab.endings, deliveries[broker], strict=True)]
    assert lab.errors(await other.settle(endings)) == dict.fromkeys(kinds, LeaseLost)
    assert lab.errors(await other.extend(deliveries[broker])) == dict.fromkeys(kinds, LeaseLost)
    for each in (broker, other):
        await lab.holds(each, {State.LEASED: [delivery.message.id for delivery in deliveries[each]]}, "long", in_order=False)
        await lab.settle(each, *map(Ack, deliveries[each]))


@scenario(needs=[LIST_QUEUES])
async def names_are_apart(broker: Broker, lab: Lab) -> None:
    """Each namespace names its own queues and no others."""
    await broker.stats()
    spaces = ("-a", "-a-b", "-A", "_a", "-", "a")
    brokers = {space: await lab.open(space, []) for space in spaces}
    for number, each in enumerate(brokers.values()):
        await lab.declare(each, QueueSpec(f"b-{number}"))
        await lab.enqueue(each, lab.message(queue=f"c-{number}"))

    async def check() -> None:
        for number, each in enumerate(brokers.values()):
            assert [stats.queue for stats in await each.stats()] == [f"b-{number}", f"c-{number}"]

    await lab.eventually(check)


@scenario()
async def one_receive_of_many_queues(broker: Broker, lab: Lab) -> None:
    """A receive of many queues with similar names gets the messages of each, under the name of its queue."""
    names = ["q", "Q", "q-", "q_", "q-9", "q9", "q-dead", "dead", "ready", "scheduled", "leased", "0", "00", "a-b", "a_b", "y" * 63]
    for name in names:
        await lab.enqueue(broker, lab.message("m", name, body=name.encode()))
    taken = await lab.take_exactly(broker, len(names), lanes=[lane for name in names for lane in lab.lanes(name)])
    assert sorted(delivery.message.queue for delivery in taken) == sorted(names)
    assert all(delivery.message.body == delivery.message.queue.encode() for delivery in taken)
    await lab.settle(broker, *map(Ack, taken))
    for name in names:
        await lab.holds(broker, {}, name)
