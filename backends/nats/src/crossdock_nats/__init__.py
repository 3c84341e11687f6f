"""crossdock on NATS JetStream: single servers and clusters.

From the outside in: `broker` is the asynchronous face, one method for each verb; `incoming` stores, `receiver` takes (`returning`
gives back, `ghosts` cures what a killed server of an old version forgot), `settling` and `letters` end deliveries, `leases` prolongs
them, `looking` and `repairs` are the other verbs, `alarms` moves what falls due where the server has no schedules of its own. `queues`
knows the streams and consumers of each queue, `api` speaks JetStream's requests, `link` is the connection that comes back, `wire` one
connection. Pure: `address` (URLs), `names`, `topology` (streams and consumers as data), `record` (one stored message), `receipt`,
`cursor`, `limits`, `facts` (what the server promises).
Why it is so: `docs/adr/0007-nats-path.md`.
"""

from __future__ import annotations

from crossdock.spi import BackendPlugin, Broker, BrokerSettings, hookimpl


@hookimpl
def crossdock_backend() -> BackendPlugin:
    """Describe the NATS backend."""
    return BackendPlugin(
        name="NATS JetStream",
        api_version=1,
        schemes=("nats", "tls"),
        create=_create,
        example_url="nats://localhost:4222",
    )


def _create(settings: BrokerSettings) -> Broker:
    from crossdock_nats.broker import NatsBroker

    return NatsBroker(settings)
