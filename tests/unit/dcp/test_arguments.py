"""torch's arguments: all of them are known here, and none is passed over."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.checkpoint import staging, state_dict_saver

import async_ckpt.dcp as dcp
from async_ckpt import OptionError
from tests.integration.sharded.torch_names import ALONE

FUNCTIONS = ["save", "async_save", "load"]


def parameters(function: Any) -> dict[str, inspect.Parameter]:
    """Return the parameters of *function*, or of what it wraps."""
    return dict(inspect.signature(inspect.unwrap(function)).parameters)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_of_torch_is_known(name: str) -> None:
    """What torch's function takes, ours takes by the same name and in the same way, with the same default."""
    theirs, ours = parameters(getattr(torch_dcp, name)), parameters(getattr(dcp, name))
    for argument, parameter in theirs.items():
        assert argument in ours, f"torch {torch.__version__} has a new argument of {name}"
        assert (ours[argument].kind, ours[argument].default) == (parameter.kind, parameter.default)


def test_every_name_of_torch_is_known() -> None:
    """What a program gets from ``torch.distributed.checkpoint``, it gets here; but for what is of another kind."""
    elsewhere = {
        "HuggingFaceStorageReader",
        "HuggingFaceStorageWriter",
        "QuantizedHuggingFaceStorageReader",
        "load_sharded_optimizer_state_dict",
        "load_state_dict",  # deprecated
        "save_state_dict",  # deprecated
    }
    names = {
        name
        for name, value in vars(torch_dcp).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert names - elsewhere <= set(dcp.__all__)


class Planner(torch_dcp.DefaultSavePlanner):
    """One of the program's own."""


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no place": ({}, "checkpoint_id"),
    "an empty place": ({"checkpoint_id": ""}, "checkpoint_id"),
    "a planner of its own": ({"planner": Planner()}, "torch.distributed.checkpoint's own function"),
    "a planner that nests": (
        {"planner": torch_dcp.DefaultSavePlanner(flatten_state_dict=False)},
        "flatten_state_dict=True is supported",
    ),
    "a planner that has one rank write": (
        {"planner": torch_dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True)},
        "dedup_save_to_lowest_rank=False is supported",
    ),
    "checkpoints of each rank": ({"use_collectives": False}, "no_dist=True"),
}


@pytest.mark.parametrize("function", [dcp.save, dcp.async_save])
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_honoured_is_refused(function: Any, case: str, tmp_path: Path) -> None:
    """The error says what to do instead; nothing is written."""
    arguments, advice = REFUSED[case]
    with pytest.raises(OptionError, match=advice):
        function({"step": 1}, **{"checkpoint_id": tmp_path / "it", **arguments} if arguments else {})
    assert list(tmp_path.iterdir()) == []


def test_a_foreign_storage_writer_is_refused(tmp_path: Path) -> None:
    """The error says what to give in its place."""
    writer = torch_dcp.FileSystemWriter(tmp_path / "it")
    with pytest.raises(OptionError, match=r"FileSystemWriter.*as checkpoint_id"):
        dcp.save({"step": 1}, storage_writer=writer)
    assert list(tmp_path.iterdir()) == []


def test_a_foreign_storage_reader_is_refused(tmp_path: Path) -> None:
    """The error says what to give in its place."""
    dcp.save({"step": 1}, checkpoint_id=tmp_path / "it")
    dcp.close()
    reader = torch_dcp.FileSystemReader(tmp_path / "it")
    with pytest.raises(OptionError, match=r"FileSystemReader.*as checkpoint_id"):
        dcp.load({"step": 0}, storage_reader=reader)


@pytest.mark.skipif(not hasattr(state_dict_saver, "AsyncCheckpointerType"), reason="torch has one kind only")
def test_another_process_is_refused(tmp_path: Path) -> None:
    """``AsyncCheckpointerType.PROCESS`` would be passed over."""
    kind = state_dict_saver.AsyncCheckpointerType.PROCESS
    with pytest.raises(OptionError, match="no second process"):
        dcp.async_save({"step": 1}, checkpoint_id=tmp_path / "it", async_checkpointer_type=kind)


def test_a_foreign_stager_is_refused(tmp_path: Path) -> None:
    """An ``async_stager`` of torch's would be passed over."""
    stager = staging.BlockingAsyncStager()
    with pytest.raises(OptionError, match="BlockingAsyncStager"):
        dcp.async_save({"step": 1}, checkpoint_id=tmp_path / "it", async_stager=stager)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # as torch's own load says
def test_the_usual_planner_is_honoured(tmp_path: Path) -> None:
    """What torch's own planner does by default is what is done here; how it caches plans makes no difference."""
    dcp.save(
        {"step": 1},
        checkpoint_id=tmp_path / "it",
        planner=torch_dcp.DefaultSavePlanner(enable_plan_caching=True),
    )
    dcp.close()
    loaded = {"step": 0}
    torch_dcp.load(loaded, checkpoint_id=tmp_path / "it", **ALONE)
    assert loaded == {"step": 1}


def test_configure_checks_its_options() -> None:
    """An option that cannot work is refused at once."""
    with pytest.raises(OptionError, match="queue_depth"):
        dcp.configure(queue_depth=0)
    with pytest.raises(OptionError, match="unknown option 'depth'"):
        dcp.configure(depth=1)
