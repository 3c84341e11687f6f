"""Make the shop's files again: orders.csv, catalog.csv, bad_orders.csv and corrections.csv, the same bytes each time.

    python make_orders.py [FOLDER]      default: the folder of this file

orders.csv looks like the export of a shop system: 5,000 orders of two weeks, 150 of them damaged in the ways that
bad_orders.csv lists, some more merely odd (line breaks inside quotes, padded fields, Windows line ends).
"""

from __future__ import annotations

import csv
import io
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path

from orders import COLUMNS

SEED = 20260301
ORDERS = 5_000
BAD_PER_HUNDRED = 3
FIRST_ID = 100_001

COLUMN = {name: place for place, name in enumerate(COLUMNS)}

# What one euro buys, for the price list only.
RATES = {"EUR": Decimal("1.00"), "GBP": Decimal("0.86"), "USD": Decimal("1.09"), "PLN": Decimal("4.29"), "CHF": Decimal("0.95")}

# country, currency, hours from UTC, warehouse, customer, mailbox
PEOPLE = (
    ("DE", "EUR", 1, "HAM", "Jürgen Groß", "juergen.gross"),
    ("DE", "EUR", 1, "HAM", "Anna Müller", "anna.mueller"),
    ("DE", "EUR", 1, "HAM", "Müller, Anna-Lena", "al.mueller"),
    ("DE", "EUR", 1, "HAM", "Dr. Sören Weiß", "s.weiss"),
    ("DE", "EUR", 1, "HAM", "Käthe Schröder", "kaethe"),
    ("DE", "EUR", 1, "HAM", "Bäckerei Höfer & Söhne, Inh. K. Höfer", "bestellung"),
    ("FR", "EUR", 1, "LYS", "François Lefèvre", "f.lefevre"),
    ("FR", "EUR", 1, "LYS", "Zoé D'Aubigné", "zoe"),
    ("FR", "EUR", 1, "LYS", "Éléonore Saint-Gély", "eleonore"),
    ("FR", "EUR", 1, "LYS", "Noël Bœuf", "noel.boeuf"),
    ("ES", "EUR", 1, "LYS", "José Ángel Núñez", "ja.nunez"),
    ("ES", "EUR", 1, "LYS", "Begoña Ibáñez", "begona"),
    ("ES", "EUR", 1, "LYS", "Íñigo Peña", "inigo.pena"),
    ("GB", "GBP", 0, "BHX", "Siobhán O'Brien", "siobhan"),
    ("GB", "GBP", 0, "BHX", 'James "Jim" Holliday', "jim.holliday"),
    ("GB", "GBP", 0, "BHX", "Smith, Jones & Co.", "office"),
    ("GB", "GBP", 0, "BHX", "Zoë Ashworth", "zoe.ashworth"),
    ("GB", "GBP", 0, "BHX", "Ravi Patel", "ravi.patel"),
    ("US", "USD", -5, "BHX", "María-José Carreño", "mj.carreno"),
    ("US", "USD", -5, "BHX", 'Robert "Bob" Tables', "bob.tables"),
    ("US", "USD", -5, "BHX", "John Smith", "john.smith"),
    ("US", "USD", -5, "BHX", "Nguyễn Thị Hương", "huong"),
    ("PL", "PLN", 1, "GDN", "Łukasz Żółkiewski", "lukasz"),
    ("PL", "PLN", 1, "GDN", "Małgorzata Wiśniewska", "m.wisniewska"),
    ("PL", "PLN", 1, "GDN", "Świętosława Grzegżółka", "swieta"),
    ("PL", "PLN", 1, "GDN", "Jan Kowalski", "jan.kowalski"),
    ("CH", "CHF", 1, "HAM", "Urs Bünzli", "urs.buenzli"),
    ("CH", "CHF", 1, "HAM", "Renée Crêtenet", "renee"),
    ("CH", "CHF", 1, "HAM", "Gian-Andri Töndury", "ga.toendury"),
    ("GR", "EUR", 2, "LYS", "Ελένη Παπαδοπούλου", "eleni"),
    ("GR", "EUR", 2, "LYS", "Γιώργος Νικολάου", "giorgos"),
    ("FI", "EUR", 2, "GDN", "Väinö Hämäläinen", "vaino"),
    ("FI", "EUR", 2, "GDN", "Åsa Öberg", "asa.oberg"),
    ("JP", "USD", 9, "HAM", "山田 太郎", "taro.yamada"),
    ("JP", "USD", 9, "HAM", "佐藤 花子", "hanako"),
    ("UA", "EUR", 2, "GDN", "Оксана Шевченко", "oksana"),
    ("UA", "EUR", 2, "GDN", "Дмитро Ґрунт", "dmytro"),
    ("IL", "USD", 2, "HAM", "נועה כהן", "noa.cohen"),
)
DOMAINS = ("example.com", "example.org", "example.net", "mail.example", "xn--bro-hoa.example", "shop.example.com")
ISSUERS = ("amber", "amber", "amber", "amber", "cedar", "cedar", "cedar", "delta", "delta")
NO_DATES = ("2026-02-30T10:00:00+01:00", "46084.4375", "31/03/26 25:61", "yesterday", "0000-00-00 00:00:00", "")
NOTES = (
    "Happy birthday, Mum!",
    "Alles Gute zum Geburtstag, 🎂 dein Ömchen",
    'Please write "Fragile" on the box',
    "Leave with neighbour, no. 12",
    "Bon anniversaire ; à bientôt",
    "50 % off next time?",
    "誕生日おめでとう",
    "No plastic, please",
)
LONG_NOTES = (
    "Dear Granny,\nthank you for the socks.\nYours, Tim",
    "Ring twice.\r\nBeware of the dog.",
    'He said:\n"I do, I do",\nso here it is',
)
GOODS = (
    ("MUG", "Mug", "8.90", ("blue", "red", "“Monday”", "moss, 0.4 l", "crème")),
    ("TEE", "T-shirt", "19.00", ("S, white", "M, white", "L, white", "XL, black", 'print "404"')),
    ("BAG", "Bag", "34.50", ("canvas", "cork", "felt, grey", "jute")),
    ("PEN", "Fountain pen", "27.00", ("fine", "medium", "broad", "left-handed")),
    ("INK", "Ink, 30 ml", "11.40", ("black", "royal blue", "green <smaragd>", "sepia & rust")),
    ("NTB", "Notebook", "6.75", ("A5, lined", "A5, dotted", "A6, plain", "A4, squared")),
    ("LMP", "Desk lamp", "89.00", ("brass", "white", "Ø 12 cm")),
    ("CHR", "Chair", "149.00", ("oak", "ash", "beech")),
    ("CDL", "Candle", "4.20", ("beeswax", "vanilla", "fir", "no scent")),
    ("KEY", "Key ring", "3.10", ("fish", "anchor", "ß")),
    ("TEA", "Tea, 100 g", "7.60", ("Assam", "Earl Grey", "rooibos", "Gyokuro 玉露")),
    ("PST", "Poster", "15.00", ("harbour", "crane", "dock at night")),
)

