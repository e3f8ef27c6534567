"""Where Lightning's own code takes what a user gives for a place: pathlib's remains of a URL, and a UPath."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import fsspec
import pytest

from async_ckpt import AsyncCheckpointCallback, AsyncCheckpointIO, OptionError

pytestmark = pytest.mark.integration


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize(
    ("dirpath", "works"),
    [
        (Path("hdfs://nn/run"), "'hdfs://nn/run/"),
        (Path("s3://b"), "'s3://b/"),
        ("file:///data/run", "'/data/run/"),
    ],
)
def test_a_directory_that_was_a_url(
    tree: Any, here: Path, companion: bool, dirpath: Any, works: str, with_base: bool
) -> None:
    """ModelCheckpoint makes it absolute; it is refused, with the companion before the first batch, and not made."""
    base = tree.module("plugins.io").TorchCheckpointIO() if with_base else None
    steps: list[int] = []

    class Counts(tree.pl.Callback):  # type: ignore[misc]  # a base that is found at run time
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            steps.append(batch_idx)

    callbacks = [Counts(), tree.checkpoints(dirpath), *([AsyncCheckpointCallback()] if companion else [])]
    trainer = tree.trainer(here, plugins=[AsyncCheckpointIO(base)], callbacks=callbacks)
    with pytest.raises(OptionError, match="lost a slash") as told:
        trainer.fit(tree.model())
    assert works in str(told.value)
    assert bool(steps) is not companion
    assert not os.listdir(here)


def test_one_that_saves_nothing_is_nobodys_business(tree: Any, here: Path) -> None:
    """A ModelCheckpoint that is switched off may name any directory."""
    callbacks = [tree.checkpoints(Path("hdfs://nn/run"), save_top_k=0), AsyncCheckpointCallback()]
    tree.trainer(here, plugins=[AsyncCheckpointIO()], callbacks=callbacks).fit(tree.model())
    assert not os.listdir(here)


def test_a_root_that_was_a_url(tree: Any, here: Path) -> None:
    """So is a checkpoint below a ``default_root_dir`` that was one, and a path for ``save_checkpoint`` and ``fit``."""
    given = Path("memory://run/a.ckpt")
    trainer = tree.trainer(
        Path("hdfs://nn/run"), plugins=[AsyncCheckpointIO()], callbacks=[tree.checkpoints(None)]
    )
    with pytest.raises(OptionError, match="'hdfs://nn/run/"):
        trainer.fit(tree.model())
    trainer = tree.trainer(here, plugins=[AsyncCheckpointIO()])
    trainer.fit(tree.model())
    for call in (trainer.save_checkpoint, lambda path: trainer.fit(tree.model(), ckpt_path=path)):
        with pytest.raises(OptionError, match=r"'memory://run/a\.ckpt'"):
            call(given)
    trainer.strategy.checkpoint_io.teardown()
    assert not os.listdir(here)


@pytest.mark.filterwarnings("ignore:`weights_only` was not set")
def test_a_upath(tree: Any, here: Path) -> None:
    """The Trainer and Fabric save to a UPath and load from it."""
    place = pytest.importorskip("upath").UPath("memory://places") / f"{tree.pl.__name__}.ckpt"
    trainer = tree.trainer(here, plugins=[AsyncCheckpointIO()])
    trainer.fit(tree.model())
    trainer.save_checkpoint(place)
    trainer.strategy.checkpoint_io.teardown()
    again = tree.trainer(here, plugins=[AsyncCheckpointIO()], max_epochs=2)
    again.fit(tree.model(), ckpt_path=place)
    assert again.current_epoch == 2
    assert again.global_step == 2 * trainer.global_step
    fabric = tree.fabric.Fabric(accelerator="cpu", devices=1, plugins=[plugin := AsyncCheckpointIO()])
    fabric.save(place, {"step": 3})
    assert fabric.load(place) == {"step": 3}
    plugin.remove_checkpoint(place)
    plugin.teardown()
    assert not fsspec.filesystem("memory").exists(str(place))
    assert not os.listdir(here)
