"""Durations and instants as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossdock.durations import format_duration, parse_datetime, parse_duration, parse_instant
from crossdock.errors import ConfigurationError

NOW_MS = 1_767_225_600_000  # 2026-01-01T00:00:00Z


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        ("90", 90),
        ("2.5", 2.5),
        ("250ms", 0.25),
        ("30s", 30),
        ("10m", 600),
        ("1.5h", 5400),
        ("2d", 172800),
        ("1w", 604800),
        ("1h30m", 5400),
        ("1w2d3h4m5s6ms", 788645.006),
        (" 10m ", 600),
    ],
)
def test_durations_are_read(text: str, seconds: float) -> None:
    """Every unit, plain numbers and combinations are understood, in seconds."""
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "ten",
        "-5",
        "-10m",
        "+5",
        "10 m",
        "1m1h",
        "1h1h",
        "10M",
        "1h30",
        ".5s",
        "1,5h",
        "1e3",
        "nan",
        "inf",
        "٣s",
        "5\x1b[31m",
    ],
)
def test_nonsense_is_refused_with_the_form(text: str) -> None:
    """What is no duration is refused in one sentence that shows how to write one, and never echoes control characters."""
    with pytest.raises(ConfigurationError, match="is no duration: write it like 30s, 10m") as caught:
        parse_duration(text)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("text", ["9" * 400, "9" * 400 + "w", "400000d"])
def test_absurd_lengths_are_refused(text: str) -> None:
    """A number beyond three centuries is a slip, and its text is not repeated in full."""
    with pytest.raises(ConfigurationError, match="too long") as caught:
        parse_duration(text)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.0004, "0s"),
        (0.25, "250ms"),
        (0.9996, "1s"),
        (2.5, "2.5s"),
        (59.94, "59.9s"),
        (59.96, "1m"),
        (90, "1m30s"),
        (3600, "1h"),
        (3601, "1h"),
        (5400.4, "1h30m"),
        (86400 * 3 + 3600 * 4 + 59, "3d4h"),
        (86400 * 15, "2w1d"),
        (90061, "1d1h"),
        (-5, "-5s"),
        (float("inf"), "forever"),
    ],
)
def test_durations_are_shown_by_their_two_largest_units(seconds: float, text: str) -> None:
    """People see two units at most, and rounding carries over."""
    assert format_duration(seconds) == text


@given(st.floats(min_value=0.001, max_value=1e9))
def test_what_is_shown_can_be_read(seconds: float) -> None:
    """A shown duration is a valid one and within its smallest unit of the truth."""
    again = parse_duration(format_duration(seconds))
    assert again == pytest.approx(seconds, rel=0.15, abs=0.001)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-01-01T00:00:00Z", NOW_MS),
        ("2026-01-01T02:00:00+02:00", NOW_MS),
        (" 2026-01-01 00:00:00.250+00:00", NOW_MS + 250),
        ("10m", NOW_MS - 600_000),
        ("0", NOW_MS),
    ],
)
def test_instants_are_read(text: str, expected: int) -> None:
    """ISO 8601 with a zone is an instant; a duration is that long ago."""
    assert parse_instant(text, NOW_MS) == expected


@pytest.mark.parametrize("text", ["yesterday", "", "-2h", "2026-13-01T00:00:00Z"])
def test_what_is_no_instant_is_refused(text: str) -> None:
    """The refusal shows how to write one."""
    with pytest.raises(ConfigurationError, match="is no instant: write it like 2026-01-01T10:00:00Z"):
        parse_instant(text, NOW_MS)


@pytest.mark.parametrize("text", ["2026-01-01", "2026-01-01T10:00:00"])
def test_an_instant_without_zone_is_refused(text: str) -> None:
    """A zone is never guessed."""
    with pytest.raises(ConfigurationError, match="has no time zone"):
        parse_datetime(text)
