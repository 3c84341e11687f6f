"""The shop example: its data, its pure parts, the demo on a few orders, and a check that can fail."""

from __future__ import annotations

import csv
import email.policy
import importlib
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import datetime
from decimal import Decimal
from email.message import EmailMessage
from email.parser import BytesParser
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import check
import documents
import pytest
from orders import BadOrder, Line, Order, Product, Refused, Row, parse_order, read_catalog, read_rows
from stock import OutOfStock, Stock

SHOP = Path(__file__).resolve().parent.parent / "shop"

HEADER = "order_id,ordered_at,customer,email,items,currency,amount,card_token,country,warehouse,gift_note\n"
GOOD = "ORD-1,2026-03-02T10:00:00+01:00,Anna,anna@example.com,MUG-01x2,EUR,17.80,tok_amber_00000000,DE,HAM,\n"

ORDER = Order(
    order_id="ORD-100001",
    ordered_at=datetime.fromisoformat("2026-03-02T07:32:41+02:00"),
    customer='Ågot "Åse" <Ø> & Søn, 山田',
    email="agot@example.com",
    lines=(
        Line("MUG-01", "Mug, <blue>", 2, Decimal("8.90")),
        Line("TEA-04", "Tea & more", 1, Decimal("7.60")),
    ),
    currency="EUR",
    amount=Decimal("25.40"),
    card_token="tok_amber_00000000",
    country="NO",
    warehouse="HAM",
    gift_note="first line\nsecond line",
)


@pytest.fixture(scope="module")
def catalog() -> dict[str, Product]:
    """The shipped catalog."""
    return read_catalog(SHOP / "catalog.csv")


def listed() -> dict[int, dict[str, str]]:
    """Rows of bad_orders.csv by row number."""
    with (SHOP / "bad_orders.csv").open(encoding="utf-8", newline="") as file:
        return {int(each["row"]): each for each in csv.DictReader(file)}


# --- the data -----------------------------------------------------------------------------------


def test_the_export_has_5000_rows_and_exactly_the_listed_150_are_bad(catalog: dict[str, Product]) -> None:
    """Each bad row is found, in the way and with the words that the list says; no good row is taken for bad."""
    found: dict[int, tuple[str, str, str]] = {}
    rows = list(read_rows(SHOP / "orders.csv"))
    for row in rows:
        if isinstance(row, Refused):
            found[row.number] = (row.order_id, "refused", row.why)
            continue
        try:
            parse_order(row.fields, catalog)
        except BadOrder as error:
            found[row.number] = (row.fields["order_id"], "dead", str(error))
    bad = listed()
    assert len(rows) == 5000
    assert len(bad) == 150
    assert sorted(found) == sorted(bad)
    for number, (order_id, ends, text) in found.items():
        assert (order_id, ends) == (bad[number]["order_id"], bad[number]["ends"])
        assert text.startswith(bad[number]["column"])
        assert bad[number]["says"] in text


def test_the_readme_lists_the_bad_rows() -> None:
    """Kinds, counts, endings and rows in the README's table are those of bad_orders.csv."""
    table = re.findall(
        r"^\| (.+?) \| (\d+) \| (dead|refused) \| ([\d, ]+) \|$", (SHOP / "README.md").read_text(encoding="utf-8"), re.M
    )
    in_readme = {(kind, ends): [int(row) for row in rows.split(",")] for kind, _, ends, rows in table}
    in_list: dict[tuple[str, str], list[int]] = {}
    for number, each in listed().items():
        in_list.setdefault((each["kind"], each["ends"]), []).append(number)
    assert in_readme == in_list
    assert [int(count) for _, count, _, _ in table] == [len(rows) for rows in in_readme.values()]


def test_the_files_can_be_made_again(tmp_path: Path) -> None:
    """make_orders.py makes the shipped files, byte by byte."""
    subprocess.run([sys.executable, SHOP / "make_orders.py", tmp_path], check=True, timeout=30)
    for name in ("orders.csv", "catalog.csv", "bad_orders.csv", "corrections.csv"):
        assert (tmp_path / name).read_bytes() == (SHOP / name).read_bytes(), name


def test_the_corrections_make_good_orders(catalog: dict[str, Product]) -> None:
    """Each correction is for a bad order, and repairs it; some are among the first 300."""
    rows = {row.fields["order_id"]: row for row in read_rows(SHOP / "orders.csv") if isinstance(row, Row)}
    with (SHOP / "corrections.csv").open(encoding="utf-8", newline="") as file:
        corrections = list(csv.DictReader(file))
    for each in corrections:
        fields = rows[each["order_id"]].fields
        with pytest.raises(BadOrder, match=each["column"]):
            parse_order(fields, catalog)
        parse_order({**fields, each["column"]: each["value"]}, catalog)
    assert {each["column"] for each in corrections if rows[each["order_id"]].number <= 300} == {"email", "amount"}


