"""Compare what lies on the disk with the orders that came in, order by order, without asking crossdock for a single number.

    python check.py FOLDER      the folder of a demo run that was kept (demo.py --keep FOLDER)

What must be there follows from the export, from `bad_orders.csv` (what is wrong with it) and from `corrections.csv`. The
demo's `run.json` adds what only the demo knows: how many rows it took, which process it killed, which dead letters were left.
Exit code 0 if all is right, else 1.
"""

from __future__ import annotations

import csv
import email
import json
import sqlite3
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from email.utils import parseaddr
from itertools import islice
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from orders import Refused, read_catalog, read_rows

SHOP = Path(__file__).parent

Fields = Mapping[str, str]


# --- what must be -------------------------------------------------------------------------------


@dataclass
class Expected:
    """What must have become of each row."""

    done: dict[str, Fields] = field(default_factory=dict[str, Fields])
    """Order -> its texts, corrected where they were corrected."""
    dead: dict[str, str] = field(default_factory=dict[str, str])
    """Order -> what its dead letter must say."""
    refused: dict[int, str] = field(default_factory=dict[int, str])
    """Row -> what its refusal must say."""


def expect(rows: int) -> Expected:
    """Work out what must become of the first `rows` rows of the export."""
    bad = {int(each["row"]): each for each in _table("bad_orders.csv")}
    corrections = {each["order_id"]: {each["column"]: each["value"]} for each in _table("corrections.csv")}
    expected = Expected()
    for row in islice(read_rows(SHOP / "orders.csv"), rows):
        fault = bad.get(row.number)
        if fault and fault["ends"] == "refused":
            expected.refused[row.number] = fault["says"]
        elif isinstance(row, Refused):
            expected.refused[row.number] = "(nothing: it is a good row)"
        elif fault and row.fields["order_id"] not in corrections:
            expected.dead[row.fields["order_id"]] = fault["says"]
        elif "_declined_" in row.fields["card_token"]:
            expected.dead[row.fields["order_id"]] = "declined"
        else:
            expected.done[row.fields["order_id"]] = {**row.fields, **corrections.get(row.fields["order_id"], {})}
    return expected


