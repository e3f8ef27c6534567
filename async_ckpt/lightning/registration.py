"""Makes the two Lightning distributions take a class for a checkpoint plugin of their own.

``pytorch_lightning`` and ``lightning.pytorch`` are two copies of the same code with two sets of classes. A
virtual subclass is accepted by both, and needs neither to be imported with this package. What does not belong
here: anything that the plugin does.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys

__all__ = ["register"]

_TREES = {
    "pytorch_lightning": ("pytorch_lightning.plugins.io.wrapper", "_WrappingCheckpointIO"),
    "lightning": ("lightning.pytorch.plugins.io.wrapper", "_WrappingCheckpointIO"),
    "lightning_fabric": ("lightning_fabric.plugins.io.checkpoint_io", "CheckpointIO"),
}


def register(plugin: type) -> None:
    """Register *plugin* with every Lightning that the program has imported; with all installed, if it has none yet.

    Raises:
        ImportError: no Lightning is installed.
    """
    trees = [tree for tree in _TREES if tree in sys.modules]
    if not trees:
        trees = [tree for tree in _TREES if importlib.util.find_spec(tree) is not None]
    if not trees:
        raise ImportError('AsyncCheckpointIO needs Lightning: pip install "async-ckpt[lightning]"')
    for tree in trees:
        module, name = _TREES[tree]
        getattr(importlib.import_module(module), name).register(plugin)
