"""The tables and the goals of `local`, from its samples. Pure.

The goals are those of the first release; what they compare is in their names.
"""

from __future__ import annotations

from statistics import median

from stress.bench.contestants import CONTESTANTS
from stress.bench.harness import MIB, Goal, Sample, table

__all__ = ["SMALL_FLOATS", "SMALL_TENSORS", "TENSORS", "report", "tables"]

SMALL_TENSORS = 10_000
SMALL_FLOATS = 256
TENSORS = 64


def report(samples: dict[str, dict[str, list[Sample]]], *, state_bytes: int) -> str:
    """Return the tables and the goals as text."""
    found = tables(samples, state_bytes=state_bytes)
    sections = [
        f"{state_bytes / MIB:.0f} MiB in {TENSORS} tensors; medians",
        found["local-large"],
        f"{SMALL_TENSORS} tensors of {SMALL_FLOATS} floats; medians",
        found["local-small"],
        _phases(samples["small"]["async_ckpt"]),
        "Goals; ratios within a round, then their median",
        found["local-goals"],
    ]
    return "\n\n".join(["", *sections])


def tables(samples: dict[str, dict[str, list[Sample]]], *, state_bytes: int) -> dict[str, str]:
    """Return the tables in Markdown, by their names on the page about performance."""
    large, small = samples["large"], samples["small"]
    return {
        "local-large": table(_HEADER, [_row(name, runs, state_bytes) for name, runs in large.items()]),
        "local-small": table(_SMALL_HEADER, [_small_row(name, runs) for name, runs in small.items()]),
        "local-goals": table(
            ["goal", "limit", "median", "range", ""],
            [goal.row() for goal in _goals(large, small, state_bytes)],
        ),
    }


_FLOORS = {
    "memcpy": "*floor: memcpy, one thread*",
    "torch copy": "*floor: torch's copy, every thread*",
    "raw write": "*floor: raw write + fsync*",
    "raw write ×4": "*floor: the same, four threads*",
}
_HEADER = [
    "contestant",
    "first stall ms",
    "warm stall ms",
    "durable s",
    "extra memory × state",
    "steps during a save / idle",
    "longest step ms",
    "steps lost ms",
    "CPU s",
]
_SMALL_HEADER = [
    "contestant",
    "first stall µs a tensor",
    "warm stall µs a tensor",
    "durable s",
    "extra memory MiB",
    "steps during a save / idle",
    "longest step ms",
    "steps lost ms",
    "CPU s",
]


def _row(name: str, runs: list[Sample], state_bytes: int) -> list[str]:
    return [
        _FLOORS.get(name, name),
        f"{_median(runs, 'first_stall_seconds') * 1e3:.0f}",
        f"{_median(runs, 'warm_stall_seconds') * 1e3:.0f}",
        *_after_stall(name, runs, f"{_median(runs, 'extra_bytes') / state_bytes:.2f}"),
    ]


def _small_row(name: str, runs: list[Sample]) -> list[str]:
    return [
        _FLOORS.get(name, name),
        f"{_median(runs, 'first_stall_seconds') * 1e6 / SMALL_TENSORS:.1f}",
        f"{_median(runs, 'warm_stall_seconds') * 1e6 / SMALL_TENSORS:.1f}",
        *_after_stall(name, runs, f"{_median(runs, 'extra_bytes') / MIB:.0f}"),
    ]


def _after_stall(name: str, runs: list[Sample], memory: str) -> list[str]:
    durable = "-"
    if CONTESTANTS[name].writes:
        durable = f"{_median(runs, 'warm_ended_seconds'):.2f}"
        durable += "" if CONTESTANTS[name].syncs else ", no fsync"
    steps = ["-", "-", "-"]
    if CONTESTANTS[name].is_background:
        longest_ms = _median(runs, "longest_step_seconds") * 1e3
        lost_ms = max(0.0, _median(runs, "slowdown_seconds") * 1e3)
        steps = [f"{_median(runs, 'step_ratio'):.2f}", f"{longest_ms:.0f}", f"{lost_ms:.0f}"]
    return [durable, memory, *steps, f"{_median(runs, 'warm_cpu_seconds'):.2f}"]


def _phases(runs: list[Sample]) -> str:
    stall, capture, copy = (
        _median(runs, name) * 1e6 / SMALL_TENSORS
        for name in ("warm_stall_seconds", "capture_seconds", "copy_seconds")
    )
    rest = stall - capture - copy
    return (
        f"async_ckpt, µs a tensor: capture {capture:.2f}, copy {copy:.2f}, admission and the rest {rest:.2f}"
    )


def _goals(large: dict[str, list[Sample]], small: dict[str, list[Sample]], state_bytes: int) -> list[Goal]:
    ours, memcpy, lightning, raw = (
        large[name] for name in ("async_ckpt", "memcpy", "Lightning", "raw write")
    )
    stall, first, durable = "warm_stall_seconds", "first_stall_seconds", "warm_durable_seconds"
    return [
        Goal(name="stall, of one memcpy", limit=1.15, values=_ratios(ours, memcpy, stall)),
        Goal(name="stall, of Lightning's", limit=0.35, values=_ratios(ours, lightning, stall)),
        Goal(name="first stall, of Lightning's", limit=1.0, values=_ratios(ours, lightning, first)),
        Goal(name="durable, of raw write + fsync", limit=1.10, values=_ratios(ours, raw, durable)),
        Goal(
            name="extra memory over the state",
            limit=64.0,
            values=[(run["extra_bytes"] - state_bytes) / MIB for run in ours],
            unit="MiB",
        ),
        Goal(
            name="stall a small tensor",
            limit=10.0,
            values=[run[stall] * 1e6 / SMALL_TENSORS for run in small["async_ckpt"]],
            unit="µs",
        ),
    ]


def _ratios(ours: list[Sample], theirs: list[Sample], what: str) -> list[float]:
    return [mine[what] / other[what] for mine, other in zip(ours, theirs, strict=True)]


def _median(runs: list[Sample], what: str) -> float:
    return float(median(run[what] for run in runs))
