"""The stock: how many pieces of each article are left, and which order has reserved which, in a SQLite file.

A reservation and the pieces it takes are written in one transaction, so a second run of the task finds it and takes nothing.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable
from pathlib import Path

from orders import Order, Product


class OutOfStock(Exception):
    """There are not enough pieces."""


class Stock:
    """The stock in one file. Any thread may use it; several processes may have it open.

    Args:
        path: The file; made when first used.
        products: What it holds when it is made.
    """

    def __init__(self, path: Path, products: Iterable[Product]) -> None:
        self._path = path
        self._products = products
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None

    def reserve(self, order: Order) -> None:
        """Reserve what an order needs, all of it or nothing. The same order again changes nothing.

        Raises:
            OutOfStock: An article is not there in that quantity.
        """
        with self._lock, self._open() as connection:  # commits, or rolls back if anything is raised
            connection.execute("BEGIN IMMEDIATE")
            if connection.execute("SELECT 1 FROM reserved WHERE order_id = ?", [order.order_id]).fetchone():
                return
            for line in order.lines:
                taken = connection.execute(
                    "UPDATE stock SET pieces = pieces - :n WHERE sku = :sku AND pieces >= :n", {"sku": line.sku, "n": line.quantity}
                )
                if not taken.rowcount:
                    raise OutOfStock(f"there are no {line.quantity} pieces of {line.sku} left")
                connection.execute("INSERT INTO reserved VALUES (?, ?, ?)", [order.order_id, line.sku, line.quantity])

    def close(self) -> None:
        """Close the file. It is opened again when it is needed."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(self._path, timeout=30, isolation_level=None, check_same_thread=False)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            with connection:
                connection.execute("BEGIN IMMEDIATE")
                connection.execute("CREATE TABLE IF NOT EXISTS stock (sku TEXT PRIMARY KEY, pieces INTEGER NOT NULL)")
                connection.execute(
                    "CREATE TABLE IF NOT EXISTS reserved (order_id TEXT, sku TEXT, pieces INTEGER, PRIMARY KEY (order_id, sku))"
                )
                connection.executemany(
                    "INSERT OR IGNORE INTO stock VALUES (?, ?)", [(each.sku, each.stock) for each in self._products]
                )
            self._connection = connection
        return self._connection
