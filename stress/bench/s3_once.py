"""One contestant, once, in this process: what an upload or a load costs it.

``python -m stress.bench.s3_once '{"task": "upload", ...}'`` prints a sample as JSON. Before the clock starts, the
contestant moves a few bytes, so that libraries are imported and a connection stands.

What does not belong here: servers, rounds, and what the samples are held against.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import anyio
import torch

from stress.bench.contestants import State
from stress.bench.harness import PeakMemory, Sample, cpu_seconds
from stress.bench.network import bytes_a_second
from stress.bench.s3_contestants import BareUpload, configure, make
from stress.bench.s3_report import OURS

__all__ = ["lines", "state_of", "upload"]

TENSORS = 60
WANTED = 3  # of them, for a partial load
TICK_SECONDS = 0.005
_SMALL = 4096


def main(arguments: Sequence[str]) -> None:
    """Do what the argument asks and print the sample."""
    from stress.bench.load import load

    asked = json.loads(arguments[0])
    configure(asked["storage_options"])
    tasks: dict[str, Callable[..., Any]] = {"upload": upload, "lines": lines, "load": load}
    print(json.dumps(tasks[asked.pop("task")](**asked)))


def state_of(nbytes: int) -> dict[str, State]:
    """Return a state of *nbytes* in fp32 tensors, each full of its number; a twentieth is the ``state_dict``."""
    floats = max(1, nbytes // TENSORS // 4)
    tensors = [(f"layer.{index}", torch.full((floats,), float(index))) for index in range(TENSORS)]
    return {"state_dict": dict(tensors[:WANTED]), "optimizer_states": dict(tensors[WANTED:])}


def upload(
    *,
    name: str,
    url: str,
    nbytes: int,
    storage_options: Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
    warm: bool = False,
    ticks: bool = False,
) -> Sample:
    """Save a state of *nbytes* to *url*.

    Args:
        name: the contestant's.
        url: a free name on the server.
        nbytes: size of the state.
        storage_options: how the server is reached.
        options: for our service.
        warm: measure the second of two saves; the memory, of both.
        ticks: whether our loop is watched, which costs a little.
    """
    contestant = make(name, storage_options, **(options or {}))
    with tempfile.TemporaryDirectory(prefix="async_ckpt-bench-") as folder:
        file = Path(folder) / "checkpoint"
        if isinstance(contestant, BareUpload):
            contestant.prepare(state_of(_SMALL), file)
        cold = PeakMemory()
        contestant.save(state_of(_SMALL), f"{url}-small")
        contestant.wait()
        libraries = cold.extra_bytes()
        state = state_of(nbytes)
        if isinstance(contestant, BareUpload):
            contestant.prepare(state, file)
            state = {}
        os.sync()
        memory = PeakMemory()
        late: list[float] = []
        if warm:
            contestant.save(state, url)
            contestant.wait()
            gc.collect()  # a full collection costs as much as half an upload, and comes when it likes
        with _ticking(late, runs=ticks):
            cpu, start = cpu_seconds(), perf_counter()
            contestant.save(state, url)
            safe_cpu, safe = cpu_seconds(), perf_counter()
            contestant.wait()
            ended_cpu, ended = cpu_seconds(), perf_counter()
        extra = memory.extra_bytes()
        contestant.close()
    return {
        "stall_seconds": safe - start,
        "seconds": ended - start,
        "cpu_seconds": ended_cpu - cpu,
        "cpu_seconds_after_stall": ended_cpu - safe_cpu,
        "extra_bytes": extra,
        "library_bytes": libraries,
        "late_seconds": _quantiles(late),
    }


def lines(
    *, url: str, nbytes: int, connections: Sequence[int], storage_options: Mapping[str, Any]
) -> dict[str, Sample]:
    """Save over some numbers of connections, *nbytes* over each; right before, see what bare sockets reach.

    Args:
        url: a free name on a sink.
        nbytes: what each connection carries.
        connections: how many at a time.
        storage_options: how the sink is reached, through slow lines.
    """
    samples = {}
    for count in connections:
        bare = bytes_a_second(storage_options["endpoint_url"], count, nbytes=nbytes // 2)
        sample = upload(
            name=OURS,
            url=url,
            nbytes=count * nbytes,
            storage_options=storage_options,
            options={"max_concurrent_parts": count},
            ticks=True,
        )
        sample["bytes_a_second"] = count * nbytes / (sample["seconds"] - sample["stall_seconds"])
        samples[str(count)] = {**sample, "bare_bytes_a_second": bare}
    return samples


def _quantiles(values: Sequence[float]) -> list[float] | None:
    """Return the median, the 99th percentile and the highest of *values*, if there are any."""
    if not values:
        return None
    ordered = sorted(values)
    return [ordered[int(share * (len(ordered) - 1))] for share in (0.5, 0.99, 1.0)]


@contextmanager
def _ticking(late: list[float], *, runs: bool) -> Iterator[None]:
    """Ask our loop for a turn every few milliseconds, and note how much later it comes."""
    if not runs:
        yield
        return
    from async_ckpt.engine.runtime import current

    ended = False

    async def tick() -> None:
        while not ended:
            due = perf_counter() + TICK_SECONDS
            await anyio.sleep(TICK_SECONDS)
            late.append(perf_counter() - due)

    runtime = current()
    assert runtime is not None
    ticker = runtime.call_async(tick)
    try:
        yield
    finally:
        ended = True
        ticker.result()


if __name__ == "__main__":
    main(sys.argv[1:])
