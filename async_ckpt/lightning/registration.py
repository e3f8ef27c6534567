"""Registers our classes with both Lightning distributions.

``pytorch_lightning`` and ``lightning.pytorch`` are two copies of the same code with two sets of classes. A virtual
subclass of ``CheckpointIO`` is accepted by both. ``Callback`` supports no virtual subclasses, so ours gets the
``Callback`` of each copy as a base. This package imports neither distribution by itself.

What does not belong here: what the classes do.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from typing import Any

from async_ckpt.lightning.compat import patch_lightning

__all__ = [
    "default_weights_only",
    "inherit_callback",
    "inherit_if_imported",
    "is_registered",
    "register",
    "register_if_imported",
]

# Fabric's XLA strategies accept only their own CheckpointIO, not even Lightning's wrappers.
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


def register_if_imported(plugin: type) -> None:
    """Register *plugin* with the Lightning modules that are imported already: LightningCLI checks the class."""
    for base in _imported(_PLUGINS):
        base.register(plugin)


def inherit_if_imported(callback: Any) -> None:
    """Make the imported ``Callback`` classes bases of *callback*, likewise."""
    for base in _imported(_CALLBACKS):
        _inherit(callback, base)


def register(plugin: type) -> None:
    """Register *plugin* with every Lightning that the program has imported, or, if none, with every one installed.

    Raises:
        ImportError: no Lightning is installed.
    """
    for base in _classes(_PLUGINS, "AsyncCheckpointIO"):
        base.register(plugin)
    _registered.add(plugin)
    patch_lightning()


def inherit_callback(callback: Any) -> None:
    """Make ``Callback`` a base of *callback*, with the same choice of modules as `register`.

    Raises:
        ImportError: no Lightning with a Trainer is installed.
    """
    for base in _classes(_CALLBACKS, "AsyncCheckpointCallback"):
        _inherit(callback, base)


def is_registered() -> bool:
    """Return whether the program has ever made a plugin."""
    return bool(_registered)


def default_weights_only() -> bool | None:
    """Return the default of ``weights_only``: torch's own, but False before Lightning 2.6."""
    for writer in _classes(_WRITERS, "AsyncCheckpointIO"):
        if "weights_only" not in inspect.signature(writer.load_checkpoint).parameters:
            return False
    return None


def _inherit(callback: Any, base: type) -> None:
    if not issubclass(callback, base):
        callback.__bases__ = (*callback.__bases__, base)


def _imported(places: Mapping[str, list[tuple[str, str]]]) -> list[Any]:
    """Return Lightning's classes that are imported already; import nothing."""
    named = [each for tree in places.values() for each in tree]
    return [cls for module, name in named if (cls := getattr(sys.modules.get(module), name, None))]


def _classes(places: Mapping[str, list[tuple[str, str]]], what: str) -> list[Any]:
    trees = [tree for tree in places if tree in sys.modules]
    if not trees:
        trees = [tree for tree in places if importlib.util.find_spec(tree) is not None]
    if not trees:
        raise ImportError(f'{what} needs Lightning: pip install "async-ckpt[lightning]"')
    return [getattr(importlib.import_module(module), name) for tree in trees for module, name in places[tree]]