# --- reading ------------------------------------------------------------------------------------


def read(tmp_path: Path, content: bytes) -> list[Row | Refused]:
    """Read an export with this content behind the header."""
    file = tmp_path / "orders.csv"
    file.write_bytes(HEADER.encode() + content)
    return list(read_rows(file))


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        (b'ORD-2,2026-03-02T10:00:00+01:00,"Smith, Jo\n', "cut off"),
        (b"ORD-2,2026-03-02\n", "cut off after 2 of 11"),
        (GOOD.replace("ORD-1", "ORD-2").encode().replace(b"Anna", b"J\xfcrgen"), "not UTF-8"),
        (GOOD.replace("ORD-1", "ORD-2").encode().replace(b",EUR", b"\n,EUR"), "line break"),
        (GOOD.replace("ORD-1", "ORD-2").encode().replace(b",\n", b",,,}]\n"), "too many columns"),
        (b"ORD-2,\x00\x00\n", "cut off"),
    ],
)
def test_a_broken_row_is_refused_alone(tmp_path: Path, broken: bytes, why: str) -> None:
    """A row that cannot be read is refused with its number, and its neighbours are read."""
    before, row, after = read(tmp_path, GOOD.encode() + broken + GOOD.replace("ORD-1", "ORD-3").encode())
    assert isinstance(before, Row)
    assert isinstance(after, Row)
    assert after.fields["order_id"] == "ORD-3"
    assert isinstance(row, Refused)
    assert (row.number, row.order_id) == (2, "ORD-2")
    assert why in row.why


def test_odd_rows_are_read(tmp_path: Path) -> None:
    """Windows line ends, padded fields, and quotes, commas and line breaks inside quotes are no fault."""
    odd = (
        GOOD.replace("Anna", ' "Anna ""A"", B"')
        .replace("anna@", "  anna@")
        .replace(",\n", ',"a\r\nb"\r\n')
        .replace(' "Anna', '"Anna')
    )
    [row] = read(tmp_path, odd.encode())
    assert isinstance(row, Row)
    assert row.fields["customer"] == 'Anna "A", B'
    assert row.fields["email"] == "anna@example.com"
    assert row.fields["gift_note"] == "a\r\nb"


def test_a_second_row_with_the_same_number_is_refused(tmp_path: Path) -> None:
    """The first one counts; the second names it."""
    first, second = read(tmp_path, GOOD.encode() * 2)
    assert isinstance(first, Row)
    assert isinstance(second, Refused)
    assert "was in row 1" in second.why


# --- documents ----------------------------------------------------------------------------------


def test_the_invoice_is_well_formed_and_shows_all_lines() -> None:
    """An XML parser takes it, whatever the names hold."""
    page = ElementTree.fromstring(documents.invoice(ORDER))
    assert page.tag == "{http://www.w3.org/1999/xhtml}html"
    assert [cell.text for cell in page.iterfind(".//{*}tbody/{*}tr/{*}td")] == [
        *("Mug, <blue>", "2", "8.90", "17.80"),
        *("Tea & more", "1", "7.60", "7.60"),
    ]
    assert [each.text for each in page.iter() if each.get("id") == "customer"] == [ORDER.customer]


def test_the_confirmation_is_a_mail_to_the_customer() -> None:
    """A strict parser reads it without a defect."""
    mail = BytesParser(policy=email.policy.strict).parsebytes(documents.confirmation(ORDER))
    assert isinstance(mail, EmailMessage)
    [to] = mail["To"].addresses
    assert (to.addr_spec, to.display_name) == (ORDER.email, ORDER.customer)
    assert not mail["To"].defects
    assert mail["Date"].datetime == ORDER.ordered_at
    assert "2 x Mug, <blue>" in mail.get_content()


def test_documents_depend_on_the_order_alone() -> None:
    """Made twice they are the same bytes, so that a second run of a task changes nothing."""
    for make in (documents.invoice, documents.confirmation, documents.picking_note, documents.sale):
        assert make(ORDER) == make(ORDER)


