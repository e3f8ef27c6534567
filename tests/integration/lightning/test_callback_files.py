"""What ``ModelCheckpoint`` does with files while saves are pending, in the company of the callback."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from async_ckpt import AsyncCheckpointCallback, AsyncCheckpointIO
from async_ckpt.events import Accepted, Event, Linked, Removed
from tests.support import python

pytestmark = pytest.mark.integration


def _dangles(link: Path) -> bool:
    return link.is_symlink() and not link.exists()


def test_link_never_dangles_at_any_event(tree: Any, tmp_path: Path, faults: Any) -> None:
    """``save_last="link", save_top_k=1``: at each event of six saves ``last.ckpt`` leads to a file or is absent."""
    faults.slow(0.02)
    link = tmp_path / "ckpt" / "last.ckpt"
    seen: list[tuple[type[Event], bool]] = []
    plugin = AsyncCheckpointIO(
        store_factory=faults.make,
        queue_depth=8,
        observer=lambda event: seen.append((type(event), _dangles(link))),
    )
    trainer = tree.trainer(
        tmp_path,
        max_epochs=6,
        plugins=[plugin],
        callbacks=[AsyncCheckpointCallback(), tree.checkpoints(tmp_path / "ckpt", save_last="link")],
    )
    trainer.fit(tree.model())
    kinds = [kind for kind, _ in seen]
    assert (kinds.count(Linked), kinds.count(Removed)) == (6, 5)
    assert not any(dangles for _, dangles in seen)
    assert os.readlink(link) == "epoch=5-step=24.ckpt"
    assert sorted(entry.name for entry in link.parent.iterdir()) == ["epoch=5-step=24.ckpt", "last.ckpt"]


def test_link_is_asked_for_before_the_old_checkpoint_is_removed(tree: Any, tmp_path: Path) -> None:
    """``ModelCheckpoint`` removes first and links afterwards; the plugin is asked the other way round (D3)."""
    calls: list[str] = []

    class Asked(AsyncCheckpointIO):
        def link(self, path: Any, target: Any) -> None:
            calls.append("link")
            super().link(path, target)

        def remove_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            calls.append("remove")
            super().remove_checkpoint(*args, **kwargs)

    trainer = tree.trainer(
        tmp_path,
        max_epochs=3,
        plugins=[Asked()],
        callbacks=[AsyncCheckpointCallback(), tree.checkpoints(tmp_path / "ckpt", save_last="link")],
    )
    trainer.fit(tree.model())
    assert calls == ["link", *["link", "remove"] * 2]


#: Forks a child for each event of a fit with links, which dies at that event; the last child survives them all.
WALK = """
    import importlib, logging, os, signal, sys, warnings

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    pl = importlib.import_module(sys.argv[1])
    import torch
    from async_ckpt import AsyncCheckpointCallback, AsyncCheckpointIO

    torch.set_num_threads(1)  # OpenMP does not survive a fork

    class Model(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 2)

        def training_step(self, batch, batch_idx):
            return self.layer(batch).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def run(directory, last):
        seen = 0

        def observer(event):
            nonlocal seen
            seen += 1
            if seen == last:
                os.kill(os.getpid(), signal.SIGKILL)

        pl.Trainer(
            accelerator="cpu", devices=1, max_epochs=2, logger=False, default_root_dir=directory,
            enable_progress_bar=False, enable_model_summary=False,
            plugins=[AsyncCheckpointIO(observer=observer, queue_depth=4)],
            callbacks=[AsyncCheckpointCallback(), pl.callbacks.ModelCheckpoint(directory, save_last="link")],
        ).fit(Model(), torch.utils.data.DataLoader(torch.ones(1, 2)))

    root = sys.argv[2]
    run(f"{root}/warm", 0)  # imports, once for all children
    last, survived = 0, False
    while not survived and last < 200:
        last += 1
        directory = f"{root}/{last}"
        os.mkdir(directory)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                run(directory, last)
                status = 0
            finally:
                os._exit(status)
        survived = os.waitpid(child, 0)[1] == 0
    print(last)
"""


def test_killed_at_any_event_the_link_leads_to_a_whole_checkpoint(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Whenever SIGKILL comes, ``last.ckpt`` is absent or a checkpoint that loads; in the end it is the newest."""
    root = tmp_path_factory.mktemp("killed")
    done = python(WALK, "pytorch_lightning", root, timeout=100.0)
    epochs = []
    for number in range(1, int(done.stdout) + 1):
        link = root / str(number) / "last.ckpt"
        assert not _dangles(link)
        epochs.append(torch.load(link)["epoch"] if link.exists() else -1)
    assert epochs[0] == -1
    assert epochs[-1] == 1
    assert 0 in epochs, "no death came between, so nothing was proven"


