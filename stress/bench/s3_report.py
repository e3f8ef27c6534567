"""The tables and the goals of ``stress.bench.s3``, from its samples, as Markdown. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from stress.bench.harness import MIB, Goal, Sample, table

__all__ = [
    "LATENCY_SECONDS",
    "LIGHTNING",
    "OBSTORE",
    "OURS",
    "PARTIAL",
    "PUT_FILE",
    "RATE",
    "SECTIONS",
    "report",
    "tables",
]

OURS = "async_ckpt"
LIGHTNING = "Lightning + s3fs"
PUT_FILE = "s3fs put_file"
OBSTORE = "obstore put, unsigned payload"
PARTIAL = "async_ckpt, 5 % of the bytes"
LATENCY_SECONDS = 0.02  # each way
RATE = 100e6  # bytes a second
GIB = 1024 * MIB


def report(samples: dict[str, Any], *, nbytes: int) -> str:
    """Return the tables and the goals as text.

    Args:
        samples: of some sections, as ``stress.bench.s3`` collects them.
        nbytes: size of the state.
    """
    found = tables(samples, nbytes=nbytes)
    goals = found.pop("s3-goals")
    return "\n\n".join(["", f"{nbytes / MIB:.0f} MiB; medians", *found.values(), "Goals", goals])


def tables(samples: dict[str, Any], *, nbytes: int) -> dict[str, str]:
    """Return the tables in Markdown, by their names on the page about performance."""
    views = {name: view for name, view in _VIEWS.items() if name in samples}
    rows = [goal.row() for name, (_, as_goals) in views.items() for goal in as_goals(samples[name], nbytes)]
    return {
        **{f"s3-{name}": as_table(samples[name], nbytes) for name, (as_table, _) in views.items()},
        "s3-goals": table(["goal", "limit", "median", "range", ""], rows),
    }


# -- the tables


def _cost(samples: dict[str, list[Sample]], nbytes: int) -> str:
    header = [
        "to the sink",
        "CPU s a GiB",
        "of them after the stall",
        "stall s",
        "whole s",
        "extra memory MiB",
        "libraries MiB",
    ]
    scale = GIB / nbytes
    rows = [
        [
            name,
            f"{_median(runs, 'cpu_seconds') * scale:.2f}",
            f"{_median(runs, 'cpu_seconds_after_stall') * scale:.2f}" if name == OURS else "-",
            f"{_median(runs, 'stall_seconds'):.2f}" if name == OURS else "-",
            f"{_median(runs, 'seconds'):.2f}",
            f"{_median(runs, 'extra_bytes') / MIB:.0f}",
            f"{_median(runs, 'library_bytes') / MIB:.0f}",
        ]
        for name, runs in samples.items()
    ]
    return table(header, rows)


def _network(samples: dict[str, list[Sample]], nbytes: int) -> str:
    header = [
        "connections",
        "MB/s",
        "of connections × rate",
        "bare sockets MB/s",
        "loop late ms p50, p99, max",
    ]
    rows = [
        [
            name,
            f"{_median(runs, 'bytes_a_second') / 1e6:.0f}",
            f"{_median(runs, 'bytes_a_second') / (int(name) * RATE):.2f}",
            f"{_median(runs, 'bare_bytes_a_second') / 1e6:.0f}",
            _late(runs),
        ]
        for name, runs in samples.items()
    ]
    return table(header, rows)


def _durable(samples: dict[str, dict[str, list[Sample]]], nbytes: int) -> str:
    header = [
        "to a server",
        "MiB",
        "stall s",
        "durable s",
        "CPU s",
        "server's CPU s",
        "extra memory × state",
        "loop late ms p50, p99, max",
    ]
    rows = [
        [
            f"{kind}: {name}",
            f"{_median(runs, 'nbytes') / MIB:.0f}",
            f"{_median(runs, 'stall_seconds'):.2f}",
            f"{_median(runs, 'seconds'):.2f}",
            f"{_median(runs, 'cpu_seconds'):.2f}",
            f"{_median(runs, 'server_cpu_seconds'):.2f}",
            f"{_median(runs, 'extra_bytes') / _median(runs, 'nbytes'):.2f}",
            _late(runs),
        ]
        for kind, contestants in samples.items()
        for name, runs in contestants.items()
    ]
    return table(header, rows)


def _load(samples: dict[str, list[Sample]], nbytes: int) -> str:
    header = ["load", "s", "CPU s", "state MiB", "memory beyond it MiB"]
    rows = [
        [
            name,
            f"{_median(runs, 'seconds'):.2f}",
            f"{_median(runs, 'cpu_seconds'):.2f}",
            f"{_median(runs, 'nbytes') / MIB:.0f}",
            f"{median(_beyond(runs)):.0f}",
        ]
        for name, runs in samples.items()
    ]
    return table(header, rows)


# -- the goals


def _cost_goals(samples: dict[str, list[Sample]], nbytes: int) -> list[Goal]:
    cost = "cpu_seconds"
    ours = [run["cpu_seconds_after_stall"] for run in samples[OURS]]
    put_file, obstore = ([run[cost] for run in samples[name]] for name in (PUT_FILE, OBSTORE))
    extra = [(run["extra_bytes"] - nbytes) / MIB for run in samples[OURS]]
    return [
        Goal(
            name="CPU a GiB, without the snapshot",
            limit=0.6,
            values=[spent * GIB / nbytes for spent in ours],
            unit="s",
        ),
        Goal(name="CPU of s3fs put_file, of ours", limit=5.0, values=_ratios(put_file, ours), at_least=True),
        Goal(name="CPU, of obstore's", limit=1.5, values=_ratios(ours, obstore)),
        Goal(name="extra memory beyond the snapshot", limit=64.0, values=extra, unit="MiB"),
    ]


def _network_goals(samples: dict[str, list[Sample]], nbytes: int) -> list[Goal]:
    goals = [
        Goal(
            name=f"{name} × 100 MB/s or what bare sockets reach",
            limit=0.9,
            values=[
                run["bytes_a_second"] / min(int(name) * RATE, run["bare_bytes_a_second"]) for run in runs
            ],
            at_least=True,
        )
        for name, runs in samples.items()
    ]
    late = [run["late_seconds"][1] * 1e3 for runs in samples.values() for run in runs]
    return [*goals, Goal(name="loop late, p99", limit=50.0, values=late, unit="ms")]


def _durable_goals(samples: dict[str, dict[str, list[Sample]]], nbytes: int) -> list[Goal]:
    goals = []
    for kind, contestants in samples.items():
        ours, theirs = ([run["seconds"] for run in contestants[name]] for name in (OURS, LIGHTNING))
        name = f"durable in {kind}: Lightning's time, of ours"
        goals.append(Goal(name=name, limit=1.5, values=_ratios(theirs, ours), at_least=True))
    return goals


def _load_goals(samples: dict[str, list[Sample]], nbytes: int) -> list[Goal]:
    ours, theirs = ([run["seconds"] for run in samples[name]] for name in (OURS, LIGHTNING))
    moved = [run["moved_bytes"] / nbytes for run in samples[PARTIAL]]
    return [
        Goal(name="load: Lightning's time, of ours", limit=2.0, values=_ratios(theirs, ours), at_least=True),
        Goal(name="load: memory beyond the state", limit=64.0, values=_beyond(samples[OURS]), unit="MiB"),
        Goal(
            name="bytes moved for 5 % of them", limit=6.0, values=[100 * share for share in moved], unit="%"
        ),
    ]


def _beyond(runs: list[Sample]) -> list[float]:
    return [(run["extra_bytes"] - run["nbytes"]) / MIB for run in runs]


def _late(runs: list[Sample]) -> str:
    if runs[0]["late_seconds"] is None:
        return "-"
    return ", ".join(
        f"{median(values) * 1e3:.0f}" for values in zip(*(run["late_seconds"] for run in runs), strict=True)
    )


def _ratios(these: Sequence[float], those: Sequence[float]) -> list[float]:
    return [mine / other for mine, other in zip(these, those, strict=True)]


def _median(runs: list[Sample], what: str) -> float:
    return float(median(run[what] for run in runs))


_VIEWS: dict[str, tuple[Callable[[Any, int], str], Callable[[Any, int], list[Goal]]]] = {
    "cost": (_cost, _cost_goals),
    "network": (_network, _network_goals),
    "durable": (_durable, _durable_goals),
    "load": (_load, _load_goals),
}
SECTIONS = tuple(_VIEWS)
