"""The stall by the size of the state: warm saves of 64 tensors to local disk, with nothing else going on.

``python -m stress.bench.sizes --rounds 5``. A fresh process for each contestant in each round; in it, from the
smallest state to the largest, a first save that is not counted and then warm ones.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from stress.bench.contestants import CONTESTANTS
from stress.bench.harness import Sample, rounds, run_apart, table
from stress.bench.local import state_of, timed_save
from stress.bench.recording import record

__all__ = ["main", "report"]

NAMES = ("torch.save", "Lightning", "dcp.async_save", "dcp.async_save, kept stager", "async_ckpt")
SIZES_MIB = (16, 64, 256, 1024)
_WARM_SAVES = 3


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print; as a child process, measure one contestant once."""
    options = _parser().parse_args(arguments)
    if options.contestant:
        print(json.dumps(_measure(options.contestant, options.mib, Path(options.directory))))
        return
    sizes = [str(mib) for mib in options.mib]
    samples: dict[str, list[Sample]] = {name: [] for name in NAMES}
    with tempfile.TemporaryDirectory(prefix="async_ckpt-bench-", dir=options.directory) as directory:
        for number, name in rounds(NAMES, options.rounds, seed=options.seed):
            what = ("--contestant", name, "--directory", directory, "--mib", *sizes)
            samples[name].append(run_apart("stress.bench.sizes", *what, attempts=3))
            print(f"round {number + 1}/{options.rounds} {name}: {samples[name][-1]}", flush=True)
        if options.record:
            what_was_asked = {"sizes_mib": options.mib}
            samples = record(options.record, samples, parameters=what_was_asked, where=directory)
    print(report(samples))


def report(samples: dict[str, list[Sample]]) -> str:
    """Return a table of medians."""
    sizes = list(next(iter(samples.values()))[0]["stall_seconds"])
    rows = [
        [name, *(f"{median(run['stall_seconds'][size] for run in runs) * 1e3:.1f}" for size in sizes)]
        for name, runs in samples.items()
    ]
    return table(["warm stall ms", *(f"{size} MiB" for size in sizes)], rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, nargs="+", default=list(SIZES_MIB), help="sizes of the state")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="seed of the order of the contestants")
    parser.add_argument("--directory", help="directory on the disk to measure; not on a tmpfs")
    parser.add_argument("--record", type=Path, help="file to which every sample is added")
    parser.add_argument("--contestant", choices=NAMES, help=argparse.SUPPRESS)
    return parser


def _measure(name: str, sizes_mib: Sequence[int], directory: Path) -> Sample:
    contestant = CONTESTANTS[name]()
    stalls = {}
    for mib in sizes_mib:
        state = state_of("large", mib / 1024)
        _, *warm = (timed_save(contestant, state, directory)["stall"] for _ in range(1 + _WARM_SAVES))
        stalls[str(mib)] = median(warm)
    contestant.close()
    return {"stall_seconds": stalls}


if __name__ == "__main__":
    main()
