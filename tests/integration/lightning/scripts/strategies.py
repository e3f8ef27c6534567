"""Trains with strategies of two processes, one run after the other, and leaves files and reports.

``python strategies.py TREE FOLDER RUN…``: TREE is the Trainer's package; a RUN, as ``ddp:ours``, names a strategy
and how it saves. ``tests/integration/lightning/test_strategies.py`` says what the runs show. A file, because the
launchers of several processes run a script again, or import it.
"""

from __future__ import annotations

import importlib
import json
import sys
import threading
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch.utils.data import DataLoader, TensorDataset

from async_ckpt import AsyncCheckpointIO, StoreError
from async_ckpt.lightning.callback import AsyncCheckpointCallback
from async_ckpt.stores import open_store
from async_ckpt.stores.base import Location, Workers
from async_ckpt.testing import Fault, FaultyStore, Gate

PL: Any = importlib.import_module(sys.argv[1])
SLOW_SECONDS = 0.1
COLLECTIVES = [
    name
    for name in dir(torch.distributed)
    if name.startswith(("all_", "barrier", "broadcast", "gather", "monitored", "reduce", "scatter"))
    or name in ("isend", "irecv", "send", "recv", "new_group", "batch_isend_irecv")
]

_IN_BETWEEN = {f"async_ckpt.lightning.{name}" for name in ("deferral", "overrides", "sharded")}

torch.set_num_threads(1)  # OpenMP does not survive a fork, and two processes share few cores


# -- collective operations, counted


class Collectives:
    """Counts the calls of torch's collective operations, and those that come from our package.

    A save of Lightning's passes through some modules of ours, which call what would have been called without them.
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.ours: list[str] = []

    def watch(self) -> None:
        """Count from now on, whoever has imported what."""
        for module in (torch.distributed, torch.distributed.distributed_c10d):
            for name in COLLECTIVES:
                function = getattr(module, name, None)
                if callable(function) and not isinstance(function, type):
                    setattr(module, name, self._counted(name, function))

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls[name] += 1
            frame = sys._getframe(1)
            while frame is not None:
                module = frame.f_globals.get("__name__", "")
                if module.split(".")[0] == "async_ckpt" and module not in _IN_BETWEEN:
                    self.ours.append(f"{name} from {frame.f_code.co_filename}:{frame.f_lineno}")
                    break
                frame = frame.f_back  # type: ignore[assignment]  # None at the end
            return function(*args, **kwargs)

        return counted


COLLECTIVES_SEEN = Collectives()
COLLECTIVES_SEEN.watch()  # as the script is imported, so in spawned processes, too


# -- the plugin, on slow or broken storage


def slow(location: Location, workers: Workers) -> FaultyStore:
    """Make a store whose commits take a while, the first one until somebody has looked for its file."""
    faults = [
        Fault(operation="commit", gate=LOOKED[0]),
        Fault(operation="commit", delay_seconds=SLOW_SECONDS),
    ]
    return FaultyStore(open_store(location, workers=workers), faults)


def broken(location: Location, workers: Workers) -> FaultyStore:
    """Make a store that refuses the training's checkpoints."""
    real = open_store(location, workers=workers)
    if ".temp" in location.path:
        return FaultyStore(real, [])
    return FaultyStore(real, [Fault(operation="commit", error=lambda: StoreError("the disk is full"))])


class Watched(AsyncCheckpointIO):
    """The plugin; writes down, as they come, its saves and whether each had been waited for."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        """Save."""
        super().save_checkpoint(checkpoint, path, storage_options)
        _append(
            FOLDER / "saves.jsonl", {"run": RUN[0], "name": Path(path).name, "waited": Path(path).exists()}
        )
        LOOKED[0].open()

    def save_sharded(self, state: Any, path: Any, **options: Any) -> None:
        """Save this process's share."""
        super().save_sharded(state, path, **options)
        waited = Path(path, ".metadata").exists()
        _append(FOLDER / "saves.jsonl", {"run": RUN[0], "name": Path(path).name, "waited": waited})
        LOOKED[0].open()


def _plugins(io: str) -> list[Any]:
    """Return the plugins of a run."""
    if io == "theirs":
        return []
    return [Watched(store_factory=broken if io == "broken" else slow)]


# -- what is trained


class Model(PL.LightningModule):  # type: ignore[misc]  # a base that is found at run time
    """A small model, equal at each call."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(8, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Return a loss."""
        return self.layer(batch[0]).pow(2).mean()

    def configure_optimizers(self) -> Any:
        """Return Adam, which has a state."""
        return torch.optim.Adam(self.parameters(), lr=0.01)

    def train_dataloader(self) -> Any:
        """Return four batches for each of two processes."""
        data = torch.linspace(-1, 1, 8 * 2 * 8).reshape(-1, 8)
        return DataLoader(TensorDataset(data), batch_size=2)


class ShardedModel(Model):
    """The model, sharded as ``ModelParallelStrategy`` wants it: by itself."""

    def configure_model(self) -> None:
        """Shard it over the processes."""
        fsdp = importlib.import_module("torch.distributed._composable.fsdp")
        fsdp.fully_shard(self.layer, mesh=self.device_mesh["data_parallel"])


