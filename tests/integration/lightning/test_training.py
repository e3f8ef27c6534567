"""Whole trainings on slow storage: the same files and the same runs as with synchronous checkpoints."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from async_ckpt import AsyncCheckpointCallback, AsyncCheckpointIO

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
]

SLOW_SECONDS = 0.1


def _records(file: Any) -> dict[str, bytes]:
    with zipfile.ZipFile(file) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def _scores(*values: float) -> Any:
    """Return a ``validation_step`` that logs one of *values* an epoch."""

    def validation_step(self: Any, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", torch.tensor(values[self.current_epoch]))

    return validation_step


def test_training_goes_on_while_saves_are_held_and_files_show_the_moment_of_the_save(
    tree: Any, tmp_path: Path, faults: Any, recording: Any
) -> None:
    """Optimizer steps after ``save`` are not in the file: each equals a synchronous save record by record (S1)."""
    gate = faults.hold(operation="begin")
    plugin = recording(queue_depth=8, store_factory=faults.make)

    class OpensTheGate(tree.pl.Callback):  # type: ignore[misc]
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            assert list((tmp_path / "ckpt").glob("*.ckpt")) == []
            gate.open()

    trainer = tree.trainer(
        tmp_path,
        max_epochs=3,
        plugins=[plugin],
        callbacks=[OpensTheGate(), tree.checkpoints(tmp_path / "ckpt", save_top_k=-1, save_last=True)],
    )
    trainer.fit(tree.model())
    written = {str(file): file for file in (tmp_path / "ckpt").iterdir()}
    assert written.keys() == plugin.expected.keys()
    assert len(written) == 4
    for path, file in written.items():
        assert _records(file) == _records(io.BytesIO(plugin.expected[path]))


def test_file_equals_that_of_lightnings_own_writer(tree: Any, tmp_path: Path) -> None:
    """For the same state, our file and ``TorchCheckpointIO``'s are equal record by record."""
    trainer = tree.trainer(tmp_path)
    trainer.fit(tree.model())
    state = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    tree.fabric.plugins.TorchCheckpointIO().save_checkpoint(state, tmp_path / "theirs.ckpt")
    plugin = AsyncCheckpointIO()
    plugin.save_checkpoint(state, tmp_path / "ours.ckpt")
    plugin.teardown()
    assert _records(tmp_path / "ours.ckpt") == _records(tmp_path / "theirs.ckpt")


def test_one_file_is_left_of_many(tree: Any, tmp_path: Path, faults: Any, names: Any) -> None:
    """``save_top_k=1`` on slow storage ends with exactly one file, the newest."""
    faults.slow(SLOW_SECONDS)
    plugin = AsyncCheckpointIO(store_factory=faults.make)
    trainer = tree.trainer(
        tmp_path, max_epochs=6, plugins=[plugin], callbacks=[tree.checkpoints(tmp_path / "ckpt")]
    )
    trainer.fit(tree.model())
    assert names(tmp_path / "ckpt") == ["epoch=5-step=24.ckpt"]
    assert torch.load(tmp_path / "ckpt" / "epoch=5-step=24.ckpt")["epoch"] == 5


@pytest.mark.parametrize(
    "options",
    [
        {"save_top_k": 2, "save_last": True, "monitor": "val_loss"},
        {"save_top_k": -1, "every_n_train_steps": 3},
        {"save_top_k": 1, "save_last": True, "monitor": "val_loss", "filename": "best"},
        {"save_top_k": 0, "save_last": True},
        {"save_top_k": 2, "save_last": "link", "monitor": "val_loss"},
        {"save_weights_only": True},
    ],
    ids=["top 2 and last", "every 3 steps", "one name", "last only", "link", "weights only"],
)
def test_same_files_as_synchronous(
    tree: Any, tmp_path: Path, faults: Any, names: Any, options: dict[str, Any]
) -> None:
    """``ModelCheckpoint`` leaves the same files, with the same weights, as with synchronous checkpoints."""
    faults.slow(0.05)
    folders = tmp_path / "ours", tmp_path / "theirs"
    for folder, plugins in zip(folders, ([AsyncCheckpointIO(store_factory=faults.make)], []), strict=True):
        trainer = tree.trainer(
            tmp_path, max_epochs=4, plugins=plugins, callbacks=[tree.checkpoints(folder, **options)]
        )
        trainer.fit(tree.model(validation_step=_scores(0.3, 0.1, 0.2, 0.4)))
    ours, theirs = (names(folder) for folder in folders)
    assert ours == theirs
    assert ours
    for name in ours:
        assert (folders[0] / name).is_symlink() == (folders[1] / name).is_symlink()
        mine, other = (torch.load(folder / name) for folder in folders)
        assert mine["global_step"] == other["global_step"]
        for weight in mine["state_dict"]:
            assert torch.equal(mine["state_dict"][weight], other["state_dict"][weight])


