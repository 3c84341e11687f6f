"""The SQLite broker: one file on a local disk, shared by any number of processes of one host. The embedded default.

From the outside in: `broker` is the asynchronous face, `engine` its one thread as the event loop sees it, `desk` the work of that
thread (group commit, waiting receives), `watch` how it learns that others write, `store` and its verbs all the SQL, `database` the
connection and its errors, `process` what connections of one process owe each other, `schema` the tables, `location` what may lie at the
end of a URL. Why it is so: `docs/adr/0003-sqlite-layout.md`.
"""

from __future__ import annotations

from crossdock.spi import BackendPlugin, Broker, BrokerSettings, hookimpl


@hookimpl
def crossdock_backend() -> BackendPlugin:
    """Describe the SQLite backend."""
    return BackendPlugin(name="SQLite", api_version=1, schemes=("sqlite",), create=_create, example_url="sqlite:///tasks.db")


def _create(settings: BrokerSettings) -> Broker:
    from crossdock.backends.sqlite.broker import SqliteBroker

    return SqliteBroker(settings)