def test_a_name_whose_removal_is_pending_is_free_again(tree: Any, tmp_path: Path, faults: Any) -> None:
    """A checkpoint that is to be removed does not count for names; it is gone before its name is used again (O1)."""
    gate = faults.hold(operation="begin")
    plugin = AsyncCheckpointIO(store_factory=faults.make, queue_depth=8, direct_saves="async")
    (tmp_path / "ckpt").mkdir()
    old = tmp_path / "ckpt" / "same.ckpt"
    old.write_bytes(b"old")

    class Removes(tree.pl.Callback):  # type: ignore[misc]
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.strategy.remove_checkpoint(old)

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            assert old.read_bytes() == b"old"
            gate.open()

    checkpoint = tree.checkpoints(tmp_path / "ckpt", filename="same", save_last="link")
    trainer = tree.trainer(
        tmp_path,
        plugins=[plugin],
        limit_val_batches=0,
        callbacks=[Removes(), AsyncCheckpointCallback(), checkpoint],
    )
    trainer.callbacks.insert(0, _Holds(tree, plugin, tmp_path / "first.ckpt"))
    trainer.fit(tree.model())
    assert checkpoint.best_model_path == str(old)
    assert torch.load(old)["global_step"] == 4


def _Holds(tree: Any, plugin: AsyncCheckpointIO, path: Path) -> Any:
    """Return a callback that saves first of all, so that a removal after it has to wait (D3)."""

    class Holds(tree.pl.Callback):  # type: ignore[misc]
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            trainer.save_checkpoint(path)

    return Holds()


def test_a_constant_name_is_never_removed_after_it_was_used_again(
    tree: Any, tmp_path: Path, faults: Any
) -> None:
    """What is saved under a name whose removal was held back for a logger stays: the removal comes first (O1), and
    before that the logger is told.
    """
    faults.slow(0.1)
    path = tmp_path / "same.ckpt"
    plugin = AsyncCheckpointIO(store_factory=faults.make, queue_depth=8, direct_saves="async")
    order: list[str] = []
    plugin.observe(lambda event: order.append(type(event).__name__) if event.url == str(path) else None)

    class Own(tree.pl.callbacks.Checkpoint):  # type: ignore[misc]
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step in (1, 2):
                trainer.save_checkpoint(path)
                self._last_checkpoint_saved = str(path)
                trainer.loggers[0].after_save_checkpoint(self)
            if trainer.global_step == 1:
                trainer.strategy.remove_checkpoint(path)

    class Told(tree.module("loggers").CSVLogger):  # type: ignore[misc]  # a base that is found at run time
        def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
            order.append(f"told of {torch.load(path)['global_step']}")

    logger = Told(tmp_path)
    trainer = tree.trainer(
        tmp_path, plugins=[plugin], callbacks=[AsyncCheckpointCallback(), Own()], logger=logger
    )
    trainer.fit(tree.model())
    assert torch.load(path)["global_step"] == 2
    steps = [each for each in order if each in ("Durable", "Removed") or each.startswith("told")]
    assert steps == ["Durable", "told of 1", "Removed", "Durable", "told of 2"]


def test_every_save_is_accepted_at_once(tree: Any, tmp_path: Path, faults: Any) -> None:
    """Links and held removals do not make a save wait: all are accepted while the first is held."""
    gate = faults.hold(1)
    accepted: list[str] = []
    plugin = AsyncCheckpointIO(store_factory=faults.make, queue_depth=8)
    plugin.observe(lambda event: accepted.append(event.url) if isinstance(event, Accepted) else None)

    class OpensTheGate(tree.pl.Callback):  # type: ignore[misc]
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            assert len(accepted) == 4
            gate.open()

    checkpoint = tree.checkpoints(tmp_path / "ckpt", save_last="link", every_n_train_steps=1)
    trainer = tree.trainer(
        tmp_path, plugins=[plugin], callbacks=[OpensTheGate(), AsyncCheckpointCallback(), checkpoint]
    )
    trainer.fit(tree.model())
    assert [entry.name for entry in sorted((tmp_path / "ckpt").iterdir())] == [
        "epoch=0-step=4.ckpt",
        "last.ckpt",
    ]
