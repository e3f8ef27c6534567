"""Whole trainings on real object stores, found as a user's are: the same files and the same runs as ever."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from async_ckpt import AsyncCheckpointIO, StoreError
from async_ckpt.events import Event, Swept
from stress.servers.s3 import call
from tests.environment import found_by_environment
from tests.servers import fresh_bucket
from tests.support import start_python

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
]

SLOW_SECONDS = 0.1

#: Both distributions in the same bucket; on the other servers, one of them tells as much.
everywhere = pytest.mark.parametrize(
    ("tree", "root"),
    [
        ("pytorch_lightning", "seaweedfs"),
        ("lightning.pytorch", "seaweedfs"),
        ("lightning.pytorch", "fake_gcs"),
        ("pytorch_lightning", "azurite"),
    ],
    indirect=True,
)
on_s3 = pytest.mark.parametrize(("tree", "root"), [("lightning.pytorch", "seaweedfs")], indirect=True)


@pytest.fixture
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a folder in a bucket of its own on each server; nothing but the environment says how to get there."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    server = request.getfixturevalue(request.param)
    with found_by_environment(server):
        yield f"{server.protocol}://{fresh_bucket(server)}/run"


def _names(root: str) -> list[str]:
    """Return what is stored below *root*, hidden names and all, as fsspec's own file system sees it now."""
    file_system, path = fsspec.url_to_fs(root)
    file_system.invalidate_cache()
    return sorted(name.removeprefix(f"{path}/") for name in file_system.find(path))


def _scores(*values: float) -> Any:
    """Return a ``validation_step`` that logs one of *values* an epoch."""

    def validation_step(self: Any, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", torch.tensor(values[self.current_epoch]))

    return validation_step


def _plain_load(url: str) -> Any:
    file_system, path = fsspec.url_to_fs(url)
    return torch.load(io.BytesIO(file_system.cat_file(path)), weights_only=True)


@everywhere
def test_same_files_as_synchronous(tree: Any, root: str) -> None:
    """In a bucket, ``save_top_k=2, save_last=True`` leaves the files of a synchronous run, equal in weights."""
    roots = f"{root}/ours", f"{root}/theirs"
    for place, plugins in zip(roots, ([AsyncCheckpointIO()], []), strict=True):
        checkpoint = tree.checkpoints(None, save_top_k=2, save_last=True, monitor="val_loss")
        trainer = tree.trainer(place, max_epochs=4, plugins=plugins, callbacks=[checkpoint])
        trainer.fit(tree.model(validation_step=_scores(0.3, 0.1, 0.2, 0.4)))
    ours, theirs = (_names(place) for place in roots)
    assert ours == theirs
    assert ours == [
        f"checkpoints/{name}" for name in ("epoch=1-step=8.ckpt", "epoch=2-step=12.ckpt", "last.ckpt")
    ]
    for name in ours:
        mine, other = (_plain_load(f"{place}/{name}") for place in roots)
        assert mine["global_step"] == other["global_step"]
        for weight in mine["state_dict"]:
            assert torch.equal(mine["state_dict"][weight], other["state_dict"][weight])


@everywhere
def test_resume_from_a_url(tree: Any, root: str) -> None:
    """``fit(ckpt_path="s3://…/last.ckpt")`` ends with the weights of a run that was never interrupted."""
    through = tree.model()
    tree.trainer(None, max_epochs=3).fit(through)
    for epochs, ckpt_path in ((2, None), (3, f"{root}/last.ckpt")):
        checkpoint = tree.checkpoints(root, save_last=True)
        resumed = tree.model()
        trainer = tree.trainer(root, max_epochs=epochs, plugins=[AsyncCheckpointIO()], callbacks=[checkpoint])
        trainer.fit(resumed, ckpt_path=ckpt_path)
    assert trainer.global_step == 12
    assert _names(root) == ["epoch=2-step=12.ckpt", "last.ckpt"]
    for name, weight in through.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], weight)


@everywhere
def test_validate_and_test_from_a_url(tree: Any, root: str) -> None:
    """``validate(ckpt_path=url)`` loads that file, and ``"best"`` the best of the run before."""
    plugin = AsyncCheckpointIO()
    checkpoint = tree.checkpoints(root, save_last=True, monitor="val_loss", save_top_k=2)
    trainer = tree.trainer(root, max_epochs=2, plugins=[plugin], callbacks=[checkpoint])
    trainer.fit(tree.model(validation_step=_scores(0.1, 0.2)))
    loaded: list[int] = []
    model = tree.model(on_load_checkpoint=lambda self, saved: loaded.append(saved["global_step"]))
    trainer.validate(model, ckpt_path=f"{root}/last.ckpt", verbose=False)
    trainer.test(model, ckpt_path="best", verbose=False)
    assert loaded == [8, 4]


