"""How a fit with the companion callback ends: after errors, with storage that hangs, with any strategy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from async_ckpt import AsyncCheckpointCallback, AsyncCheckpointIO
from async_ckpt.errors import FlushTimeoutError


class _Counting(AsyncCheckpointIO):
    """The plugin; counts who waits for everything."""

    waits = 0

    def wait(self, timeout: float | None = None) -> None:
        self.waits += 1
        super().wait(timeout)

    def settle(self, *args: Any) -> None:
        self.waits += 1
        super().settle(*args)


@pytest.mark.parametrize("fails", [False, True], ids=["success", "error"])
def test_a_storage_that_hangs_is_waited_for_once(tree: Any, tmp_path: Path, faults: Any, fails: bool) -> None:
    """When ``flush_timeout`` has passed at the end of a fit, nobody waits again, whatever is saved after that."""
    gate = faults.hold()
    plugin = _Counting(store_factory=faults.make, queue_depth=8, flush_timeout=1.0, direct_saves="async")

    class Own(tree.pl.callbacks.Checkpoint):  # type: ignore[misc]
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            self._last_checkpoint_saved = str(tmp_path / f"{trainer.global_step}.ckpt")
            trainer.save_checkpoint(self._last_checkpoint_saved)
            trainer.loggers[0].after_save_checkpoint(self)
            if fails:
                raise RuntimeError("of the training")

        def on_exception(self, trainer: Any, *args: Any) -> None:
            trainer.save_checkpoint(tmp_path / "rescued.ckpt")
            trainer.loggers[0].after_save_checkpoint(self)

        def teardown(self, *args: Any) -> None:
            gate.open()

    trainer = tree.trainer(
        tmp_path,
        plugins=[plugin],
        callbacks=[AsyncCheckpointCallback(), Own()],
        logger=tree.module("loggers").CSVLogger(tmp_path),
    )
    with pytest.raises(RuntimeError if fails else FlushTimeoutError):
        trainer.fit(tree.model())
    gate.open()
    assert plugin.waits == 1


def test_after_an_error_nothing_is_left_in_the_way(tree: Any, tmp_path: Path, faults: Any) -> None:
    """An error ends the fit as its own; saves are synchronous again and every part of the Trainer is as it was."""
    gate = faults.hold(1)
    faults.fail(1, error=lambda: OSError("no space"))
    plugin = AsyncCheckpointIO(store_factory=faults.make)
    checkpoint = tree.checkpoints(tmp_path / "ckpt", save_last="link", every_n_train_steps=1)
    logger = tree.module("loggers").CSVLogger(tmp_path)
    bar = tree.pl.callbacks.TQDMProgressBar(refresh_rate=0)
    parts = (checkpoint, logger, bar, plugin)

    class Fails(tree.pl.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, *args: Any) -> None:
            if args[-1] == 1:
                faults.faults.clear()
                gate.open()
                raise RuntimeError("of the training")

    trainer = tree.trainer(
        tmp_path,
        plugins=[plugin],
        callbacks=[AsyncCheckpointCallback(), Fails(), checkpoint, bar],
        logger=logger,
        enable_progress_bar=True,
    )
    before = [set(vars(part)) for part in (*parts, trainer.strategy)]
    with pytest.raises(RuntimeError, match="of the training"):
        trainer.fit(tree.model())
    assert plugin.synchronous
    assert type(checkpoint._fs).__name__ == "LocalFileSystem"
    after = [set(vars(part)) - seen for part, seen in zip((*parts, trainer.strategy), before, strict=True)]
    shadowed = {"_link_checkpoint", "after_save_checkpoint", "get_metrics", "save_checkpoint", "teardown"}
    assert not shadowed & set().union(*after)


def test_what_failed_is_raised_by_fit(tree: Any, tmp_path: Path, faults: Any) -> None:
    """The last save's failure is raised before ``fit`` calls the training done: ``on_fit_end`` is not reached."""
    faults.fail(error=lambda: OSError("no space"))
    ended: list[str] = []
    trainer = tree.trainer(
        tmp_path,
        plugins=[AsyncCheckpointIO(store_factory=faults.make)],
        callbacks=[AsyncCheckpointCallback(), tree.checkpoints(tmp_path / "ckpt")],
    )
    with pytest.raises(OSError, match="no space"):
        trainer.fit(tree.model(on_train_end=lambda self: ended.append("train")))
    assert ended == []


@pytest.mark.parametrize("fails", [False, True], ids=["success", "error"])
def test_strategies_that_never_tear_down(tree: Any, tmp_path: Path, faults: Any, fails: bool) -> None:
    """With a strategy that, like FSDP's, leaves its CheckpointIO alone, the plugin is torn down all the same, once."""
    faults.slow(0.05)
    strategies: Any = tree.module("strategies")

    class Forgetful(strategies.SingleDeviceStrategy):  # type: ignore[misc]
        def teardown(self) -> None:
            self.accelerator.teardown()

    class Base(tree.fabric.plugins.TorchCheckpointIO):  # type: ignore[misc]
        ended = 0

        def teardown(self) -> None:
            self.ended += 1

    def on_train_batch_end(self: Any, *args: Any) -> None:
        if fails and self.global_step == 3:
            raise RuntimeError("of the training")

    base = Base()
    plugin = AsyncCheckpointIO(base)
    checkpoint = tree.checkpoints(tmp_path / "ckpt", save_top_k=-1, every_n_train_steps=1)
    trainer = tree.trainer(
        tmp_path,
        plugins=[plugin],
        strategy=Forgetful("cpu"),
        callbacks=[AsyncCheckpointCallback(), checkpoint],
    )
    try:
        trainer.fit(tree.model(on_train_batch_end=on_train_batch_end))
    except RuntimeError:
        assert fails
    assert len(list((tmp_path / "ckpt").iterdir())) == (3 if fails else 4)
    assert base.ended == 1
    assert not plugin.is_used


@pytest.mark.parametrize(
    ("name", "given", "options"),
    [
        ("DeepSpeedStrategy", {}, {}),
        ("ModelParallelStrategy", {"_save_distributed_checkpoint": True}, {"overflow": "supersede"}),
    ],
    ids=["deepspeed", "supersede"],
)
def test_warns_once_where_the_strategy_bypasses_it(
    tree: Any, tmp_path: Path, name: str, given: dict[str, Any], options: dict[str, Any]
) -> None:
    """A strategy whose checkpoints are written past the plugin is warned of when the Trainer is set up, once."""
    single = tree.module("strategies").SingleDeviceStrategy
    strategy = type(name, (single,), given)("cpu")
    trainer = tree.trainer(
        tmp_path,
        plugins=[AsyncCheckpointIO(**options)],
        strategy=strategy,
        callbacks=[AsyncCheckpointCallback()],
    )
    model = tree.model()
    with pytest.warns(UserWarning, match=rf"^{name} writes its checkpoints itself"):
        trainer.fit(model)
    trainer.validate(model, verbose=False)  # a second warning would be an error
