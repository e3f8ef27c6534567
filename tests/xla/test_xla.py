"""Tensors of torch_xla, run by its own runtime on the CPU; ``tox -e xla`` has what is needed.

No part of the ordinary run: torch_xla is tied to one older torch and weighs seven gigabytes.
"""

from __future__ import annotations

import importlib
import io
import os
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from async_ckpt import AsyncCheckpointIO, CheckpointService
from async_ckpt.snapshot import HostBuffer, capture
from async_ckpt.snapshot.xla import fetch_values
from tests.support import PATIENCE_SECONDS, python

if os.environ.get("PJRT_DEVICE") != "CPU":
    pytest.skip("runs in `tox -e xla`: PJRT_DEVICE is not CPU", allow_module_level=True)
torch_xla: Any = pytest.importorskip("torch_xla", reason="torch_xla is not installed", exc_type=ImportError)

# Lightning: its own use of names that torch_xla has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Use torch_xla:DeprecationWarning")

DEVICE = torch_xla.device()
TREES = {
    "pytorch_lightning": "lightning_fabric",
    "lightning.pytorch": "lightning.fabric",
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]


@pytest.fixture(params=TREES)
def pl(request: pytest.FixtureRequest) -> Any:
    """Both distributions in turn: the Trainer's package."""
    importlib.import_module(TREES[request.param])
    return importlib.import_module(request.param)


def _part(pl: Any, path: str) -> Any:
    return importlib.import_module(f"{pl.__name__}.{path}")


def _fabric(pl: Any, path: str) -> Any:
    return importlib.import_module(f"{TREES[pl.__name__]}.{path}")


def _on_xla(values: Any, **options: Any) -> torch.Tensor:
    return torch.tensor(values, **options).to(DEVICE)


def _plain_state() -> dict[str, Any]:
    """Return tensors of all sorts, in containers that ``xm.save`` keeps: it makes lists of tuples."""
    state: dict[str, Any] = {str(dtype): _on_xla([[1, 0, 3], [4, 5, 1]], dtype=dtype) for dtype in DTYPES}
    state["scalar"] = _on_xla(2.5)
    state["empty"] = torch.empty(0, 3, device=DEVICE)
    state["lazy"] = state["torch.float32"] * 3 + 1
    state["transposed"] = state["torch.float32"].t()
    state["row"] = state["torch.float32"][1]
    state["complex"] = _on_xla([1 + 2j]).conj()
    state["needs grad"] = _on_xla([1.0]).requires_grad_()
    state["of the host"] = [torch.arange(3), 4, "text", 1.0, None]
    return state


def _trained() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Return a model and its optimizer after a step that is not computed yet."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8)).to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters())
    _step(model, optimizer)
    return model, optimizer


def _step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    optimizer.zero_grad()
    loss = model(torch.arange(32.0).reshape(4, 8).sin().to(DEVICE)).pow(2).mean()
    loss.backward()
    optimizer.step()
    assert isinstance(loss, torch.Tensor)
    return loss


def _executed() -> Counter[str]:
    metrics = importlib.import_module("torch_xla.debug.metrics")
    names = ("ExecuteTime", "TransferFromDeviceTime")
    return Counter({name: (metrics.metric_data(name) or (0,))[0] for name in names})


def _save(state: Any, path: Path) -> Any:
    with CheckpointService() as service:
        service.save(state, path)
    return torch.load(path, weights_only=True)


def _equal(first: Any, second: Any) -> None:
    torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)


# -- our own writer


def test_the_file_is_what_torch_xla_writes(tmp_path: Path) -> None:
    """Our file has the very bytes that ``torch_xla.core.xla_model.save`` writes."""
    state = _plain_state()
    expected = io.BytesIO()
    importlib.import_module("torch_xla.core.xla_model").save(state, expected)
    _save(state, tmp_path / "a.ckpt")
    assert (tmp_path / "a.ckpt").read_bytes() == expected.getvalue()


def test_a_training_state_keeps_what_torch_xla_would_lose(tmp_path: Path) -> None:
    """Values equal those on the device; unlike by ``xm.save``, ordered dicts keep their versions, and Parameters are
    written from the host, too.
    """
    model, optimizer = _trained()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "own": model[0].weight}  # type: ignore[index]
    loaded = _save(state, tmp_path / "a.ckpt")
    assert loaded["model"]._metadata == state["model"]._metadata
    assert type(loaded["own"]) is torch.nn.Parameter
    assert loaded["own"].device.type == "cpu"
    _equal(dict(loaded["model"]), {name: value.cpu() for name, value in model.state_dict().items()})
    for number, values in optimizer.state_dict()["state"].items():
        _equal(loaded["optimizer"]["state"][number], {name: value.cpu() for name, value in values.items()})


