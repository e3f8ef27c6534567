"""Makes a Trainer save through the plugin where every rank writes a share: with FSDP and ModelParallel.

The methods of one strategy object that save and load are replaced. They write what Lightning writes: a directory of
DCP's with ``meta.pt`` in it, from which a Trainer without this package resumes.

Guarantees: Lightning's collective operations are called as it calls them, and no others. All ranks raise
failures at the same save, so none is left alone in a collective operation. What ``meta.pt`` holds is an item of the
checkpoint, too, so counters always belong to the same checkpoint as the weights (D6).

What does not belong here: the queue, errors, waiting (session); loading (sharded_loading); the bytes (the package
``sharded``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from async_ckpt.lightning.deferral import is_from_lightning
from async_ckpt.lightning.overrides import Replacement
from async_ckpt.lightning.plugin import AsyncCheckpointIO
from async_ckpt.lightning.sharded_loading import META, ShardedLoading
from async_ckpt.lightning.strategies import is_sharded, kind_of

__all__ = ["take_over"]


def take_over(strategy: Any, plugin: AsyncCheckpointIO) -> None:
    """Have *plugin* write what *strategy* writes past any CheckpointIO, if that is of a kind that does.

    It stays so, as a strategy may save at any time; again does nothing. One whose ``save_checkpoint`` is not
    Lightning's goes on to use that. So does any with ``overflow="supersede"``, of which each rank would decide
    differently.
    """
    own = vars(strategy).get("save_checkpoint")
    if isinstance(own, Replacement):
        if own.by is plugin:
            return
    elif own is not None:
        return
    if not is_sharded(strategy) or not is_from_lightning(type(strategy).save_checkpoint):
        return
    if plugin.service.options.overflow == "supersede":
        return
    plugin.is_sharded = True
    if kind_of(strategy) == "ModelParallelStrategy":
        ours: _Sharding = _ModelParallel(strategy, plugin, model_key="state_dict")
    else:
        ours = _Sharding(strategy, plugin, model_key="model")
    for name in ours.replaces:
        if is_from_lightning(getattr(type(strategy), name)):
            setattr(strategy, name, Replacement(strategy, name, getattr(ours, name), by=plugin))


class _Sharding:
    """What takes the place of a strategy's methods.

    Args:
        strategy: Lightning's.
        plugin: which writes.
        model_key: what the strategy calls the weights in a checkpoint.
    """

    replaces: tuple[str, ...] = ("save_checkpoint", "load_checkpoint")

    def __init__(self, strategy: Any, plugin: AsyncCheckpointIO, *, model_key: str) -> None:
        self._strategy = strategy
        self._plugin = plugin
        self._model_key = model_key
        self.load_checkpoint = ShardedLoading(strategy, plugin, model_key=model_key).load_checkpoint

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Save, as the strategy's own method does; it returns once the state may be mutated."""
        strategy, plugin = self._strategy, self._plugin
        if storage_options is not None:
            raise TypeError("give storage_options to the plugin: AsyncCheckpointIO(storage_options={…})")
        first = strategy.is_global_zero
        # As Lightning does, so that all ranks save to one place; but without Path(), which removes a slash from a URL.
        path, known = strategy.broadcast((filepath, plugin.known_failures if first else None))
        state: dict[str, Any] = {self._model_key: checkpoint["state_dict"]}
        for number, optimizer_state in enumerate(checkpoint.get("optimizer_states", [])):
            state[f"optimizer_{number}"] = optimizer_state
        extras = {META: _rest(checkpoint)} if first else {}
        plugin.save_sharded(state, path, extras=extras, known=known)


class _ModelParallel(_Sharding):
    """The methods of ModelParallelStrategy."""

    replaces = (*_Sharding.replaces, "lightning_module_state_dict", "optimizer_state")

    # Lightning's own methods let torch copy everything to fresh, pageable memory. Our snapshot copies it anyway.

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return this rank's part of the weights, without copying."""
        from torch.distributed.checkpoint.state_dict import get_model_state_dict

        return get_model_state_dict(self._strategy.model)

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Return this rank's part of an optimizer's state, without copying."""
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        optimizer = getattr(optimizer, "_optimizer", optimizer)  # Lightning's wrapper has it
        return get_optimizer_state_dict(self._strategy.model, optimizer)


def _rest(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rest of *checkpoint*, which is the same on every rank."""
    return {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
