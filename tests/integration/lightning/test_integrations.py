"""What well-known integrations do with a checkpoint inside ``fit``, and what they find, without their packages.

Each class here uses files in the way that the named one does; ``tests/real`` runs some of them themselves. Storage is
slow throughout.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from async_ckpt import AsyncCheckpointCallback, AsyncCheckpointIO

pytestmark = pytest.mark.integration

SLOW_SECONDS = 0.05


def _fit(tree: Any, folder: Path, faults: Any, *callbacks: Any, **options: Any) -> Any:
    faults.slow(SLOW_SECONDS)
    plugin = AsyncCheckpointIO(store_factory=faults.make)
    trainer = tree.trainer(
        folder, plugins=[plugin], callbacks=[*callbacks, AsyncCheckpointCallback()], **options
    )
    trainer.fit(tree.model())
    return trainer


def _steps(folder: Path) -> dict[str, int]:
    """Return what checkpoints lie in *folder*, and of which step each one is."""
    return {
        str(path.relative_to(folder)): torch.load(path)["global_step"]
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_ray_train_reports_whole_folders(tree: Any, tmp_path: Path, faults: Any) -> None:
    """As ``ray.train.lightning.RayTrainReportCallback``: each reported folder has its checkpoint in it, and the folder
    that was removed after the report stays away.
    """
    temporary, reported = tmp_path / "temporary", tmp_path / "reported"

    class Reports(tree.pl.Callback):  # type: ignore[misc]  # a base that is found at run time
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            folder = temporary / str(trainer.current_epoch)
            folder.mkdir(parents=True)
            trainer.save_checkpoint((folder / "checkpoint.ckpt").as_posix(), weights_only=False)
            shutil.copytree(folder, reported / folder.name)
            trainer.strategy.barrier()
            shutil.rmtree(folder)

    _fit(tree, tmp_path, faults, Reports(), tree.checkpoints(tmp_path / "ckpt"), max_epochs=3)
    assert _steps(reported) == {f"{epoch}/checkpoint.ckpt": 4 * (epoch + 1) for epoch in range(3)}
    assert list(temporary.iterdir()) == []


def test_mlflow_autologging_uploads_each_checkpoint(tree: Any, tmp_path: Path, faults: Any) -> None:
    """As ``mlflow.pytorch.autolog(checkpoint=True)``: past ``Trainer.save_checkpoint``, into a temporary folder."""
    artifacts = tmp_path / "artifacts"

    class Logs(tree.pl.Callback):  # type: ignore[misc]  # the same
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
                path = os.path.join(folder, "latest_checkpoint_model.pth")
                checkpoint = trainer._checkpoint_connector.dump_checkpoint(False)
                trainer.strategy.save_checkpoint(checkpoint, path)
                target = artifacts / f"epoch_{trainer.current_epoch}"
                target.mkdir(parents=True)
                shutil.copy(path, target)

    _fit(tree, tmp_path, faults, Logs(), max_epochs=2)
    assert _steps(artifacts) == {
        f"epoch_{epoch}/latest_checkpoint_model.pth": 4 * (epoch + 1) for epoch in range(2)
    }
    assert [path.name for path in tmp_path.iterdir()] == ["artifacts"]


def test_a_registry_uploads_what_was_saved(tree: Any, tmp_path: Path, faults: Any) -> None:
    """As a registry's ``ModelCheckpoint``: it uploads after ``super()._save_checkpoint(…)``, and once more, the best
    one, when training ends.
    """
    registry = tmp_path / "registry"
    registry.mkdir()

    class Registers(tree.pl.callbacks.ModelCheckpoint):  # type: ignore[misc]  # the same
        def _save_checkpoint(self, trainer: Any, filepath: str) -> None:
            super()._save_checkpoint(trainer, filepath)
            shutil.copy(filepath, registry / f"{trainer.global_step}.ckpt")

        def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
            shutil.copy(self.best_model_path, registry / "best.ckpt")

    _fit(tree, tmp_path, faults, Registers(tmp_path / "ckpt", monitor="loss"), max_epochs=2)
    found = _steps(registry)
    assert found.pop("best.ckpt") in found.values()
    assert found == {"4.ckpt": 4, "8.ckpt": 8}


def test_a_preemption_handler_saves_beside_and_renames(tree: Any, tmp_path: Path, faults: Any) -> None:
    """As a handler for a scheduler's warning: the file has its final name when the handler returns."""
    final = tmp_path / "preempted.ckpt"
    seen: list[int] = []

    class Preempted(tree.pl.Callback):  # type: ignore[misc]  # the same
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            def handle(*args: Any) -> None:
                trainer.save_checkpoint(f"{final}.tmp")
                os.replace(f"{final}.tmp", final)

            self.before = signal.signal(signal.SIGUSR2, handle)

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            signal.raise_signal(signal.SIGUSR2)
            seen.append(torch.load(final)["global_step"])

        def teardown(self, *args: Any, **kwargs: Any) -> None:
            signal.signal(signal.SIGUSR2, self.before)

    _fit(tree, tmp_path, faults, Preempted(), tree.checkpoints(tmp_path / "ckpt", every_n_train_steps=1))
    assert seen == [1, 2, 3, 4]