Fields = list[str]
Damage = Callable[[Fields, random.Random], "Fields | bytes"]


@dataclass(frozen=True)
class Kind:
    """One way in which an export is bad."""

    name: str
    count: int
    ends: str
    """`dead` = refused by the task, ends as a dead letter. `refused` = the row cannot be read, or not be told from another."""
    column: str
    """Column that is wrong; "" where the row as a whole is. The dead letter's text starts with it."""
    says: str
    """What the dead letter, or the refusal, says."""
    damage: Damage


def cents(amount: Decimal) -> Decimal:
    """Two decimals."""
    return amount.quantize(Decimal("0.01"))


def catalog() -> dict[str, tuple[str, dict[str, Decimal]]]:
    """SKU -> (name, price by currency)."""
    goods: dict[str, tuple[str, dict[str, Decimal]]] = {}
    for prefix, name, euros, variants in GOODS:
        for number, variant in enumerate(variants, 1):
            price = Decimal(euros) + Decimal("0.50") * (number - 1)
            goods[f"{prefix}-{number:02d}"] = (f"{name}, {variant}", {code: cents(price * rate) for code, rate in RATES.items()})
    return goods


def good_orders(rng: random.Random, goods: dict[str, tuple[str, dict[str, Decimal]]]) -> Iterable[Fields]:
    """5,000 orders that are right."""
    skus = sorted(goods)
    moment = datetime(2026, 3, 2, 5, 30, tzinfo=UTC)
    for number in range(ORDERS):
        moment += timedelta(seconds=rng.randrange(10, 470))
        country, currency, hours, warehouse, customer, mailbox = rng.choice(PEOPLE)
        lines = [(sku, rng.choice((1, 1, 1, 2, 2, 3, 5))) for sku in sorted(rng.sample(skus, rng.choice((1, 1, 2, 2, 3, 4))))]
        amount = sum((goods[sku][1][currency] * quantity for sku, quantity in lines), Decimal(0))
        chance = rng.random()
        issuer = "bluebird" if chance < 0.02 else rng.choice(ISSUERS)
        declined = "_declined" if 0.02 <= chance < 0.032 else ""
        note = rng.choice(NOTES) if rng.random() < 0.12 else rng.choice(LONG_NOTES) if rng.random() < 0.01 else ""
        yield [
            f"ORD-{FIRST_ID + number}",
            moment.astimezone(timezone(timedelta(hours=hours))).isoformat(),
            customer,
            f"{mailbox}{rng.randrange(1, 1000)}@{rng.choice(DOMAINS)}",
            "|".join(f"{sku}x{quantity}" for sku, quantity in lines),
            currency,
            f"{amount:.2f}",
            f"tok_{issuer}{declined}_{rng.randrange(16**8):08x}",
            country,
            warehouse,
            note,
        ]


