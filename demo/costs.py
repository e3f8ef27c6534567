"""Compares what a save costs: the same training with this plugin, with Lightning's own, and with none.

The stall is the time of ``strategy.save_checkpoint``, whatever the plugin. A save counts as written when its writer
reports that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from typing import Any

import fsspec
from lightning.pytorch.plugins import AsyncCheckpointIO as LightningAsyncCheckpointIO
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.strategies import SingleDeviceStrategy

from async_ckpt import AsyncCheckpointIO
from async_ckpt.events import Durable, Event
from demo.digits import train
from demo.places import remove
from demo.printing import say

__all__ = ["NONE", "OURS", "Cost", "measure", "table"]

OURS, LIGHTNINGS, NONE = "async_ckpt", "Lightning's AsyncCheckpointIO", "no plugin"


class Stopwatch:
    """The times of every save of one run."""

    def __init__(self) -> None:
        self.started: list[float] = []
        self.stalls: list[float] = []
        self.ended: list[float] = []
        self.nbytes: list[int] = []

    def end(self, at: float, nbytes: int) -> None:
        """Note that a save has been written; all contestants write saves in the order of the calls."""
        self.ended.append(at)
        self.nbytes.append(nbytes)

    @property
    def durations(self) -> list[float]:
        """Seconds from the call until each save was written."""
        return [end - start for start, end in zip(self.started, self.ended, strict=True)]


class TimedStrategy(SingleDeviceStrategy):
    """Measures how long ``save_checkpoint`` holds the training loop."""

    stopwatch: Stopwatch

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Save, with the watch running."""
        start = perf_counter()
        self.stopwatch.started.append(start)
        super().save_checkpoint(*args, **kwargs)
        self.stopwatch.stalls.append(perf_counter() - start)


class TimedTorchCheckpointIO(TorchCheckpointIO):
    """Lightning's ordinary writer; it reports when it has written."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        self.stopwatch = stopwatch

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        """Save, and report that it is done."""
        super().save_checkpoint(checkpoint, path, storage_options)
        now = perf_counter()
        file_system, name = fsspec.url_to_fs(path)
        self.stopwatch.end(now, file_system.size(name))


def contestant(name: str, watch: Stopwatch) -> Any:
    """Return a plugin that reports to *watch* when a file is written."""

    def observer(event: Event) -> None:
        if isinstance(event, Durable):
            watch.end(perf_counter(), event.nbytes)

    if name == OURS:
        # TimedStrategy overrides save_checkpoint, so the plugin would wait; but it does not use the file.
        return AsyncCheckpointIO(queue_depth=2, direct_saves="async", observer=observer)
    ordinary = TimedTorchCheckpointIO(watch)
    return LightningAsyncCheckpointIO(ordinary) if name == LIGHTNINGS else ordinary


@dataclass
class Cost:
    """What one contestant's saves cost, over all rounds."""

    stalls: list[float] = field(default_factory=list)
    durations: list[float] = field(default_factory=list)
    nbytes: list[int] = field(default_factory=list)
    fit_seconds: list[float] = field(default_factory=list)


def measure(root: str, epochs: int, rounds: int) -> dict[str, Cost]:
    """Train with each contestant in turn, *rounds* times over, always from the same seed."""
    costs = {name: Cost() for name in (OURS, LIGHTNINGS, NONE)}
    names = list(costs)
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:  # each goes first once
            cost = costs[name]
            _run(f"{root}/measured", epochs, name, cost)
            say(f"round {number + 1}/{rounds}  {name}: {cost.fit_seconds[-1]:.1f} s")
    return costs


def _run(folder: str, epochs: int, name: str, cost: Cost) -> None:
    """Train once, and add to *cost* what the saves have cost."""
    watch = Stopwatch()
    strategy = TimedStrategy("cpu")
    strategy.stopwatch = watch
    begin = perf_counter()
    train(folder, epochs, plugins=[contestant(name, watch)], strategy=strategy)
    cost.fit_seconds.append(perf_counter() - begin)
    remove(folder)
    cost.stalls += watch.stalls
    cost.durations += watch.durations
    cost.nbytes += watch.nbytes


def table(costs: Mapping[str, Cost]) -> list[str]:
    """Return the lines of the table: one a contestant, medians, numbers under their heads."""
    heads = ["", "saves", "MiB each", "stall a save", "worst", "until written", "training"]
    rows = [
        [
            name,
            f"{len(cost.stalls)}",
            f"{median(cost.nbytes) / 2**20:.1f}",
            f"{median(cost.stalls) * 1000:.1f} ms",
            f"{max(cost.stalls) * 1000:.0f} ms",
            f"{median(cost.durations) * 1000:.0f} ms",
            f"{median(cost.fit_seconds):.1f} s",
        ]
        for name, cost in costs.items()
    ]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    rule = ["─" * width for width in widths]
    return [_line(cells, widths) for cells in (heads, rule, *rows)]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    name, *numbers = (
        cell.rjust(width) if column else cell.ljust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "  ".join([name, *numbers])
