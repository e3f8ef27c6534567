"""What each of several processes does in a test of Lightning: one function a scene."""

from __future__ import annotations

import hashlib
import importlib
import os
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import lightning.pytorch
import pytorch_lightning
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, TensorDataset

from async_ckpt import AsyncCheckpointCallback, AsyncCheckpointIO
from async_ckpt.stores import open_store
from async_ckpt.stores.base import Location, Store, Workers
from async_ckpt.testing import Fault, FaultyStore, crash

TREES: dict[str, Any] = {"lightning.pytorch": lightning.pytorch, "pytorch_lightning": pytorch_lightning}
BATCHES = 4

torch.set_num_threads(1)


class Unpicklable:
    """Whose saving fails."""

    def __reduce__(self) -> Any:
        raise TypeError("not me")


def _maybe_compiled(module: Any, kind: str) -> Any:
    return torch.compile(module, backend="eager") if kind.endswith("+compiled") else module


def _model_of(pl: Any, kind: str, *, is_broken: bool) -> Any:
    class Model(pl.LightningModule):  # type: ignore[misc]  # a base that is found at run time
        """A small model, equal at each call."""

        def __init__(self) -> None:
            super().__init__()
            self.save_hyperparameters({"width": 16})
            torch.manual_seed(0)
            self.first, self.second = _maybe_compiled(torch.nn.Linear(8, 16), kind), torch.nn.Linear(16, 2)
            self.seen: list[int] = []
            self.pending: list[list[int]] = []

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.second(self.first(batch[0]).relu()).pow(2).mean()
            self.log("loss", loss, sync_dist=True)
            self.seen.append(self.global_step)
            plugin = self.trainer.strategy.checkpoint_io
            if isinstance(plugin, AsyncCheckpointIO) and plugin.service.pending:
                self.pending.append([self.global_step])
            return loss

        def configure_model(self) -> None:
            if kind.startswith("fsdp") or hasattr(self.first, "_is_done"):
                return
            self.first._is_done = True
            mesh = self.device_mesh
            if kind == "tensor_parallel":
                plan = {"first": ColwiseParallel(), "second": RowwiseParallel()}
                parallelize_module(self, mesh["tensor_parallel"], plan)
            else:
                fully_shard(self.first, mesh=mesh["data_parallel"])
                fully_shard(self.second, mesh=mesh["data_parallel"])

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["mine"] = self.global_step
            if is_broken and self.global_step == BATCHES:
                checkpoint["state_dict"]["broken"] = Unpicklable()

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            assert checkpoint["mine"] == checkpoint["global_step"]

        def train_dataloader(self) -> Any:
            rows = BATCHES * 2 * (2 if self.trainer.distributed_sampler_kwargs["num_replicas"] > 1 else 1)
            return DataLoader(TensorDataset(torch.linspace(-1, 1, rows * 8).reshape(-1, 8)), batch_size=2)

    return Model()


def _strategy_of(pl: Any, kind: str) -> Any:
    if kind.startswith("fsdp"):
        return _fsdp_on_cpu(pl)(state_dict_type="sharded", process_group_backend="gloo")
    size = dist.get_world_size()
    sizes = (1, size) if kind == "tensor_parallel" else (size, 1)
    return pl.strategies.ModelParallelStrategy(data_parallel_size=sizes[0], tensor_parallel_size=sizes[1])


def _fsdp_on_cpu(pl: Any) -> Any:
    class FSDPOnCPU(pl.strategies.FSDPStrategy):  # type: ignore[misc]  # the same
        """Lightning's FSDP strategy on processors, which it refuses only as itself, not as a subclass.

        Its saving, loading and teardown are the real ones, and torch shards for real. Replaced: the device that it
        wraps for, and where it offloads to, because torch frees what it has not copied where nothing has to be moved.
        """

        def _setup_model(self, model: torch.nn.Module) -> torch.nn.Module:
            return FSDP(model, device_id=torch.device("cpu"), **self.kwargs)

        def lightning_module_state_dict(self) -> Any:
            with sharded(self.model):
                return self.model.state_dict()

        def optimizer_state(self, optimizer: Any) -> Any:
            with sharded(self.model):
                return FSDP.optim_state_dict(self.model, optimizer)

    return FSDPOnCPU


def sharded(model: Any) -> Any:
    """Return the context in which FSDP1 gives each rank its share, where it is."""
    fsdp = importlib.import_module("torch.distributed.fsdp")
    kind = fsdp.StateDictType.SHARDED_STATE_DICT
    options = fsdp.ShardedStateDictConfig(), fsdp.ShardedOptimStateDictConfig()
    return FSDP.state_dict_type(model, kind, *options)


