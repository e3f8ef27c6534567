"""Lightning's strategies of which every rank saves its share, in two real processes, with both Lightnings."""

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

preload("lightning_scenes")

TRAIN = "lightning_scenes.train"
BOTH = ["epoch=1-step=8.ckpt", "last.ckpt"]


def _train(folder: Path, run: str, tree: str = "lightning.pytorch", **arguments: Any) -> list[Any]:
    arguments.setdefault("kind", "fully_shard")
    arguments.setdefault("where", str(folder / run))
    return all_well(play(TRAIN, 2, folder, tree=tree, **arguments))


@pytest.mark.parametrize(
    ("tree", "kind"),
    [
        ("lightning.pytorch", "fully_shard"),
        ("pytorch_lightning", "tensor_parallel"),
        ("pytorch_lightning", "fsdp"),
        ("lightning.pytorch", "fsdp+compiled"),
    ],
)
def test_training_is_as_with_synchronous_saves(tmp_path: Path, tree: str, kind: str) -> None:
    """The same directories, of the same ``meta.pt``, and the same training when it is resumed: with our plugin, and by
    a Trainer without it.
    """
    ours = _train(tmp_path, "ours", tree, kind=kind)
    theirs = _train(tmp_path, "theirs", tree, kind=kind, ours=False)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["error"] is None
        assert mine["warnings"] == []
        assert mine["files"] == other["files"] == BOTH
        assert mine["sums"] == other["sums"]
        assert (mine["step"], mine["sum"]) == (8, 2.0)
        assert mine["threads"] == []
    for name in BOTH:
        one, other = (_meta(tmp_path / run / name) for run in ("ours", "theirs"))
        one.pop("callbacks"), other.pop("callbacks")  # which name the folder
        assert one == other
        assert one["hyper_parameters"] == {"width": 16}
        assert one["mine"] == one["global_step"] == 8
    go_on = {"epochs": 3, "kind": kind}
    straight = _train(tmp_path, "straight", tree, ours=False, **go_on)
    for run, with_ours in (("ours", True), ("ours", False), ("theirs", True)):
        resume = str(tmp_path / run / BOTH[0])
        resumed = _train(tmp_path, f"{run} {with_ours}", tree, ours=with_ours, resume=resume, **go_on)
        for mine, other in zip(resumed, straight, strict=True):
            assert mine["error"] is None
            assert mine["began_at"] == 8
            assert mine["sums"] == other["sums"]


def _meta(directory: Path) -> Any:
    return torch.load(directory / "meta.pt", weights_only=True)


def test_saves_go_on_in_the_background(tmp_path: Path) -> None:
    """With storage whose commits are slow, training goes on meanwhile; what ``save_top_k`` drops is gone after ``fit``,
    and what ``save_last="link"`` leads to is there (D3).
    """
    ranks = _train(
        tmp_path,
        "run",
        operation="commit",
        delay_seconds=0.4,
        epochs=3,
        checkpoint={"save_last": "link", "save_top_k": 1},
    )
    for told in ranks:
        assert told["error"] is None
        assert told["files"] == ["epoch=2-step=12.ckpt", "last.ckpt"]
        assert told["pending"][0] == [4]
    assert (tmp_path / "run" / "last.ckpt").readlink() == Path("epoch=2-step=12.ckpt")
    assert _meta(tmp_path / "run" / "last.ckpt")["global_step"] == 12


@pytest.mark.parametrize("rank", [0, 1])
def test_failure_of_one_rank_is_raised_by_all(tmp_path: Path, rank: int) -> None:
    """Where storage refuses one rank, ``fit`` raises the same error on both, soon, and the process group works (E4)."""
    ranks = _train(tmp_path, "run", operation="commit", calls=[1], error="OSError", rank=rank, epochs=3)
    for told in ranks:
        assert told["kind"] == "ShardedSaveError"
        assert f"failed for all ranks: rank {rank}: PermissionError" in told["error"]
        assert told["sum"] == 2.0
        assert told["seconds"] < 30
        assert told["threads"] == []
    assert not (tmp_path / "run" / "epoch=0-step=4.ckpt" / ".metadata").exists()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("epochs", [1, 3])
def test_state_of_one_rank_that_cannot_be_saved(tmp_path: Path, rank: int, epochs: int) -> None:
    """It fails the save on both ranks, and both raise the same: at the next save, or at the end. The one that knows at
    once goes with the other into Lightning's barrier, which is not a place to wait for it.
    """
    ranks = _train(tmp_path, "run", unpicklable=rank, epochs=epochs, checkpoint={"save_top_k": -1})
    for told in ranks:
        assert told["kind"] == "ShardedSaveError"
        assert f"failed for all ranks: rank {rank}: UnpicklableStateError" in told["error"]
        assert told["sum"] == 2.0
        assert told["step"] == (4 if epochs == 1 else 8)
        assert told["seconds"] < 30
        assert told["threads"] == []
    assert not (tmp_path / "run" / "epoch=0-step=4.ckpt" / ".metadata").exists()


