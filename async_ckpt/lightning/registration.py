"""Makes the two Lightning distributions take our classes for their own.

``pytorch_lightning`` and ``lightning.pytorch`` are two copies of the same code with two sets of classes. A virtual
subclass of ``CheckpointIO`` is accepted by both. ``Callback`` knows no virtual ones, so ours gets it as a base, of
each copy. None is imported with this package. What does not belong here: anything that the classes do.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from typing import Any

from async_ckpt.lightning.compat import repair

__all__ = [
    "default_weights_only",
    "inherit_callback",
    "introduce_callback",
    "introduce_plugin",
    "is_registered",
    "register",
]

# Fabric's strategies for XLA take nothing but the CheckpointIO of their own, not even Lightning's wrappers.
_PLUGINS = {
    "pytorch_lightning": [("pytorch_lightning.plugins.io.wrapper", "_WrappingCheckpointIO")],
    "lightning": [
        ("lightning.pytorch.plugins.io.wrapper", "_WrappingCheckpointIO"),
        ("lightning.fabric.plugins.io.xla", "XLACheckpointIO"),
    ],
    "lightning_fabric": [("lightning_fabric.plugins.io.xla", "XLACheckpointIO")],
}
_CALLBACKS = {
    "pytorch_lightning": [("pytorch_lightning.callbacks.callback", "Callback")],
    "lightning": [("lightning.pytorch.callbacks.callback", "Callback")],
}
_WRITERS = {
    "pytorch_lightning": [("lightning_fabric.plugins.io.torch_io", "TorchCheckpointIO")],
    "lightning": [("lightning.fabric.plugins.io.torch_io", "TorchCheckpointIO")],
    "lightning_fabric": [("lightning_fabric.plugins.io.torch_io", "TorchCheckpointIO")],
}

_registered: set[type] = set()


def introduce_plugin(plugin: type) -> None:
    """Register *plugin* with what is imported of Lightning, before one is made: LightningCLI asks the class."""
    for base in _imported(_PLUGINS):
        base.register(plugin)


def introduce_callback(callback: Any) -> None:
    """Make ``Callback`` a base of *callback*, likewise."""
    for base in _imported(_CALLBACKS):
        _inherit(callback, base)


def register(plugin: type) -> None:
    """Register *plugin* with every Lightning that the program has imported; with all installed, if it has none yet.

    Raises:
        ImportError: no Lightning is installed.
    """
    for base in _classes(_PLUGINS, "AsyncCheckpointIO"):
        base.register(plugin)
    _registered.add(plugin)
    repair()


def inherit_callback(callback: Any) -> None:
    """Make ``Callback`` a base of *callback*, likewise.

    Raises:
        ImportError: no Lightning with a Trainer is installed.
    """
    for base in _classes(_CALLBACKS, "AsyncCheckpointCallback"):
        _inherit(callback, base)


def is_registered() -> bool:
    """Return whether the program has ever made a plugin."""
    return bool(_registered)


def default_weights_only() -> bool | None:
    """Return what a load means that does not say: torch's default, but before Lightning 2.6 anything was loaded."""
    for writer in _classes(_WRITERS, "AsyncCheckpointIO"):
        if "weights_only" not in inspect.signature(writer.load_checkpoint).parameters:
            return False
    return None


def _inherit(callback: Any, base: type) -> None:
    if not issubclass(callback, base):
        callback.__bases__ = (*callback.__bases__, base)


def _imported(places: Mapping[str, list[tuple[str, str]]]) -> list[Any]:
    """Return the classes of Lightning that are there already; nothing is imported."""
    named = [each for tree in places.values() for each in tree]
    return [cls for module, name in named if (cls := getattr(sys.modules.get(module), name, None))]


def _classes(places: Mapping[str, list[tuple[str, str]]], what: str) -> list[Any]:
    trees = [tree for tree in places if tree in sys.modules]
    if not trees:
        trees = [tree for tree in places if importlib.util.find_spec(tree) is not None]
    if not trees:
        raise ImportError(f'{what} needs Lightning: pip install "async-ckpt[lightning]"')
    return [getattr(importlib.import_module(module), name) for tree in trees for module, name in places[tree]]