def _table(name: str) -> list[dict[str, str]]:
    with (SHOP / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _items(order: Fields) -> dict[str, int]:
    return {sku: int(quantity) for sku, _, quantity in (item.rpartition("x") for item in order["items"].split("|"))}


# --- one document of one order: is it the right one? --------------------------------------------


def _same(document: Mapping[str, Any], order: Fields, *keys: str) -> bool:
    return all(document[key] == order[key] for key in ("order_id", *keys))


def _payment(content: bytes, order: Fields) -> bool:
    receipt = json.loads(content)
    return _same(receipt, order, "amount", "currency") and receipt["card"] == order["card_token"]


def _sale(content: bytes, order: Fields) -> bool:
    sale = json.loads(content)
    return _same(sale, order, "amount", "currency", "country") and sale["pieces"] == sum(_items(order).values())


def _picking_note(content: bytes, order: Fields) -> bool:
    note = json.loads(content)
    picked = {each["sku"]: each["quantity"] for each in note["pick"]}
    return _same(note, order, "warehouse", "gift_note") and picked == _items(order)


def _confirmation(content: bytes, order: Fields) -> bool:
    mail = email.message_from_bytes(content)
    text = mail.get_payload(decode=True)
    return (
        parseaddr(mail["To"])[1] == order["email"]
        and mail["Subject"] == f"Your order {order['order_id']}"
        and isinstance(text, bytes)
        and f"Dear {order['customer']},".encode() in text
        and f"{order['currency']} {order['amount']}".encode() in text
    )


def _invoice(content: bytes, order: Fields) -> bool:
    page = ElementTree.fromstring(content)
    texts = {each.get("id"): each.text for each in page.iter() if each.get("id")}
    lines = len(page.findall(".//{*}tbody/{*}tr"))
    return texts == {"number": order["order_id"], "customer": order["customer"], "total": order["amount"]} and lines == len(
        _items(order)
    )


DOCUMENTS: dict[str, tuple[str, Callable[[bytes, Fields], bool]]] = {
    "receipt": ("payments/{order_id}.json", _payment),
    "confirmation": ("outbox/{order_id}.eml", _confirmation),
    "invoice": ("invoices/{order_id}.html", _invoice),
    "sale": ("sales/{order_id}.json", _sale),
    "picking note": ("warehouse/{warehouse}/{order_id}.json", _picking_note),
}
"""What each order must leave: name -> (path, test of its content)."""


def wrong_documents(folder: Path, done: Mapping[str, Fields]) -> Iterator[tuple[str, str]]:
    """Yield (order, what is wrong) for documents that are missing, wrong, or should not be there."""
    for name, (pattern, is_right) in DOCUMENTS.items():
        place = folder / pattern.partition("/")[0]
        found = {path.relative_to(folder).as_posix() for path in place.rglob("*") if not path.is_dir()}
        for order_id, order in done.items():
            path = pattern.format_map(order)
            if path not in found:
                yield order_id, f"the {name} of {order_id} is missing ({path})"
                continue
            found.remove(path)
            try:
                right = is_right((folder / path).read_bytes(), order)
            except Exception as error:
                yield order_id, f"the {name} of {order_id} cannot be read ({path}): {error}"
            else:
                if not right:
                    yield order_id, f"the {name} of {order_id} says something else than the order ({path})"
        for path in sorted(found):
            yield Path(path).stem, f"{path} should not be there"


def wrong_stock(folder: Path, done: Mapping[str, Fields]) -> Iterator[tuple[str, str]]:
    """Yield (order or article, what is wrong) for reservations, and for pieces that were taken twice or not at all."""
    reserved: dict[str, dict[str, int]] = defaultdict(dict)
    connection = sqlite3.connect(f"{(folder / 'stock.db').absolute().as_uri()}?mode=ro", uri=True)
    try:
        for order_id, sku, pieces in connection.execute("SELECT order_id, sku, pieces FROM reserved"):
            reserved[order_id][sku] = pieces
        left = dict(connection.execute("SELECT sku, pieces FROM stock").fetchall())
    finally:
        connection.close()
    for order_id, order in done.items():
        if reserved.pop(order_id, None) != _items(order):
            yield order_id, f"the reservation of {order_id} is missing or wrong"
    for order_id in reserved:
        yield order_id, f"a reservation of {order_id} should not be there"
    taken: Counter[str] = Counter()
    for order in done.values():
        taken.update(_items(order))
    for product in read_catalog(SHOP / "catalog.csv").values():
        if left.get(product.sku) != product.stock - taken[product.sku]:
            yield product.sku, f"of {product.sku} {left.get(product.sku)} pieces are left, not {product.stock - taken[product.sku]}"


# --- what ran twice, and why --------------------------------------------------------------------

# step -> the step that enqueued it; see the drawing in app.py
_BEFORE = {
    "payment": "",
    "stock": "payment",
    "confirmation": "payment",
    "invoice": "payment",
    "sale": "payment",
    "warehouse": "stock",
}


@dataclass
class Journals:
    """What the workers noted of their executions."""

    retried: int = 0
    """Requests to the gateway that were not answered."""
    twice: int = 0
    """Executions that ended well though one of the same step had ended well before."""
    unexplained: list[str] = field(default_factory=list[str])
    """Steps among them that the kill does not explain."""


def read_journals(folder: Path, killed: set[str]) -> Journals:
    """Read the journals of all workers.

    The kill explains a second execution of a step if the killed worker had begun that step, and the other one was a delivery
    with a higher count; or if it explains a second execution of the step before, which enqueued this one again.
    """
    journals = Journals()
    endings: Counter[str] = Counter()
    begun_by_killed: set[str] = set()
    redelivered: set[str] = set()
    for path in (folder / "journal").iterdir():
        for line in path.read_text().splitlines():
            what, _, step, _, deliveries = line.split()
            if what == "start" and path.name in killed:
                begun_by_killed.add(step)
            elif what == "start" and int(deliveries) > 1:
                redelivered.add(step)
            endings[step] += what == "done"
            journals.retried += what == "GatewayTimeout"

    def explained(step: str) -> bool:
        order_id, _, name = step.partition("_")
        if step in begun_by_killed and step in redelivered:
            return True
        return name in _BEFORE and explained(f"{order_id}_{_BEFORE[name]}".removesuffix("_"))

    twice = [step for step, count in endings.items() if count > 1]
    journals.twice = sum(endings[step] - 1 for step in twice)
    journals.unexplained = [step for step in twice if not explained(step)]
    return journals


# --- all of it ----------------------------------------------------------------------------------


def check(folder: Path) -> list[str]:
    """Check a finished run, print the sums, and return what is wrong."""
    run: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    expected = expect(run["rows"])
    problems: list[str] = []

    wrong: set[str] = set()
    for order_id, problem in (*wrong_documents(folder, expected.done), *wrong_stock(folder, expected.done)):
        wrong.add(order_id)
        problems.append(problem)
    done = [order_id for order_id in expected.done if order_id not in wrong]

    texts = {each["order_id"]: each["text"] for each in run["dead"]}
    dead = [order_id for order_id, says in expected.dead.items() if says in texts.get(order_id, "") and order_id not in wrong]
    problems += [
        f"{order_id} has no dead letter that says {expected.dead[order_id]!r}" for order_id in expected.dead if order_id not in dead
    ]
    problems += [
        f"{order_id} is dead and should not be: {text}" for order_id, text in texts.items() if order_id not in expected.dead
    ]

    why = {each["row"]: each["why"] for each in run["refused"]}
    refused = [row for row, says in expected.refused.items() if says in why.get(row, "")]
    problems += [f"row {row} was not refused with {expected.refused[row]!r}" for row in expected.refused if row not in refused]
    problems += [f"row {row} was refused and should not be: {text}" for row, text in why.items() if row not in expected.refused]

    journals = read_journals(folder, {str(pid) for pid in run["killed"]})
    problems += [f"{step} ran twice, and the kill does not explain it" for step in journals.unexplained]

    if len(done) + len(dead) + len(refused) != run["rows"]:
        problems.append(f"{run['rows'] - len(done) - len(dead) - len(refused):,} of {run['rows']:,} orders are not accounted for")
    print(f"  orders in        {run['rows']:6,}")
    print(f"    done           {len(done):6,}   each with {', '.join(DOCUMENTS)} and reservation, once and right")
    print(f"    dead           {len(dead):6,}   each with a dead letter that says why, and no document")
    print(f"    refused        {len(refused):6,}   rows that could not be read, or told from another")
    print(f"  payments retried {journals.retried:6,}   requests to the gateway without an answer")
    print(f"  executed twice   {journals.twice:6,}   steps that the killed worker had begun or set off; harmless by design")
    print(f"  seconds          {run['seconds']:6.1f}")
    return problems


def main(folder: Path) -> int:
    """Check, say what is wrong, and return the exit code."""
    try:
        problems = check(folder)
    except (OSError, ValueError, KeyError, sqlite3.Error) as error:
        problems = [f"{folder} does not hold a finished run: {error}"]
    if not problems:
        print("Every order is accounted for.")
        return 0
    for problem in problems[:20]:
        print(f"WRONG: {problem}")
    if len(problems) > 20:
        print(f"... and {len(problems) - 20:,} more")
    return 1


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("Usage: python check.py FOLDER")
    sys.exit(main(Path(sys.argv[1])))
