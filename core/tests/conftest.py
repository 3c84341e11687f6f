"""For all tests of core: machines of a busy CI are slow, so Hypothesis sets no deadline for a single example."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("crossdock", deadline=None)
settings.load_profile("crossdock")
