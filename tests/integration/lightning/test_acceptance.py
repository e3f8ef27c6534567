"""Both Trainers and both Fabrics take the plugin, wherever a CheckpointIO may be given, and it works there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from async_ckpt import AsyncCheckpointIO

pytestmark = pytest.mark.integration


def test_it_is_a_checkpoint_io_of_both_packages(tree: Any) -> None:
    """One class passes the type checks of Trainer and Fabric of both distributions."""
    plugin = AsyncCheckpointIO()
    assert isinstance(plugin, tree.module("plugins.io.wrapper")._WrappingCheckpointIO)
    assert isinstance(plugin, tree.fabric.plugins.CheckpointIO)


def test_trainer_takes_it_as_a_plugin(tree: Any, tmp_path: Any, names: Any) -> None:
    """``Trainer(plugins=[…])`` trains with it, and what it saved is durable when ``fit`` has returned."""
    plugin = AsyncCheckpointIO()
    trainer = tree.trainer(tmp_path, plugins=[plugin], callbacks=[tree.checkpoints(tmp_path / "ckpt")])
    assert trainer.strategy.checkpoint_io is plugin
    trainer.fit(tree.model())
    assert names(tmp_path / "ckpt") == ["epoch=0-step=4.ckpt"]
    assert torch.load(tmp_path / "ckpt" / "epoch=0-step=4.ckpt")["global_step"] == 4


def test_trainer_takes_it_without_a_list(tree: Any, tmp_path: Any) -> None:
    """``Trainer(plugins=…)`` takes the plugin itself too."""
    plugin = AsyncCheckpointIO()
    assert tree.trainer(tmp_path, plugins=plugin).strategy.checkpoint_io is plugin


def test_strategy_takes_it(tree: Any, tmp_path: Any, names: Any) -> None:
    """``Strategy(checkpoint_io=…)`` does the same."""
    plugin = AsyncCheckpointIO()
    strategy = tree.module("strategies").SingleDeviceStrategy("cpu", checkpoint_io=plugin)
    trainer = tree.trainer(tmp_path, strategy=strategy, callbacks=[tree.checkpoints(tmp_path / "ckpt")])
    assert trainer.strategy.checkpoint_io is plugin
    trainer.fit(tree.model())
    assert names(tmp_path / "ckpt") == ["epoch=0-step=4.ckpt"]


def test_trainer_offers_a_base_that_is_not_needed(tree: Any, tmp_path: Any) -> None:
    """The base that a Trainer injects at every access leaves our own writer in place."""
    plugin = AsyncCheckpointIO()
    trainer = tree.trainer(tmp_path, plugins=[plugin])
    assert trainer.strategy.checkpoint_io is trainer.strategy.checkpoint_io is plugin
    assert plugin.checkpoint_io is None


def test_trainer_fills_an_empty_wrapper_below(tree: Any, tmp_path: Any, names: Any) -> None:
    """A wrapper without a base, nested in ours, gets the strategy's; saves go through both."""
    wrapper = tree.module("plugins.io.wrapper")._WrappingCheckpointIO()
    plugin = AsyncCheckpointIO(wrapper)
    trainer = tree.trainer(
        tmp_path, plugins=[plugin], callbacks=[tree.checkpoints(tmp_path / "ckpt", save_last=True)]
    )
    trainer.fit(tree.model())
    assert type(wrapper.checkpoint_io).__name__ == "TorchCheckpointIO"
    assert names(tmp_path / "ckpt") == ["epoch=0-step=4.ckpt", "last.ckpt"]


def test_it_may_be_nested_in_a_wrapper(tree: Any, tmp_path: Any, names: Any) -> None:
    """A wrapper of Lightning's kind may have ours as its base; what it does not forward, exit or ``wait`` flushes."""
    plugin = AsyncCheckpointIO()

    class Wrapper(tree.module("plugins.io.wrapper")._WrappingCheckpointIO):  # type: ignore[misc]
        def teardown(self) -> None:
            self.checkpoint_io.teardown()

    wrapper = Wrapper(plugin)
    trainer = tree.trainer(tmp_path, plugins=[wrapper], callbacks=[tree.checkpoints(tmp_path / "ckpt")])
    assert trainer.strategy.checkpoint_io is wrapper
    trainer.fit(tree.model())
    assert names(tmp_path / "ckpt") == ["epoch=0-step=4.ckpt"]


