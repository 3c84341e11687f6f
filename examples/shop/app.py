"""An order on its way through the shop.

    receive_order --> take_payment --+--> reserve_stock --> notify_warehouse
    (critical)        (critical)     |    (high)            (high)
                                     +--> send_confirmation (default)
                                     +--> write_invoice     (low)
                                     +--> record_sale       (low)

Run it:      CROSSDOCK_URL=sqlite:///shop.db crossdock worker run app.py:app
Feed it:     demo.py, which also kills a worker and checks that no order suffers from it.
"""

from __future__ import annotations

from pathlib import Path

import documents
import files
import gateway
import orders
from orders import Order
from stock import OutOfStock, Stock

from crossdock import App, Priority, Queue, Reject, RetryPolicy, current_context

CATALOG = orders.read_catalog(Path(__file__).with_name("catalog.csv"))
STOCK = Stock(files.folder() / "stock.db", CATALOG.values())

# A short lease: a killed worker's orders go to another one within seconds. Whoever lives extends it.
app = App(
    queues=[
        Queue("critical", weight=6, lease=5),
        Queue("high", weight=4, lease=5),
        Queue("default", weight=2, lease=5),
        Queue("low", weight=1, lease=5),
    ],
    middleware=[files.Journal()],
)


def step_id(order_id: str, step: str) -> str:
    """The id of one step of one order. While a step is stored, enqueuing it again stores nothing."""
    return f"{order_id}_{step}"


@app.task(name="shop.receive_order", queue="critical")
async def receive_order(
    order_id: str,
    ordered_at: str,
    customer: str,
    email: str,
    items: str,
    currency: str,
    amount: str,
    card_token: str,
    country: str,
    warehouse: str,
    gift_note: str,
) -> None:
    """Check an order as it came, all texts, and take the payment. A bad one is dead-lettered for somebody to correct."""
    row = {
        "order_id": order_id,
        "ordered_at": ordered_at,
        "customer": customer,
        "email": email,
        "items": items,
        "currency": currency,
        "amount": amount,
        "card_token": card_token,
        "country": country,
        "warehouse": warehouse,
        "gift_note": gift_note,
    }
    try:
        order = orders.parse_order(row, CATALOG)
    except orders.BadOrder as error:
        raise Reject(str(error)) from None
    await take_payment.options(id=step_id(order_id, "payment"), priority=Priority.HIGH).enqueue(order)


@app.task(
    name="shop.take_payment",
    queue="critical",
    retry=RetryPolicy.exponential(max_attempts=4, min_backoff=0.25, max_backoff=2.0),
    timeout=30.0,
)
async def take_payment(order: Order) -> None:
    """Charge the card, then start everything that follows. No answer and a bank that is down are retried, a no is not."""
    request = current_context().attempt
    try:
        await gateway.charge(order.order_id, order.card_token, order.amount, order.currency, request)
    except gateway.CardDeclined as error:
        raise Reject(str(error)) from None
    await app.enqueue_many(
        [
            reserve_stock.options(id=step_id(order.order_id, "stock")).message(order),
            send_confirmation.options(id=step_id(order.order_id, "confirmation")).message(order),
            write_invoice.options(id=step_id(order.order_id, "invoice")).message(order),
            record_sale.options(id=step_id(order.order_id, "sale")).message(order),
        ]
    )


@app.task(name="shop.reserve_stock", queue="high")
def reserve_stock(order: Order) -> None:
    """Reserve the pieces, then tell the warehouse. A plain function: SQLite blocks, so it runs in a thread."""
    try:
        STOCK.reserve(order)
    except OutOfStock as error:
        raise Reject(str(error)) from None
    notify_warehouse.options(id=step_id(order.order_id, "warehouse")).enqueue_sync(order)


@app.task(name="shop.notify_warehouse", queue="high")
async def notify_warehouse(order: Order) -> None:
    """Leave a picking note where the warehouse picks it up."""
    files.write(files.folder() / "warehouse" / order.warehouse / f"{order.order_id}.json", documents.picking_note(order))


@app.task(name="shop.send_confirmation", queue="default")
async def send_confirmation(order: Order) -> None:
    """Put the confirmation into the outbox."""
    files.write(files.folder() / "outbox" / f"{order.order_id}.eml", documents.confirmation(order))


@app.task(name="shop.write_invoice", queue="low")
def write_invoice(order: Order) -> None:
    """Write the invoice; in a thread, as real ones are slow to make."""
    files.write(files.folder() / "invoices" / f"{order.order_id}.html", documents.invoice(order))


@app.task(name="shop.record_sale", queue="low")
async def record_sale(order: Order) -> None:
    """Keep what analytics need, a file per order, so that counting twice cannot happen."""
    files.write(files.folder() / "sales" / f"{order.order_id}.json", documents.sale(order))
