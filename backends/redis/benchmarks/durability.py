"""What an append-only file costs."""

from __future__ import annotations

import statistics

import places
from bench import Bench, Row, Table
from run import Figures, broker_figures

WORDS = ("no", "yes")


async def aof(bench: Bench) -> Table:
    """every figure of core/benchmarks/run.py with an append-only file that is synced each second, against without one"""
    if bench.program is None:
        raise SystemExit("the step aof compares two servers of our own: leave --url away")
    runs: dict[str, list[Figures]] = {word: [] for word in WORDS}
    for _ in range(bench.repeat):
        for word in WORDS:  # in turn, so that the machine's other load hits both
            with places.redis(bench.program, appendonly=word == "yes") as url:
                runs[word].append(await broker_figures(url, bench.sample))
    rows: list[Row] = []
    for name in runs["no"][0]:
        without, with_it = (statistics.median(run[name] for run in runs[word]) for word in WORDS)
        ratio = with_it / without if without else 0.0
        rows.append({"figure": name, "appendonly no": without, "everysec": with_it, "ratio": ratio})
    return Table("append-only file", rows)
