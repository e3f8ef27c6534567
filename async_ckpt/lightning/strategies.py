"""Knowledge of Lightning's strategies, versions 2.4 to 2.6.

Guarantees: no strategy is imported.

What does not belong here: anything that is done during a fit.
"""

from __future__ import annotations

from typing import Any

from async_ckpt.lightning.plugin import AsyncCheckpointIO

__all__ = ["bypass", "plugin_of"]


def plugin_of(trainer: Any) -> AsyncCheckpointIO | None:
    """Return the outermost of our plugins that *trainer* saves with, even below other wrappers."""
    place = trainer.strategy.checkpoint_io
    while place is not None:
        if isinstance(place, AsyncCheckpointIO):
            return place
        place = getattr(place, "checkpoint_io", None)
    return None


def bypass(strategy: Any) -> str | None:
    """Return advice if *strategy* writes its checkpoints past any CheckpointIO; otherwise ``None``."""
    names = {cls.__name__ for cls in type(strategy).__mro__}
    if "DeepSpeedStrategy" in names:
        instead = 'FSDPStrategy(state_dict_type="full") or DDPStrategy()'
    elif "FSDPStrategy" in names and getattr(strategy, "_state_dict_type", None) == "sharded":
        instead = 'FSDPStrategy(state_dict_type="full")'
    elif "ModelParallelStrategy" in names and getattr(strategy, "_save_distributed_checkpoint", False):
        instead = "ModelParallelStrategy(save_distributed_checkpoint=False)"
    else:
        return None
    return (
        f"{type(strategy).__name__}, as it is set up now, writes a share of each checkpoint from every process, past "
        f"any CheckpointIO, so AsyncCheckpointIO cannot make it asynchronous. To save one file, use {instead}."
    )
