"""Names by which the command, the pytest plugin and the tests know each other. Imports nothing."""

from __future__ import annotations

from typing import Final

URL_VARIABLE: Final = "CROSSDOCK_CONFORMANCE_URL"
"""Environment variable that stands for `--crossdock-url`, for URLs that hold a secret."""
PROPERTY: Final = "crossdock_conformance"
"""The property by which a test carries what it tested and how that ended."""
