"""Loading sharded checkpoints into a strategy's model and optimizers, from any storage and any number of ranks.

Guarantees: a pending save of the path is waited for. Everything is read from the same checkpoint (D6), and ``meta.pt``
is not needed, so a checkpoint is complete even if a killed process has not written that file. Directories that
Lightning wrote are read, too; Lightning itself loads plain files.

What does not belong here: saving; reading itself (the package ``sharded``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from async_ckpt.errors import RankError
from async_ckpt.lightning.plugin import AsyncCheckpointIO
from async_ckpt.lightning.registration import default_weights_only
from async_ckpt.lightning.strategies import kind_of
from async_ckpt.service import CheckpointService

__all__ = ["META", "ShardedLoading", "agree_on_path", "load_meta", "load_model", "load_optimizer"]

META = "meta.pt"
"""Lightning's name for everything in a checkpoint but weights and optimizer states."""

_MARKER = "/.metadata"
_COMPILED = "_orig_mod"
"""What torch.compile puts into the names of what it wraps,"""
_WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""and what FSDP and activation checkpointing put there, and leave out of a ``state_dict``."""


class ShardedLoading:
    """Replaces ``load_checkpoint`` of a Trainer's strategy.

    Args:
        strategy: Lightning's.
        plugin: its pending saves are waited for.
        model_key: the name of the weights in the strategy's checkpoints.
    """

    def __init__(self, strategy: Any, plugin: AsyncCheckpointIO, *, model_key: str) -> None:
        self._strategy = strategy
        self._plugin = plugin
        self._model_key = model_key
        self._load_as_lightning = partial(type(strategy).load_checkpoint, strategy)

    def load_checkpoint(self, checkpoint_path: Any, **options: Any) -> Any:
        """Load, as the strategy's own method does; returns everything but weights and optimizer states."""
        strategy = self._strategy
        path, is_sharded = agree_on_path(strategy, self._plugin, checkpoint_path)
        if not is_sharded:
            return self._load_as_lightning(path, **options)
        with self._plugin.loading(path) as service:
            meta = load_meta(service, path, weights_only=options.get("weights_only"))
            model, strict = strategy.model, strategy.lightning_module.strict_loading
            load_model(service, path, self._model_key, model, strict=strict, kind=kind_of(strategy))
            for number, optimizer in enumerate(strategy.optimizers):
                load_optimizer(service, path, f"optimizer_{number}", model, optimizer, kind=kind_of(strategy))
        return meta


def agree_on_path(strategy: Any, plugin: AsyncCheckpointIO, given: Any) -> tuple[Any, bool]:
    """Return, on every rank, the first rank's path, and whether a sharded checkpoint is there.

    The first rank waits for its pending saves of the path before.

    Raises:
        RankError: the first rank could not find out.
        Exception: the first rank's own error, on that rank.
    """
    path = os.fspath(given).removesuffix(_MARKER) if isinstance(given, (str, os.PathLike)) else given
    failure, found = None, (path, False, "")
    if strategy.is_global_zero:
        try:
            with plugin.loading(path) as service, service.turn(plugin.locate_directory(path)):
                found = (path, service.newest(path) == "", "")
        except Exception as error:  # the others are told first
            failure, found = error, (path, False, f"{type(error).__name__}: {error}")
    path, is_sharded, reason = strategy.broadcast(found)  # as Lightning does, so that all load from one path
    if failure is not None:
        raise failure
    if reason:
        raise RankError(f"rank 0 could not load {str(path)!r}: {reason}")
    return path, is_sharded


def load_meta(service: CheckpointService, path: str, *, weights_only: bool | None) -> Any:
    """Return everything but weights and optimizer states."""
    weights_only = default_weights_only() if weights_only is None else weights_only
    found: dict[str, Any] = {META: None}
    service.load_sharded(found, path, strict=False, weights_only=weights_only is not False)
    if found[META] is None:  # Lightning wrote it
        found[META] = service.load(f"{path}/{META}", weights_only=weights_only is not False)
    return found[META]


def load_model(
    service: CheckpointService, path: str, key: str, model: Any, *, strict: bool, kind: str | None
) -> None:
    """Load the item *key* of the checkpoint into *model*, as strategies of that *kind* do."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        set_model_state_dict,
    )

    found = get_model_state_dict(model)
    in_model = _names_in(model)
    weights = _load_by_name(
        service, path, key, in_model, kind, lambda rename: {rename(name): found[name] for name in found}
    )
    if kind == "ModelParallelStrategy":
        model.load_state_dict({in_model(name): value for name, value in weights.items()}, strict=strict)
    else:
        weights = {_torch_name(name): value for name, value in weights.items()}
        set_model_state_dict(model, weights, options=StateDictOptions(strict=strict))


def load_optimizer(
    service: CheckpointService, path: str, key: str, model: Any, optimizer: Any, *, kind: str | None
) -> None:
    """Load the item *key* of the checkpoint into *optimizer*, which belongs to *model*."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    found = get_optimizer_state_dict(model, optimizer)
    states = _load_by_name(service, path, key, _names_in(model), kind, lambda rename: _renamed(found, rename))
    set_optimizer_state_dict(model, optimizer, _renamed(states, _torch_name))


def _load_by_name(
    service: CheckpointService,
    path: str,
    key: str,
    in_model: Callable[[str], str],
    kind: str | None,
    values_by: Callable[[Callable[[str], str]], dict[str, Any]],
) -> dict[str, Any]:
    """Load by the names that the strategy saves under; FSDP's are the model's own, which may not have been compiled."""
    if kind == "FSDPStrategy":
        values = values_by(in_model)
        with suppress(KeyError):  # raised before anything is filled
            service.load_sharded({key: values}, path)
            return values
    values = values_by(_torch_name)
    service.load_sharded({key: values}, path)
    return values


def _renamed(states: Mapping[str, Any], rename: Callable[[str], str]) -> dict[str, Any]:
    """Return an optimizer's state with its parameters under other names."""
    groups = [{**group, "params": list(map(rename, group["params"]))} for group in states["param_groups"]]
    return {"state": {rename(name): each for name, each in states["state"].items()}, "param_groups": groups}


def _torch_name(name: str) -> str:
    """Return what ``get_model_state_dict`` calls a parameter: a compiled module is not seen in it."""
    return ".".join(part for part in name.split(".") if part != _COMPILED)


def _names_in(model: Any) -> Callable[[str], str]:
    """Return what finds, by torch's name of a parameter, its name in the model's own ``state_dict``."""
    compiled = {
        ".".join(part for part in name.split(".")[:-1] if part not in (_COMPILED, *_WRAPPERS))
        for name, _ in model.named_modules()
        if name.rpartition(".")[2] == _COMPILED
    }

    def name_in(name: str) -> str:
        found: list[str] = []
        parts = name.split(".")
        for number, part in enumerate(parts):
            found += [_COMPILED] if ".".join(parts[:number]) in compiled else []
            found.append(part)
        return ".".join(found)

    return name_in
