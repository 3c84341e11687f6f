"""What is promised of servers, by their version."""

from __future__ import annotations

import pytest

from crossdock.spi import Survives
from crossdock_rabbitmq import facts
from crossdock_rabbitmq.address import QueueType


@pytest.mark.parametrize(
    ("version", "type", "power"),
    [("3.10.8", "quorum", True), ("4.3.6", "quorum", True), ("3.10.8", "classic", True), ("4.3.6", "classic", False)],
)
def test_power_loss_is_promised_as_measured(version: str, type: QueueType, power: bool) -> None:
    """`benchmarks/power_loss.py` found all that was confirmed after a power cut; on a classic queue of RabbitMQ 4.3 nothing of it."""
    found = facts.capabilities({"version": version, "product": "RabbitMQ"}, type)
    assert (Survives.POWER in found.survives) is power
    assert Survives.PROCESS in found.survives
    assert ("power cut" in found.durability_note) is not power
