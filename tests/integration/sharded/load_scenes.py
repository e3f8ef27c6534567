"""What each of several processes does in a test of loading: one function a scene."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed._shard import sharded_tensor
from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter
from torch.distributed.checkpoint.state_dict import set_state_dict
from torch.distributed.device_mesh import init_device_mesh

from async_ckpt import CheckpointService
from async_ckpt.stores import open_store
from async_ckpt.stores.base import Location, Source, Store, Workers
from tests.integration.sharded.states import Training, differences, every_kind, spread, whole
from tests.integration.sharded.torch_names import DTensor, Shard, distribute_tensor, fully_shard


def write(folder: Path, url: str, by: str) -> None:
    """Save a state of every kind."""
    state = every_kind(1.0)
    if by == "ours":
        with CheckpointService() as service:
            service.save_sharded(state, url).wait(60)
    elif by == "fsspec":
        dcp.save(state, storage_writer=FsspecWriter(url))
    else:
        options: Any = {
            "torch": {},
            "threads": {"thread_count": 3},
            "files": {"single_file_per_rank": False},
        }[by]
        dcp.save(state, storage_writer=dcp.FileSystemWriter(url, **options))


def read(folder: Path, url: str, by_torch: bool = True) -> Any:
    """Load a state of every kind, that was saved by any number of ranks; tell what differs from what was saved."""
    state = every_kind(2.0)
    with CheckpointService() as service:
        service.load_sharded(state, url)
    found = differences(whole(every_kind(1.0)), whole(state))
    if by_torch:
        other = every_kind(2.0)
        dcp.load(other, checkpoint_id=url)
        found += differences(whole(other), whole(state))
    return found


def sharded_tensors(folder: Path, ours: str, theirs: str) -> Any:
    """Save ``ShardedTensor``, FSDP1's kind, with us and with torch; tell what each finds in what the other wrote."""
    with CheckpointService() as service:
        service.save_sharded(_sharded_tensors(1.0), ours).wait(60)
        dcp.save(_sharded_tensors(1.0), checkpoint_id=theirs)
        found = []
        for url in (ours, theirs):
            by_us, by_torch = _sharded_tensors(2.0), _sharded_tensors(2.0)
            service.load_sharded(by_us, url)
            dcp.load(by_torch, checkpoint_id=url)
            found += [
                differences(_parts(_sharded_tensors(1.0)), _parts(state)) for state in (by_us, by_torch)
            ]
    return found


def sharded_whole(name: str, seed: float = 1.0) -> torch.Tensor:
    """Return a tensor of `sharded_tensors`, whole."""
    rows, columns, dtype = {
        "blocks": (7, 3, torch.float32),  # one run of rows a rank, of different lengths
        "striped": (12, 2, torch.bfloat16),  # two runs of rows a rank, as a flat parameter may have
        "one rank's": (4, 5, torch.int64),
    }[name]
    return ((torch.arange(rows * columns).view(rows, columns) + seed) * 0.5).to(dtype)


def _sharded_tensors(seed: float) -> dict[str, Any]:
    rank, size = dist.get_rank(), dist.get_world_size()
    cuts = {
        "blocks": {each: [(sum(range(each + 1)), each + 1)] for each in range(size - 1)}
        | {size - 1: [(sum(range(size)), 7 - sum(range(size)))]},
        "striped": {each: [(2 * each, 2), (2 * (size + each), 2)] for each in range(size)},
        "one rank's": {0: [(0, 4)]},
    }
    state: dict[str, Any] = {}
    for name, parts in cuts.items():
        whole_tensor = sharded_whole(name, seed)
        shards = [
            sharded_tensor.Shard.from_tensor_and_offsets(
                whole_tensor[start : start + rows].clone(), [start, 0], rank
            )
            for start, rows in parts.get(rank, [])
        ]
        state[name] = sharded_tensor.init_from_local_shards(shards, *whole_tensor.shape)
    return {"model": state, "step": int(seed)}


def _parts(state: Any) -> Any:
    model = {name: [shard.tensor for shard in each.local_shards()] for name, each in state["model"].items()}
    return {**state, "model": model}


def train(folder: Path, url: str, steps: int, by: str) -> Any:
    """Train a model sharded by FSDP2, on a plane of ranks where there are four, and save it; tell what it is."""
    training = Training(_mesh())
    for _ in range(steps):
        training.step()
    if by == "ours":
        with CheckpointService() as service:
            service.save_sharded(training.state(), url).wait(60)
    elif by == "torch":
        dcp.save(training.state(), checkpoint_id=url)
    else:  # as one plain file
        state = whole(training.state())
        if dist.get_rank() == 0:
            torch.save(state, url)
    return fingerprints(training.state())


def resume(folder: Path, url: str, steps: int) -> Any:
    """Make the same model anew, load into it, and tell what it is now, and what after some steps more."""
    training = Training(_mesh())
    state = training.state()
    with CheckpointService() as service:
        service.load_sharded(state, url)
    set_state_dict(
        training.model,
        training.optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    training.steps = state["steps"]
    found = fingerprints(training.state())
    for _ in range(steps):
        training.step()
    return [found, training.steps]


def _mesh() -> Any:
    size = dist.get_world_size()
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "parts")) if size == 4 else None


