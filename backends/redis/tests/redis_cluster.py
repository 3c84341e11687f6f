"""A Redis Cluster: the keys are spread over several masters by slots, which can move while it serves."""

from __future__ import annotations

from redis_nodes import Group, Node, fields, wait_until
from redis_replication import STORE

from crossdock_conformance.servers import ServerFailed
from crossdock_conformance.servers.finding import BinarySource
from crossdock_conformance.servers.recipe import HOST
from crossdock_conformance.servers.redis_server import Setup

SLOTS = 16_384

_LINES = (*STORE, f"cluster-announce-ip {HOST}", "cluster-node-timeout 2000", "cluster-replica-validity-factor 0")
_MIGRATE_WITHIN_MS = 5000

_FAILOVERS, _FAILOVER_WITHIN = 4, 6.0
"""Tries of a failover, which a node gives up after 5 s: soon after another one the masters may not vote."""


class Cluster(Group):
    """Masters that have the slots in even parts, each with as many replicas. Started by `topologies.cluster`.

    It serves when every node that is awake says so, and all agree on who has which slots.
    """

    def __init__(self, source: BinarySource, nodes: int, replicas: int) -> None:
        super().__init__()
        try:
            for _ in range(nodes * (1 + replicas)):
                self.nodes.append(Node(source, Setup(lines=_LINES, cluster=True)))
            self.url = f"redis+cluster://{','.join(node.address for node in self.nodes)}"
            self._ids: dict[str, Node] = {node.call("CLUSTER", "MYID").decode(): node for node in self.nodes}
            self._join(self.nodes[:nodes], self.nodes[nodes:])
            self._first_layout = self._layout(self.nodes[0])
        except BaseException:
            self.close()
            raise

    @property
    def serves(self) -> bool:
        states = [fields(node.call("CLUSTER", "INFO")) for node in self.awake]
        return (
            all(state["cluster_state"] == "ok" and state["cluster_known_nodes"] == str(len(self.nodes)) for state in states)
            and len({self._layout(node) for node in self.awake}) == 1
            and all(node.is_replica_in_step for node in self.awake if node.info("replication")["role"] == "slave")
        )

    @property
    def is_as_made(self) -> bool:
        return super().is_as_made and self._layout(self.nodes[0]) == self._first_layout

    @property
    def masters(self) -> list[Node]:
        """The nodes that have slots, as the first node that is awake tells."""
        return [node for node in self.nodes if node.port in {port for _, _, port in self._layout(self.awake[0])}]

    def id(self, node: Node) -> str:
        """What the cluster calls a node."""
        (name,) = (name for name, each in self._ids.items() if each is node)
        return name

    def replicas(self, master: Node) -> list[Node]:
        """The replicas of a master that are awake, as they tell."""
        told = [(node, node.info("replication")) for node in self.awake]
        return [node for node, each in told if each.get("master_port") == str(master.port)]

    def slot(self, key: str) -> int:
        """The slot of a key."""
        return int(self.awake[0].call("CLUSTER", "KEYSLOT", key))

    def owner(self, slot: int) -> Node:
        """The master that has a slot, as the first node that is awake tells."""
        ports = [port for first, last, port in self._layout(self.awake[0]) if first <= slot <= last]
        (node,) = (node for node in self.nodes if [node.port] == ports)
        return node

    def migrate(self, slot: int, to: Node) -> None:
        """Move a slot with its keys to another master."""
        migration = self.migration(slot, to)
        migration.begin()
        while migration.move():
            pass
        migration.finish()

    def migration(self, slot: int, to: Node) -> Migration:
        """The same, step by step."""
        return Migration(self, slot, self.owner(slot), to)

    def failover(self, replica: Node) -> None:
        """Make a replica the master of the slots that its master has, without a death, and return when all know it."""
        for tries_left in reversed(range(_FAILOVERS)):
            replica.call("CLUSTER", "FAILOVER")
            try:
                wait_until(lambda: replica in self.masters and self.serves, f"{replica} is a master", _FAILOVER_WITHIN)
            except ServerFailed:
                if not tries_left:
                    raise
            else:
                return

    def _layout(self, node: Node) -> frozenset[tuple[int, int, int]]:
        """Who has which slots, as one node tells: first, last, port."""
        return frozenset((first, last, master[1]) for first, last, master, *_ in node.call("CLUSTER", "SLOTS"))

    def _join(self, masters: list[Node], replicas: list[Node]) -> None:
        """Make one cluster of nodes that know nothing of each other."""
        for number, node in enumerate(self.nodes):
            node.call("CLUSTER", "SET-CONFIG-EPOCH", number + 1)  # else they find out in a while that all have the same
        parts = [SLOTS * number // len(masters) for number in range(len(masters) + 1)]
        for node, first, end in zip(masters, parts, parts[1:], strict=False):
            node.call("CLUSTER", "ADDSLOTS", *range(first, end))
        for number, node in enumerate(self.nodes):
            for other in self.nodes[number + 1 :]:  # each pair, so that nobody waits for gossip
                node.call("CLUSTER", "MEET", HOST, other.port)
        for number, replica in enumerate(replicas):
            self._follow(replica, masters[number % len(masters)])
        self.wait_until_it_serves()

    def _follow(self, replica: Node, master: Node) -> None:
        def follows() -> bool:
            try:
                return bool(replica.call("CLUSTER", "REPLICATE", self.id(master)) == b"OK")
            except ServerFailed as error:
                if "Unknown node" in str(error):  # not yet met
                    return False
                raise

        wait_until(follows, f"{replica} follows {master}")


class Migration:
    """One slot on its way from one master to another.

    After `begin` the old master answers for the keys it still has and points to the new one (ASK) for the others; after `finish` the
    new one has the slot, and the old one points to it for good (MOVED).
    """

    def __init__(self, cluster: Cluster, slot: int, source: Node, target: Node) -> None:
        self.slot = slot
        self.source = source
        self.target = target
        self._cluster = cluster

    def begin(self) -> None:
        """Tell both."""
        self.target.call("CLUSTER", "SETSLOT", self.slot, "IMPORTING", self._cluster.id(self.source))
        self.source.call("CLUSTER", "SETSLOT", self.slot, "MIGRATING", self._cluster.id(self.target))

    def move(self, count: int = 10) -> int:
        """Move at most so many keys. Returns how many there were; 0 once all are moved."""
        keys = [key.decode() for key in self.source.call("CLUSTER", "GETKEYSINSLOT", self.slot, count)]
        if keys:
            self.source.call("MIGRATE", HOST, self.target.port, "", 0, _MIGRATE_WITHIN_MS, "KEYS", *keys)
        return len(keys)

    def finish(self) -> None:
        """Give the slot to the new master, and return when all know it."""
        others = [node for node in self._cluster.masters if node not in (self.source, self.target)]
        for node in (self.target, self.source, *others):  # the new one first: else for a moment nobody has it
            node.call("CLUSTER", "SETSLOT", self.slot, "NODE", self._cluster.id(self.target))
        self._cluster.wait_until_it_serves()

    def give_up(self) -> None:
        """Leave the slot where it is, with the keys that were not moved."""
        for node in (self.source, self.target):
            node.call("CLUSTER", "SETSLOT", self.slot, "STABLE")
