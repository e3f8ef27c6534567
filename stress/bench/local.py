"""Saving to local disk: what it costs the training loop, and when the checkpoint is durable.

``python -m stress.bench.local --size-gib 1 --rounds 5`` measures two states: 64 fp32 tensors that make up
the size, and 10,000 tensors of 256 floats. Each contestant gets a fresh process in each round: a first
save, warm saves with nothing else going on, and one save beside a training-like loop.

It prints medians, ratios and the goals that they are compared with. It asserts nothing, because machines differ.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

from stress.bench.contestants import CONTESTANTS, Contestant, State, remove_tree, sync_tree
from stress.bench.harness import (
    MIB,
    PeakMemory,
    Sample,
    StepLoop,
    cpu_seconds,
    rounds,
    run_apart,
)
from stress.bench.recording import record
from stress.bench.report import SMALL_FLOATS, SMALL_TENSORS, TENSORS, report

__all__ = ["main", "state_of", "timed_save"]

_WARM_SAVES = {"large": 2, "small": 5}
_LARGE_CONTESTANTS = (
    "memcpy",
    "torch copy",
    "raw write",
    "raw write ×4",
    "torch.save",
    "Lightning",
    "dcp.async_save",
    "dcp.async_save, kept stager",
    "async_ckpt",
)
_SMALL_CONTESTANTS = ("memcpy", "torch.save", "Lightning", "async_ckpt")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print; as a child process, measure one contestant once."""
    options = _parser().parse_args(arguments)
    if options.contestant:
        print(
            json.dumps(_measure(options.contestant, options.state, options.size_gib, Path(options.directory)))
        )
        return
    with tempfile.TemporaryDirectory(prefix="async_ckpt-bench-", dir=options.directory) as directory:
        samples = {
            "large": _compete(_LARGE_CONTESTANTS, "large", options, directory),
            "small": _compete(_SMALL_CONTESTANTS, "small", options, directory),
        }
        if options.record:
            what = {"size_gib": options.size_gib}
            samples = record(options.record, samples, parameters=what, where=directory)
    print(report(samples, state_bytes=int(options.size_gib * 1024 * MIB)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size-gib", type=float, default=1.0, help="size of the large state")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="seed of the order of the contestants")
    parser.add_argument("--directory", help="directory on the disk to measure; not on a tmpfs")
    parser.add_argument("--record", type=Path, help="file to which every sample is added")
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--state", choices=("large", "small"), default="large", help=argparse.SUPPRESS)
    return parser


# -- one contestant, once


def _compete(
    names: Sequence[str], kind: str, options: argparse.Namespace, directory: str
) -> dict[str, list[Sample]]:
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    for number, name in rounds(names, options.rounds, seed=options.seed):
        what = ("--contestant", name, "--state", kind, "--size-gib", str(options.size_gib))
        sample = run_apart("stress.bench.local", *what, "--directory", directory, attempts=3)
        samples[name].append(sample)
        stall_ms = sample["warm_stall_seconds"] * 1e3
        print(f"round {number + 1}/{options.rounds} {kind} {name}: {stall_ms:.1f} ms", flush=True)
    return samples


def _measure(name: str, kind: str, size_gib: float, directory: Path) -> Sample:
    state = state_of(kind, size_gib)
    contestant = CONTESTANTS[name]()
    loop = StepLoop()
    memory = PeakMemory()
    first, *warm = (timed_save(contestant, state, directory) for _ in range(1 + _WARM_SAVES[kind]))
    sample: Sample = {
        "first_stall_seconds": first["stall"],
        "extra_bytes": memory.extra_bytes(),
        **{f"warm_{what}_seconds": median(each[what] for each in warm) for what in warm[0]},
        "step_ratio": None,
        "longest_step_seconds": None,
        "slowdown_seconds": None,
    }
    if contestant.is_background:
        sample.update(_save_beside(loop, contestant, state, directory))
    contestant.close()
    if name == "async_ckpt" and kind == "small":
        from stress.bench.phases import capture_and_copy_seconds  # the others do not import us at all

        sample["capture_seconds"], sample["copy_seconds"] = capture_and_copy_seconds(state)
    return sample


def state_of(kind: str, size_gib: float) -> State:
    """Return a state of *size_gib* in ``"large"`` tensors, or one of 10,000 ``"small"`` ones."""
    count, floats = SMALL_TENSORS, SMALL_FLOATS
    if kind == "large":
        count, floats = TENSORS, int(size_gib * 1024 * MIB / TENSORS / 4)
    return {f"layer.{index}.weight": torch.full((floats,), float(index)) for index in range(count)}


def timed_save(contestant: Contestant, state: State, directory: Path) -> dict[str, float]:
    """Save on a quiet disk; return the seconds of the stall, until it ended, until it was durable, and CPU time."""
    path = directory / "checkpoint"
    os.sync()  # nobody starts with another's dirty pages
    cpu, start = cpu_seconds(), perf_counter()
    contestant.save(state, path)
    safe = perf_counter()
    contestant.wait()
    ended = perf_counter()
    if contestant.writes and not contestant.syncs:
        sync_tree(path)
    durable, cpu = perf_counter(), cpu_seconds() - cpu
    remove_tree(path)
    return {"stall": safe - start, "ended": ended - start, "durable": durable - start, "cpu": cpu}


def _save_beside(loop: StepLoop, contestant: Contestant, state: State, directory: Path) -> Sample:
    """Compare the loop's rate during a save with its rates right before and after."""
    path = directory / "checkpoint"
    os.sync()
    before, _ = loop.run_for(0.5)
    contestant.save(state, path)
    safe = perf_counter()
    during, longest = loop.run_until(contestant.done)
    seconds = perf_counter() - safe
    contestant.wait()
    remove_tree(path)
    os.sync()
    after, _ = loop.run_for(0.5)
    ratio = 2 * during / (before + after)
    return {"step_ratio": ratio, "longest_step_seconds": longest, "slowdown_seconds": (1 - ratio) * seconds}


if __name__ == "__main__":
    main()
