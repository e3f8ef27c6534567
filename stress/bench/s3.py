"""Checkpoints in S3: what an upload costs, how fast it is through a bad network, and to and from real servers.

``python -m stress.bench.s3 --mib 1024 --rounds 5`` prints the tables of the documentation, in Markdown, and the
goals they are held against. It needs the servers (``python -m stress.servers.install FOLDER --bench``) and
obstore, and takes about ten minutes and five times the size in memory. It asserts nothing: machines differ.

Each sample is taken in a fresh process, alone, in an order shuffled per round; servers and networks are processes
of their own, and what was uploaded is deleted before the next sample.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from stress import sink
from stress.bench.harness import MIB, Sample, rounds, run_apart
from stress.bench.load import LOADERS
from stress.bench.network import network
from stress.bench.recording import record
from stress.bench.s3_contestants import UPLOADERS
from stress.bench.s3_report import LATENCY_SECONDS, LIGHTNING, OURS, PARTIAL, RATE, SECTIONS, report
from stress.servers import juicefs, seaweedfs
from stress.servers.process import Server
from stress.servers.s3 import call

__all__ = ["main"]

SAMPLE_SECONDS = 180.0
_BUCKET = "bench"
_URL = f"s3://{_BUCKET}/checkpoint"
_CONNECTIONS = ("1", "2", "4", "8")
_CONNECTION_SHARE = 4  # each carries this part of the size
_SERVERS: dict[str, Callable[[], AbstractContextManager[Server]]] = {
    "JuiceFS gateway": juicefs.start,
    "SeaweedFS": seaweedfs.start,
}
_LOADED_FROM = "JuiceFS gateway"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    options = _parser().parse_args(arguments)
    if options.directory:
        tempfile.tempdir = options.directory  # where servers keep what they are sent
        os.environ["TMPDIR"] = options.directory  # and our processes their files
    measure: dict[str, Callable[[argparse.Namespace], Any]] = {
        "cost": _cost,
        "network": _network,
        "durable": _durable,
        "load": _load,
    }
    samples = {name: measure[name](options) for name in options.only or SECTIONS}
    if options.record:
        samples = record(options.record, samples, parameters={"mib": options.mib}, where=options.directory)
    print(report(samples, nbytes=options.mib * MIB))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=1024, help="size of the state")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="seed of the order of the contestants")
    parser.add_argument("--only", choices=SECTIONS, nargs="+", help="measure less")
    parser.add_argument("--directory", help="where the servers keep their data; a tmpfs leaves the disk out")
    parser.add_argument("--record", type=Path, help="file to which every sample is added")
    return parser


# -- the sections


def _cost(options: argparse.Namespace) -> dict[str, list[Sample]]:
    """Uploads to the sink, the second of each process."""
    names = [name for name in UPLOADERS if name != LIGHTNING]  # it is measured with real servers
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    with sink.start() as server:
        for number, name in rounds(names, options.rounds, seed=options.seed):
            sample = _upload(server, name, options.mib * MIB, warm=True)
            samples[name].append(sample)
            _tell(options, number, f"{name} to the sink: {sample['cpu_seconds']:.2f} CPU s")
    return samples


def _network(options: argparse.Namespace) -> dict[str, list[Sample]]:
    """Our uploads to the sink through slow lines, and what bare sockets reach there."""
    shuffled = [int(name) for _, name in rounds(_CONNECTIONS, options.rounds, seed=options.seed)]
    samples: dict[str, list[Sample]] = {name: [] for name in _CONNECTIONS}
    nbytes = options.mib * MIB // _CONNECTION_SHARE
    with sink.start() as server, network(server.url, latency_seconds=LATENCY_SECONDS, rate=RATE) as slow:
        for number in range(options.rounds):
            order = shuffled[number * len(samples) : (number + 1) * len(samples)]
            what = {"task": "lines", "connections": order, "nbytes": nbytes}
            for name, sample in _once(server, through=slow.url, **what).items():
                samples[name].append(sample)
                reached = sample["bytes_a_second"] / 1e6
                _tell(options, number, f"{reached:.0f} MB/s over {name} slow connections")
    return samples


def _durable(options: argparse.Namespace) -> dict[str, dict[str, list[Sample]]]:
    """Saves to real servers, of half the size to the slow one."""
    names = [OURS, LIGHTNING]
    samples: dict[str, dict[str, list[Sample]]] = {}
    for kind in _SERVERS:
        nbytes = options.mib * MIB // (1 if kind == _LOADED_FROM else 2)
        samples[kind] = {name: [] for name in names}
        with _real(kind) as server:
            for number, name in rounds(names, options.rounds, seed=options.seed):
                sample = _upload(server, name, nbytes, ticks=name == OURS)
                _delete(server)
                samples[kind][name].append({**sample, "nbytes": nbytes})
                _tell(options, number, f"{name} to {kind}: {sample['seconds']:.2f} s")
    return samples


def _load(options: argparse.Namespace) -> dict[str, list[Sample]]:
    """Loads from a real server, and one of a twentieth, its bytes counted on the way."""
    samples: dict[str, list[Sample]] = {name: [] for name in LOADERS}
    with _real(_LOADED_FROM) as server, network(server.url) as counted:
        _upload(server, OURS, options.mib * MIB)
        what = {"task": "load", "small_url": f"{_URL}-small"}
        for number, name in rounds(list(LOADERS), options.rounds, seed=options.seed):
            sample = _once(server, name=name, **what)
            samples[name].append(sample)
            _tell(options, number, f"{name} from {_LOADED_FROM}: {sample['seconds']:.2f} s")
        partial = _once(server, through=counted.url, name=OURS, keys="state_dict.*", **what)
        samples[PARTIAL] = [{**partial, "moved_bytes": counted.counts()["bytes_down"]}]
    return samples


# -- one sample


def _upload(server: Server, name: str, nbytes: int, **more: Any) -> Sample:
    before = _cpu_seconds(server.pid)
    sample: Sample = _once(server, task="upload", name=name, nbytes=nbytes, **more)
    sample["server_cpu_seconds"] = _cpu_seconds(server.pid) - before
    return sample


def _once(server: Server, *, through: str | None = None, **asked: Any) -> Any:
    storage_options = {**server.storage_options, "endpoint_url": through or server.url}
    what = json.dumps({"url": _URL, "storage_options": storage_options, **asked})
    return run_apart("stress.bench.s3_once", what, timeout_seconds=SAMPLE_SECONDS)


@contextmanager
def _real(kind: str) -> Iterator[Server]:
    with ExitStack() as stack:
        server = stack.enter_context(_SERVERS[kind]())
        server.make_bucket(_BUCKET)
        yield server


def _delete(server: Server) -> None:
    for key in ("checkpoint", "checkpoint-small"):
        call(server.url, "DELETE", f"{_BUCKET}/{key}")


def _cpu_seconds(pid: int) -> float:
    """Return the CPU time of another process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _tell(options: argparse.Namespace, number: int, text: str) -> None:
    print(f"round {number + 1}/{options.rounds} {text}", flush=True)


if __name__ == "__main__":
    main()
