"""Loading sharded checkpoints into a strategy's model and optimizers, from any storage and any number of ranks.

Guarantees: a pending save of the path is waited for. What is no tensor is read from the same checkpoint as the tensors
(D6), so one whose ``meta.pt`` a killed process did not come to write is whole. Directories of Lightning's own are read,
too; a plain file is left to Lightning.

What does not belong here: saving; reading itself (the package ``sharded``).
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

from async_ckpt.errors import RankError
from async_ckpt.lightning.plugin import AsyncCheckpointIO
from async_ckpt.lightning.registration import default_weights_only
from async_ckpt.lightning.strategies import kind_of
from async_ckpt.service import CheckpointService

__all__ = ["META", "ShardedLoading"]

META = "meta.pt"
"""Lightning's name for everything in a checkpoint but weights and optimizer states."""

_MARKER = "/.metadata"


class ShardedLoading:
    """Stands in for ``load_checkpoint`` of a strategy.

    Args:
        strategy: Lightning's.
        plugin: which has saved, or not.
        model_key: the name of the weights in the strategy's checkpoints.
    """

    def __init__(self, strategy: Any, plugin: AsyncCheckpointIO, *, model_key: str) -> None:
        self._strategy = strategy
        self._plugin = plugin
        self._model_key = model_key
        self._load_as_lightning = partial(type(strategy).load_checkpoint, strategy)

    def load_checkpoint(self, checkpoint_path: Any, **options: Any) -> Any:
        """Load, as the strategy's own method does; returns everything but weights and optimizer states."""
        path = os.fspath(checkpoint_path).removesuffix(_MARKER)
        failure, found = None, ("", False, "")
        if self._strategy.is_global_zero:
            try:
                found = (path, self._is_sharded(path), "")
            except Exception as error:  # the others are told first
                failure, found = error, (path, False, f"{type(error).__name__}: {error}")
        path, is_sharded, reason = self._strategy.broadcast(
            found
        )  # as Lightning does, so that all load from one path
        if failure is not None:
            raise failure
        if reason:
            raise RankError(f"rank 0 could not load {path!r}: {reason}")
        if not is_sharded:
            return self._load_as_lightning(path, **options)
        weights_only = options.get("weights_only")
        weights_only = default_weights_only() if weights_only is None else weights_only
        with self._plugin.loading(path) as service:
            return self._load(service, path, weights_only=weights_only is not False)

    def _is_sharded(self, path: str) -> bool:
        """Return whether a directory with the marker of a checkpoint is at *path*, once pending saves have ended."""
        with self._plugin.loading(path) as service, service.turn(self._plugin.locate_directory(path)):
            return service.newest(path) == ""

    def _load(self, service: CheckpointService, path: str, *, weights_only: bool) -> Any:
        rest: dict[str, Any] = {META: None}
        service.load_sharded(rest, path, strict=False, weights_only=weights_only)
        if rest[META] is None:  # Lightning wrote it
            rest[META] = service.load(f"{path}/{META}", weights_only=weights_only)
        self._load_weights(service, path)
        for number, optimizer in enumerate(self._strategy.optimizers):
            self._load_optimizer(service, path, f"optimizer_{number}", optimizer)
        return rest[META]

    def _load_weights(self, service: CheckpointService, path: str) -> None:
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            get_model_state_dict,
            set_model_state_dict,
        )

        model, strict = self._strategy.model, self._strategy.lightning_module.strict_loading
        weights = {self._model_key: get_model_state_dict(model)}
        service.load_sharded(weights, path)
        if kind_of(self._strategy) == "ModelParallelStrategy":
            model.load_state_dict(weights[self._model_key], strict=strict)
        else:
            set_model_state_dict(model, weights[self._model_key], options=StateDictOptions(strict=strict))

    def _load_optimizer(self, service: CheckpointService, path: str, name: str, optimizer: Any) -> None:
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

        model = self._strategy.model
        states = {name: get_optimizer_state_dict(model, optimizer)}
        service.load_sharded(states, path)
        set_optimizer_state_dict(model, optimizer, states[name])
