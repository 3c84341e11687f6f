"""The examples are programs, not packages: their modules import each other by name, as `python demo.py` does."""

from __future__ import annotations

import sys
from pathlib import Path

SHOP = Path(__file__).resolve().parent.parent / "shop"

sys.path.insert(0, str(SHOP))
