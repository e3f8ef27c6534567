"""Memory over time: what a process holds beyond its state, while it trains and saves twice.

``python -m stress.bench.memory --rounds 5``. A fresh process for each contestant in each round; this one looks at
its resident memory from outside, every 20 ms, so that nothing runs in it that would not run without the look.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter, sleep

from stress.bench.contestants import CONTESTANTS, remove_tree
from stress.bench.harness import MIB, Sample, StepLoop, rounds, table, undisturbed
from stress.bench.local import state_of
from stress.bench.recording import record

__all__ = ["corners", "main", "report"]

NAMES = ("torch.save", "Lightning", "dcp.async_save", "dcp.async_save, kept stager", "async_ckpt")
PERIOD_SECONDS = 0.02
BEFORE_SECONDS = 0.4
BETWEEN_SECONDS = 4.0
"""From one save to the next, and from the last to the end of the look; longer where the save takes longer."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, or as a child process train and save, and print."""
    options = _parser().parse_args(arguments)
    if options.contestant:
        _train(options.contestant, options.mib, Path(options.directory))
        return
    samples: dict[str, list[Sample]] = {name: [] for name in NAMES}
    with tempfile.TemporaryDirectory(prefix="async_ckpt-bench-", dir=options.directory) as directory:
        for number, name in rounds(NAMES, options.rounds, seed=options.seed):
            sample = undisturbed(partial(_watched, name, options.mib, directory))
            samples[name].append(sample)
            print(f"round {number + 1}/{options.rounds} {name}: {_peak(sample):.0f} MiB", flush=True)
        if options.record:
            parameters = {"mib": options.mib, "period_seconds": PERIOD_SECONDS}
            samples = record(options.record, samples, parameters=parameters, where=directory)
    print(report(samples, mib=options.mib))


def report(samples: dict[str, list[Sample]], *, mib: int) -> str:
    """Return a table of medians."""
    rows = [[name, f"{median(map(_peak, runs)) / mib:.2f}"] for name, runs in samples.items()]
    return table(["", "highest × state"], rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024, help="size of the state")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="seed of the order of the contestants")
    parser.add_argument("--directory", help="directory on the disk to measure; not on a tmpfs")
    parser.add_argument("--record", type=Path, help="file to which every sample is added")
    parser.add_argument("--contestant", choices=NAMES, help=argparse.SUPPRESS)
    return parser


def _peak(sample: Sample) -> float:
    return max(mib for _, mib in sample["held"])


# -- the process that is looked at


def _train(name: str, mib: int, directory: Path) -> None:
    """Train, save, train, save, train; print when each save began, returned and ended."""
    contestant = CONTESTANTS[name]()
    loop = StepLoop()
    contestant.save(state_of("large", 1 / 1024), directory / "small")  # imports what it needs
    contestant.wait()
    remove_tree(directory / "small")
    state = state_of("large", mib / 1024)
    os.sync()
    loop.run_for(2 * BEFORE_SECONDS)
    saves = []
    for number in range(2):
        path = directory / f"checkpoint-{number}"
        began = perf_counter()
        contestant.save(state, path)
        returned = perf_counter()
        loop.run_until(contestant.done)
        contestant.wait()
        saves.append((began, returned, perf_counter()))
        loop.run_for(max(0.1, began + BETWEEN_SECONDS - perf_counter()))
        remove_tree(path)
    contestant.close()
    print(json.dumps(saves))


# -- the look


def _watched(name: str, mib: int, directory: str) -> Sample:
    """Return the memory beyond the state, in MiB, and the saves, in seconds since the first of them began."""
    command = [sys.executable, "-m", "stress.bench.memory", "--contestant", name, "--mib", str(mib)]
    seen: list[tuple[float, int]] = []
    with subprocess.Popen([*command, "--directory", directory], stdout=subprocess.PIPE, text=True) as child:
        while child.poll() is None:
            seen.append((perf_counter(), _resident_bytes(child.pid)))
            sleep(PERIOD_SECONDS)
        assert child.stdout is not None
        answer = child.stdout.read()
    if child.returncode != 0:
        raise RuntimeError(f"{name} ended with {child.returncode}")
    saves = json.loads(answer.splitlines()[-1])  # on Linux, perf_counter is the same clock in every process
    zero = saves[0][0]
    end = saves[-1][0] + BETWEEN_SECONDS
    base = next(held for at, held in reversed(seen) if at < zero)
    return {
        "saves": [[round(at - zero, 3) for at in save] for save in saves],
        "held": corners(
            [
                (round(at - zero, 2), round((held - base) / MIB))
                for at, held in seen
                if zero - BEFORE_SECONDS <= at <= end
            ]
        ),
    }


def corners(line: list[tuple[float, int]]) -> list[tuple[float, int]]:
    """Return *line* without the points that lie between two of the same height."""
    inner = [
        point
        for before, point, after in zip(line, line[1:], line[2:], strict=False)
        if not before[1] == point[1] == after[1]
    ]
    return [line[0], *inner, line[-1]]


def _resident_bytes(pid: int) -> int:
    """Return the resident memory of a process, or none if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/statm").read_text().split()
    except OSError:
        return 0
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") if fields else 0


if __name__ == "__main__":
    main()