class FSDPOnCPU(PL.strategies.FSDPStrategy):  # type: ignore[misc]
    """Lightning's FSDP strategy on processors, which it refuses only as itself, not as a subclass.

    Its saving, loading and teardown are the real ones, and torch shards for real. Replaced: the device that it
    wraps for, and how it gathers, because torch's own gathering frees what it has not copied where nothing has to
    be moved off a device, and crashes.
    """

    def _setup_model(self, model: torch.nn.Module) -> torch.nn.Module:
        fsdp = importlib.import_module("torch.distributed.fsdp")
        return fsdp.FullyShardedDataParallel(model, device_id=torch.device("cpu"), **self.kwargs)  # type: ignore[no-any-return]

    def lightning_module_state_dict(self) -> Any:
        """Return the weights, gathered or this process's shard."""
        with self._copying():
            return self.model.state_dict()

    def optimizer_state(self, optimizer: Any) -> Any:
        """Return the optimizer's state likewise."""
        fsdp = importlib.import_module("torch.distributed.fsdp")
        with self._copying():
            return fsdp.FullyShardedDataParallel.optim_state_dict(self.model, optimizer)

    def _copying(self) -> Any:
        fsdp = importlib.import_module("torch.distributed.fsdp")
        if self._state_dict_type == "sharded":
            options = fsdp.ShardedStateDictConfig(), fsdp.ShardedOptimStateDictConfig()
            kind = fsdp.StateDictType.SHARDED_STATE_DICT
        else:
            options = (
                fsdp.FullStateDictConfig(offload_to_cpu=False),
                fsdp.FullOptimStateDictConfig(offload_to_cpu=False),
            )
            kind = fsdp.StateDictType.FULL_STATE_DICT
        return fsdp.FullyShardedDataParallel.state_dict_type(self.model, kind, *options)


def _strategy(name: str) -> Any:
    """Return a strategy of a name, Lightning's or one of ours for the sharded ones."""
    strategies = PL.strategies
    kind, _, sharded = name.partition("-")
    if kind == "fsdp":
        return FSDPOnCPU(state_dict_type=sharded or "full", process_group_backend="gloo")
    if kind == "model_parallel":
        return strategies.ModelParallelStrategy(
            data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=bool(sharded)
        )
    if kind == "ddp_forkserver":
        return strategies.DDPStrategy(start_method="forkserver")
    return kind


# -- reports


class Reporter(PL.Callback):  # type: ignore[misc]
    """Tells what each process saw, and what was on disk when the strategy had been torn down."""

    def __init__(self, run: str) -> None:
        super().__init__()
        self.run = run

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Tell the plugin's doubles in a new process which run this is."""
        RUN[0] = self.run

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Look at the threads while saves are pending."""
        self.threads = [t.name for t in threading.enumerate() if t.name.startswith("async_ckpt")]

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Write the report; Lightning comes here after the strategy's teardown."""
        import os

        _append(
            FOLDER / "reports.jsonl",
            {
                "run": self.run,
                "rank": trainer.global_rank,
                "files": sorted(path.name for path in (FOLDER / self.run).glob("*")),
                "threads": getattr(self, "threads", None),
                "world_size": os.environ.get("WORLD_SIZE"),
                "collectives": sum(COLLECTIVES_SEEN.calls.values()),
                "ours": COLLECTIVES_SEEN.ours,
            },
        )


def _append(path: Path, record: dict[str, Any]) -> None:
    """Add a line in one write, so that processes do not mix theirs."""
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


FOLDER = Path(sys.argv[2])
RUN = ["none"]
LOOKED = [Gate()]  # of this run
LAUNCHED = ("ddp_notebook", "ddp_spawn", "ddp_forkserver")


def train(run: str) -> None:
    """Train once; report what was raised and what was warned of where ``fit`` was called."""
    name, _, io = run.partition(":")
    RUN[0], LOOKED[0] = run, Gate()
    plugins = _plugins(io)
    callbacks = [Reporter(run), PL.callbacks.ModelCheckpoint(FOLDER / run, save_last=True)]
    report: dict[str, Any] = {"run": run, "error": None}
    trainer = PL.Trainer(
        strategy=_strategy(name),
        plugins=plugins,
        accelerator="cpu",
        devices=2,
        max_epochs=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=FOLDER,
        callbacks=callbacks + [AsyncCheckpointCallback() for _ in plugins],
    )
    model = ShardedModel() if name.startswith("model_parallel") else Model()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            trainer.fit(model)
        except Exception as error:
            report["error"] = "".join(traceback.format_exception(error))
    report["warnings"] = [
        str(warning.message) for warning in warned if "AsyncCheckpointIO" in str(warning.message)
    ]
    report["rank"] = trainer.global_rank
    report["best"] = Path(trainer.checkpoint_callback.best_model_path).name
    report["best_exists"] = Path(trainer.checkpoint_callback.best_model_path).is_file()
    if report["error"] is None and name in LAUNCHED:
        by_hand = FOLDER / f"{run}-by-hand.ckpt"
        LOOKED[0].open()  # somebody has, in a child
        trainer.save_checkpoint(by_hand)
        # At once, and past the plugin.
        report["by_hand"] = torch.load(by_hand, weights_only=True)["state_dict"]["layer.weight"].tolist()
    report["weight"] = None if name.startswith(("fsdp", "model")) else model.layer.weight.tolist()
    report["threads"] = [t.name for t in threading.enumerate() if t.name.startswith("async_ckpt")]
    for plugin in plugins:
        plugin.teardown()
    _append(FOLDER / "fits.jsonl", report)


if __name__ == "__main__":
    for one in sys.argv[3:]:
        train(one)
