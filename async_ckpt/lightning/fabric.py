"""Makes a Fabric save and load through the plugin, even if its strategy refuses any CheckpointIO.

FSDP and ModelParallel have Fabric's own code write their checkpoints. On the one strategy object of a Fabric, the
methods that save and load are replaced. They write what Fabric writes: a directory of DCP's with ``meta.pt`` in it, or
one file, each of which a Fabric without this package opens.

Guarantees: Fabric's collective operations are called as it calls them, and no others. All ranks raise failures at the
same save, so none is left alone in Fabric's barrier. What is neither module nor optimizer is an item of a sharded
checkpoint, too, so a step number always belongs to the same checkpoint as the weights (D6).

What does not belong here: the queue, errors, waiting (session); the Trainer's strategies (sharded).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from async_ckpt.errors import IncompleteCheckpointError, OptionError
from async_ckpt.lightning.deferral import is_from_lightning
from async_ckpt.lightning.overrides import Replacement
from async_ckpt.lightning.plugin import AsyncCheckpointIO
from async_ckpt.lightning.sharded_loading import META, agree_on_path, load_meta, load_model, load_optimizer
from async_ckpt.lightning.strategies import is_sharded, kind_of
from async_ckpt.stores import is_local

__all__ = ["attach"]

_BY_THEMSELVES = ("FSDPStrategy", "ModelParallelStrategy")


def attach(fabric: Any, plugin: AsyncCheckpointIO | None = None) -> AsyncCheckpointIO:
    """Make ``fabric.save`` and ``fabric.load`` use a plugin, whatever the strategy.

    Call it on every rank, after ``Fabric(…)`` and before the first save. ``fabric.save`` returns once the state may be
    mutated. If every rank saves a share, the shares are written as by ``CheckpointService.save_sharded``, and a
    ``fabric.load`` without this package can load them. FSDP and ModelParallel refuse any CheckpointIO, so they need
    this call; for other strategies it is the same as ``Fabric(plugins=[plugin])``.

    Args:
        fabric: a Fabric of either Lightning distribution.
        plugin: the plugin, to set options; ``None`` makes one with default options.

    Returns:
        The plugin. Call its ``wait``, ``flush`` or ``teardown``, or leave a ``with plugin`` block, on every rank, to
        wait until everything is durable.

    Raises:
        OptionError: the strategy writes checkpoints in a way that is not known, or does not support the plugin's base
            or options.
    """
    plugin = AsyncCheckpointIO() if plugin is None else plugin
    strategy = fabric.strategy
    name, kind = type(strategy).__name__, kind_of(strategy)
    if kind not in _BY_THEMSELVES:
        if kind is not None:
            raise OptionError(
                f"{name} writes a share of each checkpoint from every process by itself; "
                'use FSDPStrategy(state_dict_type="sharded") or ModelParallelStrategy'
            )
        strategy.checkpoint_io = plugin
        return plugin
    if plugin.checkpoint_io is not None:
        raise OptionError(
            f"{name} calls no CheckpointIO, so the base of AsyncCheckpointIO would never be called; give it no base"
        )
    if not is_from_lightning(type(strategy).save_checkpoint):
        raise OptionError(
            f"{name} overrides save_checkpoint, so what it writes is not known; use Fabric's own {kind}"
        )
    ours = _Methods(strategy, plugin)
    ours.note_kind_of_save()
    for method in ("save_checkpoint", "load_checkpoint"):
        setattr(strategy, method, Replacement(strategy, method, getattr(ours, method), by=plugin))
    return plugin


class _Methods:
    """Replaces the methods of a strategy."""

    def __init__(self, strategy: Any, plugin: AsyncCheckpointIO) -> None:
        self._strategy = strategy
        self._plugin = plugin
        self._kind = kind_of(strategy)
        self._save_as_fabric = partial(type(strategy).save_checkpoint, strategy)
        self._load_as_fabric = partial(type(strategy).load_checkpoint, strategy)

    def note_kind_of_save(self) -> bool:
        """Return whether every rank saves a share, according to the strategy's present settings."""
        plugin = self._plugin
        plugin.is_sharded = is_sharded(self._strategy)
        if plugin.is_sharded and plugin.service.options.overflow == "supersede":
            raise OptionError(
                f"overflow='supersede': each rank of {type(self._strategy).__name__} would decide by itself "
                "which save is dropped; use 'block' or 'raise'"
            )
        return plugin.is_sharded

    def save_checkpoint(self, path: Any, state: Any, storage_options: Any = None, filter: Any = None) -> None:
        """Save, as the strategy's own method does; it returns once the state may be mutated."""
        are_shares = self.note_kind_of_save()
        if storage_options is not None or (are_shares and filter is not None):
            self._save_as_fabric(path, state, storage_options, filter)  # it refuses these arguments
            return
        plugin, is_first = self._plugin, self._strategy.is_global_zero
        path, known = self._broadcast(path)
        shares, rest = self._converted(state, full=not are_shares)
        if are_shares:
            plugin.save_sharded(shares, path, extras={META: rest} if is_first else {}, known=known)
            return
        whole = {**shares, **rest}
        for key, keeps in (filter or {}).items():
            if isinstance(whole[key], dict):
                whole[key] = {name: value for name, value in whole[key].items() if keeps(name, value)}
        plugin.save_once(whole, path, is_first=is_first, known=known)

    def load_checkpoint(self, path: Any, state: Any = None, strict: bool = True, **options: Any) -> Any:
        """Load, as the strategy's own method does; a sharded checkpoint from any storage, a file from a local one."""
        path, is_sharded_here = agree_on_path(self._strategy, self._plugin, path)
        if not is_sharded_here or not isinstance(state, dict):
            if not is_local(self._plugin.locate_directory(path)):
                raise IncompleteCheckpointError.at(str(path)) from OptionError(
                    "Fabric loads files of gathered weights only from local disks; from other storage, call "
                    "async_ckpt.load_sharded with what get_model_state_dict(model) returns"
                )
            return self._load_as_fabric(path, state, strict, **options)
        key, model = self._model_in(state, "load")
        optimizers = {name: each for name, each in state.items() if _is_optimizer(each)}
        with self._plugin.loading(path) as service:
            rest = load_meta(service, path, weights_only=options.get("weights_only"))
            load_model(service, path, key, model, strict=strict, kind=self._kind)
            for name, optimizer in optimizers.items():
                load_optimizer(service, path, name, model, optimizer, kind=self._kind)
        wanted = state.keys() - optimizers.keys() - {key}
        if strict and (missing := sorted(wanted - rest.keys())):
            others = f", nor do {', '.join(map(repr, missing[1:]))}" if missing[1:] else ""
            raise KeyError(
                f"The requested state contains a key {missing[0]!r} that does not exist in {str(path)!r}{others}; "
                "strict=False ignores that"
            )
        state.update({name: rest.pop(name) for name in wanted & rest.keys()})
        return rest

    def _broadcast(self, path: Any) -> tuple[Any, Any]:
        """Return the first rank's path, as Fabric does, and the failures that it knows."""
        plugin, strategy = self._plugin, self._strategy
        path, known = strategy.broadcast((path, plugin.known_failures if strategy.is_global_zero else None))
        return path, known

    def _model_in(self, state: Mapping[str, Any], verb: str) -> tuple[str, Any]:
        """Return the one distributed model of *state*, and its key."""
        models = [
            (key, each) for key, each in state.items() if _is_module(each) and self._is_distributed(each)
        ]
        if len(models) != 1:
            found = "no" if not models else f"more than one ({len(models)})"
            raise ValueError(
                f"{found} distributed model in the state: call fabric.{verb}(path, {{'model': model, …}}) with the "
                "model that fabric.setup returned; save several models to a checkpoint each"
            )
        return models[0]

    def _is_distributed(self, module: Any) -> bool:
        from torch.distributed.fsdp import FullyShardedDataParallel

        from async_ckpt.sharded.writing.flatten import DTensor

        if self._kind == "FSDPStrategy":
            return any(isinstance(each, FullyShardedDataParallel) for each in module.modules())
        return any(isinstance(each, DTensor) for each in module.parameters())

    def _converted(self, state: Mapping[str, Any], *, full: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the states of modules and optimizers, and the rest of *state*, as the strategy would save them."""
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            get_model_state_dict,
            get_optimizer_state_dict,
        )
        from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

        _, model = self._model_in(state, "save")
        # Fabric offloads shares, too: torch copies them to fresh, pageable memory. Our snapshot copies them anyway.
        options = StateDictOptions(full_state_dict=full, cpu_offload=full)
        is_fsdp = self._kind == "FSDPStrategy"
        shares: dict[str, Any] = {}
        rest: dict[str, Any] = {}
        with _fsdp_states(model, full=full) if is_fsdp else nullcontext():
            for key, each in state.items():
                if _is_module(each):
                    shares[key] = (
                        each.state_dict() if is_fsdp else get_model_state_dict(each, options=options)
                    )
                elif _is_optimizer(each) and is_fsdp:
                    shares[key] = FSDP.optim_state_dict(model, each)
                elif _is_optimizer(each):
                    shares[key] = get_optimizer_state_dict(model, each, options=options)
                else:
                    rest[key] = each.state_dict() if _has_state_dict(each) else each
        return shares, rest


@contextmanager
def _fsdp_states(model: Any, *, full: bool) -> Iterator[None]:
    import torch.distributed as dist
    from torch.distributed import fsdp

    if full:
        # As Fabric does: gathered one by one, on the first rank only, as the whole may not fit a GPU. Parameters on
        # the CPU are not offloaded: torch would free them.
        is_away = any(each.device.type != "cpu" for each in model.parameters())
        offload = {"offload_to_cpu": is_away and dist.get_world_size() > 1, "rank0_only": True}
        kind = fsdp.StateDictType.FULL_STATE_DICT
        of_model: Any = fsdp.FullStateDictConfig(**offload)
        of_optimizer: Any = fsdp.FullOptimStateDictConfig(**offload)
    else:
        kind = fsdp.StateDictType.SHARDED_STATE_DICT
        of_model = fsdp.ShardedStateDictConfig(offload_to_cpu=False)
        of_optimizer = fsdp.ShardedOptimStateDictConfig(offload_to_cpu=False)
    context: AbstractContextManager[Any]
    context = fsdp.FullyShardedDataParallel.state_dict_type(model, kind, of_model, of_optimizer)
    with context:
        yield


def _is_module(value: Any) -> bool:
    from torch.nn import Module

    return isinstance(value, Module)


def _is_optimizer(value: Any) -> bool:
    from torch.optim import Optimizer

    return isinstance(value, Optimizer)


def _has_state_dict(value: Any) -> bool:
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))
