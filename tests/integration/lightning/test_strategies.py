"""Strategies of several processes, each run by a script of its own kind of launcher; here is what they must show.

Real: Lightning's launchers, process groups of two processes with gloo, DDP, FSDP's and ModelParallel's sharding on
processors, and their saving. ``scripts/strategies.py`` says what FSDP needed to run there.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from async_ckpt.lightning.callback import AsyncCheckpointCallback
from async_ckpt.lightning.plugin import AsyncCheckpointIO
from async_ckpt.lightning.sharded import take_over
from async_ckpt.lightning.strategies import bypass
from tests.support import python

# The runs of one script start several interpreters that import Lightning.
pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(220)]

SCRIPT = Path(__file__).parent / "scripts" / "strategies.py"
RUN_SECONDS = 200.0
FILES = ["epoch=1-step=8.ckpt", "last.ckpt"]
SUBPROCESSES = [
    *("ddp:ours", "ddp:theirs", "model_parallel:ours", "model_parallel:theirs", "fsdp:ours", "fsdp:theirs"),
    *("model_parallel-sharded:ours", "fsdp-sharded:ours", "ddp:broken"),
]
FORKED = ["ddp_notebook:ours", "ddp_notebook:theirs", "ddp_notebook:broken"]


@dataclass(frozen=True)
class Launched:
    """What the runs of one script have left."""

    folder: Path
    records: dict[str, list[dict[str, Any]]]
    stderr: str

    def of(self, kind: str, run: str, **where: Any) -> list[dict[str, Any]]:
        """Return the records of a kind, of a run, that match."""
        return [
            record
            for record in self.records[kind]
            if record["run"] == run and all(record[name] == value for name, value in where.items())
        ]

    def one(self, kind: str, run: str, **where: Any) -> dict[str, Any]:
        """Return the only such record."""
        (record,) = self.of(kind, run, **where)
        return record

    def load(self, run: str, name: str = FILES[0]) -> Any:
        """Load a checkpoint of a run with plain torch."""
        return torch.load(self.folder / run / name, weights_only=True)


def _launch(tree: str, folder: Path, runs: list[str], environment: dict[str, str]) -> Launched:
    """Run the script; the launchers start, and end, what else there is of processes."""
    done = python(SCRIPT, tree, folder, *runs, timeout=RUN_SECONDS, env=environment)
    assert done.returncode == 0, done.stderr
    records = {
        kind: [json.loads(line) for line in (folder / f"{kind}.jsonl").read_text().splitlines()]
        for kind in ("fits", "reports", "saves")
    }
    return Launched(folder, records, done.stderr)


# Both distributions have the same launchers and strategies, and starting new interpreters takes long: one each.


@pytest.fixture(scope="module")
def subprocesses(tmp_path_factory: pytest.TempPathFactory, process_group: dict[str, str]) -> Launched:
    """``strategy="ddp"``, and what else runs the script again for each process."""
    folder = tmp_path_factory.mktemp("subprocesses")
    return _launch("pytorch_lightning", folder, SUBPROCESSES, process_group)


@pytest.fixture(scope="module")
def multiprocessing(tmp_path_factory: pytest.TempPathFactory, process_group: dict[str, str]) -> Launched:
    """``ddp_notebook``, which forks, ``ddp_spawn`` and the fork server."""
    folder = tmp_path_factory.mktemp("multiprocessing")
    runs = [*FORKED, "ddp_spawn:ours", "ddp_forkserver:ours"]
    return _launch("lightning.pytorch", folder, runs, process_group)


def _same(one: Any, other: Any) -> bool:
    """Tell whether two loaded states are equal, bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def _assert_same_training(one: Any, other: Any) -> None:
    """Compare what training makes: all but the callbacks' states, which name the folder."""
    for part in ("state_dict", "optimizer_states", "global_step", "epoch"):
        assert _same(one[part], other[part]), part
    assert one.keys() == other.keys()


# -- the launcher that runs the script again: DDP, FSDP, ModelParallel