def test_resume_begins_with_the_same_weights(tree: Any, tmp_path: Path, recording: Any, faults: Any) -> None:
    """A run that is resumed from ``ckpt_path`` ends with the same weights as one that was never interrupted."""
    faults.slow(SLOW_SECONDS)
    through = tree.model()
    tree.trainer(tmp_path, max_epochs=3).fit(through)

    checkpoint = tree.checkpoints(tmp_path / "ckpt", save_last=True)
    plugin = AsyncCheckpointIO(store_factory=faults.make)
    tree.trainer(tmp_path, max_epochs=2, plugins=[plugin], callbacks=[checkpoint]).fit(tree.model())

    resumed = tree.model()
    tree.trainer(tmp_path, max_epochs=3, plugins=[plugin]).fit(resumed, ckpt_path=checkpoint.last_model_path)
    for name, weight in through.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], weight)


@pytest.mark.parametrize("which", ["last", "best"])
def test_resume_by_word(tree: Any, tmp_path: Path, faults: Any, which: str) -> None:
    """``ckpt_path="last"`` and ``"best"`` find what slow storage has just been given."""
    faults.slow(SLOW_SECONDS)
    plugin = AsyncCheckpointIO(store_factory=faults.make)
    checkpoint = tree.checkpoints(tmp_path / "ckpt", save_last=True, monitor="val_loss")
    trainer = tree.trainer(tmp_path, max_epochs=2, plugins=[plugin], callbacks=[checkpoint])
    trainer.fit(tree.model(validation_step=_scores(0.1, 0.2)))
    if which == "best":
        trainer.test(ckpt_path="best", verbose=False)
        assert trainer.ckpt_path == str(tmp_path / "ckpt" / "epoch=0-step=4.ckpt")
        return
    again = tree.trainer(
        tmp_path,
        max_epochs=3,
        plugins=[plugin],
        callbacks=[tree.checkpoints(tmp_path / "ckpt", save_last=True, monitor="val_loss")],
    )
    again.fit(tree.model(validation_step=_scores(0.1, 0.2, 0.3)), ckpt_path="last")
    assert again.global_step == 12


def test_second_fit_validate_and_test(tree: Any, tmp_path: Path, faults: Any, names: Any) -> None:
    """After each teardown the plugin is ready for the next ``fit``, ``validate`` and ``test`` of the Trainer (L1)."""
    faults.slow(SLOW_SECONDS)
    plugin = AsyncCheckpointIO(store_factory=faults.make)
    trainer = tree.trainer(
        tmp_path, max_epochs=1, plugins=[plugin], callbacks=[tree.checkpoints(tmp_path / "ckpt")]
    )
    model = tree.model()
    trainer.fit(model)
    assert names(tmp_path / "ckpt") == ["epoch=0-step=4.ckpt"]
    trainer.validate(model, verbose=False)
    trainer.test(model, verbose=False)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model)
    assert names(tmp_path / "ckpt") == ["epoch=1-step=8.ckpt"]


def test_save_outside_fit(tree: Any, tmp_path: Path, faults: Any) -> None:
    """``trainer.save_checkpoint`` after ``fit`` is durable after ``wait``, and a load right after it finds it."""
    gate = faults.hold()
    faults.slow(SLOW_SECONDS)
    plugin = AsyncCheckpointIO(store_factory=faults.make)
    trainer = tree.trainer(tmp_path, plugins=[plugin])
    model = tree.model()
    trainer.fit(model)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert not (tmp_path / "a.ckpt").exists()
    gate.open()
    loaded = trainer.strategy.load_checkpoint(tmp_path / "a.ckpt")
    assert torch.equal(loaded["state_dict"]["layer.weight"], model.layer.weight)
    trainer.save_checkpoint(tmp_path / "b.ckpt")
    plugin.wait()
    assert torch.load(tmp_path / "b.ckpt")["global_step"] == 4
    plugin.teardown()


def test_lr_find(tree: Any, tmp_path: Path, faults: Any, names: Any) -> None:
    """The learning rate finder saves, loads at once what it saved, and removes it: nothing stays, weights do."""
    faults.slow(SLOW_SECONDS)
    plugin = AsyncCheckpointIO(store_factory=faults.make)
    trainer = tree.trainer(tmp_path, plugins=[plugin], max_epochs=5)
    model = tree.model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    found = tree.module("tuner").Tuner(trainer).lr_find(model, num_training=20, min_lr=1e-4, max_lr=1e-2)
    assert len(found.results["lr"]) == 20
    assert names(tmp_path) == []
    for name, weight in before.items():
        assert torch.equal(model.state_dict()[name], weight)
    trainer.fit(model)


