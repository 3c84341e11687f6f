"""A master with replicas, and nobody who watches over them."""

from __future__ import annotations

from redis_nodes import Group, Node, wait_until

from crossdock_conformance.servers.finding import BinarySource
from crossdock_conformance.servers.recipe import HOST
from crossdock_conformance.servers.redis_server import Setup

STORE = (f"replica-announce-ip {HOST}", "repl-diskless-sync-delay 0", "repl-ping-replica-period 1")
"""What every server that replicates has: each tells the others that it is on loopback, and nobody waits longer than needed."""


def start_store(source: BinarySource, master: Node | None = None) -> Node:
    """A master, or a replica of this one."""
    following = [f"replicaof {HOST} {master.port}"] if master else []
    return Node(source, Setup(lines=[*STORE, *following]))


class Replicated(Group):
    """A master and its replicas, all with an append-only file that the system syncs. Started by `topologies.replicated`."""

    def __init__(self, source: BinarySource, replicas: int) -> None:
        super().__init__()
        try:
            self.master = start_store(source)
            """Who is the master."""
            self.nodes.append(self.master)
            for _ in range(replicas):
                self.nodes.append(start_store(source, self.master))
            self.wait_until_it_serves()
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:  # type: ignore[override]
        """The URL of the master of the moment."""
        return self.master.url

    @property
    def replicas(self) -> list[Node]:
        """All but the master, running or not."""
        return [node for node in self.nodes if node is not self.master]

    @property
    def serves(self) -> bool:
        return self.master.info("replication")["role"] == "master" and all(
            node.is_replica_in_step for node in self.awake if node is not self.master
        )

    @property
    def is_as_made(self) -> bool:
        return super().is_as_made and self.master is self.nodes[0]

    def start(self) -> None:
        """As `Group.start`; the master of the moment stays it, and all others follow it."""
        for node in (self.master, *self.replicas):
            if node.running:
                node.resume()
            else:
                node.start()
            node.follow(None if node is self.master else self.master)
        self.wait_until_it_serves()

    def wait_until_replicated(self) -> None:
        """Return when all replicas that are awake have all that the master has."""
        followers = [node for node in self.awake if node is not self.master]
        written = int(self.master.info("replication")["master_repl_offset"])
        wait_until(lambda: all(_received(node) >= written for node in followers), f"{followers} have what the master has")

    def promote(self, replica: Node) -> None:
        """Make a replica the master, by hand. The other replicas that are awake follow it; the old master is left as it is, and may take
        writes that are lost when it is told to follow, as `start()` does."""
        old, self.master = self.master, replica
        replica.follow(None)
        for node in self.awake:
            if node not in (old, replica):
                node.follow(replica)
        wait_until(lambda: replica.info("replication")["role"] == "master", f"{replica} is a master")


def _received(replica: Node) -> int:
    """How far a replica has come."""
    return int(replica.info("replication")["slave_repl_offset"])