@pytest.mark.parametrize("strategy", ["ddp", "model_parallel", "fsdp"])
def test_same_files_as_synchronous(subprocesses: Launched, strategy: str) -> None:
    """DDP, ModelParallel and FSDP with full states leave the files, and the states in them, of synchronous saves."""
    ours, theirs = f"{strategy}:ours", f"{strategy}:theirs"
    assert subprocesses.one("fits", ours, rank=0)["error"] is None
    for run in (ours, theirs):
        assert sorted(path.name for path in (subprocesses.folder / run).iterdir()) == FILES
    for name in FILES:
        _assert_same_training(subprocesses.load(ours, name), subprocesses.load(theirs, name))
    assert subprocesses.load(ours)["global_step"] == 8
    assert subprocesses.load(ours)["state_dict"]["layer.weight"].shape == (2, 8)


@pytest.mark.parametrize("strategy", ["ddp", "model_parallel", "fsdp"])
def test_only_the_first_process_writes(subprocesses: Launched, strategy: str) -> None:
    """Rank 0 has the plugin's threads and saves while training goes on; the other process has neither."""
    run = f"{strategy}:ours"
    names = ["epoch=0-step=4.ckpt", "last.ckpt", "epoch=1-step=8.ckpt", "last.ckpt"]
    assert [save["name"] for save in subprocesses.of("saves", run)] == names
    assert not subprocesses.of("saves", run)[0]["waited"]
    assert subprocesses.one("reports", run, rank=1)["threads"] == []
    assert "async_ckpt-loop" in subprocesses.one("reports", run, rank=0)["threads"]


@pytest.mark.parametrize("strategy", ["ddp", "model_parallel", "fsdp"])
def test_all_is_durable_when_the_strategy_was_torn_down(subprocesses: Launched, strategy: str) -> None:
    """After ``fit`` nothing is pending and no thread is left, though FSDP and ModelParallel tear no plugin down.

    Lightning's environment has deleted ``WORLD_SIZE`` by then.
    """
    run = f"{strategy}:ours"
    report = subprocesses.one("reports", run, rank=0)
    assert report["files"] == FILES
    assert report["world_size"] is None
    assert subprocesses.one("fits", run, rank=0)["threads"] == []


def test_no_collectives_in_our_code(subprocesses: Launched) -> None:
    """Of all collective operations of these trainings, none is called by our package, in no process (L1)."""
    reports = subprocesses.records["reports"]
    assert {report["rank"] for report in reports} == {0, 1}
    assert all(report["collectives"] > 10 for report in reports)
    assert [call for report in reports for call in report["ours"]] == []


def test_error_of_a_save_is_raised_by_the_first_process(subprocesses: Launched) -> None:
    """DDP: where storage refuses, ``fit`` raises the storage's error on rank 0, and no process hangs (E1)."""
    fit = subprocesses.one("fits", "ddp:broken", rank=0)
    assert "StoreError: the disk is full" in fit["error"]
    assert "RankError" not in fit["error"]
    assert list((subprocesses.folder / "ddp:broken").iterdir()) == []


@pytest.mark.parametrize("strategy", ["model_parallel-sharded", "fsdp-sharded"])
def test_sharded_checkpoints_are_asynchronous(subprocesses: Launched, strategy: str) -> None:
    """Each process saves its share, and goes on before the checkpoint is there; nobody is warned of anything."""
    run = f"{strategy}:ours"
    saves = subprocesses.of("saves", run)
    names = ["epoch=0-step=4.ckpt", "last.ckpt", "epoch=1-step=8.ckpt", "last.ckpt"]
    assert sorted(save["name"] for save in saves) == sorted(2 * names)
    assert [save["waited"] for save in saves if save["name"] == names[0]] == [False, False]
    for rank in (0, 1):
        assert subprocesses.one("fits", run, rank=rank)["warnings"] == []
        assert subprocesses.one("fits", run, rank=rank)["threads"] == []


