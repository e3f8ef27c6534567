"""Ray Train itself: one worker on this machine, its own report callback, its own storage."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

ray: Any = pytest.importorskip("ray", reason="some 500 MB: tox -e integrations installs it")
pytest.importorskip("ray.train", reason="ray without its extra 'train'", exc_type=ImportError)

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(240),
    pytest.mark.filterwarnings("default"),  # of others: the packages warn of each other
]

EPOCHS = 3


def _train(config: dict[str, Any]) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint
    from ray.train.lightning import RayTrainReportCallback

    from async_ckpt import AsyncCheckpointIO
    from tests.real.training import Model, slow_store, trainer

    report = RayTrainReportCallback()
    plugin = AsyncCheckpointIO(store_factory=slow_store)
    checkpoint = ModelCheckpoint(config["folder"] + "/own", save_top_k=-1)
    trainer(config["folder"], plugin, report, checkpoint, max_epochs=EPOCHS).fit(Model())
    left = sorted(str(path) for path in Path(report.tmpdir_prefix).rglob("*"))
    Path(config["folder"], "left.txt").write_text("\n".join(left))


def test_each_reported_folder_has_its_checkpoint(tmp_path: Path) -> None:
    """Every epoch's report has a whole checkpoint, none of the temporary folders comes back, and what
    ``ModelCheckpoint`` saves beside it is all there.
    """
    from ray.train import CheckpointConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    path = filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")])
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=80 << 20,
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(path)}},
    )
    try:
        result = TorchTrainer(
            _train,
            train_loop_config={"folder": str(tmp_path)},
            scaling_config=ScalingConfig(num_workers=1),
            run_config=RunConfig(
                storage_path=str(tmp_path / "storage"), checkpoint_config=CheckpointConfig(num_to_keep=None)
            ),
        ).fit()
    finally:
        ray.shutdown()
    steps = []
    for checkpoint, metrics in result.best_checkpoints:
        saved = torch.load(Path(checkpoint.path) / "checkpoint.ckpt")
        steps.append((metrics["step"], saved["global_step"]))
    assert sorted(steps) == [(4 * (epoch + 1),) * 2 for epoch in range(EPOCHS)]
    assert (tmp_path / "left.txt").read_text() == ""
    assert len(list((tmp_path / "own").iterdir())) == EPOCHS
