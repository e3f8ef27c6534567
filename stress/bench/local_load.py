"""Loading from local disk: how long it takes, and what memory, with the file in the page cache and without.

``python -m stress.bench.local_load --rounds 5``. A fresh process for each contestant in each round; in it one load of
a file whose pages the kernel was told to forget, and one of the same file right afterwards. What was loaded is looked
at. A mapped file is read by being looked at, so that look is in everybody's time.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from stress.bench.contestants import CONTESTANTS, State
from stress.bench.harness import MIB, PeakMemory, Sample, cpu_seconds, rounds, run_apart, table
from stress.bench.local import state_of
from stress.bench.recording import record

__all__ = ["main", "report"]

PARTIAL = "async_ckpt, 1 of 16 tensors"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print; as a child process, measure one contestant once."""
    options = _parser().parse_args(arguments)
    if options.contestant:
        print(json.dumps(_measure(options.contestant, options.mib, Path(options.directory))))
        return
    samples: dict[str, list[Sample]] = {name: [] for name in LOADERS}
    with tempfile.TemporaryDirectory(prefix="async_ckpt-bench-", dir=options.directory) as directory:
        for number, name in rounds(list(LOADERS), options.rounds, seed=options.seed):
            what = ("--contestant", name, "--mib", str(options.mib), "--directory", directory)
            samples[name].append(run_apart("stress.bench.local_load", *what, attempts=3))
            print(f"round {number + 1}/{options.rounds} {name}: {samples[name][-1]}", flush=True)
        if options.record:
            samples = record(options.record, samples, parameters={"mib": options.mib}, where=directory)
    print(report(samples))


def report(samples: dict[str, list[Sample]]) -> str:
    """Return a table."""
    header = ["", "s, from the disk", "s, from the page cache", "CPU s", "memory beyond the state MiB"]
    rows = [
        [
            name,
            f"{median(run['cold_seconds'] for run in runs):.2f}",
            f"{median(run['warm_seconds'] for run in runs):.2f}",
            f"{median(run['warm_cpu_seconds'] for run in runs):.2f}",
            str(round(median(run["extra_bytes"] - run["nbytes"] for run in runs) / MIB)),
        ]
        for name, runs in samples.items()
    ]
    return table(header, rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=1024, help="size of the state")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="seed of the order of the contestants")
    parser.add_argument("--directory", help="directory on the disk to measure; not on a tmpfs")
    parser.add_argument("--record", type=Path, help="file to which every sample is added")
    parser.add_argument("--contestant", choices=LOADERS, help=argparse.SUPPRESS)
    return parser


# -- the contestants


def _torch(path: Path) -> State:
    state: State = torch.load(path, weights_only=True)
    return state


def _mapped(path: Path) -> State:
    state: State = torch.load(path, weights_only=True, mmap=True)
    return state


def _dcp(path: Path) -> State:
    """Load a directory of torch's distributed checkpoints, as it does, into tensors that are there."""
    from torch.distributed.checkpoint import FileSystemReader, load

    entries = FileSystemReader(path).read_metadata().state_dict_metadata.items()
    state = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries}
    load(state, checkpoint_id=path, no_dist=True)
    return state


def _ours(path: Path) -> State:
    import async_ckpt

    state: State = async_ckpt.load(path)
    return state


def _ours_in_part(path: Path) -> State:
    import async_ckpt

    state: State = async_ckpt.load(path, keys="layer.6?.*")
    return state


LOADERS: dict[str, tuple[Callable[[Path], State], str]] = {
    "torch.load": (_torch, "torch.save"),
    "torch.load, mmap": (_mapped, "torch.save"),
    "dcp.load": (_dcp, "dcp.async_save"),
    "async_ckpt": (_ours, "async_ckpt"),
    PARTIAL: (_ours_in_part, "async_ckpt"),
}
"""How each loads, and who wrote what it loads."""


# -- one contestant, once


def _measure(name: str, mib: int, directory: Path) -> Sample:
    load, writer = LOADERS[name]
    path, small = directory / f"checkpoint of {writer}", directory / f"small of {writer}"
    if not path.exists():
        saver = CONTESTANTS[writer]()
        for size_mib, name_of_it in ((1, small), (mib, path)):
            saver.save(state_of("large", size_mib / 1024), name_of_it)
            saver.wait()
        saver.close()
    _looked_at(load(small))  # imports what it needs
    _forget(path)
    memory = PeakMemory()
    sample: Sample = {}
    for kind in ("cold", "warm"):
        cpu, start = cpu_seconds(), perf_counter()
        state = load(path)
        sample["nbytes"] = _looked_at(state)
        sample[f"{kind}_seconds"] = perf_counter() - start
        sample[f"{kind}_cpu_seconds"] = cpu_seconds() - cpu
        sample.setdefault("extra_bytes", memory.extra_bytes())  # of the first load
        del state
    return sample


def _forget(path: Path) -> None:
    """Have the kernel drop the pages of what is at *path*, so that it has to be read from the disk."""
    os.sync()
    for file in path.rglob("*") if path.is_dir() else (path,):
        fd = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def _looked_at(state: Any) -> int:
    """Return the bytes of the tensors in *state*, each of which is full of its number."""
    for name, tensor in state.items():
        number = float(name.split(".")[1])
        least, most = tensor.aminmax()
        if (least, most) != (number, number):
            raise AssertionError(f"{name} is not what was saved")
    return sum(tensor.nbytes for tensor in state.values())


if __name__ == "__main__":
    main()
