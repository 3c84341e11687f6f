"""What crossdock finds first. It says what there is, and imports nothing dear."""

from __future__ import annotations

from crossdock.spi import BackendPlugin, Broker, BrokerSettings, hookimpl


def create(settings: BrokerSettings) -> Broker:
    """Build an unopened Broker. A real backend imports its driver here or below, never at the top."""
    from crossdock_toy.broker import ToyBroker

    return ToyBroker(settings)


@hookimpl
def crossdock_backend() -> BackendPlugin:
    """Describe the backend."""
    return BackendPlugin(name="toy", api_version=1, schemes=("toy",), create=create, example_url="toy:///some/folder")
