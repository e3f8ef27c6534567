"""``ModelCheckpoint``, and checkpoint callbacks of the user's own, leave the files of a synchronous run."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.integration.lightning.both_ways import (
    BOTH_WAYS,
    ONE_TREE,
    WITH_CALLBACK,
    Both,
    breaking_step,
    saving,
)

pytestmark = BOTH_WAYS

MATRIX: dict[str, list[dict[str, Any]]] = {
    "highest three": [{"monitor": "val_loss", "mode": "max", "save_top_k": 3, "save_last": True}],
    "link to the newest": [{"save_last": "link"}],
    "every second epoch": [{"every_n_epochs": 2, "save_top_k": -1}],
    "at the end of training epochs": [{"save_on_train_epoch_end": True, "save_top_k": -1}],
    "after validation": [{"save_on_train_epoch_end": False, "save_top_k": 2, "monitor": "val_loss"}],
    "every 3 steps, newest two": [
        {"every_n_train_steps": 3, "save_top_k": 2, "monitor": "step", "mode": "max"}
    ],
    "by time": [{"train_time_interval": timedelta(microseconds=1), "save_top_k": -1, "save_last": True}],
    "weights only": [{"save_weights_only": True, "save_top_k": 2, "monitor": "val_loss", "save_last": True}],
    "folders in the name": [
        {"filename": "of-{epoch}/{val/loss:.2f}", "auto_insert_metric_name": False, "save_top_k": -1}
    ],
    "one name": [{"filename": "same", "enable_version_counter": False, "save_last": True}],
    "two at once": [
        {"monitor": "val_loss", "filename": "best-{epoch}", "save_last": True},
        {"every_n_train_steps": 5, "filename": "every-{step}", "save_top_k": -1},
    ],
}


@ONE_TREE
@pytest.mark.parametrize("options", MATRIX.values(), ids=MATRIX)
def test_model_checkpoint(both: Both, options: list[dict[str, Any]]) -> None:
    """``ModelCheckpoint`` leaves the same files, links and contents as with synchronous checkpoints."""
    assert both.fit(saving(*options))


@WITH_CALLBACK
@pytest.mark.parametrize("last", [True, "link"])
def test_versions(both: Both, last: Any) -> None:
    """Checkpoints of the same name are counted up as with synchronous ones, though earlier ones are pending."""
    options = {"filename": "same", "monitor": "val_loss", "save_top_k": 3, "save_last": last}
    files = both.fit(saving(options))
    assert files.keys() == {f"ckpt/{name}.ckpt" for name in ("same", "same-v1", "same-v2", "last")}


@ONE_TREE
def test_save_on_exception(both: Both) -> None:
    """What ``ModelCheckpoint(save_on_exception=True)`` saves because training broke is there as with synchronous IO."""
    files = both.fit(
        saving({"save_on_exception": True, "save_top_k": -1, "save_last": True}), training_step=breaking_step
    )
    assert len(files) > 2


@ONE_TREE
def test_resume_goes_on_deleting(both: Both) -> None:
    """A resumed run replaces what the run before it has left, as with synchronous checkpoints."""
    both.fit(saving({"monitor": "val_loss", "save_top_k": 2, "save_last": True}), resume="last")


@ONE_TREE
def test_name_of_last(both: Both) -> None:
    """A ``last`` checkpoint whose name changes with the epoch is one file, as with synchronous checkpoints."""

    def callbacks(tree: Any, folder: Path) -> list[Any]:
        checkpoint = tree.checkpoints(folder / "ckpt", save_last=True)
        checkpoint.CHECKPOINT_NAME_LAST = "last-{epoch}"
        return [checkpoint]

    files = both.fit(callbacks)
    assert [name for name in files if "last" in name] == ["ckpt/last-epoch=3.ckpt"]


@ONE_TREE
def test_custom_checkpoint_callback(both: Both) -> None:
    """A ``Checkpoint`` of the user's own, which saves, overwrites and removes as it likes, leaves the same files."""

    def callbacks(tree: Any, folder: Path) -> list[Any]:
        class Custom(tree.pl.callbacks.Checkpoint):  # type: ignore[misc]  # a base that is found at run time
            def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
                step = trainer.global_step
                trainer.save_checkpoint(folder / f"{step}.ckpt", weights_only=step % 2 == 0)
                trainer.save_checkpoint(folder / "newest.ckpt")
                if step > 3:
                    trainer.strategy.remove_checkpoint(folder / f"{step - 3}.ckpt")

        return [Custom()]

    assert both.fit(callbacks).keys() == {"14.ckpt", "15.ckpt", "16.ckpt", "newest.ckpt"}


@ONE_TREE
def test_subclass_of_model_checkpoint(both: Both) -> None:
    """A subclass that saves a second file beside each, by the methods it inherits, leaves the same files."""

    def callbacks(tree: Any, folder: Path) -> list[Any]:
        class Twice(tree.pl.callbacks.ModelCheckpoint):  # type: ignore[misc]  # the same
            def _save_checkpoint(self, trainer: Any, filepath: str) -> None:
                super()._save_checkpoint(trainer, filepath)
                trainer.save_checkpoint(f"{filepath}.copy.ckpt")

            def _remove_checkpoint(self, trainer: Any, filepath: str) -> None:
                super()._remove_checkpoint(trainer, filepath)
                trainer.strategy.remove_checkpoint(f"{filepath}.copy.ckpt")

        return [Twice(folder / "ckpt", monitor="val_loss", save_top_k=2)]

    assert len(both.fit(callbacks)) == 4