@pytest.mark.parametrize("strategy", ["model_parallel-sharded", "fsdp-sharded"])
def test_removals_of_sharded_checkpoints_go_through_the_plugin(subprocesses: Launched, strategy: str) -> None:
    """The directory that ``save_top_k`` removes is gone after ``fit``; the newest one is whole."""
    folder = subprocesses.folder / f"{strategy}:ours"
    assert subprocesses.one("fits", f"{strategy}:ours", rank=0)["error"] is None
    assert sorted(path.name for path in folder.iterdir()) == FILES
    kept = [path.name for path in (folder / FILES[0]).iterdir()]
    assert sorted(name.partition(".")[0] for name in kept) == ["", "__0_0", "__1_0", "meta"]


# -- the launchers that fork or spawn


def _launchers(launched: Launched) -> list[str]:
    return sorted({record["run"] for record in launched.records["fits"] if record["run"].endswith(":ours")})


def test_forked_and_spawned_trainings_leave_the_same_files(multiprocessing: Launched) -> None:
    """``ddp_notebook``, ``ddp_spawn`` and the fork server leave the files of synchronous saves, and their states.

    But for weights from the fork server, where Lightning has both processes train the same memory.
    """
    theirs = multiprocessing.load("ddp_notebook:theirs")
    assert len(_launchers(multiprocessing)) == 3
    for run in _launchers(multiprocessing):
        assert sorted(path.name for path in (multiprocessing.folder / run).iterdir()) == FILES
        if run.startswith("ddp_forkserver"):
            assert multiprocessing.load(run)["global_step"] == 8
        else:
            _assert_same_training(multiprocessing.load(run), theirs)


def test_all_is_durable_before_the_child_ends(multiprocessing: Launched) -> None:
    """``atexit`` does not run in forked and served children: what they saved is durable after their teardown."""
    for run in _launchers(multiprocessing):
        assert multiprocessing.one("reports", run, rank=0)["files"] == FILES
        assert multiprocessing.one("reports", run, rank=1)["threads"] == []


def test_weights_come_back_through_a_synchronous_save(multiprocessing: Launched) -> None:
    """``.temp.ckpt``, which carries the weights to the parent, is there when its save returns; others are not yet.

    The parent has the trained weights then, and no thread of ours.
    """
    for run in _launchers(multiprocessing):
        waited = {save["name"]: save["waited"] for save in multiprocessing.of("saves", run)}
        assert waited["epoch=0-step=4.ckpt"] is False
        assert waited[".temp.ckpt"] is True
        fit = multiprocessing.one("fits", run)
        assert fit["threads"] == []
        if not run.startswith("ddp_forkserver"):
            saved = multiprocessing.load(run, "last.ckpt")["state_dict"]["layer.weight"]
            assert saved.tolist() == fit["weight"]


def test_parent_finds_what_its_children_have_saved(multiprocessing: Launched) -> None:
    """When ``fit`` returns in the process that has launched others, the best checkpoint is there; and what is saved by
    hand there is, as soon as ``trainer.save_checkpoint`` returns.
    """
    for run in _launchers(multiprocessing):
        fit = multiprocessing.one("fits", run)
        assert (fit["best"], fit["best_exists"]) == (FILES[0], True)
        assert fit["by_hand"] == fit["weight"]


def test_error_of_a_save_in_a_child_reaches_the_parent(multiprocessing: Launched) -> None:
    """A save that fails in a child ends ``fit`` in the parent with an error that says why (E1)."""
    fit = multiprocessing.one("fits", "ddp_notebook:broken")
    assert "ProcessRaisedException" in fit["error"]
    assert "StoreError: the disk is full" in fit["error"]
    assert list((multiprocessing.folder / "ddp_notebook:broken").iterdir()) == []


def test_no_collectives_in_our_code_in_children(multiprocessing: Launched) -> None:
    """In forked, spawned and served processes neither (L1)."""
    reports = multiprocessing.records["reports"]
    assert all(report["collectives"] > 10 for report in reports)
    assert [call for report in reports for call in report["ours"]] == []


# -- DeepSpeed