def fingerprints(state: Any) -> dict[str, Any]:
    """Return a digest of each tensor, put together, and each value."""
    found: dict[str, Any] = {}

    def walk(value: Any, at: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{at}.{key}")
        elif isinstance(value, torch.Tensor):
            data = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            found[at] = hashlib.sha256(data).hexdigest()
        else:
            found[at] = repr(value)

    walk(whole(state), "")
    return found


class CountingStore:
    """A store that counts what is read, and how."""

    def __init__(self, inner: Store) -> None:
        self.inner = inner
        self.nbytes = 0
        self.ranges: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    async def source(self, location: Location) -> Any:
        """Open a file."""
        return CountingSource(await self.inner.source(location), self, location.path.rpartition("/")[2])


class CountingSource:
    """A file whose reads are counted."""

    def __init__(self, inner: Source, store: CountingStore, name: str) -> None:
        self.inner, self.store, self.name = inner, store, name
        self.nbytes, self.max_concurrent_reads = inner.nbytes, inner.max_concurrent_reads

    async def read_into(self, start: int, *targets: memoryview) -> None:
        """Read."""
        self.store.nbytes += sum(target.nbytes for target in targets)
        self.store.ranges[self.name] += 1
        await self.inner.read_into(start, *targets)

    async def aclose(self) -> None:
        """Close."""
        await self.inner.aclose()


def count(folder: Path, url: str, rows: int, dimension: int = 0, plain: bool = False) -> Any:
    """Load large tensors that are cut in that dimension; tell what was fetched, and whether it is right."""
    stores = []

    def make(location: Location, workers: Workers) -> Any:
        stores.append(CountingStore(open_store(location, workers=workers)))
        return stores[-1]

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    expected = large(rows)
    state: dict[str, Any] = {
        name: distribute_tensor(torch.zeros_like(value), mesh, [Shard(dimension)])
        for name, value in expected.items()
    }
    with CheckpointService(store_factory=make) as service:
        service.load_sharded({"model": state} if plain else state, url)
    right = all(torch.equal(state[name].full_tensor(), expected[name]) for name in expected)
    return {"right": right, "nbytes": stores[0].nbytes, "ranges": dict(stores[0].ranges)}


def large(rows: int) -> dict[str, torch.Tensor]:
    """Return some large tensors, always the same."""
    return {
        f"layers.{number}": torch.arange(rows * 1000, dtype=torch.float32).view(rows, 1000) + number
        for number in range(5)
    }


def much(rows: int) -> dict[str, torch.Tensor]:
    """Return tensors of 64 KiB a row, in all: one that is half of it, and others."""
    sizes = {"half": (rows, 8192), **{f"layers.{number}": (rows // 8, 8192) for number in range(8)}}
    return {
        name: torch.arange(torch.Size(size).numel(), dtype=torch.float32).view(size)
        for name, size in sizes.items()
    }


def write_much(folder: Path, url: str, rows: int, dimension: int) -> None:
    """Save them, cut in that dimension."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    placed = {name: spread(value, mesh, [Shard(dimension)]) for name, value in much(rows).items()}
    with CheckpointService() as service:
        service.save_sharded(placed, url).wait(100)


def write_large(folder: Path, url: str, rows: int) -> None:
    """Save large tensors, each rank its rows."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    dcp.save(
        {name: distribute_tensor(value, mesh, [Shard(0)]) for name, value in large(rows).items()},
        checkpoint_id=url,
    )


def to_and_from_bucket(folder: Path, url: str, options: dict[str, Any]) -> Any:
    """Save to a bucket and load from it, as a whole and as a plain file; tell what differs."""
    state, plain = every_kind(1.0), every_kind(1.0)
    with CheckpointService(storage_options=options) as service:
        service.save_sharded(state, f"{url}/sharded").wait(60)
        if dist.get_rank() == 0:
            service.save(whole_here(state), f"{url}/plain.ckpt").wait(60)
        dist.barrier()
        other, another = every_kind(2.0), every_kind(3.0)
        service.load_sharded(other, f"{url}/sharded")
        service.load_sharded(another, f"{url}/plain.ckpt")
    expected = whole(plain)
    return differences(expected, whole(other)) + differences(expected, whole(another))


def whole_here(state: Any) -> Any:
    """Return what `every_kind` is made of, without asking the other ranks."""
    if isinstance(state, dict):
        return {key: whole_here(value) for key, value in state.items()}
    if isinstance(state, list):
        return [whole_here(value) for value in state]
    if isinstance(state, DTensor):
        size = state.numel()
        numbers = torch.arange(size, dtype=torch.float32).view(state.shape) * 0.5 + 1.0
        return numbers.to(state.dtype)
    return state


def stateful(folder: Path, url: str) -> Any:
    """Load into objects that have a state of their own, as DCP takes them; tell what they were given."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    for layer in model:
        fully_shard(layer)
    counter = Steps(7)
    dcp.save({"model": model, "counter": counter}, checkpoint_id=url)
    saved = fingerprints(model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    other = Steps(0)
    with CheckpointService() as service:
        service.load_sharded({"model": model, "counter": other}, url)
    return [fingerprints(model.state_dict()) == saved, other.steps, other.loads]


class Steps:
    """Something with a state."""

    def __init__(self, steps: int) -> None:
        self.steps, self.loads = steps, 0

    def state_dict(self) -> dict[str, Any]:
        """Return it."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it."""
        self.steps = state["steps"]
        self.loads += 1
