"""Orders: reading the export row by row, and turning the texts of a row into a typed order, or saying what is wrong.

Two kinds of bad are kept apart. A row that cannot be read, or cannot be told from another, never becomes a task
(`Refused`, with its row number). A row that can be read and says nonsense becomes a task that refuses it (`BadOrder`),
so that it ends as a dead letter that people can correct and replay.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Literal, get_args

COLUMNS = (
    "order_id",
    "ordered_at",
    "customer",
    "email",
    "items",
    "currency",
    "amount",
    "card_token",
    "country",
    "warehouse",
    "gift_note",
)

Currency = Literal["EUR", "GBP", "USD", "PLN", "CHF"]
CURRENCIES: tuple[Currency, ...] = get_args(Currency)

_ROW_START = re.compile(rb'\s*"?ORD-\d+')
_BOM = b"\xef\xbb\xbf"
_EMAIL = re.compile(r"[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]+@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+")
_ITEM = re.compile(r"(?P<sku>.+?)x(?P<quantity>[^x]*)")
_CARD = re.compile(r"tok_[a-z]+(?:_declined)?_[0-9a-f]{8}")


@dataclass(frozen=True, slots=True)
class Product:
    """One article of the catalog."""

    sku: str
    name: str
    stock: int
    prices: Mapping[str, Decimal]
    """Price of one piece by currency."""


@dataclass(frozen=True, slots=True)
class Line:
    """One position of an order."""

    sku: str
    name: str
    quantity: int
    price: Decimal
    """Of one piece, in the order's currency."""

    @property
    def total(self) -> Decimal:
        """Price of all pieces."""
        return self.price * self.quantity


@dataclass(frozen=True, slots=True)
class Order:
    """A valid order. This is what travels from task to task."""

    order_id: str
    ordered_at: datetime
    customer: str
    email: str
    lines: tuple[Line, ...]
    currency: Currency
    amount: Decimal
    card_token: str
    country: str
    warehouse: str
    gift_note: str


@dataclass(frozen=True, slots=True)
class Row:
    """A row that could be read: texts by column, without the space around them."""

    number: int
    """1 = the first behind the header."""
    fields: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Refused:
    """A row that no order can be made of."""

    number: int
    order_id: str
    why: str


class BadOrder(ValueError):
    """The texts of a row make no order. The text starts with the column's name."""


# --- reading the export -------------------------------------------------------------------------


def read_rows(path: Path) -> Iterator[Row | Refused]:
    """Read an export row by row, whatever state it is in.

    A row starts where a line starts with an order number, and is parsed alone: an open quote costs one row, not all behind it.
    """
    seen: dict[str, int] = {}
    for number, record in enumerate(_records(path), 1):
        row = _parse(number, record)
        if isinstance(row, Row):
            order_id = row.fields["order_id"]
            first = seen.setdefault(order_id, number)
            if first != number:
                row = Refused(number, order_id, f"order {order_id} was in row {first} already")
        yield row