def test_it_loads_where_there_is_no_torch_xla(tmp_path: Path) -> None:
    """A file of XLA tensors, Parameters and attributes loads with plain torch, ``weights_only``."""
    parameter = torch.nn.Parameter(_on_xla([1.0, 2.0]))
    parameter.label = "kept"  # type: ignore[attr-defined]
    tensor = _on_xla([3.0]).requires_grad_()
    tensor.register_hook(lambda gradient: gradient)
    loaded = _save({"parameter": parameter, "tensor": tensor}, tmp_path / "a.ckpt")
    assert loaded["parameter"].label == "kept"
    script = """
        import sys
        sys.modules["torch_xla"] = None
        import torch
        print(torch.load(sys.argv[1], weights_only=True))
    """
    ran = python(script, tmp_path / "a.ckpt")
    assert ran.stdout.split() == str(loaded).split(), ran.stderr


def test_torch_xla_is_not_imported_for_others(tmp_path: Path) -> None:
    """Saving a state without XLA tensors imports no torch_xla."""
    script = """
        import sys, torch
        from async_ckpt import CheckpointService
        with CheckpointService() as service:
            service.save({"w": torch.ones(3)}, sys.argv[1])
        print("torch_xla" in sys.modules)
    """
    ran = python(script, tmp_path / "a.ckpt")
    assert ran.stdout.split() == ["False"], ran.stderr


def test_ties_stay_tied(tmp_path: Path) -> None:
    """Tied weights are two tensors in a ``state_dict``, and one storage in the file; a view is a value of its own."""
    model = torch.nn.Module()
    model.first = torch.nn.Linear(8, 8, bias=False).to(DEVICE)
    model.second = torch.nn.Linear(8, 8, bias=False)
    model.second.weight = model.first.weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.second(model.first(torch.ones(8).to(DEVICE))).sum().backward()
    optimizer.step()
    state = {**model.state_dict(), "row": model.first.weight.detach()[1]}
    assert state["first.weight"] is not state["second.weight"]
    loaded = _save(state, tmp_path / "a.ckpt")
    assert loaded["first.weight"].data_ptr() == loaded["second.weight"].data_ptr()
    assert loaded["row"].untyped_storage().nbytes() == 8 * 4


def test_later_changes_do_not_reach_the_file(tmp_path: Path) -> None:
    """What is saved is the state at the call, whatever training does while it is written (S1)."""
    model, optimizer = _trained()
    expected = {name: value.cpu() for name, value in model.state_dict().items()}
    with CheckpointService() as service:
        service.save(model.state_dict(), tmp_path / "a.ckpt")
        _step(model, optimizer)
        torch_xla.sync(wait=True)
    _equal(dict(torch.load(tmp_path / "a.ckpt", weights_only=True)), expected)


def test_what_is_pending_is_computed_once_and_stays_pending(tmp_path: Path) -> None:
    """A save in the middle of a step costs one execution and one transfer, and the step goes on as if without it."""
    model, optimizer = _trained()
    torch_xla.sync(wait=True)
    loss = _step(model, optimizer)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    before = _executed()
    _save(state, tmp_path / "a.ckpt")
    assert _executed() - before == {"ExecuteTime": 1, "TransferFromDeviceTime": 1}
    torch_xla.sync(wait=True)  # the loss still has all it is computed from
    assert loss.item() > 0
    before = _executed()
    _save(state, tmp_path / "b.ckpt")
    assert _executed() - before == {"TransferFromDeviceTime": 1}
    assert (tmp_path / "a.ckpt").read_bytes() == (tmp_path / "b.ckpt").read_bytes()


