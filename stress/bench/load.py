"""Reading a checkpoint from an S3 server, once, in this process: ours and Lightning's way.

The result is looked at: every tensor that was asked for holds what was saved. What does not belong here: servers,
rounds, and what the samples are held against.
"""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter
from typing import Any

from stress.bench.harness import PeakMemory, Sample, cpu_seconds
from stress.bench.s3_report import LIGHTNING, OURS

__all__ = ["LOADERS", "load"]


def _lightning(url: str, keys: str | None) -> Any:
    from pytorch_lightning.plugins.io import TorchCheckpointIO

    if keys is not None:
        raise ValueError("Lightning loads whole checkpoints")
    return TorchCheckpointIO().load_checkpoint(url, weights_only=True)


def _ours(url: str, keys: str | None) -> Any:
    import async_ckpt

    return async_ckpt.load(url, keys=keys)


LOADERS = {OURS: _ours, LIGHTNING: _lightning}


def load(
    *, name: str, url: str, small_url: str, storage_options: Mapping[str, Any], keys: str | None = None
) -> Sample:
    """Load the checkpoint at *url*.

    Args:
        name: the contestant's.
        url: what ``s3_once.upload`` has saved there.
        small_url: a small checkpoint, to be loaded before the clock starts.
        storage_options: how the server is reached.
        keys: which entries; all by default.
    """
    loader = LOADERS[name]
    loader(small_url, None)
    memory = PeakMemory()
    cpu, start = cpu_seconds(), perf_counter()
    state = loader(url, keys)
    ended, ended_cpu = perf_counter(), cpu_seconds()
    extra = memory.extra_bytes()
    return {
        "seconds": ended - start,
        "cpu_seconds": ended_cpu - cpu,
        "extra_bytes": extra,
        "nbytes": _checked_bytes(state),
    }


def _checked_bytes(state: Mapping[str, Any]) -> int:
    """Return the bytes of the tensors in *state*, each of which is full of its number."""
    total = 0
    for name, value in state.items():
        if isinstance(value, Mapping):
            total += _checked_bytes(value)
        else:
            if not bool((value == float(name.split(".")[1])).all()):
                raise AssertionError(f"{name} is not what was saved")
            total += value.nbytes
    return total