def test_root_in_another_file_system(tree: Any, faults: Any, request: pytest.FixtureRequest) -> None:
    """``default_root_dir="memory://…"`` works as a local directory does, resuming from it included."""
    root = f"memory://{abs(hash(request.node.name))}"
    faults.slow(SLOW_SECONDS)
    plugin = AsyncCheckpointIO(store_factory=faults.make)
    checkpoint = tree.checkpoints(None, save_last=True)
    trainer = tree.trainer(root, max_epochs=3, plugins=[plugin], callbacks=[checkpoint])
    trainer.fit(tree.model())
    files = fsspec.filesystem("memory").find(f"{root}/checkpoints")
    assert [file.rpartition("/")[2] for file in files] == ["epoch=2-step=12.ckpt", "last.ckpt"]
    again = tree.trainer(root, max_epochs=4, plugins=[plugin])
    again.fit(tree.model(), ckpt_path=checkpoint.last_model_path)
    assert again.global_step == 16


def test_hooks_see_the_state_of_the_call(tree: Any, tmp_path: Path, faults: Any) -> None:
    """What ``on_save_checkpoint`` adds is written as it was then, and ``on_load_checkpoint`` gets it back."""
    gate = faults.hold(operation="begin")
    plugin = AsyncCheckpointIO(store_factory=faults.make, queue_depth=4)
    history: list[int] = []
    loaded: list[list[int]] = []

    def on_save_checkpoint(self: Any, checkpoint: Any) -> None:
        history.append(self.global_step)
        checkpoint["history"] = history

    def on_load_checkpoint(self: Any, checkpoint: Any) -> None:
        loaded.append(checkpoint["history"])

    hooks = {"on_save_checkpoint": on_save_checkpoint, "on_load_checkpoint": on_load_checkpoint}
    checkpoint = tree.checkpoints(tmp_path / "ckpt", save_top_k=-1)

    class OpensTheGate(tree.pl.Callback):  # type: ignore[misc]
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            gate.open()

    trainer = tree.trainer(tmp_path, max_epochs=2, plugins=[plugin], callbacks=[OpensTheGate(), checkpoint])
    trainer.fit(tree.model(**hooks))
    first = tmp_path / "ckpt" / "epoch=0-step=4.ckpt"
    tree.trainer(tmp_path, plugins=[plugin], max_epochs=2).fit(tree.model(**hooks), ckpt_path=first)
    assert history == [4, 8]
    assert loaded == [[4]]


def test_names_are_counted_up_while_saves_are_pending(
    tree: Any, tmp_path: Path, faults: Any, names: Any
) -> None:
    """Two checkpoints of the same name get different versions, though the first is still pending."""
    gate = faults.hold(operation="begin")

    class OpensTheGate(tree.pl.Callback):  # type: ignore[misc]
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            gate.open()

    trainer = tree.trainer(
        tmp_path,
        max_epochs=2,
        plugins=[AsyncCheckpointIO(store_factory=faults.make, queue_depth=4)],
        callbacks=[
            OpensTheGate(),
            AsyncCheckpointCallback(),
            tree.checkpoints(tmp_path / "ckpt", filename="same", monitor="val_loss", save_top_k=2),
        ],
    )
    trainer.fit(tree.model(validation_step=_scores(0.2, 0.1)))
    assert names(tmp_path / "ckpt") == ["same-v1.ckpt", "same.ckpt"]


def test_link_never_dangles(tree: Any, tmp_path: Path, faults: Any) -> None:
    """``save_last="link"``: while the newest checkpoint is pending, ``last.ckpt`` is the one before, or absent."""
    gate = faults.hold(operation="begin")
    dangling: list[bool] = []

    class OpensTheGate(tree.pl.Callback):  # type: ignore[misc]
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            last = tmp_path / "ckpt" / "last.ckpt"
            dangling.append(last.is_symlink() and not last.exists())
            gate.open()

    trainer = tree.trainer(
        tmp_path,
        plugins=[AsyncCheckpointIO(store_factory=faults.make, queue_depth=4)],
        callbacks=[
            OpensTheGate(),
            AsyncCheckpointCallback(),
            tree.checkpoints(tmp_path / "ckpt", save_last="link"),
        ],
    )
    trainer.fit(tree.model())
    assert dangling == [False]
