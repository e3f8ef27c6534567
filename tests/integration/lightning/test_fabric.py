"""The plugin in Fabric, of both packages, which never tears a CheckpointIO down: who uses it ends it.

What Fabric accepts and how a load follows a save is in ``test_acceptance.py``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
import torch

from async_ckpt import AsyncCheckpointIO, OptionError, StoreError
from async_ckpt.lightning import attach
from tests.integration.lightning.both_ways import ONE_TREE
from tests.support import python

pytestmark = pytest.mark.integration


def _fabric(tree: Any, *plugins: Any, **options: Any) -> Any:
    return tree.fabric.Fabric(accelerator="cpu", devices=1, plugins=list(plugins), **options)


def _set_up(fabric: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Return a model and its optimizer, set up and trained one step, and the state to save."""
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 2)
    model, optimizer = fabric.setup(model, torch.optim.Adam(model.parameters(), lr=0.01))
    _step(fabric, model, optimizer)
    return model, optimizer, {"model": model, "optimizer": optimizer, "step": 1}


def _step(fabric: Any, model: Any, optimizer: Any) -> None:
    fabric.backward(model(torch.ones(4, 8)).pow(2).mean())
    optimizer.step()
    optimizer.zero_grad()


def test_context_manager_makes_all_durable(tree: Any, tmp_path: Path, faults: Any) -> None:
    """``with AsyncCheckpointIO() as plugin``: saves return before they are written; after it, all files are whole."""
    gate = faults.hold(operation="begin")
    with AsyncCheckpointIO(store_factory=faults.make, queue_depth=3) as plugin:
        fabric = _fabric(tree, plugin)
        model, optimizer, state = _set_up(fabric)
        weights = []
        for number in range(3):
            fabric.save(tmp_path / f"{number}.ckpt", {**state, "step": number})
            weights.append(model.weight.detach().clone())
            _step(fabric, model, optimizer)
        assert list(tmp_path.iterdir()) == []
        gate.open()
    for number in range(3):
        saved = torch.load(tmp_path / f"{number}.ckpt")
        assert saved["step"] == number
        assert torch.equal(saved["model"]["weight"], weights[number])


def test_context_manager_raises_what_failed(tree: Any, tmp_path: Path, faults: Any) -> None:
    """A failed save that nobody was told of is raised at the end of the ``with``; the plugin works again after it."""
    faults.fail(1, error=lambda: StoreError("the disk is full"))
    plugin = AsyncCheckpointIO(store_factory=faults.make)
    fabric = _fabric(tree, plugin)
    with pytest.raises(StoreError, match="the disk is full"), plugin:
        fabric.save(tmp_path / "a.ckpt", {"step": 1})
    assert list(tmp_path.iterdir()) == []
    with plugin:
        fabric.save(tmp_path / "a.ckpt", {"step": 2})
    assert torch.load(tmp_path / "a.ckpt") == {"step": 2}


def test_error_in_the_loop_stays_first(tree: Any, tmp_path: Path, faults: Any) -> None:
    """Where the loop breaks while a save fails, the ``with`` raises the loop's error (E2)."""
    gate = faults.hold(operation="begin")
    faults.fail(error=lambda: StoreError("the disk is full"))
    plugin = AsyncCheckpointIO(store_factory=faults.make)

    def loop() -> None:
        with plugin:
            _fabric(tree, plugin).save(tmp_path / "a.ckpt", {"step": 1})
            gate.open()
            _ = 1 // 0

    with pytest.raises(ZeroDivisionError):
        loop()
    plugin.teardown()


@pytest.mark.parametrize("how", ["wait", "flush"])
def test_flush(tree: Any, tmp_path: Path, faults: Any, how: str) -> None:
    """``plugin.wait()``, or ``await plugin.flush()``, makes what Fabric has saved so far durable; it goes on then."""
    gates = [faults.hold(1), faults.hold(2)]
    faults.slow(0.05)
    plugin = AsyncCheckpointIO(store_factory=faults.make)
    flush: Callable[[], None] = plugin.wait if how == "wait" else lambda: anyio.run(plugin.flush)
    fabric = _fabric(tree, plugin)
    for number, gate in enumerate(gates):
        fabric.save(tmp_path / f"{number}.ckpt", {"step": number})
        assert not (tmp_path / f"{number}.ckpt").exists()
        gate.open()
        flush()
        assert torch.load(tmp_path / f"{number}.ckpt") == {"step": number}
    plugin.teardown()


def test_default_base_writes_fabrics_own_file(tree: Any, tmp_path: Path) -> None:
    """Without a base our own writer stays in place, however often Fabric asks; its file holds what Fabric's would."""
    theirs = _fabric(tree)
    theirs.save(tmp_path / "theirs.ckpt", _set_up(theirs)[2])
    with AsyncCheckpointIO() as plugin:
        fabric = _fabric(tree, plugin)
        assert fabric.strategy.checkpoint_io is fabric.strategy.checkpoint_io is plugin
        fabric.save(tmp_path / "ours.ckpt", _set_up(fabric)[2])
        assert plugin.checkpoint_io is None
    ours, other = (torch.load(tmp_path / name) for name in ("ours.ckpt", "theirs.ckpt"))
    assert ours.keys() == other.keys()
    assert ours["step"] == other["step"]
    assert all(torch.equal(ours["model"][name], other["model"][name]) for name in other["model"])
    for key, moments in other["optimizer"]["state"].items():
        assert all(torch.equal(ours["optimizer"]["state"][key][name], moments[name]) for name in moments)


