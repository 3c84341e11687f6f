"""crossdock on RabbitMQ.

From the outside in: `broker` is the asynchronous face, one method for each verb; `enqueueing`, `receiving`, `settling` and `letters` are
the verbs; `lane` is one level of one queue as it is consumed, `publisher` stores with confirms; `definitions` declares; `connection`
keeps a connection alive, `link` is one, and `tap` the fast lane in it, beside aiormq. Pure: `address` (URLs), `names`, `topology` (what is
declared), `delays` (how a message waits), `wire` (frames), `record` (a message in properties and headers), `windows` (how much is asked
for), `cursor`, `facts` (what the server promises). Why it is so: `docs/adr/0008-rabbitmq-path.md`.
"""

from __future__ import annotations

from crossdock.spi import BackendPlugin, Broker, BrokerSettings, hookimpl


@hookimpl
def crossdock_backend() -> BackendPlugin:
    """Describe the RabbitMQ backend."""
    return BackendPlugin(
        name="RabbitMQ",
        api_version=1,
        schemes=("amqp", "amqps"),
        create=_create,
        example_url="amqp://guest:guest@localhost:5672/",
    )


def _create(settings: BrokerSettings) -> Broker:
    from crossdock_rabbitmq.broker import RabbitMQBroker

    return RabbitMQBroker(settings)
