"""What crossdock finds first. It says what there is, and imports nothing dear."""

from __future__ import annotations

from crossdock.spi import BackendPlugin, Broker, BrokerSettings, hookimpl


def create(settings: BrokerSettings) -> Broker:
    """Build an unopened Broker. What is dear to import, such as a driver, is imported here or below, never at the top."""
    from crossdock_plainfiles.broker import PlainFilesBroker

    return PlainFilesBroker(settings)


@hookimpl
def crossdock_backend() -> BackendPlugin:
    """Describe the backend."""
    return BackendPlugin(
        name="plain files", api_version=1, schemes=("plainfiles",), create=create, example_url="plainfiles:///some/folder"
    )
