"""Knowledge of Lightning's strategies, versions 2.4 to 2.6.

Guarantees: no strategy is imported.

What does not belong here: anything that is done during a fit.
"""

from __future__ import annotations

from typing import Any

from async_ckpt.lightning.overrides import Replacement
from async_ckpt.lightning.plugin import AsyncCheckpointIO

__all__ = ["bypass", "is_sharded", "kind_of", "plugin_of"]


def plugin_of(trainer: Any) -> AsyncCheckpointIO | None:
    """Return the outermost of our plugins that *trainer* saves with, even below other wrappers."""
    place = trainer.strategy.checkpoint_io
    while place is not None:
        if isinstance(place, AsyncCheckpointIO):
            return place
        place = getattr(place, "checkpoint_io", None)
    return None


def kind_of(strategy: Any) -> str | None:
    """Return which of Lightning's strategies that write checkpoints themselves *strategy* derives from."""
    kinds = ("DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy")
    return next((cls.__name__ for cls in type(strategy).__mro__ if cls.__name__ in kinds), None)


def is_sharded(strategy: Any) -> bool:
    """Return whether every rank of *strategy* writes a share of each checkpoint, in the format of torch's DCP."""
    kind = kind_of(strategy)
    if kind == "FSDPStrategy":
        return getattr(strategy, "_state_dict_type", None) == "sharded"
    return kind == "ModelParallelStrategy" and bool(getattr(strategy, "_save_distributed_checkpoint", False))


def bypass(strategy: Any) -> str | None:
    """Return advice if *strategy* writes its checkpoints by itself, without the plugin; otherwise ``None``."""
    kind, name = kind_of(strategy), type(strategy).__name__
    if kind == "DeepSpeedStrategy":
        cause = "as DeepSpeed writes a share of each checkpoint from every process"
        instead = 'FSDPStrategy(state_dict_type="sharded") or DDPStrategy()'
    elif is_sharded(strategy) and not isinstance(vars(strategy).get("save_checkpoint"), Replacement):
        cause = 'as it overrides save_checkpoint, or the plugin has overflow="supersede"'
        instead = f'the save_checkpoint of Lightning\'s {kind}, and overflow="block"'
    else:
        return None
    return (
        f"{name} writes its checkpoints itself, without any CheckpointIO, so AsyncCheckpointIO cannot make them "
        f"asynchronous: {cause}. Use {instead}."
    )
