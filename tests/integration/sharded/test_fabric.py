"""Fabric, of both Lightnings, with each kind of strategy, in two processes: one call makes its saves asynchronous."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import async_ckpt
from stress.servers.process import Server
from tests.integration.sharded.launching import all_well, play, preload
from tests.servers import fresh_bucket

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(240)]

preload("fabric_scenes")

TRAIN = "fabric_scenes.train"
STEPS = ["step-1", "step-2", "step-3"]


def _train(
    folder: Path, run: str, kind: str, tree: str = "lightning.fabric", ranks: int = 2, **more: Any
) -> list[Any]:
    more.setdefault("where", str(folder / run))
    return all_well(play(TRAIN, ranks, folder, tree=tree, kind=kind, **more))


@pytest.mark.parametrize(
    ("tree", "kind"),
    [
        ("lightning.fabric", "fully_shard"),
        ("lightning_fabric", "tensor_parallel"),
        ("lightning_fabric", "fsdp"),
        ("lightning_fabric", "fsdp+compiled"),
        ("lightning.fabric", "fully_shard+full"),
        ("lightning.fabric", "fsdp+full"),
        ("lightning_fabric", "ddp"),
    ],
)
def test_a_run_is_as_without_us(tmp_path: Path, tree: str, kind: str) -> None:
    """The same checkpoints, with the same values beside the tensors; and from ours, Fabric goes on as from its own,
    with the plugin or without, and with the plugin from Fabric's.
    """
    ours = _train(tmp_path, "ours", kind, tree)
    theirs = _train(tmp_path, "theirs", kind, tree, ours=False)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["error"] is other["error"] is None
        assert mine["files"] == other["files"] == STEPS
        assert mine["sums"] == other["sums"]
        assert mine["threads"] == []
    one, other = (_rest(tmp_path / run / "step-2") for run in ("ours", "theirs"))
    assert one == other == {"step": 2, "epoch": {"number": 2}, "notes": {"width": 16}}
    for run, with_ours in (("ours", True), ("ours", False), ("theirs", True)):
        where = str(tmp_path / run)
        resumed = _train(tmp_path, "again", kind, tree, ours=with_ours, where=where, resume="step-2")
        for mine, other in zip(resumed, theirs, strict=True):
            assert mine["error"] is None
            assert (mine["began_at"], mine["rest"]) == (2, {})
            assert mine["sums"] == other["sums"]


@pytest.mark.parametrize("kind", ["fully_shard", "fsdp"])
def test_parts_that_are_compiled(tmp_path: Path, kind: str) -> None:
    """A model with a compiled part goes on from its checkpoint, and from that of one without, which Fabric refuses."""
    theirs = _train(tmp_path, "plain", kind, ours=False)
    _train(tmp_path, "compiled", f"{kind}+compiled")
    for run in ("plain", "compiled"):
        where = str(tmp_path / run)
        resumed = _train(tmp_path, "again", f"{kind}+compiled", where=where, resume="step-2")
        for mine, other in zip(resumed, theirs, strict=True):
            assert mine["error"] is None
            sums = {name.replace("_orig_mod.", ""): each for name, each in mine["sums"].items()}
            assert sums == other["sums"]


def _rest(checkpoint: Path) -> Any:
    """Return what is in a checkpoint beside the states of model and optimizer."""
    file = checkpoint / "meta.pt" if checkpoint.is_dir() else checkpoint
    found = torch.load(file, weights_only=True)
    return {key: value for key, value in found.items() if key not in ("model", "optimizer")}


@pytest.mark.parametrize("kind", ["fully_shard", "fully_shard+full", "ddp"])
def test_saves_go_on_in_the_background(tmp_path: Path, kind: str) -> None:
    """With storage whose commits are slow, ``fabric.save`` returns before its checkpoint is there."""
    ranks = _train(
        tmp_path,
        "run",
        kind,
        fault={"operation": "commit", "delay_seconds": 0.5},
        options={"queue_depth": 3},
    )
    assert [told["error"] for told in ranks] == [None, None]
    assert ranks[0]["pending"] >= 3
    assert sum(ranks[0]["saves"]) < ranks[0]["seconds"] - 0.5
    assert ranks[0]["files"] == STEPS


@pytest.mark.parametrize(("rank", "of"), [(0, "storage"), (1, "storage"), (0, "state")])
def test_failure_of_one_rank_is_raised_by_all(tmp_path: Path, rank: int, of: str) -> None:
    """Where storage refuses one rank, or its state cannot be saved, all raise the same, soon, and none is left in
    Fabric's barrier; the checkpoint that failed is not there.
    """
    ranks = _train(tmp_path, "run", "fully_shard", **_fault(rank, of), steps=4)
    for told in ranks:
        assert told["kind"] == "ShardedSaveError"
        assert f"failed for all ranks: rank {rank}: " in told["error"]
        assert told["seconds"] < 30
        assert told["threads"] == []
    assert not (tmp_path / "run" / "step-1" / ".metadata").exists()


@pytest.mark.parametrize(("of", "kind"), [("storage", "PermissionError"), ("state", "UnpicklableStateError")])
def test_failure_of_a_gathered_file_is_raised_by_all(tmp_path: Path, of: str, kind: str) -> None:
    """Only the first rank writes; the others learn of its failure at the next save, and are not left in the barrier."""
    first, second = _train(tmp_path, "run", "fully_shard+full", **_fault(0, of), steps=4)
    assert first["kind"] == kind
    assert second["kind"] == "RankError"
    assert f"rank 0 failed in something that only it does: {kind}" in second["error"]
    assert max(first["seconds"], second["seconds"]) < 30


def _fault(rank: int, of: str) -> dict[str, Any]:
    if of == "state":
        return {"unpicklable": rank}
    return {"fault": {"operation": "commit", "calls": [1], "error": "OSError", "rank": rank}}


def test_bucket_and_another_number_of_ranks(tmp_path: Path, seaweedfs: Server) -> None:
    """On an S3 server, what two ranks have saved is loaded by one, with the plugin; each goes on to the same."""
    where, env = f"s3://{fresh_bucket(seaweedfs)}/run", dict(seaweedfs.environment)
    first = _train(tmp_path, "run", "fully_shard", where=where, env=env)
    assert [told["error"] for told in first] == [None, None]
    assert first[0]["files"] == STEPS
    (alone,) = _train(tmp_path, "run", "fully_shard", ranks=1, where=where, env=env, resume="step-2")
    assert (alone["error"], alone["began_at"]) == (None, 2)
    straight = _train(tmp_path, "straight", "fully_shard", ours=False)
    assert alone["sums"].keys() == straight[0]["sums"].keys()
    with_two = _train(tmp_path, "run", "fully_shard", where=where, env=env, resume="step-2")
    assert [told["sums"] for told in with_two] == [told["sums"] for told in straight]
    missing = _train(tmp_path, "run", "fully_shard", where=where, env=env, resume="step-9")
    assert [told["kind"] for told in missing] == ["IncompleteCheckpointError"] * 2


def test_file_in_place_of_a_directory_and_back(tmp_path: Path) -> None:
    """A gathered file takes the place of a sharded checkpoint of that name, and the other way round, as with Fabric."""
    for kind in ("fully_shard", "fully_shard+full", "fully_shard"):
        ranks = _train(tmp_path, "run", kind, steps=1)
        assert [told["error"] for told in ranks] == [None, None]
        assert (tmp_path / "run" / "step-1").is_dir() == (kind == "fully_shard")
    assert async_ckpt.latest(tmp_path / "run") == tmp_path / "run" / "step-1"


def test_strategy_whose_kind_of_save_changes(tmp_path: Path) -> None:
    """Each save is of the kind that the strategy's settings ask for at that moment, as with Fabric."""
    ranks = _train(tmp_path, "run", "fully_shard", gathered=[2])
    assert [told["error"] for told in ranks] == [None, None]
    assert [(tmp_path / "run" / step).is_dir() for step in STEPS] == [True, False, True]


def test_failed_save_of_all_is_raised_by_all_at_a_save_of_one(tmp_path: Path) -> None:
    """Where the kind of save changes after a failure: no rank is left in Fabric's barrier."""
    gathered = list(range(2, 40))
    ranks = _train(tmp_path, "run", "fully_shard", gathered=gathered, **_fault(1, "storage"), steps=40)
    for told in ranks:
        assert told["kind"] == "ShardedSaveError"
        assert "failed for all ranks: rank 1: " in told["error"]
        assert told["seconds"] < 30