def sums(strategy: Any, optimizers: list[Any]) -> dict[str, str]:
    """Return a checksum of each weight, and of the optimizer's state for it, put together: a collective call."""
    found: dict[str, Any] = {}
    if isinstance(strategy.model, FSDP):
        with FSDP.summon_full_params(strategy.model):
            for name, parameter in strategy.model.named_parameters():
                found[name.replace("_fsdp_wrapped_module.", "")] = parameter.detach().clone()
    else:
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=False)
        found |= get_model_state_dict(strategy.model, options=options)
        for optimizer in optimizers:
            of_names = get_optimizer_state_dict(strategy.model, optimizer, options=options)["state"]
            for name, states in of_names.items():
                found |= {f"{name}.{key}": value for key, value in states.items()}  # type: ignore[union-attr]
    return {name: hashlib.sha256(value.numpy().tobytes()).hexdigest()[:16] for name, value in found.items()}


def names_in(where: str) -> list[str]:
    """Return the names in a directory on a disk; of a bucket, the first parts of all names below it."""
    if "://" not in where:
        return sorted(os.listdir(where)) if os.path.isdir(where) else []
    file_system, path = fsspec.url_to_fs(where)
    file_system.invalidate_cache()
    return sorted(name.removeprefix(f"{path}/").partition("/")[0] for name in file_system.find(path))


def store_of(
    operation: str,
    calls: list[int] | None = None,
    error: str = "",
    after: bool = False,
    delay_seconds: float = 0.0,
    rank: int | None = None,
) -> Callable[[Location, Workers], Store] | None:
    """Return what makes a rank's stores, with a `Fault`; ``None`` where it has none."""
    if not operation or (rank is not None and rank != dist.get_rank()):
        return None
    errors: dict[str, Any] = {"": None, "OSError": lambda: PermissionError(13, "no"), "crash": crash}
    fault = Fault(
        operation=operation,  # type: ignore[arg-type]
        calls=calls,
        error=errors[error],
        after=after,
        delay_seconds=delay_seconds,
    )
    return lambda location, workers: FaultyStore(open_store(location, workers=workers), [fault])


def train(
    folder: Path,
    tree: str,
    kind: str,
    where: str,
    *,
    ours: bool = True,
    epochs: int = 2,
    resume: str | None = None,
    checkpoint: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    operation: str = "",
    calls: list[int] | None = None,
    error: str = "",
    after: bool = False,
    delay_seconds: float = 0.0,
    rank: int | None = None,
    by_hand: str = "",
    unpicklable: int | None = None,
) -> Any:
    """Train with one of Lightning's sharding strategies, and tell what was seen.

    Args:
        folder: for what is not a checkpoint.
        tree: which Lightning.
        kind: "fsdp", "fully_shard" or "tensor_parallel".
        where: the directory of the checkpoints.
        ours: whether with our plugin.
        epochs: how many.
        resume: ``ckpt_path``.
        checkpoint: of the ``ModelCheckpoint``.
        options: of the plugin.
        operation: of the store, with a fault.
        calls: see `Fault`.
        error: the same.
        after: the same.
        delay_seconds: the same.
        rank: whose store it is; ``None`` is everybody's.
        by_hand: where to save after the fit.
        unpicklable: the rank whose part of the first save cannot be saved.
    """
    os.environ["LOCAL_RANK"] = os.environ["RANK"]  # the processes are there already
    pl = TREES[tree]
    told: dict[str, Any] = {"error": None, "kind": None}
    ours_here: list[Any] = []
    if ours:
        store = store_of(operation, calls, error, after, delay_seconds, rank)
        given = {"store_factory": store} if store is not None else {}
        ours_here = [AsyncCheckpointIO(**given, **(options or {}))]
    saves = pl.callbacks.ModelCheckpoint(where, **(checkpoint or {"save_last": True}))
    strategy = _strategy_of(pl, kind)
    trainer = pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=dist.get_world_size(),
        max_epochs=epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=kind != "tensor_parallel",
        default_root_dir=str(folder),
        plugins=ours_here,
        callbacks=[saves, *(AsyncCheckpointCallback() for _ in ours_here)],
    )
    trainer.callbacks = [each for each in trainer.callbacks if type(each).__name__ != "FoundCallback"]
    model = _model_of(pl, kind, is_broken=unpicklable == dist.get_rank())
    began = time.monotonic()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            trainer.fit(model, ckpt_path=resume)
        except Exception as failure:
            told["kind"] = type(failure).__name__
            told["error"] = "".join(traceback.format_exception(failure))
    told["seconds"] = time.monotonic() - began
    told["warnings"] = [str(each.message) for each in warned if "AsyncCheckpointIO" in str(each.message)]
    told["files"] = names_in(where)
    told["began_at"] = model.seen[0] if model.seen else None
    told["pending"] = model.pending
    told["step"] = trainer.global_step
    told["best"] = saves.best_model_path
    told["last"] = saves.last_model_path
    told["threads"] = [t.name for t in threading.enumerate() if t.name.startswith("async_ckpt")]
    if told["error"] is None:
        told["sums"] = sums(strategy, trainer.optimizers)
        if by_hand:
            trainer.save_checkpoint(by_hand)
            told["by hand"] = sorted(os.listdir(by_hand)) if os.path.isdir(by_hand) else []
    numbers = torch.tensor([1.0])
    if told["kind"] in (None, "ShardedSaveError"):
        dist.all_reduce(numbers)
    told["sum"] = numbers.item()
    return told
