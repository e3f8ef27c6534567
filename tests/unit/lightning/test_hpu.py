"""``HPUCheckpointIO`` as the base, by its documented interface.

Nothing for Gaudi can be run here: its torch plugin is on no index, and lightning-habana 1.6.0, the last there is,
cannot be imported beside Lightning 2.6 (``cannot import name 'LRScheduler' from 'lightning.fabric.utilities.types'``).
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from async_ckpt import AsyncCheckpointIO
from async_ckpt.snapshot.locations import mark

TREES = {
    "pytorch_lightning": "lightning_fabric",
    "lightning.pytorch": "lightning.fabric",
}


class Parts:
    """What lightning-habana has of its own, over one Lightning: the CheckpointIO, and a strategy's use of it."""

    def __init__(self, trainer: str) -> None:
        io: Any = importlib.import_module(f"{TREES[trainer]}.plugins.io.torch_io")
        cloud: Any = importlib.import_module(f"{TREES[trainer]}.utilities.cloud_io")
        apply: Any = importlib.import_module(f"{TREES[trainer]}.utilities.apply_func")
        single: Any = importlib.import_module(f"{trainer}.strategies")
        wrapper: Any = importlib.import_module(f"{trainer}.plugins.io.wrapper")

        class HPUCheckpointIO(io.TorchCheckpointIO):  # type: ignore[misc]  # a base that is found at run time
            """Moves everything to the CPU and writes it there."""

            def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
                if storage_options is not None:
                    raise TypeError("storage_options is not supported for HPUCheckpointIO")
                cloud.get_filesystem(path).makedirs(os.path.dirname(path), exist_ok=True)
                cloud._atomic_save(apply.move_data_to_device(checkpoint, torch.device("cpu")), path)

        class SingleHPUStrategy(single.SingleDeviceStrategy):  # type: ignore[misc]  # likewise
            """Hands a wrapper a base of its own at every access."""

            _checkpoint_io: Any

            @property
            def checkpoint_io(self) -> Any:
                if self._checkpoint_io is None:
                    self._checkpoint_io = HPUCheckpointIO()
                elif isinstance(self._checkpoint_io, wrapper._WrappingCheckpointIO):
                    self._checkpoint_io.checkpoint_io = HPUCheckpointIO()
                return self._checkpoint_io

            @checkpoint_io.setter
            def checkpoint_io(self, checkpoint_io: Any) -> None:
                self._checkpoint_io = checkpoint_io

        self.io: Any = HPUCheckpointIO
        self.strategy: Any = SingleHPUStrategy


@pytest.fixture(params=TREES)
def hpu(request: pytest.FixtureRequest) -> Parts:
    """The doubles, over both distributions in turn."""
    return Parts(request.param)


def _state() -> dict[str, Any]:
    """Return a state whose tensors are, for all that torch.save knows, on an HPU."""
    weight = torch.arange(12.0).reshape(3, 4)
    mark(weight.untyped_storage(), "hpu:0")
    return {"weight": weight, "tied": weight, "step": 3}


def test_the_strategy_gives_the_plugin_its_base(hpu: Parts, tmp_path: Path) -> None:
    """Without a base of the user's the plugin takes the strategy's, once, and saves, loads and removes through it."""
    plugin = AsyncCheckpointIO()
    strategy = hpu.strategy("cpu", checkpoint_io=plugin)
    assert strategy.checkpoint_io is plugin
    base = plugin.checkpoint_io
    assert type(base) is hpu.io
    path = tmp_path / "new" / "a.ckpt"
    strategy.save_checkpoint({"weight": torch.ones(3)}, path)
    assert torch.equal(strategy.load_checkpoint(path)["weight"], torch.ones(3))
    strategy.remove_checkpoint(path)
    plugin.wait()
    assert not path.exists()
    assert plugin.checkpoint_io is base
    plugin.teardown()


def test_the_file_needs_no_hpu(hpu: Parts, tmp_path: Path) -> None:
    """What the base writes lies on the CPU, as when it moves the tensors itself: it loads where there is no HPU."""
    plugin = AsyncCheckpointIO(hpu.io())
    state = _state()
    plugin.save_checkpoint(state, tmp_path / "a.ckpt")
    state["weight"].zero_()
    plugin.teardown()
    loaded = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert torch.equal(loaded["weight"], torch.arange(12.0).reshape(3, 4))
    assert loaded["tied"].data_ptr() == loaded["weight"].data_ptr()
    assert loaded["step"] == 3


def test_what_the_base_refuses_is_told(hpu: Parts, tmp_path: Path) -> None:
    """The base's own refusal of ``storage_options`` reaches the user, and the plugin works on."""
    plugin = AsyncCheckpointIO(hpu.io())
    plugin.save_checkpoint(_state(), tmp_path / "a.ckpt", storage_options={"a": 1})
    with pytest.raises(TypeError, match="storage_options"):
        plugin.wait()
    plugin.save_checkpoint(_state(), tmp_path / "a.ckpt")
    plugin.teardown()
    assert (tmp_path / "a.ckpt").exists()