def test_stock_is_taken_once_per_order(tmp_path: Path) -> None:
    """A second reservation of one order takes nothing; what is not there is not reserved in part."""
    products = [Product("MUG-01", "Mug", 3, {}), Product("TEA-04", "Tea", 5, {})]
    stock = Stock(tmp_path / "stock.db", products)
    stock.reserve(ORDER)
    stock.reserve(ORDER)
    other = Order(**{name: getattr(ORDER, name) for name in ORDER.__slots__} | {"order_id": "ORD-100002"})
    with pytest.raises(OutOfStock, match="MUG-01"):
        stock.reserve(other)
    stock.close()
    with closing(sqlite3.connect(tmp_path / "stock.db")) as connection:
        left = dict(connection.execute("SELECT sku, pieces FROM stock"))
    assert left == {"MUG-01": 1, "TEA-04": 4}


# --- the tasks, in virtual time -----------------------------------------------------------------


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The program, with its documents in `tmp_path`."""
    monkeypatch.setenv("SHOP_DIR", str(tmp_path))
    shop = importlib.import_module("app")
    monkeypatch.setattr(shop, "STOCK", Stock(tmp_path / "stock.db", shop.CATALOG.values()))
    yield shop
    shop.STOCK.close()
    del sys.modules["app"]  # other examples have an app, too


def documents_in(folder: Path) -> list[str]:
    """What the shop has written about orders."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("ORD-*"))


@pytest.mark.asyncio
async def test_orders_take_their_ways(shop: ModuleType, tmp_path: Path) -> None:
    """One order goes through after a retry, a declined card and a wrong amount are dead at once, a bank that is down later."""
    fields = {"order_id": "ORD-1", "ordered_at": "2026-03-02T10:00:00+01:00", "customer": "Anna", "email": "anna@example.com"}
    fields |= {"items": "MUG-01x2", "currency": "EUR", "amount": "17.80", "card_token": "tok_amber_00000000", "country": "DE"}
    fields |= {"warehouse": "HAM", "gift_note": ""}
    slow = next(f"ORD-{number}" for number in range(1000) if zlib.crc32(f"ORD-{number}".encode()) % 100 == 1)
    orders = [
        fields | {"order_id": slow},
        fields | {"order_id": "ORD-2001", "card_token": "tok_amber_declined_00000000"},
        fields | {"order_id": "ORD-2002", "amount": "17,80"},
        fields | {"order_id": "ORD-2003", "card_token": "tok_bluebird_00000000"},
    ]
    async with shop.app.testing() as testing:
        await shop.app.enqueue_many([shop.receive_order.options(id=each["order_id"]).message(**each) for each in orders])
        await testing.run_until_idle()
        assert documents_in(tmp_path) == [f"payments/{slow}.json"]  # charged, but nobody knows: the answer got lost
        await testing.advance(minutes=1)
        dead = {letter.message.id: (letter.reason.value, letter.task) for letter in testing.dead_letters()}
    assert dead == {
        "ORD-2001_payment": ("rejected", "shop.take_payment"),
        "ORD-2002": ("rejected", "shop.receive_order"),
        "ORD-2003_payment": ("attempts_exhausted", "shop.take_payment"),
    }
    assert documents_in(tmp_path) == [
        f"invoices/{slow}.html",
        f"outbox/{slow}.eml",
        f"payments/{slow}.json",
        f"sales/{slow}.json",
        f"warehouse/HAM/{slow}.json",
    ]