def test_filter_and_raw_load(tree: Any, tmp_path: Path, faults: Any) -> None:
    """``fabric.save(filter=…)`` and ``fabric.load_raw`` work, the load right after the save, before it is written."""
    faults.slow(0.05)
    with AsyncCheckpointIO(store_factory=faults.make) as plugin:
        fabric = _fabric(tree, plugin)
        model, _, state = _set_up(fabric)
        fabric.save(tmp_path / "a.ckpt", state, filter={"model": lambda name, value: name == "weight"})
        loaded = fabric.load(tmp_path / "a.ckpt")
        assert list(loaded["model"]) == ["weight"]
        fabric.save(tmp_path / "weights.ckpt", model.state_dict())
        other = torch.nn.Linear(8, 2)
        fabric.load_raw(tmp_path / "weights.ckpt", other)
        assert torch.equal(other.weight, model.weight)


def test_base_is_torn_down_by_the_context_manager(tree: Any, tmp_path: Path) -> None:
    """With a base, the end of the ``with`` writes through it and tears it down, which Fabric itself never does."""
    log: list[str] = []

    class Base(tree.fabric.plugins.TorchCheckpointIO):  # type: ignore[misc]  # a base found at run time
        def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            super().save_checkpoint(*args, **kwargs)
            log.append("saved")

        def teardown(self) -> None:
            log.append("torn down")

    with AsyncCheckpointIO(Base()) as plugin:
        _fabric(tree, plugin).save(tmp_path / "a.ckpt", {"step": 1})
    assert log == ["saved", "torn down"]
    assert torch.load(tmp_path / "a.ckpt") == {"step": 1}


@pytest.mark.parametrize(
    ("name", "arguments"), [("FSDPStrategy", ()), ("ModelParallelStrategy", (lambda model, mesh: model,))]
)
def test_sharding_strategies_of_fabric_refuse_any(tree: Any, name: str, arguments: Any) -> None:
    """Fabric's FSDP and ModelParallel take no CheckpointIO, ours or another: Lightning says so, nothing is lost."""
    strategy = getattr(importlib.import_module(f"{tree.fabric.__name__}.strategies"), name)(*arguments)
    with pytest.raises(NotImplementedError, match="CheckpointIO"):
        strategy.checkpoint_io = AsyncCheckpointIO()


def test_attached_to_a_strategy_that_takes_one(tree: Any, tmp_path: Path) -> None:
    """It is Fabric's CheckpointIO then, as with ``plugins=``."""
    fabric = _fabric(tree)
    with attach(fabric) as plugin:
        assert fabric.strategy.checkpoint_io is plugin
        _, _, state = _set_up(fabric)
        fabric.save(tmp_path / "a.ckpt", state)
        assert fabric.load(tmp_path / "a.ckpt", dict(state)) == {}
    assert torch.load(tmp_path / "a.ckpt")["step"] == 1


def test_what_is_not_attached(tree: Any) -> None:
    """A base that would never be called, options that ranks would follow differently, and code that is not known."""
    strategies = importlib.import_module(f"{tree.fabric.__name__}.strategies")

    class Own(strategies.FSDPStrategy):  # type: ignore[misc]  # a base found at run time
        def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            pass

    class DeepSpeedStrategy(strategies.DDPStrategy):  # type: ignore[misc]  # the same: the real one needs CUDA
        pass

    def refusal(strategy: Any, plugin: AsyncCheckpointIO) -> str:
        methods = dict(vars(strategy))
        with pytest.raises(OptionError) as refused:
            attach(SimpleNamespace(strategy=strategy), plugin)
        assert vars(strategy) == methods
        return str(refused.value)

    base = tree.fabric.plugins.TorchCheckpointIO()
    assert "give it no base" in refusal(strategies.FSDPStrategy(), AsyncCheckpointIO(base))
    assert "use 'block'" in refusal(strategies.FSDPStrategy(), AsyncCheckpointIO(overflow="supersede"))
    assert "overrides save_checkpoint" in refusal(Own(), AsyncCheckpointIO())
    assert "from every process" in refusal(DeepSpeedStrategy(), AsyncCheckpointIO())
    full = strategies.FSDPStrategy(state_dict_type="full")
    attach(SimpleNamespace(strategy=full), AsyncCheckpointIO(overflow="supersede"))  # the first rank decides


@ONE_TREE
def test_two_processes(tree: Any, tmp_path: Path, process_group: dict[str, str]) -> None:
    """``fabric.launch`` with two forked processes: the first one writes, both load, all is durable at the end."""
    done = python(
        """
        import importlib, sys, threading
        import torch
        from async_ckpt import AsyncCheckpointIO

        torch.set_num_threads(1)  # OpenMP does not survive a fork
        Fabric = importlib.import_module(sys.argv[1]).Fabric
        path = sys.argv[2] + "/a.ckpt"

        def train(fabric):
            with plugin:
                fabric.save(path, {"rank": fabric.global_rank})
                busy = sum(thread.name.startswith("async_ckpt") for thread in threading.enumerate())
            fabric.barrier()
            loaded = fabric.load(path)
            plugin.teardown()
            print(f"{fabric.global_rank} {busy > 0} {loaded}\\n", end="", flush=True)

        plugin = AsyncCheckpointIO()
        Fabric(accelerator="cpu", devices=2, strategy="ddp_notebook", plugins=[plugin]).launch(train)
        """,
        tree.fabric.__name__,
        tmp_path,
        timeout=100.0,
        env=process_group,
    )
    assert sorted(done.stdout.splitlines()) == ["0 True {'rank': 0}", "1 False {'rank': 0}"], done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]
