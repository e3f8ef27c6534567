"""What every benchmark shares: fair rounds, memory and step-rate probes, medians and tables.

Guarantees: each contestant runs once a round, in an order drawn anew for each round, alone, in a fresh
process. Ratios are taken within a round, so a slow minute of the machine hits both sides of a ratio.

What does not belong here: what is measured (`local`), who is measured (`contestants`). Linux only, for
the memory probe.
"""

from __future__ import annotations

import gc
import json
import os
import random
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import Any, TypeAlias

import torch

__all__ = [
    "Goal",
    "PeakMemory",
    "Sample",
    "StepLoop",
    "cpu_seconds",
    "goes_first",
    "machine_cpu_seconds",
    "rounds",
    "run_apart",
    "table",
]

Sample: TypeAlias = "dict[str, Any]"
"""What one contestant measured in one round, by name; ``None`` for what it does not have."""

MIB = 1 << 20

QUIET = 0.15
"""Of one CPU: what others may use of the machine before something is measured,"""
DISTURBED = 0.3
"""and what they may use while it is, the kernel's work for it included."""

_LOOK_SECONDS = 0.5
_ATTEMPTS = 3


def rounds(names: Sequence[str], count: int, *, seed: int) -> Iterator[tuple[int, str]]:
    """Yield the number of the round and a contestant, *count* times each, in an order shuffled per round."""
    shuffle = random.Random(seed).shuffle
    for number in range(count):
        order = list(names)
        shuffle(order)
        yield from ((number, name) for name in order)


def run_apart(module: str, *arguments: str, timeout_seconds: float = 600.0, attempts: int = 1) -> Sample:
    """Run ``python -m module`` in a fresh process, once the machine is quiet, and return what its last line holds.

    Args:
        module: what to run.
        *arguments: for it.
        timeout_seconds: after which it is ended.
        attempts: how often it is run at the most, until others used next to nothing of the CPUs meanwhile.

    Raises:
        RuntimeError: it failed; the message holds what it printed.
    """
    command = [sys.executable, "-m", module, *arguments]
    return undisturbed(lambda: _last_line(command, timeout_seconds), attempts=attempts)


def goes_first() -> bool:
    """Return whether this process was given precedence over others (``nice -n -20``), so that they disturb little."""
    return os.getpriority(os.PRIO_PROCESS, 0) < 0


def undisturbed(measure: Callable[[], Sample], *, attempts: int = _ATTEMPTS) -> Sample:
    """Return a sample that other work on this machine has not disturbed, or after some attempts, the last one.

    What the kernel does on behalf of the measured, such as writing pages out, counts as other work; it is little.
    """
    while True:
        wait_until_quiet()
        before, own, start = machine_cpu_seconds(), cpu_seconds(), perf_counter()
        sample = measure()
        others = machine_cpu_seconds() - before - (cpu_seconds() - own)
        attempts -= 1
        if attempts <= 0 or goes_first() or others <= DISTURBED * (perf_counter() - start):
            return sample


def _last_line(command: Sequence[str], timeout_seconds: float) -> Sample:
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_seconds, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    sample: Sample = json.loads(done.stdout.splitlines()[-1])
    return sample


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its ended children so far."""
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in spent)


def machine_cpu_seconds() -> float:
    """Return the CPU time of everything so far: the kernel's work, and what other virtual machines took, included."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    user, nice, system, _idle, _waiting, irq, softirq, stolen = fields
    return (user + nice + system + irq + softirq + stolen) / os.sysconf("SC_CLK_TCK")


def wait_until_quiet(*, limit_seconds: float = 60.0) -> bool:
    """Wait until others use next to nothing of the CPUs, or until the limit; return whether it is so.

    A process that goes first does not wait.
    """
    end = perf_counter() + limit_seconds
    while not goes_first():
        before = machine_cpu_seconds()
        sleep(_LOOK_SECONDS)
        if machine_cpu_seconds() - before <= QUIET * _LOOK_SECONDS:
            return True
        if perf_counter() > end:
            return False
    return True


class PeakMemory:
    """Measures by how much resident memory rises above what it is at the start, at its highest."""

    def __init__(self) -> None:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the kernel starts a new high-water mark
        self._baseline = _status_bytes("VmRSS")

    def extra_bytes(self) -> int:
        """Return the highest rise so far."""
        return _status_bytes("VmHWM") - self._baseline


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"this kernel does not tell {name}")


class StepLoop:
    """A loop like training's on an accelerator: one thread, short operations, much Python between them.

    torch gets one thread while it runs: its threads wait for each other after every operation, and on a busy
    machine a loop that uses several measures little else.
    """

    def __init__(self) -> None:
        torch.manual_seed(0)
        layers = [layer for _ in range(4) for layer in (torch.nn.Linear(128, 128), torch.nn.ReLU())]
        self._model = torch.nn.Sequential(*layers)
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=1e-3, momentum=0.9)
        self._batch = torch.randn(32, 128)
        self.run_for(0.3)

    def run_for(self, seconds: float) -> tuple[float, float]:
        """Step for *seconds*; return steps a second and the longest step in seconds."""
        end = perf_counter() + seconds
        return self.run_until(lambda: perf_counter() >= end)

    def run_until(self, done: Callable[[], bool]) -> tuple[float, float]:
        """Step until *done*; return steps a second and the longest step in seconds."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        start = last = perf_counter()
        steps, longest = 0, 0.0
        while not done():
            self._step()
            now = perf_counter()
            longest = max(longest, now - last)
            steps, last = steps + 1, now
        torch.set_num_threads(threads)
        return steps / max(last - start, 1e-9), longest

    def _step(self) -> None:
        self._optimizer.zero_grad()
        self._model(self._batch).square().mean().backward()
        self._optimizer.step()


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """A value to stay under, or to reach, and what was measured in each round.

    Attributes:
        name: what is compared.
        limit: the value not to exceed, or to reach.
        values: one a round.
        unit: after the numbers.
        at_least: whether the limit is to be reached.
    """

    name: str
    limit: float
    values: Sequence[float]
    unit: str = "×"
    at_least: bool = False

    @property
    def value(self) -> float:
        """The median of the rounds."""
        return median(self.values)

    @property
    def met(self) -> bool:
        """Whether the median is on the right side of the limit."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def row(self) -> list[str]:
        """Return the goal as a row: name, limit, median, range, verdict."""
        return [
            self.name,
            f"{'≥' if self.at_least else '≤'} {self.limit:g} {self.unit}",
            f"{self.value:.2f}",
            f"{min(self.values):.2f} - {max(self.values):.2f}",
            "met" if self.met else "MISSED",
        ]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an aligned Markdown table."""
    widths = [max(3, *(len(row[column]) for row in (header, *rows))) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        aligned = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        return f"| {' | '.join(aligned)} |"

    rule = f"| {' | '.join(['-' * widths[0], *('-' * (width - 1) + ':' for width in widths[1:])])} |"
    return os.linesep.join([line(header), rule, *map(line, rows)])
