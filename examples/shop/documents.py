"""The documents an order leaves behind, each made from the order alone: the same order gives the same bytes."""

from __future__ import annotations

import email.policy
import json
from email.headerregistry import Address
from email.message import EmailMessage
from html import escape

from orders import Order

SHOP = "Dockside Goods"

_INVOICE = """\
<!DOCTYPE html>
<html xmlns="http://www.w3.org/1999/xhtml" lang="en">
<head>
<meta charset="utf-8"/>
<title>Invoice {order_id}</title>
<style>
@page {{ size: A4; margin: 25mm }}
body {{ font: 11pt sans-serif; max-width: 160mm; margin: 20mm auto }}
table {{ width: 100%; border-collapse: collapse }}
th, td {{ padding: 2mm; border-bottom: 1px solid #999; text-align: right }}
th:first-child, td:first-child {{ text-align: left }}
</style>
</head>
<body>
<h1>{shop}</h1>
<p>Invoice <b id="number">{order_id}</b>, {date}</p>
<p id="customer">{customer}</p>
<table>
<thead><tr><th>Article</th><th>Quantity</th><th>Each</th><th>Total</th></tr></thead>
<tbody>
{lines}
</tbody>
</table>
<p>To pay, in {currency}: <b id="total">{amount}</b>. Paid by card.</p>
</body>
</html>
"""
_INVOICE_LINE = "<tr><td>{name}</td><td>{quantity}</td><td>{price}</td><td>{total}</td></tr>"

_MAIL = """\
Dear {customer},

thank you for your order {order_id}. We send you:

{lines}

Paid by card: {currency} {amount}

{shop}
"""


def invoice(order: Order) -> bytes:
    """The invoice as an HTML page for screen and A4 paper, which is well-formed XML too."""
    lines = "\n".join(
        _INVOICE_LINE.format(name=escape(line.name), quantity=line.quantity, price=line.price, total=line.total)
        for line in order.lines
    )
    return _INVOICE.format(
        shop=escape(SHOP),
        order_id=escape(order.order_id),
        date=order.ordered_at.date(),
        customer=escape(order.customer),
        lines=lines,
        currency=order.currency,
        amount=order.amount,
    ).encode()


def confirmation(order: Order) -> bytes:
    """The confirmation e-mail as it goes over the wire, ready to be opened as an .eml file."""
    mail = EmailMessage(policy=email.policy.SMTP)
    mail["From"] = Address(SHOP, addr_spec="orders@shop.example")
    mail["To"] = Address(order.customer, addr_spec=order.email)
    mail["Subject"] = f"Your order {order.order_id}"
    mail["Date"] = order.ordered_at
    mail["Message-ID"] = f"<{order.order_id}@shop.example>"
    mail.set_content(
        _MAIL.format(
            customer=order.customer,
            order_id=order.order_id,
            lines="\n".join(f"  {line.quantity} x {line.name}" for line in order.lines),
            currency=order.currency,
            amount=order.amount,
            shop=SHOP,
        )
    )
    return mail.as_bytes()


def picking_note(order: Order) -> bytes:
    """What the warehouse has to pack, as JSON."""
    pick = [{"sku": line.sku, "quantity": line.quantity} for line in order.lines]
    note = {"order_id": order.order_id, "warehouse": order.warehouse, "pick": pick, "gift_note": order.gift_note}
    return json.dumps(note, ensure_ascii=False).encode()


def sale(order: Order) -> bytes:
    """What analytics keep of an order, as JSON: no names."""
    day, pieces = order.ordered_at.date().isoformat(), sum(line.quantity for line in order.lines)
    facts = {"order_id": order.order_id, "day": day, "country": order.country, "pieces": pieces}
    return json.dumps({**facts, "currency": order.currency, "amount": str(order.amount)}).encode()
