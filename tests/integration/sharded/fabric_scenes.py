"""What each of several processes does in a test of Fabric: one function a scene."""

from __future__ import annotations

import importlib
import os
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.fabric
import lightning_fabric
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from async_ckpt import AsyncCheckpointIO
from async_ckpt.lightning import attach
from tests.integration.sharded import lightning_scenes as scenes

TREES: dict[str, Any] = {"lightning.fabric": lightning.fabric, "lightning_fabric": lightning_fabric}


class Model(torch.nn.Module):
    """A small model, equal at each call."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(8, 16), torch.nn.Linear(16, 2)

    def forward(self, x: Any) -> Any:
        return self.second(self.first(x).relu()).pow(2).mean()


class Epoch:
    """What Fabric saves by its ``state_dict``."""

    def __init__(self) -> None:
        self.number = 0

    def state_dict(self) -> dict[str, int]:
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.number = state["number"]


def _parallelize(kind: str) -> Any:
    def parallelize(model: Any, mesh: Any) -> Any:
        if kind == "tensor_parallel":
            plan = {"first": ColwiseParallel(), "second": RowwiseParallel()}
            return parallelize_module(model, mesh["tensor_parallel"], plan)
        fully_shard(model.first, mesh=mesh["data_parallel"])
        return fully_shard(model, mesh=mesh["data_parallel"])

    return parallelize


def _strategy_of(tree: Any, kind: str) -> Any:
    strategies = importlib.import_module(f"{tree.__name__}.strategies")
    kind, _, how = kind.removesuffix("+compiled").partition("+")
    size = dist.get_world_size()
    if kind == "ddp":
        return strategies.DDPStrategy(process_group_backend="gloo")
    if kind == "fsdp":
        return _fsdp_on_cpu(strategies)(state_dict_type=how or "sharded", process_group_backend="gloo")
    data, tensor = (1, size) if kind == "tensor_parallel" else (size, 1)
    return strategies.ModelParallelStrategy(
        _parallelize(kind),
        data_parallel_size=data,
        tensor_parallel_size=tensor,
        save_distributed_checkpoint=how != "full",
    )


def _fsdp_on_cpu(strategies: Any) -> Any:
    module = importlib.import_module(f"{strategies.__name__}.fsdp")
    # Where nothing has to be moved, torch frees what it has not copied.
    module._get_sharded_state_dict_context = scenes.sharded
    module._get_full_state_dict_context = _full

    class FSDPOnCPU(strategies.FSDPStrategy):  # type: ignore[misc]  # a base that is found at run time
        """Fabric's FSDP strategy on processors, which it refuses only as itself, not as a subclass.

        Its saving and loading are the real ones, and torch shards for real. Replaced: the device that it wraps for, and
        where it offloads to.
        """

        def setup_module(self, module: torch.nn.Module) -> torch.nn.Module:
            return FSDP(module, device_id=torch.device("cpu"), **self._fsdp_kwargs)

    return FSDPOnCPU


def _full(module: Any, world_size: int, rank0_only: bool = True) -> Any:
    fsdp = importlib.import_module("torch.distributed.fsdp")
    of_what = (fsdp.FullStateDictConfig, fsdp.FullOptimStateDictConfig)
    options = [of(offload_to_cpu=False, rank0_only=rank0_only) for of in of_what]
    return FSDP.state_dict_type(module, fsdp.StateDictType.FULL_STATE_DICT, *options)


def train(
    folder: Path,
    tree: str,
    kind: str,
    where: str,
    *,
    ours: bool = True,
    steps: int = 3,
    resume: str | None = None,
    options: dict[str, Any] | None = None,
    fault: dict[str, Any] | None = None,
    unpicklable: int | None = None,
    gathered: Sequence[int] = (),
) -> Any:
    """Train in a loop of Fabric's, save after each step, and tell what was seen.

    Args:
        folder: for nothing.
        tree: which Fabric.
        kind: "ddp", "fsdp", "fully_shard" or "tensor_parallel"; "+full" after it gathers into one file, and
            "+compiled" after that compiles a part of the model.
        where: the directory of the checkpoints.
        ours: whether with our plugin.
        steps: how many.
        resume: the name of a checkpoint there.
        options: of the plugin.
        fault: see `lightning_scenes.store_of`.
        unpicklable: the rank on which the first step's state cannot be saved.
        gathered: the steps before which the strategy is told to gather into one file, others to save shares.
    """
    os.environ["LOCAL_RANK"] = os.environ["RANK"]  # the processes are there already
    told: dict[str, Any] = {"error": None, "kind": None, "began_at": 0, "saves": [], "pending": 0}
    strategy = _strategy_of(TREES[tree], kind)
    fabric = TREES[tree].Fabric(accelerator="cpu", devices=dist.get_world_size(), strategy=strategy)
    fabric.launch()
    if "://" not in where:
        os.makedirs(where, exist_ok=True)  # which Fabric does not do for a file
    plugin = None
    if ours:
        store = scenes.store_of(**fault) if fault else None
        given = {"store_factory": store} if store is not None else {}
        plugin = attach(fabric, AsyncCheckpointIO(**given, **(options or {})))
    module = Model()
    if kind.endswith("+compiled"):
        module.first = torch.compile(module.first, backend="eager")  # type: ignore[assignment]
    model = fabric.setup_module(module)
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=0.01))
    epoch = Epoch()
    state = {"model": model, "optimizer": optimizer, "step": 0, "epoch": epoch, "notes": {"width": 16}}
    began = time.monotonic()
    try:
        if resume is not None:
            told["rest"] = fabric.load(f"{where}/{resume}", state)
            told["began_at"] = state["step"]
            if isinstance(state["epoch"], dict):
                epoch.load_state_dict(state["epoch"])
                state["epoch"] = epoch
        for step in range(state["step"] + 1, steps + 1):
            optimizer.zero_grad()
            fabric.backward(model(torch.linspace(-1, 1, 32).reshape(4, 8) * step))
            optimizer.step()
            state["step"], epoch.number = step, step
            bad = {"bad": scenes.Unpicklable()} if step == 1 and unpicklable == dist.get_rank() else {}
            if gathered:
                strategy._save_distributed_checkpoint = step not in gathered
            saved = time.monotonic()
            fabric.save(f"{where}/step-{step}", {**state, **bad})
            told["saves"].append(time.monotonic() - saved)
            told["pending"] += 0 if plugin is None else len(plugin.service.pending)
        if plugin is not None:
            plugin.teardown()
    except Exception as failure:
        told["kind"] = type(failure).__name__
        told["error"] = "".join(traceback.format_exception(failure))
        if plugin is not None:
            with suppress(Exception):
                plugin.teardown()
    told["seconds"] = time.monotonic() - began
    told["step"] = state["step"]
    told["files"] = sorted(set(scenes.names_in(where)))
    told["threads"] = [t.name for t in threading.enumerate() if t.name.startswith("async_ckpt")]
    if told["error"] is None:
        told["sums"] = scenes.sums(SimpleNamespace(model=_bare(model)), [optimizer.optimizer])
    return told


def _bare(model: Any) -> Any:
    while hasattr(model, "_forward_module"):
        model = model._forward_module
    return model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model
