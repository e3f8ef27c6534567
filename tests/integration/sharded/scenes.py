"""What each of several processes does in a test: one function a scene."""

from __future__ import annotations

import copyreg
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from fsspec.core import url_to_fs
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader

from async_ckpt import CheckpointService, Handle, ShardedSaveError, latest
from async_ckpt.stores import open_store
from async_ckpt.stores.base import Location, Store, Workers
from async_ckpt.testing import Fault, FaultyStore, crash
from tests.integration.sharded.states import Training, differences, every_kind, whole


def every_kind_of_state(folder: Path, url: str) -> Any:
    """Save a state of every kind, have torch load it, and tell what differs."""
    state = every_kind(1.0)
    with CheckpointService() as service:
        handle = service.save_sharded(state, url)
        with torch.no_grad():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    (value.to_local() if hasattr(value, "to_local") else value).zero_()
        handle.wait()
    other = every_kind(2.0)
    dcp.load(other, checkpoint_id=url)
    return differences(whole(every_kind(1.0)), whole(other))


def overlapping_saves(folder: Path, saves: int) -> Any:
    """Save again and again, and change the weights right after each call; tell what torch then finds in each."""
    training = Training()
    expected, found = [], []
    with CheckpointService(queue_depth=2, max_concurrent_saves=2) as service:
        for number in range(saves):
            training.step()
            state = training.state()
            service.save_sharded(state, str(folder / f"step-{number}"))
            expected.append(whole(state)["model"]["0.weight"].clone())
            with torch.no_grad():
                for parameter in training.model.parameters():
                    parameter.to_local().add_(1.0)  # type: ignore[attr-defined]
                    parameter.to_local().sub_(1.0)  # type: ignore[attr-defined]
        service.wait()
    for number in range(saves):
        state = training.state()
        dcp.load(state, checkpoint_id=str(folder / f"step-{number}"))
        found.append(
            state["steps"] == number + 1 and torch.equal(whole(state["model"]["0.weight"]), expected[number])
        )
    return found


def those_that_fail(folder: Path, url: str, cases: dict[str, dict[str, Any]]) -> Any:
    """Play `one_that_fails` for each case, at a place of its own."""
    return {
        name: one_that_fails(folder, f"{url}-{number}", **case)
        for number, (name, case) in enumerate(cases.items())
    }


def one_that_fails(
    folder: Path,
    url: str,
    victim: int,
    operation: str = "",
    call: int = 1,
    error: str = "OSError",
    after: bool = False,
    moment: str = "store",
    silence: float = 3.0,
) -> Any:
    """Save, save once more with something that fails on one rank, look around, and save again."""
    rank = dist.get_rank()
    bounds = {"silence_timeout": silence, "agreement_timeout": 2 * silence}
    with CheckpointService(**bounds) as service:
        service.save_sharded(_state(1.0), url).wait()
    dist.barrier()
    with CheckpointService(
        store_factory=_failing(rank == victim, operation, call, error, after), **bounds
    ) as service:
        told: dict[str, Any] = {"seconds": None, "failures": None, "kind": ""}
        begun = time.monotonic()
        told |= _second_save(service, url, victim, moment, silence)
        told["seconds"] = time.monotonic() - begun
        try:
            service.wait()
        except BaseException as failure:
            told["twice"] = repr(failure)
    if error == "crash" or moment == "never":
        return told
    numbers = torch.tensor([rank + 1.0])
    dist.all_reduce(numbers)
    told["sum"] = numbers.item()
    told["earlier"] = _is_there(url, 1.0)
    with CheckpointService(**bounds) as service:
        service.save_sharded(_state(3.0), url).wait()
    dist.barrier()
    told["next"] = _is_there(url, 3.0)
    dist.barrier()
    told["files"] = sorted(os.listdir(url)) if "://" not in url else []
    return told


def _second_save(
    service: CheckpointService, url: str, victim: int, moment: str, silence: float
) -> dict[str, Any]:
    is_victim = dist.get_rank() == victim
    state: dict[str, Any] = _state(2.0)
    if is_victim and moment == "staging":
        state["odd"] = lambda: None  # which pickle refuses
    if is_victim and moment == "elsewhere":
        url += "-elsewhere"
    if is_victim and moment == "plan":
        state["rows"] = torch.zeros(2)  # where the others have a part of something else
    if is_victim and moment == "nowhere":
        url = "no-such-protocol://bucket/run"
    if moment == "layout":  # of a kind of tensor of which there is no template yet
        state["new"] = torch.zeros(11, victim + 13)
        if is_victim:
            copyreg.pickle(torch.Tensor, _reduced_otherwise)  # type: ignore[arg-type]
    if is_victim and moment == "never":
        return {"kind": "none"}
    if is_victim and moment == "late":
        time.sleep(3 * silence)
    try:
        service.save_sharded(state, url).wait()
    except ShardedSaveError as failure:
        return {
            "kind": "ShardedSaveError",
            "failures": {str(rank): why for rank, why in failure.failures.items()},
        }
    except Exception as failure:
        return {"kind": type(failure).__name__}
    finally:
        copyreg.dispatch_table.pop(torch.Tensor, None)
    return {"kind": "durable"}


