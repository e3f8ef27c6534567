"""What saves cost a training as a whole: the stall, and what the work behind it takes from the steps after it.

``python -m stress.bench.loop --rounds 5`` trains a small transformer with AdamW, about 300 MiB of state, and saves
every 4 and every 10 steps. It does so three times: with every CPU at work for training, by a fused and by a foreach
optimizer, and with one CPU left free. Each contestant gets a fresh process in each round. In it, short stretches with
saves stand between stretches without, and each is held against its neighbours, so that a slow moment of the machine
counts little; where something else used the machine in one of those, the stretch is measured again, for a while.

A stretch with saves goes on until the last of them has ended, so that nothing of their cost falls behind its end:
what is *lost* a save is the time of the whole stretch, less what as many steps take right before and after it. CPU time
is that of the whole machine, less what the steps need, until the last page is on disk: so a contestant's child
processes count, and the kernel's work for it.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from stress.bench.contestants import CONTESTANTS, Contestant, remove_tree
from stress.bench.harness import (
    QUIET,
    Sample,
    cpu_seconds,
    goes_first,
    machine_cpu_seconds,
    rounds,
    run_apart,
    table,
    wait_until_quiet,
)
from stress.bench.recording import record

__all__ = ["EVERY", "NAMES", "NONE", "TRAININGS", "Setting", "costs_of", "main", "training_table"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a training is like.

    Attributes:
        free_cpus: how many CPUs it leaves.
        optimizer: the implementation of AdamW, ``"fused"`` or ``"foreach"``.
        table: the name of its table on the documentation's page.
    """

    free_cpus: int
    optimizer: str
    table: str


NONE = "no saves"
NAMES = (
    NONE,
    "torch.save",
    "Lightning",
    "dcp.async_save, kept stager",
    "dcp.async_save, process",
    "torch_checkpointing",
    "async_ckpt",
    "async_ckpt, lazy",
)
TRAININGS = {
    "every CPU at work": Setting(free_cpus=0, optimizer="fused", table="loop-every-cpu"),
    "every CPU at work, foreach": Setting(free_cpus=0, optimizer="foreach", table="loop-every-cpu-foreach"),
    "one CPU left free": Setting(free_cpus=1, optimizer="fused", table="loop-one-cpu"),
}
"""The trainings, by how they are called."""
EVERY = {"4": 2, "10": 1}
"""After how many steps there is a save, and how many saves make a stretch."""

_STRETCHES = 2
_PATIENCE_SECONDS = 40.0
_IDLE_STEPS = 5
_LAYERS, _WIDTH, _TOKENS, _WORDS = 8, 512, 32, 1024


class Nothing(Contestant):
    """No save at all: what this way to measure finds where there is nothing to be found."""

    writes = False

    def save(self, state: Any, path: Any) -> None:
        """Return."""


class Training:
    """A transformer and AdamW on some of the CPUs.

    Args:
        setting: what it is like.
        contestant: who may guard the step of the optimizer.
    """

    def __init__(self, setting: Setting, contestant: Contestant) -> None:
        threads = max(1, len(os.sched_getaffinity(0)) - setting.free_cpus)
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        layer = torch.nn.TransformerEncoderLayer(_WIDTH, 8, 4 * _WIDTH, dropout=0.0, batch_first=True)
        self._words = torch.nn.Embedding(_WORDS, _WIDTH)
        self._layers = torch.nn.TransformerEncoder(layer, _LAYERS, enable_nested_tensor=False)
        self._model = torch.nn.Sequential(self._words, self._layers)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-4, **{setting.optimizer: True})
        self._contestant = contestant
        self._batch = torch.randint(_WORDS, (2 * threads, _TOKENS))
        for _ in range(3):
            self.step()

    def step(self) -> float:
        """Train for a step, and return its seconds."""
        start = perf_counter()
        self._optimizer.zero_grad()
        self._model(self._batch).square().mean().backward()
        with self._contestant.step_guard():
            self._optimizer.step()
        return perf_counter() - start

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds; the tensors are those that the next step changes."""
        return {"model": self._model.state_dict(), "optimizer": self._optimizer.state_dict()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print; as a child process, measure one contestant once."""
    options = _parser().parse_args(arguments)
    if options.contestant:
        print(json.dumps(measure(options.contestant, options.training[0], Path(options.directory))))
        return
    samples: dict[str, dict[str, list[Sample]]] = {}
    with tempfile.TemporaryDirectory(prefix="async_ckpt-bench-", dir=options.directory) as directory:
        for training in options.training:
            samples[training] = {name: [] for name in options.only}
            for number, name in rounds(options.only, options.rounds, seed=options.seed):
                what = ("--contestant", name, "--training", training, "--directory", directory)
                sample = run_apart("stress.bench.loop", *what)
                samples[training][name].append(sample)
                costs = ", ".join(f"{sample[every]['ratio']:.2f} × every {every}" for every in EVERY)
                print(f"round {number + 1}/{options.rounds} {training}, {name}: {costs}", flush=True)
        if options.record:
            parameters = {"saves": EVERY, "stretches": _STRETCHES, "idle_steps": _IDLE_STEPS}
            samples = record(options.record, samples, parameters=parameters, where=directory)
    print(report(samples))


def report(samples: dict[str, dict[str, list[Sample]]]) -> str:
    """Return a table for each training."""
    parts = [f"{name}; medians\n\n{training_table(contestants)}" for name, contestants in samples.items()]
    return "\n\n".join(["", *parts])


