"""MLflow itself, with a tracking server's file store on disk: autologging, and Lightning's logger for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from async_ckpt import AsyncCheckpointIO
from tests.real.training import Model, slow_store, trainer

mlflow: Any = pytest.importorskip("mlflow", reason="some 400 MB: tox -e integrations installs it")

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(240),
    pytest.mark.filterwarnings("default"),  # of others: the packages warn of each other
]


@pytest.fixture
def tracking(tmp_path: Path) -> Any:
    """Return a client of a tracking database of the test's own."""
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = mlflow.create_experiment("test", artifact_location=(tmp_path / "artifacts").as_uri())
    mlflow.set_experiment(experiment_id=experiment)
    yield mlflow.MlflowClient()
    mlflow.pytorch.autolog(disable=True)


def _steps(client: Any, run_id: str, folder: Path) -> dict[str, int]:
    """Return the checkpoints among a run's artifacts, and of which step each one is."""
    root = Path(client.download_artifacts(run_id, "", str(folder)))
    found = [
        path for path in root.rglob("*") if path.suffix in (".ckpt", ".pth") and "data" not in path.parts
    ]
    return {
        str(path.relative_to(root)): torch.load(path, weights_only=False)["global_step"] for path in found
    }


def test_autologging_uploads_each_checkpoint(tracking: Any, tmp_path: Path) -> None:
    """``mlflow.pytorch.autolog(checkpoint=True)`` has an artifact for each epoch, with its weights in it."""
    mlflow.pytorch.autolog(checkpoint=True, checkpoint_save_best_only=False, log_models=False)
    with mlflow.start_run() as run:
        trainer(tmp_path, AsyncCheckpointIO(store_factory=slow_store), max_epochs=2).fit(Model())
    mlflow.flush_artifact_async_logging()
    (tmp_path / "download").mkdir()
    steps = _steps(tracking, run.info.run_id, tmp_path / "download")
    assert steps == {f"checkpoints/epoch_{epoch}/checkpoint.pth": 4 * (epoch + 1) for epoch in range(2)}


@pytest.mark.parametrize("log_model", ["all", True])
def test_the_logger_uploads_what_model_checkpoint_saves(
    tracking: Any, tmp_path: Path, log_model: Any
) -> None:
    """``MLFlowLogger(log_model=…)`` has the files that a synchronous run has."""
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers import MLFlowLogger

    found = []
    for who, plugin in (("theirs", None), ("ours", AsyncCheckpointIO(store_factory=slow_store))):
        logger = MLFlowLogger("test", tracking_uri=mlflow.get_tracking_uri(), log_model=log_model)
        checkpoint = ModelCheckpoint(tmp_path / who, save_top_k=-1 if log_model == "all" else 1)
        trainer(tmp_path, plugin, checkpoint, max_epochs=3, logger=logger).fit(Model())
        (tmp_path / f"download-{who}").mkdir()
        found.append(_steps(tracking, logger.run_id, tmp_path / f"download-{who}"))
    theirs, ours = found
    assert theirs == ours
    assert ours