def _reduced_otherwise(tensor: torch.Tensor) -> tuple[Any, ...]:
    return torch.tensor, (tensor.tolist(),)


def seen_by_the_store(folder: Path, url: str) -> Any:
    """Save, and tell how many writers the store was told of."""
    seen: set[int] = set()

    def factory(location: Location, workers: Workers) -> Store:
        store: Any = open_store(location, workers=workers)
        begin = store.begin

        async def noting(place: Location, nbytes: int) -> Any:
            seen.add(place.writers)
            return await begin(place, nbytes)

        store.begin = noting
        return store  # type: ignore[no-any-return]

    with CheckpointService(store_factory=factory) as service:
        service.save_sharded(_state(1.0), url).wait()
    return sorted(seen)


def _failing(
    is_victim: bool, operation: str, call: int, error: str, after: bool
) -> Callable[[Location, Workers], Store] | None:
    if not is_victim or not operation:
        return None
    errors: dict[str, Callable[[], BaseException]] = {
        "OSError": lambda: PermissionError(13, "no"),
        "crash": crash,
    }
    fault = Fault(operation=operation, calls={call}, error=errors[error], after=after)  # type: ignore[arg-type]
    return lambda location, workers: FaultyStore(open_store(location, workers=workers), [fault])


def _state(seed: float) -> dict[str, Any]:
    return every_kind(seed, with_planes=False)  # so that any number of ranks has the same


def _is_there(url: str, seed: float) -> list[str]:
    """Return what of a state of every kind is not in the checkpoint."""
    other = _state(-1.0)
    dcp.load(other, checkpoint_id=url)
    return differences(whole(_state(seed)), whole(other))


def what_is_there(folder: Path, url: str, seeds: list[float]) -> Any:
    """Tell which state the checkpoint holds, save another one, and tell what is in the directory."""
    seed = next((seed for seed in seeds if not _is_there(url, seed)), None)
    dist.barrier()
    with CheckpointService() as service:
        service.save_sharded(_state(9.0), url).wait()
    dist.barrier()
    return {"seed": seed, "next": _is_there(url, 9.0), "files": sorted(os.listdir(url))}


def on_a_store(folder: Path, url: str, options: dict[str, Any]) -> Any:
    """Save twice to one place, have torch load both, and remove it; tell what differs, and what is left."""
    told: dict[str, Any] = {}
    with CheckpointService(storage_options=options) as service:
        for seed in (1.0, 2.0):
            service.save_sharded(every_kind(seed), url).wait()
            dist.barrier()
            other = every_kind(-1.0)
            dcp.load(other, storage_reader=FsspecReader(url, **options))
            told[f"{seed}"] = differences(whole(every_kind(seed)), whole(other))
        dist.barrier()
        file_system, path = url_to_fs(url, **options)
        file_system.invalidate_cache()
        told["files"] = len(file_system.ls(path, detail=False))
        dist.barrier()
        if dist.get_rank() == 0:
            service.remove(url).wait()
        dist.barrier()
    fresh, path = url_to_fs(url, skip_instance_cache=True, **options)
    told["is left"] = fresh.exists(path)
    return told


def _write_whole(path: Path, text: str) -> None:
    """Write a file that is never seen half written, not even where this process is killed."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(text)
    unfinished.replace(path)


def until_killed(folder: Path, url: str, victim: int, seconds: float, begun: int) -> Any:
    """Load what is there, then overwrite it until one rank is killed, at any moment; write down what is durable."""
    rank, notes = dist.get_rank(), folder / f"durable-{dist.get_rank()}"
    found = None
    if begun:
        assert latest(str(folder / "run")) == url
        state = _state(-1.0)
        dcp.load(state, checkpoint_id=url)
        found = int(state["number"].item())
        wrong = differences(whole(_state(float(found))), whole(state))
        (folder / f"found-{rank}").write_text(f"{found} {wrong}")
    number = begun if found is None else max(begun, found)
    with CheckpointService(silence_timeout=2.0, agreement_timeout=15.0, queue_depth=2) as service:
        handles: deque[tuple[int, Handle]] = deque()
        while True:
            number += 1
            handles.append((number, service.save_sharded(_state(float(number)), url)))
            if number == begun + 2 and rank == victim:
                threading.Timer(seconds, crash).start()
            while len(handles) > 1 or (handles and handles[0][1].done()):
                tried, handle = handles.popleft()
                try:
                    handle.wait()
                except ShardedSaveError as failure:
                    for _, other in handles:  # the dead one was missed there, too
                        with suppress(ShardedSaveError):
                            other.wait()
                    return {"failures": sorted(failure.failures)}
                _write_whole(notes, str(tried))