def test_transfers_are_bounded() -> None:
    """Tensors come in batches of a bounded size, a larger one alone, each to its place."""
    tensors = [_on_xla([float(number)] * length) for number, length in enumerate([4, 4, 4, 20, 4])]
    starts = [0, 64, 128, 192, 320]
    buffer = HostBuffer(1024)
    before = _executed()
    fetch_values(list(zip(starts, tensors, strict=True)), buffer.as_tensor(), fresh=True, batch_bytes=32)
    assert (_executed() - before)["TransferFromDeviceTime"] == 4
    for start, tensor in zip(starts, tensors, strict=True):
        found = torch.frombuffer(buffer.memory, dtype=torch.float32, count=len(tensor), offset=start)
        assert torch.equal(found, tensor.cpu())


def test_a_tied_tensor_needs_memory_once() -> None:
    """The budget is asked for each value once."""
    tensor = torch.ones(1 << 16, device=DEVICE)
    captured = capture({"a": tensor, "b": tensor, "c": torch.nn.Parameter(tensor).data})
    assert [storage.nbytes for storage in captured.storages] == [4 << 16]
    assert [storage.location for storage in captured.storages] == ["cpu"]


# -- Lightning


def _accelerator(pl: Any) -> Any:
    """Return the XLA accelerator, with the answers of a TPU where it would look for one."""

    class OnCPU(pl.accelerators.XLAAccelerator):  # type: ignore[misc]  # a base that is found at run time
        @staticmethod
        def is_available() -> bool:
            return True

        @staticmethod
        def parse_devices(devices: Any) -> Any:
            return devices

        @staticmethod
        def get_parallel_devices(devices: int) -> list[int]:
            return list(range(devices))

        @staticmethod
        def auto_device_count() -> int:
            return 1

    return OnCPU()


def _fit(pl: Any, directory: Path, plugin: Any, *, through_strategy: bool = False, **options: Any) -> Any:
    """Train a little on the XLA device, with many checkpoints."""

    class Tiny(pl.LightningModule):  # type: ignore[misc]  # a base that is found at run time
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(8, 2)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            assert self.layer.weight.device.type == "xla"
            return self.layer(batch[0]).pow(2).mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=0.01)

        def train_dataloader(self) -> Any:
            data = torch.utils.data.TensorDataset(torch.linspace(-1, 1, 64).reshape(-1, 8))
            return torch.utils.data.DataLoader(data, batch_size=2)

    torch.manual_seed(0)
    strategies, precision = _part(pl, "strategies"), _part(pl, "plugins.precision.xla")
    strategy = strategies.SingleDeviceXLAStrategy(
        0, **({"checkpoint_io": plugin} if through_strategy else {})
    )
    checkpoints = pl.callbacks.ModelCheckpoint(
        directory, save_last=True, every_n_train_steps=2, save_top_k=-1
    )
    trainer = pl.Trainer(
        accelerator=_accelerator(pl),
        devices=1,
        strategy=strategy,
        plugins=[precision.XLAPrecision(), *([] if through_strategy else [plugin])],
        callbacks=[checkpoints],
        max_epochs=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=directory,
    )
    assert trainer.strategy.checkpoint_io is plugin
    trainer.fit(Tiny(), **options)
    return trainer


def _checkpoints(directory: Path) -> dict[str, Any]:
    found = {path.name: torch.load(path, weights_only=True) for path in sorted(directory.glob("*.ckpt"))}
    for checkpoint in found.values():
        checkpoint.pop("callbacks")  # they name the directory
    return found


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("through_strategy", [False, True])
def test_a_trainer_on_xla_saves_what_it_saves_without_us(
    pl: Any, tmp_path: Path, with_base: bool, through_strategy: bool
) -> None:
    """A whole training, resumed from its last checkpoint, leaves the checkpoints that a synchronous one leaves."""
    base = _part(pl, "plugins").XLACheckpointIO
    _fit(pl, tmp_path / "sync", base())
    plugin = AsyncCheckpointIO(base() if with_base else None)
    _fit(pl, tmp_path / "ours", plugin, through_strategy=through_strategy)
    expected, found = _checkpoints(tmp_path / "sync"), _checkpoints(tmp_path / "ours")
    assert list(found) == [
        "epoch=0-step=2.ckpt",
        "epoch=0-step=4.ckpt",
        "epoch=1-step=6.ckpt",
        "epoch=1-step=8.ckpt",
        "last.ckpt",
    ]
    assert [found[name]["global_step"] for name in found] == [2, 4, 6, 8, 8]
    for name in expected:
        _equal(dict(found[name]["state_dict"]), dict(expected[name]["state_dict"]))
        _equal(found[name]["optimizer_states"], expected[name]["optimizer_states"])
    resumed = _fit(pl, tmp_path / "ours", plugin, ckpt_path=tmp_path / "ours" / "epoch=0-step=4.ckpt")
    assert resumed.global_step == 8


