"""A card gateway, simulated: slow, sometimes silent, sometimes saying no, and with one bank behind it that is down.

What it does to an order depends on the order's number and card alone, so every run of the demo meets the same trouble:

- about one order in twenty gets no answer to the first request, some of them none to the second either;
- cards whose token holds `_declined_` are declined;
- cards of Bluebird Bank (`tok_bluebird_...`) fail until the file `bluebird-is-back` appears in the shop's folder.
"""

from __future__ import annotations

import asyncio
import json
import zlib
from decimal import Decimal

import files

LATENCY = 0.02
"""Seconds an answer takes, at least; at most twice that."""


class GatewayTimeout(Exception):
    """No answer. The card may have been charged: ask again with the same order number."""


class IssuerDown(Exception):
    """The bank that issued the card cannot be reached. Nothing was charged."""


class CardDeclined(Exception):
    """The bank says no, and will say no again."""


async def charge(order_id: str, card_token: str, amount: Decimal, currency: str, request: int) -> None:
    """Charge a card, once per order number however often it is asked, and leave a receipt in `payments/`.

    Args:
        order_id: The idempotency key.
        card_token: What to charge.
        amount: How much.
        currency: Of what.
        request: 1 = the first time this is asked.
    """
    dice = zlib.crc32(order_id.encode())
    await asyncio.sleep(LATENCY * (1 + dice % 1000 / 1000))
    if "_declined_" in card_token:
        raise CardDeclined(f"the bank declined the card {card_token}")
    if card_token.startswith("tok_bluebird_") and not (files.folder() / "bluebird-is-back").exists():
        raise IssuerDown("Bluebird Bank does not answer")
    unanswered = 2 if dice % 100 == 0 else 1 if dice % 100 < 5 else 0
    if request >= unanswered:
        receipt = {"order_id": order_id, "amount": str(amount), "currency": currency, "card": card_token, "approval": f"{dice:08x}"}
        files.write(files.folder() / "payments" / f"{order_id}.json", json.dumps(receipt).encode())
    if request <= unanswered:
        raise GatewayTimeout(f"the gateway gave no answer for {order_id}")
