"""Any set-up of ``ModelCheckpoint`` leaves what it leaves with synchronous checkpoints."""

from __future__ import annotations

import io
import os
import pprint
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.lightning.both_ways import BOTH_WAYS, ONE_TREE
from tests.integration.lightning.running import STORAGES, Ours, Run, Synchronous
from tests.integration.lightning.setups import Fit, Program, Save, random_program

pytestmark = [*BOTH_WAYS, pytest.mark.filterwarnings("ignore")]  # what Lightning thinks of such set-ups

SEEDS = 800 if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else 48
ABSENT = "absent"


@pytest.fixture(scope="module")
def made() -> dict[Any, bytes]:
    """What ``_pretrained`` has made already."""
    return {}


def _pretrained(tree: Any, made: dict[Any, bytes]) -> bytes:
    """Return the checkpoint of another run, the same one for all programs."""
    if tree not in made:
        with tempfile.TemporaryDirectory() as folder:
            program = (Fit(epochs=1, scores=(0.25,)), Save(name="a/last.ckpt", weights_only=False))
            made[tree] = Run(tree, Path(folder) / "run", Synchronous(), b"").play(program)[-1]["a/last.ckpt"]
    return made[tree]


def differences(tree: Any, folder: Path, program: Program, way: Ours, pretrained: bytes) -> list[str]:
    """Run *program* with synchronous checkpoints, then *way*, in the same folder; return how they differ first."""
    expected = Run(tree, folder / "run", Synchronous(), pretrained).play(program)
    (folder / "run").rename(folder / "synchronous")
    actual = Run(tree, folder / "run", way, pretrained).play(program)
    for number, (before, after) in enumerate(zip(expected, actual, strict=True)):
        values = {name: (before.get(name, ABSENT), after.get(name, ABSENT)) for name in {**before, **after}}
        differing = {name: pair for name, pair in values.items() if not _is_same(*pair)}
        if differing:
            return [f"step {number}: {name}: {_said(a)} != {_said(b)}" for name, (a, b) in differing.items()]
    return []


def _is_same(one: Any, other: Any) -> bool:
    """Compare values, tensors and NaNs in them, and files by what they hold."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one.nan_to_num(), other.nan_to_num())
    if isinstance(one, dict):
        return list(one) == list(other) and all(_is_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_is_same, one, other))
    if isinstance(one, bytes) and one != other:
        return _is_same(_loaded(one), _loaded(other))
    return bool(one == other or (one != one and other != other))


def _loaded(file: bytes) -> Any:
    return torch.load(io.BytesIO(file), weights_only=False)


def _said(value: Any) -> str:
    if isinstance(value, bytes):
        loaded = _loaded(value)
        value = {name: loaded.get(name) for name in ("epoch", "global_step", "callbacks")}
    return repr(value)


@ONE_TREE
@pytest.mark.parametrize("seed", range(SEEDS))
def test_any_setup(
    tree: Any, seed: int, tmp_path: Path, made: dict[Any, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names, links, every tensor, the callbacks' states and what ``ckpt_path`` finds are those of a synchronous run."""
    # Lightning's own writer writes through a link where its temporary file is of another file system.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    program = random_program(seed)
    way = Ours(STORAGES[seed % 4], base=seed // 4 % 2 == 1)
    found = differences(tree, tmp_path, program, way, _pretrained(tree, made))
    assert not found, pprint.pformat(program)
