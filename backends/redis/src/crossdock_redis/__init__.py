"""crossdock on Redis and Valkey: single servers, Sentinel and Cluster.

From the outside in: `broker` is the asynchronous face, one method for each verb; `incoming` stores, `desk` settles and receives in one
script, `parked` lets a look wait in the server, `repairs` are the other verbs; `spread` and `waker` receive from several servers at once;
`route` is all that leads to one server, `lane` a stream of requests that are each answered once, `link` one connection, `servers` who
serves. Pure: `address` (URLs), `keys` (what is stored where), `record` (one stored value), `cursor`, `limits`, `replies`, `facts` (what
the server promises). What happens in the server is in `lua/`, one file for each script. Why it is so: `docs/adr/0006-redis-layout.md`.
"""

from __future__ import annotations

from crossdock.spi import BackendPlugin, Broker, BrokerSettings, hookimpl


@hookimpl
def crossdock_backend() -> BackendPlugin:
    """Describe the Redis backend."""
    return BackendPlugin(
        name="Redis",
        api_version=1,
        schemes=(
            "redis",
            "rediss",
            "unix",
            "valkey",
            "valkeys",
            "redis+sentinel",
            "rediss+sentinel",
            "redis+cluster",
            "rediss+cluster",
        ),
        create=_create,
        example_url="redis://localhost:6379/0",
    )


def _create(settings: BrokerSettings) -> Broker:
    from crossdock_redis.broker import RedisBroker

    return RedisBroker(settings)