def test_deepspeed_bypasses_the_plugin(tree: Any, tmp_path: Path) -> None:
    """A strategy that is DeepSpeed's by name, and writes for itself: one warning in two fits, and no save of ours.

    A stand-in, because DeepSpeed trains on CUDA only and Lightning's class refuses to be made without it.
    """
    saved: list[Path] = []

    class DeepSpeedStrategy(tree.module("strategies").SingleDeviceStrategy):  # type: ignore[misc]
        def save_checkpoint(self, checkpoint: Any, filepath: Any, storage_options: Any = None) -> None:
            saved.append(Path(filepath))

    plugin = AsyncCheckpointIO()
    strategy = DeepSpeedStrategy("cpu", checkpoint_io=plugin)
    checkpoint = tree.checkpoints(tmp_path, save_top_k=-1)
    callback = AsyncCheckpointCallback()
    trainer = tree.trainer(tmp_path, strategy=strategy, callbacks=[callback, checkpoint])
    with pytest.warns(UserWarning, match="without any CheckpointIO") as warned:
        _fit_twice(trainer, tree.model())
    assert len([each for each in warned if "AsyncCheckpointIO" in str(each.message)]) == 1
    assert [path.name for path in saved] == ["epoch=0-step=4.ckpt", "epoch=1-step=8.ckpt"]
    assert not plugin.is_used


def _fit_twice(trainer: Any, model: Any) -> None:
    trainer.fit(model)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model)


def test_lightnings_own_deepspeed_strategy_is_known(tree: Any) -> None:
    """What tells of the bypass recognises Lightning's class itself, and what derives from it."""
    real = tree.module("strategies").DeepSpeedStrategy
    for kind in (real, type("Mine", (real,), {})):
        advice = bypass(object.__new__(kind))
        assert advice is not None
        assert kind.__name__ in advice
        assert "DDPStrategy" in advice


# -- which strategies' methods are replaced


@pytest.mark.parametrize("name", ["FSDPStrategy", "ModelParallelStrategy"])
def test_sharded_strategies_are_taken_over(tree: Any, name: str) -> None:
    """Lightning's own are, once, for as long as they are; a copy has Lightning's methods, and no advice is due."""
    strategy, plugin = _sharded(tree, name), AsyncCheckpointIO()
    before = dict(vars(strategy))
    take_over(strategy, plugin)
    taken = dict(vars(strategy))
    assert taken.keys() - before.keys() >= {"save_checkpoint", "load_checkpoint"}
    take_over(strategy, plugin)
    assert vars(strategy) == taken
    assert bypass(strategy) is None
    copied = copy.deepcopy(strategy)
    assert copied.save_checkpoint.__func__ is type(strategy).save_checkpoint
    assert copied.save_checkpoint.__self__ is copied
    other = AsyncCheckpointIO()
    take_over(strategy, other)
    assert strategy.save_checkpoint.by is other


@pytest.mark.parametrize("name", ["FSDPStrategy", "ModelParallelStrategy"])
def test_strategies_that_go_on_to_save_themselves(tree: Any, name: str) -> None:
    """One with a save_checkpoint of its own does, and any where each rank would decide which save to drop: advice is
    due. One whose checkpoints are single files is none of these.
    """

    def save_checkpoint(self: Any, *args: Any) -> None:
        raise AssertionError("nobody calls it")

    for own, options in (({"save_checkpoint": save_checkpoint}, {}), ({}, {"overflow": "supersede"})):
        strategy = _sharded(tree, name, **own)
        before = dict(vars(strategy))
        take_over(strategy, AsyncCheckpointIO(**options))
        assert vars(strategy) == before
        assert f"Lightning's {name}" in (bypass(strategy) or "")
    full = tree.module("strategies").ModelParallelStrategy(save_distributed_checkpoint=False)
    take_over(full, AsyncCheckpointIO())
    assert "save_checkpoint" not in vars(full)
    assert bypass(full) is None


def _sharded(tree: Any, name: str, **own: Any) -> Any:
    kind = getattr(tree.module("strategies"), name)
    options = {"state_dict_type": "sharded"} if name == "FSDPStrategy" else {}
    return type(name, (kind,), own)(**options) if own else kind(**options)