def test_two_wrappers_deep(tree: Any, tmp_path: Any, names: Any) -> None:
    """The strategy's base reaches the innermost empty wrapper."""
    wrapping = tree.module("plugins.io.wrapper")._WrappingCheckpointIO
    innermost = wrapping()
    plugin = AsyncCheckpointIO(wrapping(innermost))
    trainer = tree.trainer(tmp_path, plugins=[plugin], callbacks=[tree.checkpoints(tmp_path / "ckpt")])
    trainer.fit(tree.model())
    assert type(innermost.checkpoint_io).__name__ == "TorchCheckpointIO"
    assert names(tmp_path / "ckpt") == ["epoch=0-step=4.ckpt"]


def test_fabric_takes_it(tree: Any, tmp_path: Any) -> None:
    """``Fabric(plugins=[…])`` saves and loads with it, with no base; a load follows the save of its path."""
    plugin = AsyncCheckpointIO()
    fabric = tree.fabric.Fabric(accelerator="cpu", devices=1, plugins=[plugin])
    model = torch.nn.Linear(8, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model, optimizer = fabric.setup(model, optimizer)
    expected = model.weight.detach().clone()
    fabric.save(tmp_path / "a.ckpt", {"model": model, "optimizer": optimizer, "step": 3})
    with torch.no_grad():
        model.weight.zero_()
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "step": 0}
    fabric.load(tmp_path / "a.ckpt", state)
    assert state["step"] == 3
    assert torch.equal(model.weight, expected)
    plugin.teardown()


def test_fabric_strategy_takes_it(tree: Any, tmp_path: Any) -> None:
    """A Fabric strategy takes it as its ``checkpoint_io``; ``wait`` makes what it saved durable."""
    plugin = AsyncCheckpointIO()
    strategies = __import__(f"{tree.fabric.__name__}.strategies", fromlist=["SingleDeviceStrategy"])
    strategy = strategies.SingleDeviceStrategy("cpu", checkpoint_io=plugin)
    fabric = tree.fabric.Fabric(accelerator="cpu", devices=1, strategy=strategy)
    fabric.save(tmp_path / "a.ckpt", {"step": 3})
    plugin.wait()
    assert torch.load(tmp_path / "a.ckpt") == {"step": 3}
    plugin.teardown()


def test_fabric_with_a_base(tree: Any, tmp_path: Any) -> None:
    """Fabric calls with keywords; a base gets them as they are."""
    plugin = AsyncCheckpointIO(tree.fabric.plugins.TorchCheckpointIO())
    fabric = tree.fabric.Fabric(accelerator="cpu", devices=1, plugins=[plugin])
    fabric.save(tmp_path / "a.ckpt", {"step": 3})
    assert fabric.load(tmp_path / "a.ckpt") == {"step": 3}
    plugin.teardown()


def test_a_base_of_lightning_itself(tree: Any, tmp_path: Any, names: Any) -> None:
    """A Trainer's ``TorchCheckpointIO`` as the base: the files are there and load."""
    plugin = AsyncCheckpointIO(tree.fabric.plugins.TorchCheckpointIO())
    trainer = tree.trainer(
        tmp_path,
        max_epochs=3,
        plugins=[plugin],
        callbacks=[tree.checkpoints(tmp_path / "ckpt", save_last=True)],
    )
    trainer.fit(tree.model())
    assert names(tmp_path / "ckpt") == ["epoch=2-step=12.ckpt", "last.ckpt"]
    assert torch.load(tmp_path / "ckpt" / "last.ckpt")["global_step"] == 12
