"""Saving to local disk through the page cache and past it, beside a bare write and fsync.

``python -m stress.bench.page_cache --rounds 5``. A fresh process for each contestant in each round; in it, for each
size, a few warm saves, each until it is durable, and one load right after the last. Times run from the end of the call,
for the snapshot is the same; a bare write has no checksum. Do it while nothing else runs: the machine's CPU time is
everybody's.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter, sleep

import torch

from stress.bench.harness import (
    MIB,
    Goal,
    PeakMemory,
    Sample,
    cpu_seconds,
    machine_cpu_seconds,
    rounds,
    run_apart,
    table,
)
from stress.bench.local import state_of
from stress.bench.recording import record

__all__ = ["main", "report", "size_table"]

BARE, KEPT, DROPPED = "write and fsync", 'page_cache="keep"', 'page_cache="drop"'
CONTESTANTS = (BARE, KEPT, DROPPED)
_PIECE_BYTES = 32 << 20
_SETTLING_SECONDS = 0.3  # until the kernel has done what it put off


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, or as a child process measure one contestant once, and print."""
    options = _parser().parse_args(arguments)
    if options.contestant:
        print(json.dumps(_measure(options.contestant, options.mib, options.saves, Path(options.directory))))
        return
    samples: dict[str, list[Sample]] = {name: [] for name in CONTESTANTS}
    sizes = [str(mib) for mib in options.mib]
    with tempfile.TemporaryDirectory(prefix="async_ckpt-bench-", dir=options.directory) as directory:
        for number, name in rounds(CONTESTANTS, options.rounds, seed=options.seed):
            what = ("--contestant", name, "--directory", directory, "--saves", str(options.saves))
            samples[name].append(run_apart("stress.bench.page_cache", *what, "--mib", *sizes))
            print(f"round {number + 1}/{options.rounds} {name}: {samples[name][-1]}", flush=True)
        if options.record:
            what = {"mib": options.mib, "saves": options.saves}
            samples = record(options.record, samples, parameters=what, where=directory)
    print(report(samples))


def report(samples: dict[str, list[Sample]]) -> str:
    """Return a table for each size, and the goals for the largest."""
    sizes = [int(size) for size in samples[BARE][0]]
    tables = [f"{size} MiB\n\n{size_table(samples, size)}" for size in sizes]
    goals = table(
        ["goal", "limit", "median", "range", ""], [goal.row() for goal in _goals(samples, max(sizes))]
    )
    return "\n\n".join([*tables, goals])


def size_table(samples: dict[str, list[Sample]], mib: int) -> str:
    """Return the table of one size."""
    header = [
        "",
        "durable after s",
        "CPU s",
        "CPU s of the machine",
        "memory beyond the state MiB",
        "load right after s",
    ]
    columns = ("durable_seconds", "cpu_seconds", "machine_cpu_seconds", "extra_bytes", "load_seconds")
    rows = []
    for name, runs in samples.items():
        values = [[run[str(mib)][column] for run in runs] for column in columns]
        cells = ["-" if value[0] is None else f"{median(value):.3g}" for value in values]
        if values[3][0] is not None:
            cells[3] = str(round(median(values[3]) / MIB - mib))
        rows.append([name, *cells])
    return table(header, rows)


def _goals(samples: dict[str, list[Sample]], mib: int) -> list[Goal]:
    def ratios(what: str, name: str, other: str) -> list[float]:
        pairs = zip(samples[name], samples[other], strict=True)
        return [run[str(mib)][what] / other_run[str(mib)][what] for run, other_run in pairs]

    return [
        Goal(name="CPU, of the kept one's", limit=0.5, values=ratios("cpu_seconds", DROPPED, KEPT)),
        Goal(name="CPU of the machine", limit=0.5, values=ratios("machine_cpu_seconds", DROPPED, KEPT)),
        Goal(name="durable, of write and fsync", limit=1.0, values=ratios("durable_seconds", DROPPED, BARE)),
        Goal(name="extra memory", limit=1.01, values=ratios("extra_bytes", DROPPED, KEPT)),
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=int, nargs="+", default=[1024], help="sizes of the state")
    parser.add_argument("--saves", type=int, default=3, help="warm saves of each size")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the order of the contestants")
    parser.add_argument("--directory", help="on the disk to be measured; not a tmpfs")
    parser.add_argument("--record", type=Path, help="a file to add every sample to")
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    return parser


# -- one contestant, once


def _measure(name: str, sizes: Sequence[int], saves: int, directory: Path) -> Sample:
    path = directory / "checkpoint"
    return {str(mib): (_bare if name == BARE else _ours)(name, mib, saves, path) for mib in sizes}


def _bare(name: str, mib: int, saves: int, path: Path) -> Sample:
    memory = memoryview(torch.arange(mib * MIB // 8).numpy()).cast("B")

    def write() -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        for at in range(0, memory.nbytes, _PIECE_BYTES):
            stop = min(at + _PIECE_BYTES, memory.nbytes)
            while at < stop:
                at += os.pwrite(fd, memory[at:stop], at)
        os.fsync(fd)
        os.close(fd)

    sample = _medians([_timed(write, path) for _ in range(saves)])
    path.unlink()
    return {**sample, "extra_bytes": None, "load_seconds": None}


def _ours(name: str, mib: int, saves: int, path: Path) -> Sample:
    from async_ckpt import CheckpointService

    state = state_of("large", mib / 1024)
    memory = PeakMemory()
    with CheckpointService(page_cache="drop" if name == DROPPED else "keep") as service:
        service.save(state, path).wait()  # memory and directory are known from here on
        timed = []
        for _ in range(saves):
            os.sync()
            timed.append(_timed(service.save(state, path).wait, None))
        sample = _medians(timed)
        extra_bytes = memory.extra_bytes()
        start = perf_counter()
        service.load(path)
        load_seconds = perf_counter() - start
    path.unlink()
    return {**sample, "extra_bytes": extra_bytes, "load_seconds": load_seconds}


def _timed(work: Callable[[], object], fresh: Path | None) -> Sample:
    if fresh is not None:
        fresh.unlink(missing_ok=True)
        os.sync()
    everybody, cpu, start = machine_cpu_seconds(), cpu_seconds(), perf_counter()
    work()
    durable, cpu = perf_counter() - start, cpu_seconds() - cpu
    sleep(_SETTLING_SECONDS)
    return {
        "durable_seconds": durable,
        "cpu_seconds": cpu,
        "machine_cpu_seconds": machine_cpu_seconds() - everybody,
    }


def _medians(samples: Sequence[Sample]) -> Sample:
    return {what: median(sample[what] for sample in samples) for what in samples[0]}


if __name__ == "__main__":
    main()