@everywhere
def test_load_of_a_pending_save(tree: Any, root: str, faults: Any) -> None:
    """A checkpoint in a bucket can be loaded through the Trainer right after it was saved: the load waits (O2)."""
    faults.slow(SLOW_SECONDS)
    plugin = AsyncCheckpointIO(store_factory=faults.make)
    trainer = tree.trainer(root, plugins=[plugin])
    model = tree.model()
    trainer.fit(model)
    trainer.save_checkpoint(f"{root}/a.ckpt")
    loaded = trainer.strategy.load_checkpoint(f"{root}/a.ckpt")
    assert torch.equal(loaded["state_dict"]["layer.weight"], model.layer.weight)
    plugin.teardown()


@everywhere
def test_what_fsspec_remembers_is_forgotten(tree: Any, root: str) -> None:
    """A file system that has listed the folder sees what we save, replace and remove there, as Lightning's own does."""
    plugin = AsyncCheckpointIO()
    trainer = tree.trainer(root, plugins=[plugin])
    trainer.fit(tree.model())
    file_system, path = fsspec.url_to_fs(root)

    def listed() -> list[str]:
        return sorted(name.rpartition("/")[2] for name in file_system.ls(path, detail=False))

    trainer.save_checkpoint(f"{root}/a.ckpt")
    trainer.save_checkpoint(f"{root}/b.ckpt")
    plugin.wait()
    assert listed() == ["a.ckpt", "b.ckpt"]
    old_size = file_system.size(f"{path}/a.ckpt")
    plugin.save_checkpoint({"weights": torch.zeros(old_size)}, f"{root}/a.ckpt")
    trainer.save_checkpoint(f"{root}/c.ckpt")
    plugin.remove_checkpoint(f"{root}/b.ckpt")
    plugin.wait()
    assert listed() == ["a.ckpt", "c.ckpt"]
    assert not file_system.exists(f"{path}/b.ckpt")
    assert file_system.size(f"{path}/a.ckpt") > old_size
    assert _plain_load(f"{root}/a.ckpt")["weights"].shape == (old_size,)
    plugin.teardown()


@on_s3
def test_two_runs_in_one_folder_do_not_share_names(tree: Any, root: str) -> None:
    """A second run in the same folder counts its names up, as on a local disk, and leaves the first one's files."""
    for _ in range(2):
        trainer = tree.trainer(
            root, plugins=[AsyncCheckpointIO()], callbacks=[tree.checkpoints(root, save_last=True)]
        )
        trainer.fit(tree.model())
    assert _names(root) == ["epoch=0-step=4-v1.ckpt", "epoch=0-step=4.ckpt", "last-v1.ckpt", "last.ckpt"]


@everywhere
@pytest.mark.parametrize("named", [True, False], ids=["dirpath", "default_root_dir"])
def test_resume_by_the_word_last(tree: Any, root: str, named: bool) -> None:
    """``ckpt_path="last"`` finds ``last.ckpt`` in a bucket (Lightning issue 18261)."""
    _resume_by_the_word_last(tree, root, named, [AsyncCheckpointIO()])


@on_s3
def test_resume_by_the_word_last_without_the_plugin(tree: Any, root: str) -> None:
    """A program that has made our plugin may resume so with any CheckpointIO."""
    AsyncCheckpointIO()
    _resume_by_the_word_last(tree, root, True, [])


def _resume_by_the_word_last(tree: Any, root: str, named: bool, plugins: list[Any]) -> None:
    for epochs in (1, 2):
        checkpoint = tree.checkpoints(root if named else None, save_last=True)
        trainer = tree.trainer(root, max_epochs=epochs, plugins=plugins, callbacks=[checkpoint])
        trainer.fit(tree.model(), ckpt_path="last" if epochs == 2 else None)
    assert trainer.ckpt_path == f"{root}{'' if named else '/checkpoints'}/last.ckpt"
    assert trainer.global_step == 8


@on_s3
def test_wrong_bucket(tree: Any, root: str) -> None:
    """A bucket that is not there fails the training once, naming the URL and the stage; nothing hangs."""
    wrong = root.replace("test-", "absent-")
    trainer = tree.trainer(wrong, plugins=[AsyncCheckpointIO()], callbacks=[tree.checkpoints(wrong)])
    with pytest.raises(OSError, match=r"absent-.*epoch=0-step=4\.ckpt"):
        trainer.fit(tree.model())


