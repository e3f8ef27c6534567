"""``StorageWriter``, ``StorageReader`` and ``Stager`` under torch's own functions, in one process."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

import async_ckpt.dcp as dcp
from async_ckpt import CheckpointService, OptionError, UnpicklableStateError
from async_ckpt.stores import open_store
from async_ckpt.testing import Fault, FaultyStore
from tests.integration.sharded.torch_names import ALONE

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # as torch's functions say


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """Leave no service behind."""
    yield
    dcp.configure()


def numbers(seed: float) -> dict[str, Any]:
    """Return a state."""
    return {
        "large": torch.arange(300_000.0) + seed,
        "half": torch.full((5, 3), seed, dtype=torch.bfloat16),
        "turned": torch.arange(6.0).view(2, 3).t() + seed,
        "part": (torch.arange(20.0) + seed)[3:9:2],
        "nothing": torch.zeros(0, 3),
        "scalar": torch.tensor(seed),
        "step": int(seed),
        "nested": [{"rate": seed / 3}, f"run {seed}"],
    }


def found(path: object, seed: float) -> list[str]:
    """Return what torch does not find at *path* as it is in a state."""
    state = numbers(-1.0)
    torch_dcp.load(state, checkpoint_id=str(path), **ALONE)
    return [
        name
        for name, value in numbers(seed).items()
        if not (torch.equal(value, state[name]) if isinstance(value, torch.Tensor) else value == state[name])
    ]


def test_torch_saves_by_our_writer(tmp_path: Path) -> None:
    """What torch's own ``save`` writes by a ``StorageWriter``, torch's reader finds, bit for bit."""
    metadata = torch_dcp.save(numbers(1.0), storage_writer=dcp.StorageWriter(tmp_path / "it"))
    assert found(tmp_path / "it", 1.0) == []
    assert metadata.storage_meta.save_id
    torch_dcp.save(numbers(2.0), storage_writer=dcp.StorageWriter(), checkpoint_id=str(tmp_path / "other"))
    assert found(tmp_path / "other", 2.0) == []


def test_many_parts(tmp_path: Path) -> None:
    """A tensor that is sent in many parts, several at a time, arrives whole."""
    with CheckpointService(part_size="64KiB", max_concurrent_parts=3) as service:
        torch_dcp.save(numbers(1.0), storage_writer=dcp.StorageWriter(tmp_path / "it", service=service))
    assert found(tmp_path / "it", 1.0) == []


def test_saving_again_replaces(tmp_path: Path) -> None:
    """The objects of the checkpoint before are deleted once the new one is there; no other file is touched."""
    writer = dcp.StorageWriter(tmp_path / "it")
    torch_dcp.save(numbers(1.0), storage_writer=writer)
    (tmp_path / "it" / "notes.txt").write_text("mine")
    before = set(os.listdir(tmp_path / "it"))
    torch_dcp.save(numbers(2.0), storage_writer=writer)
    after = set(os.listdir(tmp_path / "it"))
    assert len(after) == len(before) == 3
    assert before & after == {".metadata", "notes.txt"}
    assert found(tmp_path / "it", 2.0) == []


@pytest.mark.parametrize(("operation", "call"), [("put", 1), ("commit", 1), ("commit", 2)])
def test_a_save_that_fails_leaves_the_checkpoint_before(tmp_path: Path, operation: str, call: int) -> None:
    """Whatever fails, what was there loads; the next save by that writer deletes what the failed one has left (D5)."""
    torch_dcp.save(numbers(1.0), storage_writer=dcp.StorageWriter(tmp_path / "it"))
    error = OSError(errno.EACCES, "no")
    fault = Fault(operation=operation, calls={call}, error=lambda: error)  # type: ignore[arg-type]
    with CheckpointService(
        store_factory=lambda location, workers: FaultyStore(open_store(location, workers=workers), [fault])
    ) as service:
        writer = dcp.StorageWriter(tmp_path / "it", service=service)
        with pytest.raises(torch_dcp.CheckpointException):
            torch_dcp.save(numbers(2.0), storage_writer=writer)
        assert found(tmp_path / "it", 1.0) == []
        torch_dcp.save(numbers(3.0), storage_writer=writer)
        service.wait()  # has nothing more to tell: torch was told
    assert found(tmp_path / "it", 3.0) == []
    assert len(os.listdir(tmp_path / "it")) == 2


def test_overwriting_may_be_refused(tmp_path: Path) -> None:
    """With ``overwrite=False`` a checkpoint is not replaced, and nothing is written beside it."""
    with CheckpointService(overwrite=False) as service:
        writer = dcp.StorageWriter(tmp_path / "it", service=service)
        torch_dcp.save(numbers(1.0), storage_writer=writer)
        with pytest.raises(torch_dcp.CheckpointException, match="exists"):
            torch_dcp.save(numbers(2.0), storage_writer=writer)
    assert found(tmp_path / "it", 1.0) == []
    assert len(os.listdir(tmp_path / "it")) == 2


class Halving(torch_dcp.DefaultSavePlanner):
    """Writes every tensor as one of float16, made anew each time."""

    def resolve_data(self, write_item: WriteItem) -> Any:
        found = super().resolve_data(write_item)
        return found if write_item.type is WriteItemType.BYTE_IO else found.to(torch.float16)  # type: ignore[union-attr]


def test_any_planner(tmp_path: Path) -> None:
    """A planner of the program's own says what the bytes are."""
    torch_dcp.save(
        {"w": torch.arange(9.0)}, storage_writer=dcp.StorageWriter(tmp_path / "it"), planner=Halving()
    )
    loaded = {"w": torch.zeros(9, dtype=torch.float16)}
    torch_dcp.load(loaded, checkpoint_id=str(tmp_path / "it"), **ALONE)
    assert torch.equal(loaded["w"], torch.arange(9.0).half())