# --- the demo -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a demo run of 300 orders that went well."""
    folder = tmp_path_factory.mktemp("shop")
    ended = subprocess.run(
        [sys.executable, SHOP / "demo.py", "--orders", "300", "--keep", folder],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    print(ended.stdout, ended.stderr)
    assert ended.returncode == 0, ended.stderr
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to spoil."""
    return shutil.copytree(finished, tmp_path / "shop")


def test_the_demo_accounts_for_every_order(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The check, run again on the folder, finds nothing; the kill was in the middle and some payments were retried."""
    assert check.main(folder) == 0
    shown = capsys.readouterr().out
    assert re.search(r"orders in +300$", shown, re.M)
    assert not re.search(r"payments retried +0 ", shown)
    assert "Every order is accounted for." in shown


def first(folder: Path, pattern: str) -> Path:
    """The first file of that pattern."""
    return sorted(folder.glob(pattern))[0]


def lose_an_invoice(folder: Path) -> None:
    first(folder, "invoices/*").unlink()


def file_an_invoice_twice(folder: Path) -> None:
    invoice = first(folder, "invoices/*")
    shutil.copy(invoice, invoice.with_stem(f"{invoice.stem} (1)"))


def send_a_mail_to_somebody_else(folder: Path) -> None:
    mails = sorted(folder.glob("outbox/*"))
    shutil.copy(mails[0], mails[1])


def change_a_total(folder: Path) -> None:
    invoice = first(folder, "invoices/*")
    invoice.write_text(invoice.read_text(encoding="utf-8").replace('id="total">', 'id="total">1'), encoding="utf-8")


def cut_a_sale(folder: Path) -> None:
    sale = first(folder, "sales/*")
    sale.write_bytes(sale.read_bytes()[:-5])


def note_for_the_wrong_warehouse(folder: Path) -> None:
    note = first(folder, "warehouse/HAM/*")
    note.rename(folder / "warehouse" / "BHX" / note.name)


def charge_a_declined_card(folder: Path) -> None:
    (folder / "payments" / f"{declined()}.json").write_text("{}")


def take_stock_twice(folder: Path) -> None:
    with closing(sqlite3.connect(folder / "stock.db")) as connection, connection:
        connection.execute("UPDATE stock SET pieces = pieces - 1 WHERE sku = 'MUG-01'")


def lose_a_dead_letter(folder: Path) -> None:
    change_facts(folder, "dead", lambda dead: [each for each in dead if each["order_id"] != declined()])


def lose_a_refusal(folder: Path) -> None:
    change_facts(folder, "refused", lambda refused: refused[1:])


def run_a_step_twice_for_no_reason(folder: Path) -> None:
    journal = first(folder, "journal/*")
    order_id = first(folder, "invoices/*").stem
    with journal.open("a") as file:
        file.write(f"start shop.write_invoice {order_id}_invoice 1 1\ndone shop.write_invoice {order_id}_invoice 1 1\n" * 2)


def change_facts(folder: Path, key: str, change: Callable[[list[Any]], list[Any]]) -> None:
    """Change what the demo wrote down."""
    facts = json.loads((folder / "run.json").read_text())
    facts[key] = change(facts[key])
    (folder / "run.json").write_text(json.dumps(facts))


def declined() -> str:
    """The first order whose card is declined."""
    rows = (row for row in read_rows(SHOP / "orders.csv") if isinstance(row, Row))
    return next(row.fields["order_id"] for row in rows if "_declined_" in row.fields["card_token"])


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lose_an_invoice, "the invoice of ORD-[0-9]+ is missing"),
        (file_an_invoice_twice, r"invoices/ORD-[0-9]+ \(1\).html should not be there"),
        (send_a_mail_to_somebody_else, "the confirmation of ORD-[0-9]+ says something else"),
        (change_a_total, "the invoice of ORD-[0-9]+ says something else"),
        (cut_a_sale, "the sale of ORD-[0-9]+ cannot be read"),
        (note_for_the_wrong_warehouse, "the picking note of ORD-[0-9]+ is missing"),
        (charge_a_declined_card, "payments/ORD-[0-9]+.json should not be there"),
        (take_stock_twice, "of MUG-01 [0-9]+ pieces are left, not"),
        (lose_a_dead_letter, "has no dead letter that says 'declined'"),
        (lose_a_refusal, "row [0-9]+ was not refused"),
        (run_a_step_twice_for_no_reason, "ran twice, and the kill does not explain it"),
    ],
)
def test_the_check_has_teeth(folder: Path, spoil: Callable[[Path], None], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever is spoilt in a finished run, the check names it and fails."""
    spoil(folder)
    assert check.main(folder) == 1
    assert re.search(f"WRONG: .*{says}", capsys.readouterr().out)


def test_the_check_command_fails_too(folder: Path) -> None:
    """`python check.py FOLDER` ends with 1 where an invoice is missing, and where there was no run."""
    lose_an_invoice(folder)
    for place in (folder, folder / "outbox"):
        ended = subprocess.run([sys.executable, SHOP / "check.py", place], capture_output=True, text=True, timeout=30, check=False)
        assert ended.returncode == 1
        assert "WRONG: " in ended.stdout
        assert not ended.stderr


def test_ctrl_c_leaves_no_process_behind(tmp_path: Path) -> None:
    """Interrupted while the workers work, the demo ends with 130 and all three of them are gone."""
    demo = subprocess.Popen(
        [sys.executable, "-u", SHOP / "demo.py", "--orders", "300", "--keep", tmp_path / "shop"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # As from a terminal: a shell's background jobs, and what they start, ignore SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    with demo:
        assert demo.stdout is not None
        pids: list[int] = []
        for line in demo.stdout:
            if line.startswith("Workers "):
                pids = [int(number) for number in re.findall(r"\d+", line)[:2]]
            if line.startswith("Worker ") and "takes its place" in line:
                pids += [int(number) for number in re.findall(r"\d+", line)]
                demo.send_signal(signal.SIGINT)
                break
        rest = demo.stdout.read()
    assert demo.returncode == 130, rest
    assert len(pids) == 3
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
