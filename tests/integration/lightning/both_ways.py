"""A training to be run both ways: with our plugin on slow storage, and with synchronous checkpoints.

Both runs begin alike and write to the same folder, one after the other, so that their files can be compared as a
whole: names, links, and each record's bytes, the paths that callbacks remember in them included.
"""

from __future__ import annotations

import inspect
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from async_ckpt import AsyncCheckpointCallback, AsyncCheckpointIO

#: What the modules have as their ``pytestmark``; the warnings are Lightning's advice, which they cannot take.
BOTH_WAYS = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
    pytest.mark.filterwarnings("ignore:.?.fit.ckpt_path="),
    pytest.mark.filterwarnings("ignore:Swapping scheduler"),
    pytest.mark.filterwarnings("ignore:You.re resuming from a checkpoint that ended before the epoch"),
]
#: The two distributions have the same code here; where that decides nothing, one is enough.
ONE_TREE = pytest.mark.parametrize("tree", ["pytorch_lightning"], indirect=True)
#: For what the plugin alone cannot do.
WITH_CALLBACK = pytest.mark.parametrize("companion", [True], indirect=True, ids=["with callback"])

SLOW_SECONDS = 0.05
LOSSES = (0.3, 0.1, 0.2, 0.4)

Callbacks = Callable[[Any, Path], "list[Any]"]


class Breaks(Exception):
    """The training's own error."""


def validation_step(self: Any, batch: Any, batch_idx: int) -> None:
    """Log the loss of this epoch."""
    self.log("val_loss", torch.tensor(LOSSES[self.current_epoch % 4]))
    self.log("val/loss", torch.tensor(LOSSES[self.current_epoch % 4]))


def breaking_step(self: Any, batch: Any, batch_idx: int) -> Any:
    """Break at step 6."""
    if self.global_step == 6:
        raise Breaks
    return self.layer(batch[0]).pow(2).mean()


def contents(folder: Path) -> dict[str, Any]:
    """Return what a folder holds: each file's records, each link's target."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.suffix == ".ckpt":
            with zipfile.ZipFile(path) as archive:
                found[name] = {
                    record.partition("/")[2]: archive.read(record) for record in archive.namelist()
                }
    return found


class Both:
    """Runs a training twice in the same folder: with synchronous checkpoints, and with ours on slow storage."""

    def __init__(self, tree: Any, root: Path, faults: Any, companion: bool) -> None:
        self.folder = root / "run"
        self._tree = tree
        self._kept = root / "synchronous"
        self._companion = companion
        self._faults = faults
        faults.slow(SLOW_SECONDS)

    def run(self, train: Callable[[dict[str, Any]], Any]) -> tuple[Any, Any]:
        """Call *train* twice, with what its Trainers need; compare the files; return what it returned."""
        expected = train({"plugins": [], "callbacks": []})
        self.folder.rename(self._kept)
        plugin = AsyncCheckpointIO(store_factory=self._faults.make, queue_depth=4)
        actual = train(
            {"plugins": [plugin], "callbacks": [AsyncCheckpointCallback()] if self._companion else []}
        )
        assert contents(self.folder) == contents(self._kept)
        return expected, actual

    def fit(self, callbacks: Callbacks, *, resume: str | None = None, **model: Any) -> dict[str, Any]:
        """Train for four epochs with these callbacks, both ways; return the files."""

        def train(options: dict[str, Any]) -> Any:
            module = self._tree.model(**{"validation_step": validation_step, **model})
            is_ours = bool(options["plugins"])
            for epochs, path in ((2, None), (4, resume)) if resume else ((4, None),):
                own = callbacks(self._tree, self.folder)
                if not is_ours:
                    own = [sparing(each) if hasattr(each, "_link_checkpoint") else each for each in own]
                trainer = self._tree.trainer(
                    self.folder,
                    max_epochs=epochs,
                    plugins=options["plugins"],
                    callbacks=[*own, *options["callbacks"]],
                )
                try:
                    trainer.fit(module, ckpt_path=path)
                except Breaks:
                    pass
            return module.state_dict()

        expected, actual = self.run(train)
        for name, weight in expected.items():
            assert torch.equal(actual[name], weight)
        return contents(self.folder)


def sparing(checkpoint: Any) -> Any:
    """Return a ModelCheckpoint that links none of its files to itself, as before Lightning 2.6, where that loses it.

    One that has a method of its own is waited for by ours, so this is for the synchronous run alone.
    """
    link = checkpoint._link_checkpoint

    def link_checkpoint(trainer: Any, filepath: str, linkpath: str) -> None:
        if os.path.abspath(filepath) != os.path.abspath(linkpath):
            link(trainer, filepath, linkpath)

    checkpoint._link_checkpoint = link_checkpoint
    return checkpoint


def saving(*options: dict[str, Any]) -> Callbacks:
    """Return ModelCheckpoints with these options."""

    def callbacks(tree: Any, folder: Path) -> list[Any]:
        known = inspect.signature(tree.pl.callbacks.ModelCheckpoint).parameters
        for name in {name for each in options for name in each} - known.keys():
            pytest.skip(f"this Lightning's ModelCheckpoint has no {name}")
        return [tree.checkpoints(folder / "ckpt", **each) for each in options]

    return callbacks