def training_table(contestants: dict[str, list[Sample]]) -> str:
    """Return a table of medians for one training."""
    header = ["", *(f"time, a save every {every} steps" for every in EVERY), "lost a save ms"]
    header += ["of them in the call ms", "longest step × usual", "machine’s CPU s a save"]
    return table(header, [[name, *_cells(runs)] for name, runs in contestants.items()])


def _cells(runs: list[Sample]) -> list[str]:
    last = list(EVERY)[-1]

    def middle(what: str) -> float:
        return float(median(run[last][what] for run in runs))

    return [
        *(f"{median(run[every]['ratio'] for run in runs):.2f} ×" for every in EVERY),
        f"{middle('lost_seconds') * 1e3:.0f}",
        f"{middle('stall_seconds') * 1e3:.0f}",
        f"{median(max(run[last]['steps_ms']) / median(run[last]['idle_steps_ms']) for run in runs):.1f}",
        f"{middle('machine_cpu_seconds'):.2f}",
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="seed of the order of the contestants")
    parser.add_argument("--training", choices=TRAININGS, nargs="+", default=list(TRAININGS))
    parser.add_argument(
        "--only", choices=NAMES, nargs="+", default=list(NAMES), help="contestants to measure"
    )
    parser.add_argument("--directory", help="directory on the disk to measure; not on a tmpfs")
    parser.add_argument("--record", type=Path, help="file to which every sample is added")
    parser.add_argument("--contestant", choices=NAMES, help=argparse.SUPPRESS)
    return parser


# -- one contestant, once


def measure(name: str, training_name: str, directory: Path) -> Sample:
    """Train with and without saves; return the samples of every cadence."""
    contestant = Nothing() if name == NONE else CONTESTANTS[name]()
    training = Training(TRAININGS[training_name], contestant)
    _save(contestant, training, directory / "first")
    contestant.wait()
    remove_tree(directory / "first")
    costs: dict[str, list[Sample]] = {every: [] for every in EVERY}
    before = _idle(training)
    end = perf_counter() + (0.0 if goes_first() else _PATIENCE_SECONDS)
    while any(len(each) < _STRETCHES for each in costs.values()):
        for every, saves in EVERY.items():
            if len(costs[every]) == _STRETCHES:
                continue
            stretch = _saving(training, contestant, directory, every=int(every), saves=saves)
            after = _idle(training)
            if max(before["others"], after["others"]) < QUIET or perf_counter() > end:
                costs[every].append(costs_of(stretch, before, after, every=int(every), saves=saves))
            else:
                wait_until_quiet(limit_seconds=5.0)
                after = _idle(training)
            before = after
    contestant.close()
    return {every: _middle(each) for every, each in costs.items()}


def _middle(costs: list[Sample]) -> Sample:
    """Return the medians of numbers, and all of the steps."""
    return {
        what: [step for each in costs for step in each[what]]
        if isinstance(value, list)
        else median(each[what] for each in costs)
        for what, value in costs[0].items()
    }


def _idle(training: Training) -> Sample:
    """Train without saves, on a quiet disk."""
    os.sync()
    training.step()
    cpu, machine, start = cpu_seconds(), machine_cpu_seconds(), perf_counter()
    steps = [training.step() for _ in range(_IDLE_STEPS)]
    seconds = perf_counter() - start
    spent, machine_spent = cpu_seconds() - cpu, machine_cpu_seconds() - machine
    return {
        "steps": steps,
        "step_seconds": seconds / _IDLE_STEPS,
        "cpu": spent / _IDLE_STEPS,
        "machine": machine_spent / _IDLE_STEPS,
        "others": (machine_spent - spent) / seconds,
    }


def _saving(training: Training, contestant: Contestant, directory: Path, *, every: int, saves: int) -> Sample:
    """Train with a save before every so many steps, and on until the last save has ended."""
    paths = [directory / f"every-{every}-{number}" for number in range(saves)]
    cpu, machine, start = cpu_seconds(), machine_cpu_seconds(), perf_counter()
    stalls, steps = [], []
    for path in paths:
        stalls.append(_save(contestant, training, path))
        steps += [training.step() for _ in range(every)]
    while not contestant.done():
        steps.append(training.step())
    contestant.wait()
    seconds, spent = perf_counter() - start, cpu_seconds() - cpu
    os.sync()  # what a contestant leaves to the kernel is its cost, too
    machine_spent = machine_cpu_seconds() - machine
    for path in paths:
        remove_tree(path)
    return {"seconds": seconds, "steps": steps, "stalls": stalls, "cpu": spent, "machine": machine_spent}


def _save(contestant: Contestant, training: Training, path: Path) -> float:
    state = training.state()
    start = perf_counter()
    contestant.save(state, path)
    return perf_counter() - start


def costs_of(stretch: Sample, before: Sample, after: Sample, *, every: int, saves: int) -> Sample:
    """Return what a save cost, in time, CPU time and steps that took longer."""
    count = len(stretch["steps"])

    def beyond(total: str, a_step: str) -> float:
        return float(stretch[total] - count * (before[a_step] + after[a_step]) / 2) / saves

    step = (before["step_seconds"] + after["step_seconds"]) / 2
    lost = beyond("seconds", "step_seconds")
    return {
        "ratio": 1 + lost / (every * step),
        "lost_seconds": lost,
        "stall_seconds": median(stretch["stalls"]),
        "idle_step_seconds": step,
        "cpu_seconds": beyond("cpu", "cpu"),
        "machine_cpu_seconds": beyond("machine", "machine"),
        "steps_ms": [round(seconds * 1e3, 1) for seconds in stretch["steps"]],
        "idle_steps_ms": [round(seconds * 1e3, 1) for seconds in before["steps"] + after["steps"]],
    }


if __name__ == "__main__":
    main()