def _records(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.readline()  # the header
        record = b""
        for line in file:
            if _ROW_START.match(line) and record:
                yield record
                record = b""
            record += line
        if record.strip():
            yield record


def _parse(number: int, record: bytes) -> Row | Refused:
    order_id = re.sub(rb"[^A-Z0-9-].*", b"", record.lstrip(b' \t"'), flags=re.DOTALL).decode("ascii", "replace")
    try:
        text = record.removeprefix(_BOM).decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        return Refused(number, order_id, f"the row is not UTF-8: byte 0x{record[error.start]:02x} at place {error.start + 1}")
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        return Refused(number, order_id, f"the row is cut off or its quotes are broken: {error}")
    if len(rows) != 1:
        return Refused(number, order_id, f"a line break without quotes breaks the row into {len(rows)} pieces")
    fields = rows[0]
    if len(fields) < len(COLUMNS):
        return Refused(number, order_id, f"the row is cut off after {len(fields)} of {len(COLUMNS)} columns")
    if len(fields) > len(COLUMNS):
        return Refused(number, order_id, f"too many columns, {len(fields)} instead of {len(COLUMNS)}: {','.join(fields[11:])!r}")
    return Row(number, {name: field.strip() for name, field in zip(COLUMNS, fields, strict=True)})


def read_catalog(path: Path) -> dict[str, Product]:
    """Read the catalog: SKU -> product."""
    with path.open(encoding="utf-8", newline="") as file:
        return {
            row["sku"]: Product(
                row["sku"],
                row["name"],
                int(row["stock"]),
                {code: Decimal(row[f"price_{code.lower()}"]) for code in CURRENCIES},
            )
            for row in csv.DictReader(file)
        }


# --- from texts to an order ---------------------------------------------------------------------


def parse_order(fields: Mapping[str, str], catalog: Mapping[str, Product]) -> Order:
    """Make an order of the texts of a row.

    Raises:
        BadOrder: What is wrong, and in which column.
    """
    currency = _currency(fields["currency"])
    lines = tuple(_line(item, currency, catalog) for item in fields["items"].split("|"))
    return Order(
        order_id=fields["order_id"],
        ordered_at=_moment(fields["ordered_at"]),
        customer=_customer(fields["customer"]),
        email=_email(fields["email"]),
        lines=lines,
        currency=currency,
        amount=_amount(fields["amount"], lines),
        card_token=_card(fields["card_token"]),
        country=fields["country"],
        warehouse=fields["warehouse"],
        gift_note=fields["gift_note"],
    )


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise BadOrder(f"ordered_at: {text!r} is not a date and time like 2026-03-02T07:32:41+02:00") from None
    if moment.tzinfo is None:
        raise BadOrder(f"ordered_at: {text!r} has no time zone, so it does not say which moment is meant")
    return moment


def _customer(text: str) -> str:
    if not text:
        raise BadOrder("customer: is missing")
    if not text.isprintable():
        raise BadOrder(f"customer: {text!r} has a line break or another control character")
    if "\N{REPLACEMENT CHARACTER}" in text or _is_mojibake(text):
        raise BadOrder(f"customer: {text!r} was garbled by a wrong encoding")
    return text


def _is_mojibake(text: str) -> bool:
    """Whether it is UTF-8 that somebody read as Windows-1252, like `MÃ¼ller`: read back, right text hardly ever is UTF-8."""
    try:
        return text.encode("cp1252").decode("utf-8") != text
    except UnicodeError:
        return False


def _email(text: str) -> str:
    hidden = [character for character in text if not character.isprintable() or character == "\N{NO-BREAK SPACE}"]
    if hidden:
        raise BadOrder(f"email: {text!r} holds the invisible character U+{ord(hidden[0]):04X}")
    if not _EMAIL.fullmatch(text):
        raise BadOrder(f"email: {text!r} is not an e-mail address")
    return text


def _currency(text: str) -> Currency:
    for currency in CURRENCIES:
        if text == currency:
            return currency
    raise BadOrder(f"currency: {text!r} is none of {', '.join(CURRENCIES)}" if text else "currency: is missing")


def _line(text: str, currency: Currency, catalog: Mapping[str, Product]) -> Line:
    match = _ITEM.fullmatch(text)
    if not match:
        raise BadOrder(f"items: {text!r} is not an article and a quantity like MUG-01x2")
    product = catalog.get(match["sku"])
    if product is None:
        raise BadOrder(f"items: there is no article {match['sku']!r} in the catalog")
    if not re.fullmatch(r"[1-9][0-9]{0,3}", match["quantity"]):
        raise BadOrder(f"items: {match['quantity']!r} is no quantity of {product.sku}, use 1 to 9999")
    return Line(product.sku, product.name, int(match["quantity"]), product.prices[currency])


def _amount(text: str, lines: tuple[Line, ...]) -> Decimal:
    if re.fullmatch(r"\d+,\d\d", text):
        raise BadOrder(f"amount: {text!r} has a decimal comma, write {text.replace(',', '.')}")
    try:
        amount = Decimal(text)
    except InvalidOperation:
        amount = Decimal("NaN")
    if not amount.is_finite():
        raise BadOrder(f"amount: {text!r} is not a number like 49.90")
    if amount <= 0:
        raise BadOrder(f"amount: {text} is not above zero")
    owed = sum((line.total for line in lines), Decimal(0))
    if amount != owed:
        raise BadOrder(f"amount: {text} is not what the items cost, {owed}")
    return amount


def _card(text: str) -> str:
    if not _CARD.fullmatch(text):
        raise BadOrder(f"card_token: {text!r} is not a token of the payment gateway" if text else "card_token: is missing")
    return text