def raw(fields: Sequence[str]) -> bytes:
    """One row as the export writes it, without its line end."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(fields)
    return text.getvalue().removesuffix("\n").encode()


def put(column: str, *values: str) -> Damage:
    """Replace a field by one of `values`; `{}` in it stands for what was there."""

    def damage(fields: Fields, rng: random.Random) -> Fields:
        fields[COLUMN[column]] = rng.choice(values).replace("{}", fields[COLUMN[column]])
        return fields

    return damage


def edit(column: str, change: Callable[[str], str]) -> Damage:
    """Replace a field by what `change` makes of it."""

    def damage(fields: Fields, rng: random.Random) -> Fields:
        fields[COLUMN[column]] = change(fields[COLUMN[column]])
        return fields

    return damage


def bad_mail(fields: Fields, rng: random.Random) -> Fields:
    """An address that is none."""
    name, _, domain = fields[COLUMN["email"]].partition("@")
    forms = (
        f"{name}.{domain}",
        f"{name}@",
        f"{name}@@{domain}",
        f"{name} at {domain}",
        f"{name}@{domain.split('.')[0]}",
        f"@{domain}",
    )
    fields[COLUMN["email"]] = rng.choice(forms)
    return fields


def bad_sku(fields: Fields, rng: random.Random) -> Fields:
    """An article that is not in the catalog."""
    lines = fields[COLUMN["items"]].split("|")
    lines[-1] = rng.choice(("XMAS-01x1", "MUG-99x2", "1.00E+05x1", "#N/Ax1"))
    fields[COLUMN["items"]] = "|".join(lines)
    return fields


def bad_quantity(fields: Fields, rng: random.Random) -> Fields:
    """A quantity nobody can order."""
    lines = fields[COLUMN["items"]].split("|")
    lines[0] = lines[0].rpartition("x")[0] + "x" + rng.choice(("0", "-1", "1.5"))
    fields[COLUMN["items"]] = "|".join(lines)
    return fields


def mojibake(fields: Fields, rng: random.Random) -> Fields:
    """UTF-8 that somebody read as Latin-1, or could not read."""
    name = rng.choice(("Jürgen Groß", "François Lefèvre", "Käthe Schröder", "Begoña Ibáñez"))
    garbled = name.encode().decode("cp1252") if rng.random() < 0.7 else name.encode("latin-1").decode(errors="replace")
    fields[COLUMN["customer"]] = garbled
    return fields


def two_line_customer(fields: Fields, rng: random.Random) -> Fields:
    """A name pasted with its street."""
    fields[COLUMN["customer"]] += rng.choice(("\nHafenstraße 12", "\r\nc/o Reception", "\nBcc: everybody@example.com"))
    return fields


def truncated(fields: Fields, rng: random.Random) -> bytes:
    """The disk was full: cut in the middle, sometimes inside quotes, so that a naive reader swallows the rows behind it."""
    if rng.random() < 0.5:
        fields[COLUMN["customer"]] = "Smith, Jones & Co."
        whole = raw(fields)
        return whole[: whole.index(b"Smith, Jones") + rng.randrange(4, 12)]
    whole = raw(fields)
    return whole[: rng.randrange(18, len(fields[0]) + len(fields[1]))]


def trailing_garbage(fields: Fields, rng: random.Random) -> bytes:
    """More behind the last column than belongs there."""
    return raw(fields) + rng.choice((b",,,,,,", b",\x00\x00\x00", b",0x80004005,ERR_PIPE", b",}]);"))


def split_row(fields: Fields, rng: random.Random) -> bytes:
    """A line break without quotes around it."""
    return raw(fields).replace(b",tok_", b"\n,tok_", 1)


def latin1(fields: Fields, rng: random.Random) -> bytes:
    """Bytes of another encoding in a UTF-8 file."""
    fields[COLUMN["customer"]] = rng.choice(("Jürgen Groß", "François Lefèvre", "José Ángel Núñez"))
    fields[COLUMN["gift_note"]] = ""
    return raw(fields).decode().encode("latin-1", errors="replace")


def duplicate(fields: Fields, rng: random.Random) -> Fields:
    """An order number that an earlier row has."""
    number = int(fields[0].removeprefix("ORD-")) - FIRST_ID
    fields[0] = f"ORD-{FIRST_ID + number // 100 * 100 + rng.randrange(10)}"
    return fields


KINDS = (
    Kind("not an e-mail address", 14, "dead", "email", "is not an e-mail address", bad_mail),
    Kind(
        "space in the e-mail address",
        4,
        "dead",
        "email",
        "is not an e-mail address",
        edit("email", lambda mail: mail.replace("@", " @")),
    ),
    Kind(
        "invisible character in the e-mail address",
        6,
        "dead",
        "email",
        "invisible",
        put("email", "\ufeff{}", "{}\u200b", "\u00ad{}"),
    ),
    Kind("customer missing", 10, "dead", "customer", "is missing", put("customer", "", "   ", "\u00a0")),
    Kind("customer garbled (mojibake)", 12, "dead", "customer", "garbled", mojibake),
    Kind("line break in the customer", 5, "dead", "customer", "line break", two_line_customer),
    Kind("amount negative or zero", 8, "dead", "amount", "is not above zero", put("amount", "-{}", "0.00", "-0.01")),
    Kind("amount not a number", 8, "dead", "amount", "is not a number", put("amount", "n/a", "#REF!", "free", "", "NaN", "{} EUR")),
    Kind("amount with a decimal comma", 12, "dead", "amount", "decimal comma", edit("amount", lambda text: text.replace(".", ","))),
    Kind(
        "amount without its decimal point",
        8,
        "dead",
        "amount",
        "what the items cost",
        edit("amount", lambda text: text.replace(".", "")),
    ),
    Kind("currency missing or unknown", 10, "dead", "currency", "is ", put("currency", "", "", "€", "EURO", "XXX")),
    Kind("unknown SKU", 10, "dead", "items", "in the catalog", bad_sku),
    Kind("quantity zero, negative or broken", 8, "dead", "items", "is no quantity", bad_quantity),
    Kind("no items", 3, "dead", "items", "is not an article and a quantity", put("items", "")),
    Kind("date that is none", 10, "dead", "ordered_at", "is not a date", put("ordered_at", *NO_DATES)),
    Kind("date without time zone", 3, "dead", "ordered_at", "no time zone", edit("ordered_at", lambda text: text[:19])),
    Kind("card missing", 3, "dead", "card_token", "is ", put("card_token", "", "NULL")),
    Kind("order number used twice", 6, "refused", "", "was in row", duplicate),
    Kind("row cut off", 4, "refused", "", "cut off", truncated),
    Kind("garbage behind the row", 2, "refused", "", "too many columns", trailing_garbage),
    Kind("row broken in two", 2, "refused", "", "line break", split_row),
    Kind("not UTF-8", 2, "refused", "", "not UTF-8", latin1),
)

# A small run holds a bit of everything: these are the first bad rows.
FIRST = (
    "not an e-mail address",
    "amount with a decimal comma",
    "order number used twice",
    "customer garbled (mojibake)",
    "row cut off",
    "unknown SKU",
    "customer missing",
    "amount not a number",
    "not UTF-8",
)
CORRECTED = ("not an e-mail address", "amount with a decimal comma")
CORRECTIONS_EACH = 3


def plan(rng: random.Random) -> dict[int, Kind]:
    """Row (1 = the first behind the header) -> what is wrong with it: three of each hundred rows, 150 in all."""
    by_name = {kind.name: kind for kind in KINDS}
    first = [by_name[name] for name in FIRST]
    rest = list((Counter({kind: kind.count for kind in KINDS}) - Counter(first)).elements())
    rng.shuffle(rest)
    kinds = [*first, *rest]
    rows: dict[int, Kind] = {}
    for start in range(0, ORDERS, 100):
        # The first rows of each hundred are right, so that a number can be used twice.
        for row in sorted(rng.sample(range(start + 21, start + 100), BAD_PER_HUNDRED)):
            rows[row] = kinds[len(rows)]
    assert len(rows) == len(kinds)
    return rows


def odd(fields: Fields, rng: random.Random) -> tuple[Fields, bytes]:
    """Oddities a reader must take: padded fields, Windows line ends. Returns the row and its line end."""
    chance = rng.random()
    if chance < 0.01:
        fields[COLUMN["email"]] = f"  {fields[COLUMN['email']]} "
        fields[COLUMN["customer"]] += "\u00a0"
    return fields, b"\r\n" if 0.01 <= chance < 0.03 else b"\n"


def table(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV file."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def main(folder: Path) -> None:
    """Write the four files into `folder`."""
    rng = random.Random(SEED)
    goods = catalog()
    rows = list(good_orders(rng, goods))
    bad = plan(rng)
    demand: Counter[str] = Counter()
    listed: list[tuple[object, ...]] = []
    corrections: list[tuple[str, str, str]] = []
    corrected: Counter[str] = Counter()
    content = b"\xef\xbb\xbf" + raw(COLUMNS) + b"\r\n"
    for number, right in enumerate(rows, 1):
        for line in right[COLUMN["items"]].split("|"):
            sku, _, quantity = line.rpartition("x")
            demand[sku] += int(quantity)
        kind = bad.get(number)
        if kind is None:
            fields, end = odd(list(right), rng)
            content += raw(fields) + end
            continue
        damaged = kind.damage(list(right), rng)
        order_id = right[0] if isinstance(damaged, bytes) else damaged[0]
        content += (damaged if isinstance(damaged, bytes) else raw(damaged)) + b"\n"
        listed.append((number, order_id, kind.name, kind.ends, kind.column, kind.says))
        if kind.name in CORRECTED and corrected[kind.name] < CORRECTIONS_EACH:
            corrected[kind.name] += 1
            corrections.append((order_id, kind.column, right[COLUMN[kind.column]]))
    (folder / "orders.csv").write_bytes(content)
    table(folder / "bad_orders.csv", ("row", "order_id", "kind", "ends", "column", "says"), listed)
    table(folder / "corrections.csv", ("order_id", "column", "value"), corrections)
    table(
        folder / "catalog.csv",
        ("sku", "name", "stock", *(f"price_{code.lower()}" for code in RATES)),
        ((sku, name, demand[sku] * 5 // 4, *prices.values()) for sku, (name, prices) in goods.items()),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
