"""A master, replicas, and sentinels that make one of these the master when it dies."""

from __future__ import annotations

from collections.abc import Sequence

from redis_nodes import Group, Node, wait_until
from redis_replication import start_store

from crossdock_conformance.servers import ServerFailed
from crossdock_conformance.servers.finding import BinarySource
from crossdock_conformance.servers.recipe import HOST
from crossdock_conformance.servers.redis_server import Setup

NAME = "shop"
"""What sentinels call the master."""

_SENTINELS, _QUORUM = 3, 2


def _watching(master: Node) -> Setup:
    """How a sentinel is set up: quick to see a death, quick to try again."""
    lines = [
        f"sentinel monitor {NAME} {HOST} {master.port} {_QUORUM}",
        f"sentinel down-after-milliseconds {NAME} 1000",
        f"sentinel failover-timeout {NAME} 3000",
        f"sentinel announce-ip {HOST}",
    ]
    return Setup(lines=lines, sentinel=True)


class SentinelSet(Group):
    """One master, its replicas, three sentinels. Started by `topologies.sentinel_set`.

    After a death the new master is there within some 3 s; until the old one, started again, follows it takes 20 s.
    """

    serves_within = 60.0

    def __init__(self, source: BinarySource, replicas: int) -> None:
        super().__init__()
        self.stores: list[Node] = []
        """Those that store: the master and its replicas, in no order."""
        self.sentinels: list[Node] = []
        try:
            self._add(self.stores, start_store(source))
            for _ in range(replicas):
                self._add(self.stores, start_store(source, self.stores[0]))
            wait_until(lambda: all(node.is_replica_in_step for node in self.stores[1:]), "the replicas are in step")
            for _ in range(_SENTINELS):
                self._add(self.sentinels, Node(source, _watching(self.stores[0])))
            self.url = f"redis+sentinel://{','.join(node.address for node in self.sentinels)}/{NAME}"
            self.wait_until_it_serves()
        except BaseException:
            self.close()
            raise

    def _add(self, role: list[Node], node: Node) -> None:
        role.append(node)
        self.nodes.append(node)

    def told(self, sentinel: Node) -> Node:
        """Who is the master, as one sentinel tells. Raises OSError if it does not answer."""
        host, port = sentinel.call("SENTINEL", "GET-MASTER-ADDR-BY-NAME", NAME)
        (node,) = (node for node in self.stores if node.address == f"{host.decode()}:{port.decode()}")
        return node

    @property
    def master(self) -> Node:
        """Who is the master, as the first sentinel that is awake tells. It may be dead already."""
        return self.told(self._watchers()[0])

    @property
    def master_address(self) -> tuple[str, int]:
        """Its host and port."""
        return HOST, self.master.port

    @property
    def serves(self) -> bool:
        """Whether all sentinels that are awake agree on a master, every store that is awake is in step with it, and each of these
        sentinels knows them all: it can be failed over now."""
        if (master := self._agreed()) is None:
            return False
        followers = [node for node in self.awake if node in self.stores and node is not master]
        return all(node.is_replica_in_step and node.master_port == master.port for node in followers) and all(
            self._sees(sentinel, len(followers)) for sentinel in self._watchers()
        )

    @property
    def is_as_made(self) -> bool:
        return super().is_as_made and self.master is self.stores[0]

    def kill_master(self) -> Node:
        """Kill the master. Returns it."""
        master = self.master
        master.kill()
        return master

    def failover(self) -> Node:
        """Have the sentinels make another one the master, without a death, and return that one when it serves."""
        old = self.master
        # A sentinel that does not know yet which replicas are in step refuses.
        wait_until(self._begins_failover, "a sentinel begins a failover")
        return self.wait_for_another_master(old)

    def wait_for_another_master(self, old: Node) -> Node:
        """The new master, once all sentinels that are awake tell that it is the one, and it takes writes."""
        wait_until(lambda: self._agreed() not in (None, old), f"another server than {old} is the master", self.serves_within)
        return self.master

    def _watchers(self) -> Sequence[Node]:
        """The sentinels that are awake."""
        return [node for node in self.awake if node in self.sentinels]

    def _begins_failover(self) -> bool:
        try:
            return bool(self._watchers()[0].call("SENTINEL", "FAILOVER", NAME) == b"OK")
        except ServerFailed as error:
            if "NOGOODSLAVE" in str(error) or "INPROG" in str(error):
                return False
            raise

    def _agreed(self) -> Node | None:
        """The master of which all sentinels that are awake tell, if there is one such, and it is one."""
        (master, *others) = {self.told(sentinel) for sentinel in self._watchers()}
        is_master = not others and master in self.awake and master.info("replication")["role"] == "master"
        return master if is_master else None

    def _sees(self, sentinel: Node, replicas: int) -> bool:
        told = _pairs(sentinel.call("SENTINEL", "MASTER", NAME))
        known = [_pairs(each) for each in sentinel.call("SENTINEL", "REPLICAS", NAME)]
        well = [each for each in known if each["flags"] == "slave" and each["master-link-status"] == "ok"]
        return told["flags"] == "master" and int(told["num-other-sentinels"]) == _SENTINELS - 1 and len(well) >= replicas


def _pairs(told: list[bytes]) -> dict[str, str]:
    """An answer that lists names and values in turn."""
    words = [word.decode() for word in told]
    return dict(zip(words[::2], words[1::2], strict=True))