def test_the_base_writes_the_same_file(pl: Any, tmp_path: Path) -> None:
    """``XLACheckpointIO`` inside ours writes, byte for byte, what it writes alone."""
    base, state = _part(pl, "plugins").XLACheckpointIO(), _plain_state()
    plugin = AsyncCheckpointIO(base)
    plugin.save_checkpoint(state, tmp_path / "ours" / "a.ckpt")
    plugin.teardown()
    base.save_checkpoint(state, tmp_path / "alone" / "a.ckpt")
    assert (tmp_path / "ours" / "a.ckpt").read_bytes() == (tmp_path / "alone" / "a.ckpt").read_bytes()


def test_training_goes_on_while_the_base_writes(pl: Any, tmp_path: Path) -> None:
    """The base has host tensors only: it neither waits for the device nor touches what training has pending."""
    gate = threading.Event()

    class Held(_part(pl, "plugins").XLACheckpointIO):  # type: ignore[misc]  # a base that is found at run time
        def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
            assert all(value.device.type == "cpu" for value in checkpoint.values())
            assert gate.wait(PATIENCE_SECONDS)
            super().save_checkpoint(checkpoint, path, storage_options)

    model, optimizer = _trained()
    expected = {name: value.cpu() for name, value in model.state_dict().items()}
    plugin = AsyncCheckpointIO(Held())
    plugin.save_checkpoint(model.state_dict(), tmp_path / "a.ckpt")
    loss = _step(model, optimizer)  # not computed before the base has written
    before = _executed()
    gate.set()
    plugin.wait()
    assert _executed() == before
    torch_xla.sync(wait=True)
    assert loss.item() > 0
    plugin.teardown()
    _equal(torch.load(tmp_path / "a.ckpt", weights_only=True), expected)


@pytest.mark.parametrize("name", ["SingleDeviceXLAStrategy", "XLAStrategy"])
@pytest.mark.parametrize("with_base", [False, True])
def test_strategies_take_the_plugin(pl: Any, tmp_path: Path, name: str, with_base: bool) -> None:
    """Both XLA strategies take the plugin, given or set, and save, load and remove through it."""
    make = getattr(_part(pl, "strategies"), name)
    plugin = AsyncCheckpointIO(_part(pl, "plugins").XLACheckpointIO() if with_base else None)
    device = (0,) if name == "SingleDeviceXLAStrategy" else ()
    strategy = make(*device, accelerator=_accelerator(pl), checkpoint_io=plugin)
    assert strategy.checkpoint_io is plugin
    strategy = make(*device, accelerator=_accelerator(pl))
    strategy.checkpoint_io = plugin
    assert strategy.checkpoint_io is plugin
    path = tmp_path / "a.ckpt"
    strategy.save_checkpoint({"w": _on_xla([1.0]) + 1}, path)
    assert torch.equal(strategy.load_checkpoint(path)["w"], torch.tensor([2.0]))
    strategy.remove_checkpoint(path)
    plugin.wait()
    assert not path.exists()
    plugin.teardown()


@pytest.mark.parametrize("name", ["SingleDeviceXLAStrategy", "XLAStrategy"])
def test_fabric_strategies_take_the_plugin(pl: Any, tmp_path: Path, name: str) -> None:
    """Fabric's XLA strategies, which ask for an ``XLACheckpointIO`` and nothing else, take it too."""
    plugin = AsyncCheckpointIO()
    make = getattr(_fabric(pl, "strategies"), name)
    strategy = make(*((0,) if name == "SingleDeviceXLAStrategy" else ()), checkpoint_io=plugin)
    assert strategy.checkpoint_io is plugin
    model, optimizer = _trained()
    strategy.save_checkpoint(tmp_path / "a.ckpt", {"model": model, "optimizer": optimizer, "step": 3})
    state: dict[str, Any] = {
        "model": torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8)),
        "step": 0,
    }
    strategy.load_checkpoint(tmp_path / "a.ckpt", state, strict=False)
    plugin.teardown()
    assert state["step"] == 3
    assert torch.equal(state["model"][0].weight, model[0].weight.cpu())  # type: ignore[index]
