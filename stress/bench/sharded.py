"""Sharded saves by several processes: what they cost each training thread, and when they are durable.

``python -m stress.bench.sharded --size-gib 0.5 --rounds 5`` measures two states on local disk: 64 ``DTensor`` that make
up the size, and 2,000 of 4,096 floats. ``--url s3://bucket/run --storage-options '{…}'`` measures them on a server.
Each contestant gets fresh processes in each round: a first save, warm saves with nothing else going on, and a load.
What a save costs is what it costs the slowest rank.

It prints medians, ratios and the goals that they are compared with. It asserts nothing, because machines differ.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from statistics import median
from time import perf_counter
from typing import Any

import torch

from stress.bench.harness import MIB, Goal, PeakMemory, Sample, rounds, table

__all__ = ["main"]

_WARM_SAVES = 3
_TENSORS = {"large": 64, "many": 2_000}
_MANY_FLOATS = 4_096


class Ours:
    """``save_sharded`` and ``load_sharded``."""

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        from async_ckpt import CheckpointService

        self._service = CheckpointService(storage_options=options or None)

    def save(self, state: dict[str, Any], place: str) -> None:
        """Return when the state may change."""
        self._handle = self._service.save_sharded(state, place)

    def wait(self) -> None:
        """Return when it is durable."""
        self._handle.wait()

    def load(self, state: dict[str, Any], place: str) -> None:
        """Fill *state*."""
        self._service.load_sharded(state, place)

    def close(self) -> None:
        """Free what is held."""
        self._service.close()


class Dcp:
    """``torch.distributed.checkpoint.async_save`` as it comes."""

    _stager: Any = None

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        self._options = options

    def save(self, state: dict[str, Any], place: str) -> None:
        """Return when the state may change."""
        from torch.distributed.checkpoint.state_dict_saver import async_save

        given = {} if self._stager is None else {"async_stager": self._stager}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._future: Any = async_save(state, **self._target(place), **given)

    def _target(self, place: str) -> dict[str, Any]:
        if "://" not in place:
            return {"checkpoint_id": place}
        from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

        return {"storage_writer": FsspecWriter(place, **self._options)}

    def wait(self) -> None:
        """Return when it is durable."""
        self._future.result()

    def load(self, state: dict[str, Any], place: str) -> None:
        """Fill *state*."""
        from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader
        from torch.distributed.checkpoint.state_dict_loader import load

        if "://" in place:
            load(state, storage_reader=FsspecReader(place, **self._options))
        else:
            load(state, checkpoint_id=place)

    def close(self) -> None:
        """Free what is held."""
        if self._stager is not None:
            self._stager.close()


class DcpKept(Dcp):
    """The same with a stager, and its memory, that is kept from save to save."""

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        super().__init__(url, options)
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=False,
                use_shared_memory=False,
                use_async_staging=False,
                use_non_blocking_copy=False,
            )
        )


CONTESTANTS: dict[str, type[Any]] = {
    "dcp.async_save": Dcp,
    "dcp.async_save, kept stager": DcpKept,
    "async_ckpt": Ours,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, or as one rank measure one contestant once, and print."""
    options = _parser().parse_args(arguments)
    if options.contestant:
        print(json.dumps(_measure(options)))
        return
    with tempfile.TemporaryDirectory(prefix="async_ckpt-bench-", dir=options.directory) as directory:
        for state in options.states:
            samples: dict[str, list[Sample]] = {name: [] for name in CONTESTANTS}
            for number, name in rounds(list(CONTESTANTS), options.rounds, seed=options.seed):
                place = (
                    f"{options.url or directory}/{state}-{number}-{name.replace(' ', '-').replace(',', '')}"
                )
                samples[name].append(_run_ranks(options, state, name, place))
                print(".", end="", flush=True, file=sys.stderr)
            print(_report(samples, state, options), end="\n\n", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size-gib", type=float, default=0.5, help="of the large state, all ranks together")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="seed of the order of the contestants")
    parser.add_argument("--directory", help="directory on the disk to measure; not on a tmpfs")
    parser.add_argument("--url", help="a directory on a server, instead")
    parser.add_argument("--storage-options", type=json.loads, default={}, help="of the server, as JSON")
    parser.add_argument("--states", nargs="+", choices=_TENSORS, default=list(_TENSORS))
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--state", choices=_TENSORS, help=argparse.SUPPRESS)
    parser.add_argument("--place", help=argparse.SUPPRESS)
    return parser


# -- one contestant, once


def _run_ranks(options: argparse.Namespace, state: str, name: str, place: str) -> Sample:
    """Return for each measure the most that a rank has; memory is that of one rank."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "stress.bench.sharded",
        "--contestant",
        name,
        "--state",
        state,
        "--place",
        place,
    ]
    command += ["--size-gib", str(options.size_gib), "--storage-options", json.dumps(options.storage_options)]
    processes = []
    for rank in range(options.ranks):
        env = {"RANK": str(rank), "WORLD_SIZE": str(options.ranks), "MASTER_ADDR": "127.0.0.1"}
        given = {**os.environ, **env, "MASTER_PORT": str(port)}
        processes.append(subprocess.Popen(command, env=given, stdout=subprocess.PIPE, text=True))
    told: list[Sample] = []
    for process in processes:
        output, _ = process.communicate(timeout=600)
        if process.returncode:
            raise RuntimeError(f"{name} failed")
        told.append(json.loads(output.splitlines()[-1]))
    return {measure: max(each[measure] for each in told) for measure in told[0]}


def _measure(options: argparse.Namespace) -> Sample:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    state = _state(options.state, options.size_gib)
    contestant = CONTESTANTS[options.contestant](options.place, options.storage_options)
    memory = PeakMemory()
    first = _timed_save(contestant, state, f"{options.place}-first")
    warm = [_timed_save(contestant, state, f"{options.place}-{number}") for number in range(_WARM_SAVES)]
    extra = memory.extra_bytes()
    dist.barrier()
    begun = perf_counter()
    contestant.load(state, f"{options.place}-first")
    load_seconds = perf_counter() - begun
    dist.barrier()
    contestant.close()
    dist.destroy_process_group()
    return {
        "first_stall": first[0],
        "stall": median(each[0] for each in warm),
        "durable": median(each[1] for each in warm),
        "load": load_seconds,
        "extra": float(extra),
    }


def _timed_save(contestant: Any, state: dict[str, Any], place: str) -> tuple[float, float]:
    import torch.distributed as dist

    dist.barrier()
    begun = perf_counter()
    contestant.save(state, place)
    stall = perf_counter() - begun
    contestant.wait()
    return stall, perf_counter() - begun


def _state(kind: str, size_gib: float) -> dict[str, Any]:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    size, count = dist.get_world_size(), _TENSORS[kind]
    mesh = init_device_mesh("cpu", (size,))
    floats = int(size_gib * 1024 * MIB) // 4 // count // size if kind == "large" else _MANY_FLOATS // size
    return {
        f"layers.{number}.weight": DTensor.from_local(
            torch.randn(floats // 64, 64), mesh, [Shard(0)], run_check=False
        )
        for number in range(count)
    }


# -- what came of it


def _report(samples: dict[str, list[Sample]], state: str, options: argparse.Namespace) -> str:
    count = _TENSORS[state]
    nbytes = options.size_gib * 1024 * MIB if state == "large" else count * _MANY_FLOATS * 4
    local = nbytes / options.ranks
    header = [
        "contestant",
        "first stall ms",
        "stall ms",
        "µs a tensor",
        "durable s",
        "load s",
        "extra memory × part",
    ]
    rows = [
        [
            name,
            f"{_median(runs, 'first_stall') * 1e3:.1f}",
            f"{_median(runs, 'stall') * 1e3:.1f}",
            f"{_median(runs, 'stall') / count * 1e6:.0f}",
            f"{_median(runs, 'durable'):.3f}",
            f"{_median(runs, 'load'):.3f}",
            f"{_median(runs, 'extra') / local:.2f}",
        ]
        for name, runs in samples.items()
    ]
    ours, peers = samples["async_ckpt"], [runs for name, runs in samples.items() if name != "async_ckpt"]

    def goal(measure: str, limit: float) -> Goal:
        best = [min(run[measure] for run in together) for together in zip(*peers, strict=True)]
        values = [mine[measure] / other for mine, other in zip(ours, best, strict=True)]
        return Goal(name=f"{measure}, of the better of DCP's two", limit=limit, values=values)

    goals = [goal("stall", 0.5), goal("durable", 1.0), goal("load", 0.6)]
    beyond = [(run["extra"] - local) / MIB for run in ours]
    goals.append(Goal(name="extra memory beyond the snapshot", limit=64, values=beyond, unit="MiB"))
    if state == "many":
        goals.append(
            Goal(
                name="training thread, a tensor",
                limit=40,
                values=[run["stall"] / count * 1e6 for run in ours],
                unit="µs",
            )
        )
    title = f"{nbytes / MIB:.0f} MiB in {count} DTensors on {options.ranks} ranks; medians"
    verdicts = table(["goal", "limit", "median", "range", ""], [each.row() for each in goals])
    return "\n\n".join([title, table(header, rows), verdicts])


def _median(runs: Sequence[Sample], measure: str) -> float:
    return median(run[measure] for run in runs)


if __name__ == "__main__":
    main()
