"""Forty restarts of the server in a row, half of them by SIGKILL. It takes ten minutes: name this file to run it."""

from __future__ import annotations

import asyncio
import time

import pytest
from rabbitmq_traffic import Traffic

from crossdock_conformance.servers import Server

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(1800)]


async def test_forty_restarts(server: Server) -> None:
    """While the server restarts forty times, one producer and one worker go on: nothing confirmed is lost, nobody is deaf."""
    slowest = 0.0
    async with Traffic(f"{server.url}?timeout=5") as traffic:
        for number in range(40):
            await traffic.flows()
            await asyncio.to_thread(server.restart, kill=number % 2 == 1)
            began = time.monotonic()
            await traffic.flows()
            slowest = max(slowest, time.monotonic() - began)
        lost = await traffic.ends()
        print(f"again at work after {slowest:.1f} s at most; {traffic.said()}")
        assert not lost, traffic.said()