def test_plans_that_are_kept(tmp_path: Path) -> None:
    """Where torch keeps its plans from save to save, each save still has names of its own."""
    for seed in (1.0, 2.0, 3.0):
        planner = torch_dcp.DefaultSavePlanner(enable_plan_caching=True)
        torch_dcp.save(numbers(seed), storage_writer=dcp.StorageWriter(tmp_path / "it"), planner=planner)
        assert found(tmp_path / "it", seed) == []


def test_checkpoints_of_each_rank_are_refused(tmp_path: Path) -> None:
    """``use_collectives=False`` is refused by the writer, too."""
    with pytest.raises(OptionError, match="one directory"):
        torch_dcp.save(numbers(1.0), storage_writer=dcp.StorageWriter(tmp_path / "it"), use_collectives=False)


def test_what_is_not_in_the_format_is_refused(tmp_path: Path) -> None:
    """A sparse tensor is named in the error."""
    sparse = torch.eye(3).to_sparse()
    with pytest.raises(torch_dcp.CheckpointException, match="cannot save odd"):
        torch_dcp.save({"odd": sparse}, storage_writer=dcp.StorageWriter(tmp_path / "it"))


def test_which_places_are_known() -> None:
    """As torch asks a class before it makes a writer."""
    assert dcp.StorageWriter.validate_checkpoint_id("s3://bucket/step-1")
    assert dcp.StorageWriter.validate_checkpoint_id("run/step-1")


def test_a_kept_stager_tears_nothing(tmp_path: Path) -> None:
    """Saves that overlap, by one ``Stager``, hold their own step, whatever happens to the weights meanwhile (S1)."""
    stager, weight = dcp.Stager(), torch.zeros(1_000_000)
    futures = []
    for step in range(4):
        weight.fill_(step)
        futures.append(
            torch_dcp.async_save(
                {"weight": weight, "tied": weight[:10], "steps": [step]},
                storage_writer=dcp.StorageWriter(tmp_path / str(step)),
                async_stager=stager,
                no_dist=True,
            )
        )
        weight.fill_(-1)
    for step, future in enumerate(futures):
        future.result(60)  # type: ignore[union-attr]
        loaded: dict[str, Any] = {"weight": torch.zeros(1_000_000), "tied": torch.zeros(10), "steps": [-1]}
        torch_dcp.load(loaded, checkpoint_id=str(tmp_path / str(step)), **ALONE)
        assert loaded["steps"] == [step]
        assert torch.equal(loaded["weight"], torch.full((1_000_000,), float(step)))
        assert torch.equal(loaded["tied"], torch.full((10,), float(step)))
    stager.close()


def test_tied_tensors_are_copied_once() -> None:
    """What is the same tensor in the state is the same in the copy; nothing is shared with the state."""
    weight, order = torch.ones(5), {"deep": [1]}
    staged = dcp.Stager().stage({"a": weight, "b": (weight, order)})
    assert staged["a"] is staged["b"][0]
    weight.zero_()
    order["deep"].append(2)
    assert torch.equal(staged["a"], torch.ones(5))
    assert staged["b"][1] == {"deep": [1]}


def test_a_sharded_tensor_cannot_be_staged(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused by name, and the error says what takes it."""
    kind = type("ShardedTensor", (), {})
    monkeypatch.setattr("async_ckpt.dcp.stager.ShardedTensor", kind)
    with pytest.raises(UnpicklableStateError, match=r"state\['model'\]\['w'\].*async_ckpt.dcp.async_save"):
        dcp.Stager().stage({"model": {"w": kind()}})


@pytest.mark.parametrize("by", ["torch", "our writer", "us"])
def test_torch_loads_by_our_reader(tmp_path: Path, by: str) -> None:
    """What torch's own ``load`` reads by a ``StorageReader`` is what was saved, whoever has written it."""
    if by == "us":
        dcp.save(numbers(1.0), checkpoint_id=tmp_path / "it")
    else:
        writer = dcp.StorageWriter(tmp_path / "it") if by == "our writer" else None
        torch_dcp.save(numbers(1.0), storage_writer=writer, checkpoint_id=str(tmp_path / "it"))
    state = numbers(2.0)
    torch_dcp.load(state, storage_reader=dcp.StorageReader(tmp_path / "it"))
    for name, value in numbers(1.0).items():
        assert torch.equal(value, state[name]) if isinstance(value, torch.Tensor) else value == state[name], (
            name
        )


def test_our_reader_compares_checksums(tmp_path: Path) -> None:
    """A damaged tensor is an error that names it; torch's own reader takes it as it is."""
    torch_dcp.save({"weight": torch.zeros(100_000)}, checkpoint_id=str(tmp_path / "it"))
    (path,) = (tmp_path / "it").glob("*.distcp")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(torch_dcp.CheckpointException, match="weight"):
        torch_dcp.load({"weight": torch.ones(100_000)}, storage_reader=dcp.StorageReader(tmp_path / "it"))


def test_our_reader_refuses_what_is_not_complete(tmp_path: Path) -> None:
    """Without ``.metadata``, of whatever rank, there is no checkpoint."""
    torch_dcp.save({"step": 1}, checkpoint_id=str(tmp_path / "it"))
    (tmp_path / "it" / ".metadata").rename(tmp_path / "it" / "__0.metadata")
    with pytest.raises(torch_dcp.CheckpointException, match="no complete checkpoint"):
        torch_dcp.load({"step": 0}, storage_reader=dcp.StorageReader(tmp_path / "it"))
