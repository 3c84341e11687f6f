"""No secret of a URL is ever shown."""

from __future__ import annotations

import pytest

from crossdock.spi import redact


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("sqlite:///tasks.db", "sqlite:///tasks.db"),
        ("sqlite:////var/tasks.db?durability=relaxed", "sqlite:////var/tasks.db?durability=relaxed"),
        ("memory://", "memory://"),
        ("redis://host:6379/0", "redis://host:6379/0"),
        ("redis://user:canary@host/0", "redis://user:***@host/0"),
        ("redis://:canary@host/0", "redis://:***@host/0"),
        ("nats://canary@host", "nats://***@host"),
        ("amqp://u:canary@a:1,u:canary@b:2/vhost", "amqp://u:***@a:1,u:***@b:2/vhost"),
        ("amqp://u:can%40ary@host", "amqp://u:***@host"),
        ("redis://u:a@canary@host", "redis://u:***@host"),
        ("redis://host?password=canary&ssl=true", "redis://host?password=***&ssl=***"),
        ("redis://host/0#canary", "redis://host/0"),
        ("canary", "***"),
        ("http://[canary", "***"),
    ],
)
def test_secrets_are_hidden(url: str, shown: str) -> None:
    """Passwords, tokens, unknown options and fragments are hidden; what helps to recognise the broker stays."""
    assert redact(url) == shown
    assert "canary" not in redact(url)
