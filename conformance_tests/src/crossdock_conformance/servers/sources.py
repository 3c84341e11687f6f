"""Programs to start servers from, for tests that need several servers, or one that is set up in its own way. Used in a conftest.py:

    def pytest_generate_tests(metafunc):
        sources.parametrize(metafunc, "redis", "valkey")

    @pytest.fixture(scope="session")
    def source(request):
        return sources.source_of(request)

A test that takes `source` then runs once for each version that is on this machine; where none is, it is skipped by name. Where
CROSSDOCK_REQUIRE names one of the kinds, it runs once for each of its entries instead, and fails where there is no such server:
`redis:7.0,valkey` is that version, installed if CROSSDOCK_TEST_INSTALL allows it, and whichever Valkey is found first.
"""

from __future__ import annotations

from typing import Any

import pytest

from crossdock_conformance.servers.errors import ServerNotFound
from crossdock_conformance.servers.finding import BinarySource, find_servers, start_server
from crossdock_conformance.servers.fixtures import skip_or_fail
from crossdock_conformance.servers.requirements import required
from crossdock_conformance.servers.versions import matches


def programs(kind: str, version: str | None = None) -> list[BinarySource]:
    """The programs of this kind on this machine, of the versions that begin like this one."""
    return [source for source in find_servers(kind, version) if isinstance(source, BinarySource)]


def parametrize(metafunc: pytest.Metafunc, *kinds: str) -> None:
    """Give the fixture `source`, if the test takes it, one value for each version found or required, and one for a kind of which there is
    none."""
    if "source" in metafunc.fixturenames:
        values = [value for kind in kinds for value in _values(kind, kinds)]
        metafunc.parametrize("source", values, indirect=True, scope="session")


def _values(kind: str, kinds: tuple[str, ...]) -> list[Any]:
    found = programs(kind)
    entries = [entry.partition(":") for entry in sorted(required())]
    if any(name in kinds for name, _, _ in entries):
        wanted = [version for name, _, version in entries if name == kind]
        return [
            _value(kind, version, [source for source in found if not version or matches(source.version, version)])
            for version in wanted
        ]
    return [_value(kind, "", [source]) for source in found] or [_value(kind, "", [])]


def _value(kind: str, version: str, found: list[BinarySource]) -> Any:
    if found:
        return pytest.param(found[0], id=f"{kind}-{found[0].version}")
    return pytest.param((kind, version or None), id=f"{kind}-{version}" if version else kind)


def source_of(request: pytest.FixtureRequest) -> BinarySource:
    """What `parametrize` gave to a fixture: a program; installed now, if it has to be and may be."""
    if isinstance(request.param, BinarySource):
        return request.param
    kind, version = request.param
    return _installed(kind, version, request.config)[0]


def newest(config: pytest.Config, *kinds: str) -> BinarySource:
    """The newest program of these kinds; installed now if there is none, and it may be."""
    found = [source for kind in kinds for source in programs(kind)] or _installed(kinds[0], None, config)
    return max(found, key=lambda source: [int(part) for part in source.version.split(".") if part.isdecimal()])


def _installed(kind: str, version: str | None, config: pytest.Config) -> list[BinarySource]:
    try:
        start_server(kind, version=version).close()  # which may install it
    except ServerNotFound as error:
        skip_or_fail(error, config)
    if found := programs(kind, version):
        return found
    pytest.skip(f"the only {kind} {version or ''} server is a container, or given by its URL")
