"""A Trainer whose checkpoints go to a mount that refuses one thing or another."""

from __future__ import annotations

import errno
import os
from typing import Any

import pytest
import torch

from async_ckpt import AsyncCheckpointCallback, AsyncCheckpointIO, StoreError
from tests.fuse.mounted import mounted, why_not
from tests.fuse.places import EXPRESS, HDFS, MOUNTPOINT, VOLUMES

pytestmark = [pytest.mark.integration, pytest.mark.skipif(bool(why_not()), reason=why_not() or "there is")]


@pytest.mark.parametrize("kind", ["HDFS", "EXPRESS", "VOLUMES"])
@pytest.mark.parametrize("save_last", [True, "link"])
def test_a_training(tree: Any, kind: str, save_last: Any) -> None:
    """What is left after a training with rotation and a last.ckpt is what a local disk would have, and resumes."""
    rules = {"HDFS": HDFS, "EXPRESS": EXPRESS, "VOLUMES": VOLUMES}[kind]
    with mounted(rules) as mount:

        def trainer(epochs: int) -> Any:
            saving = tree.checkpoints(mount.path / "run", save_last=save_last, save_top_k=1, monitor=None)
            return tree.trainer(
                mount.path,
                plugins=[AsyncCheckpointIO()],
                callbacks=[saving, AsyncCheckpointCallback()],
                max_epochs=epochs,
            )

        trainer(2).fit(tree.model())
        again = trainer(3)
        again.fit(tree.model(), ckpt_path="last")
        assert again.current_epoch == 3
        left = sorted(os.listdir(mount.path / "run"))
        assert "last.ckpt" in left
        assert not [name for name in left if name.startswith(".") or ".previous-" in name]
        for name in left:
            assert torch.load(mount.path / "run" / name, weights_only=False)["epoch"] <= 3


def test_a_training_in_place(tree: Any) -> None:
    """Mountpoint for S3 takes a training where in place is allowed, and says what to do where it is not."""
    with mounted(MOUNTPOINT.but(unlink=0, overwrite=0)) as mount:

        def trainer(epochs: int, **options: Any) -> Any:
            saving = tree.checkpoints(mount.path / "run", save_last=epochs > 1, save_top_k=1, monitor=None)
            plugins = [AsyncCheckpointIO(**options)]
            return tree.trainer(mount.path, plugins=plugins, callbacks=[saving], max_epochs=epochs)

        with pytest.raises(StoreError, match=r"refuses to rename.*in_place") as caught:
            trainer(1).fit(tree.model())  # one save, one error
        assert caught.value.errno == errno.ENOSYS
        trainer(2, in_place="allow").fit(tree.model())
        assert torch.load(mount.path / "run" / "last.ckpt", weights_only=False)["epoch"] == 1