def test_failure_of_the_last_save_is_raised_by_all(tmp_path: Path) -> None:
    """So does it where there is no later save: at the end of training."""
    ranks = _train(
        tmp_path, "run", operation="commit", calls=[1], error="OSError", rank=1, epochs=1, checkpoint={}
    )
    assert [told["kind"] for told in ranks] == ["ShardedSaveError"] * 2
    assert [told["sum"] for told in ranks] == [2.0, 2.0]


def test_training_goes_on_where_a_rank_was_killed(tmp_path: Path) -> None:
    """A rank is killed as it writes its share: the other ends within the bound, and the newest complete checkpoint
    resumes to what an uninterrupted training comes to.
    """
    options = {"silence_timeout": 3.0, "agreement_timeout": 6.0}
    arguments = {"kind": "fully_shard", "where": str(tmp_path / "run"), "epochs": 3, "options": options}
    arguments |= {"checkpoint": {"save_top_k": -1}}
    first, second = play(
        TRAIN,
        2,
        tmp_path,
        env={"GROUP_SECONDS": "25"},  # gloo does not always see that the other process has gone
        tree="lightning.pytorch",
        operation="commit",
        calls=[2],
        error="crash",
        rank=1,
        **arguments,
    )
    assert second.was_killed
    assert first.code == 0, first.output[-4000:]
    assert first.told["error"] is not None
    assert first.told["seconds"] < 45
    newest = async_ckpt.latest(str(tmp_path / "run"))
    assert newest == str(tmp_path / "run" / "epoch=0-step=4.ckpt")
    resumed = all_well(play(TRAIN, 2, tmp_path, tree="lightning.pytorch", resume=newest, **arguments))
    straight = _train(tmp_path, "straight", epochs=3, ours=False)
    assert [told["began_at"] for told in resumed] == [4, 4]
    assert [told["sums"] for told in resumed] == [told["sums"] for told in straight]
    for file in tmp_path.rglob(".async_ckpt*"):  # the next save there would have swept it
        file.unlink()


def test_directory_in_place_of_a_file(tmp_path: Path) -> None:
    """Where a plain checkpoint, or a link to another directory, has the name, the directory takes its place; what the
    link led to stays as it is.
    """
    run = tmp_path / "run"
    (run / "other").mkdir(parents=True)
    (run / "last.ckpt").write_bytes(b"plain")
    (run / "by-hand.ckpt").symlink_to("other")
    ranks = _train(
        tmp_path,
        "run",
        checkpoint={"save_last": True, "enable_version_counter": False},
        by_hand=str(run / "by-hand.ckpt"),
    )
    for told in ranks:
        assert told["error"] is None
        assert ".metadata" in told["by hand"]
    assert _meta(run / "last.ckpt")["global_step"] == 8
    assert not (run / "by-hand.ckpt").is_symlink()
    assert list((run / "other").iterdir()) == []


def test_checkpoints_in_a_bucket(tmp_path: Path, seaweedfs: Server) -> None:
    """On an S3 server, ``save_top_k`` and ``save_last`` leave what they leave on a disk, and ``ckpt_path="last"``
    resumes to what an uninterrupted training comes to.
    """
    where, env = f"s3://{fresh_bucket(seaweedfs)}/run", dict(seaweedfs.environment)

    def fit(**arguments: Any) -> list[Any]:
        return all_well(play(TRAIN, 2, tmp_path, env=env, tree="lightning.pytorch", **arguments))

    first = fit(kind="fully_shard", where=where)
    assert [told["error"] for told in first] == [None, None]
    assert first[0]["files"] == [name for name in BOTH for _ in range(4)]
    resumed = fit(kind="fully_shard", where=where, resume="last", epochs=3)
    assert [told["error"] for told in resumed] == [None, None]
    assert [told["began_at"] for told in resumed] == [8, 8]
    straight = _train(tmp_path, "straight", epochs=3, ours=False)
    assert [told["sums"] for told in resumed] == [told["sums"] for told in straight]


def test_resume_where_a_process_was_killed_before_the_last_file(tmp_path: Path) -> None:
    """A checkpoint without its ``meta.pt`` is whole: what that held is in it. A torn one is passed over."""
    _train(tmp_path, "run")
    run = tmp_path / "run"
    (run / "last.ckpt" / "meta.pt").unlink()
    (run / "last-v1.ckpt").mkdir()
    (run / "last-v1.ckpt" / "__0_0.torn.distcp").write_bytes(b"torn")
    resumed = _train(tmp_path, "run", resume="last", epochs=3)
    assert [told["error"] for told in resumed] == [None, None]
    assert [told["began_at"] for told in resumed] == [8, 8]