#: A training that stops for ever once the third epoch's checkpoint has its first part in the bucket.
DIES = """
    import sys, threading
    import pytorch_lightning as pl
    import torch
    from async_ckpt import AsyncCheckpointIO
    from async_ckpt.events import PartWritten
    from tests.integration.lightning.test_remote import wide_model

    saves = set()

    def observer(event):
        if isinstance(event, PartWritten):
            saves.add(event.request_id)
            if len(saves) == 3:
                print("in mid-upload", flush=True)
                threading.Event().wait()

    pl.Trainer(
        max_epochs=3,
        plugins=[AsyncCheckpointIO(part_size="5MiB", max_concurrent_parts=1, observer=observer)],
        callbacks=[pl.callbacks.ModelCheckpoint(sys.argv[1], save_top_k=-1)],
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
    ).fit(wide_model())
"""


def wide_model() -> Any:
    """Return a model whose checkpoint, with Adam's state, has three parts of 5 MiB."""
    import pytorch_lightning as pl
    from torch.utils.data import DataLoader

    class Wide(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1024, 1024)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer(batch).pow(2).mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters())

        def train_dataloader(self) -> Any:
            return DataLoader(torch.ones(2, 1024))

    return Wide()


@pytest.mark.parametrize("root", ["seaweedfs"], indirect=True)
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_killed_in_mid_upload(root: str, seaweedfs: Any) -> None:
    """A run killed by SIGKILL in mid-upload is resumed from the checkpoint before, and its upload is swept (D2)."""
    import pytorch_lightning as pl

    bucket = root.split("/")[2]

    def open_uploads() -> int:
        return call(seaweedfs.url, "GET", f"{bucket}?uploads=").count(b"<UploadId>")

    process = start_python(DIES, root)
    try:
        assert process.stdout is not None
        assert "in mid-upload\n" in iter(process.stdout.readline, ""), process.communicate()
    finally:
        process.kill()
        process.communicate()
    before = ["epoch=0-step=2.ckpt", "epoch=1-step=4.ckpt"]
    assert _names(root) == before
    assert [_plain_load(f"{root}/{name}")["epoch"] for name in before] == [0, 1]
    assert open_uploads() == 1

    swept: list[Event] = []
    plugin = AsyncCheckpointIO(
        observer=lambda event: swept.append(event) if isinstance(event, Swept) else None
    )
    trainer = pl.Trainer(
        max_epochs=3,
        plugins=[plugin],
        callbacks=[pl.callbacks.ModelCheckpoint(root, save_top_k=-1)],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(wide_model(), ckpt_path=f"{root}/epoch=1-step=4.ckpt")
    assert trainer.global_step == 6
    assert len(swept) == 1
    assert open_uploads() == 0
    assert _names(root) == [*before, "epoch=2-step=6.ckpt"]
    assert _plain_load(f"{root}/epoch=2-step=6.ckpt")["epoch"] == 2


@everywhere
def test_lightnings_own_base_is_looked_after(tree: Any, root: str) -> None:
    """``TorchCheckpointIO`` below the plugin: the same bytes, written twice within a second, are written."""
    plugin = AsyncCheckpointIO(tree.fabric.plugins.TorchCheckpointIO(), queue_depth=4)
    for _ in range(2):
        plugin.save_checkpoint({"step": 1}, f"{root}/last.ckpt")
    plugin.wait()
    assert _plain_load(f"{root}/last.ckpt") == {"step": 1}
    plugin.remove_checkpoint(f"{root}/last.ckpt")
    plugin.teardown()
    assert not [
        name for name in _names(root) if name.endswith("last.ckpt")
    ]  # a folder may be left, by the base


@on_s3
def test_a_denial_by_s3_that_the_base_swallows_is_a_failed_save(
    tree: Any, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong key: ``TorchCheckpointIO`` returns as if it had written, which nobody takes for durable (D1)."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    plugin = AsyncCheckpointIO(tree.fabric.plugins.TorchCheckpointIO())
    try:
        plugin.save_checkpoint({"step": 1}, f"{root}/last.ckpt")
        with pytest.raises(StoreError, match=r"run/last\.ckpt.*could not be checked"):
            plugin.wait()
    finally:
        plugin.teardown()
        fsspec.get_filesystem_class("s3").clear_instance_cache()
