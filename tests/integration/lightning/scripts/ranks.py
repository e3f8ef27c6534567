"""What one rank of two does in trainings on slow storage, and what it saw: files, weights, errors.

``python ranks.py TREE FOLDER RUN…``, with ``LOCAL_RANK`` set: TREE is the Trainer's package; a RUN, as ``resume:ours``,
names what happens and who saves. ``tests/integration/lightning/test_ranks.py`` starts both ranks and says what the runs
show. Each rank writes its records to a file of its own.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from async_ckpt import AsyncCheckpointIO, StoreError
from async_ckpt.lightning.callback import AsyncCheckpointCallback
from async_ckpt.stores import open_store
from async_ckpt.stores.base import Location, Workers
from async_ckpt.testing import Fault, FaultyStore

PL: Any = importlib.import_module(sys.argv[1])
FOLDER = Path(sys.argv[2])
RANK = int(os.environ["LOCAL_RANK"])
SLOW_SECONDS = 0.3

torch.set_num_threads(1)  # two processes share few cores


class Model(PL.LightningModule):  # type: ignore[misc]  # a base that is found at run time
    """A small model, equal at each call; it notes which files there are when its training ends."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(8, 2)
        self.began_at = -1
        self.files_at_end: list[str] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Return a loss."""
        return self.layer(batch[0]).pow(2).mean()

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log what tells one set of weights from another."""
        self.log("weights", self.layer.weight.abs().sum())

    def configure_optimizers(self) -> Any:
        """Return Adam, which has a state."""
        return torch.optim.Adam(self.parameters(), lr=0.01)

    def train_dataloader(self) -> Any:
        """Return four batches for each of two ranks."""
        data = torch.linspace(-1, 1, 8 * 2 * 8).reshape(-1, 8)
        return DataLoader(TensorDataset(data), batch_size=2)

    test_dataloader = train_dataloader

    def on_train_start(self) -> None:
        """Note where training starts."""
        self.began_at = self.trainer.global_step

    def on_train_end(self) -> None:
        """Note what is there; every callback's hook has been called."""
        self.files_at_end = files()


RUN = [""]


def folder() -> Path:
    """Return where this run saves."""
    return FOLDER / RUN[0].replace(":", "-")


def files() -> list[str]:
    """Return the names of what this run has saved, hidden files and all."""
    return sorted(path.name for path in folder().glob("*"))


def storage(*faults: Fault) -> Callable[[Location, Workers], FaultyStore]:
    """Return what makes stores whose commits take a while, with *faults*, one after the other."""
    calls: Any = None

    def make(location: Location, workers: Workers) -> FaultyStore:
        nonlocal calls
        slow = Fault(operation="commit", delay_seconds=SLOW_SECONDS)
        store = FaultyStore(open_store(location, workers=workers), [slow, *faults])
        calls = store.calls = store.calls if calls is None else calls
        return store

    return make


def trainer(*callbacks: Any, epochs: int = 1, faults: tuple[Fault, ...] = (), **options: Any) -> Any:
    """Return a Trainer of two ranks, and in it our plugin, if this run is ours."""
    plugins: list[Any] = []
    found: list[Any] = []
    if RUN[0].endswith(":ours"):
        plugins = [AsyncCheckpointIO(store_factory=storage(*faults), **options)]
        found = [AsyncCheckpointCallback()]
    return PL.Trainer(
        strategy="ddp",
        plugins=plugins,
        accelerator="cpu",
        devices=2,
        max_epochs=epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=FOLDER,
        callbacks=[*callbacks, PL.callbacks.ModelCheckpoint(folder(), save_last=True), *found],
    )


def seen(model: Model) -> dict[str, Any]:
    """Return what a rank sees of its training."""
    return {
        "began_at": model.began_at,
        "files_at_end": model.files_at_end,
        "files": files(),
        "weights": model.layer.weight.tolist(),
    }


def error_of(run: Callable[[], object]) -> dict[str, Any]:
    """Return what *run* raises, and how long that took."""
    began = time.monotonic()
    error = None
    try:
        run()
    except Exception as raised:
        error = raised
    return {
        "error": type(error).__name__ if error is not None else None,
        "text": str(error),
        "is_os_error": isinstance(error, OSError),
        "seconds": time.monotonic() - began,
    }


# -- the runs


def resume() -> dict[str, Any]:
    """Train, and at once go on from the last checkpoint, load the best one, test the last one."""
    first = Model()
    trainer().fit(first)
    saw = {"first": seen(first)}
    second = Model()
    other = trainer(epochs=2)
    other.fit(second, ckpt_path="last")
    saw["second"] = seen(second)
    best = Model.load_from_checkpoint(other.checkpoint_callback.best_model_path)
    tested = Model()
    (result,) = other.test(tested, ckpt_path="last", verbose=False)
    return {
        **saw,
        "best": best.layer.weight.tolist(),
        "tested": tested.layer.weight.tolist(),
        "result": result,
    }


def direct() -> dict[str, Any]:
    """Save by hand when training is over, twice to the same place, and load that on every rank, each time."""
    model = Model()
    one = trainer()
    one.fit(model)
    loaded = []
    for value in (1.0, 2.0):
        with torch.no_grad():
            model.layer.weight.fill_(value)
        one.save_checkpoint(folder() / "manual.ckpt")
        loaded.append(Model.load_from_checkpoint(folder() / "manual.ckpt").layer.weight[0, 0].item())
    return {"loaded": loaded}


def reported() -> dict[str, Any]:
    """Save by hand in the middle of training, use the file on the rank that wrote it, and remove its folder."""
    reports: list[int] = []

    class Reports(PL.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            place = folder() / f"report-{trainer.global_step}"
            if RANK == 0:
                place.mkdir(parents=True)
            trainer.save_checkpoint(place / "a.ckpt")
            reports.append(torch.load(place / "a.ckpt")["global_step"])  # a barrier has been passed
            trainer.strategy.barrier()
            if RANK == 0:
                shutil.rmtree(place)

    trainer(Reports()).fit(Model())
    return {"reports": reports, "files": files()}


def midway() -> dict[str, Any]:
    """Load the checkpoint of the first epoch through the strategy when the second one begins, on every rank."""
    loaded: list[int] = []

    class Looks(PL.Callback):  # type: ignore[misc]
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                loaded.append(trainer.strategy.load_checkpoint(folder() / "last.ckpt")["global_step"])

    trainer(Looks(), epochs=2).fit(Model())
    return {"loaded": loaded}


def disk_full() -> StoreError:
    """Return what the storage of a broken run raises."""
    return StoreError("the disk is full")


def broken() -> dict[str, Any]:
    """Have the last save fail; then train again from the one before."""
    one = trainer(faults=(Fault(operation="commit", calls=[2], error=disk_full),))
    ended = error_of(lambda: one.fit(Model()))
    left = files()
    return {
        **ended,
        "left": left,
        "again": error_of(lambda: trainer(epochs=2).fit(Model())),
        "files": files(),
    }


def warned() -> dict[str, Any]:
    """Have the last save fail where that is only to be warned of."""
    one = trainer(faults=(Fault(operation="commit", calls=[2], error=disk_full),), on_error="warn")
    return error_of(lambda: one.fit(Model()))


def late() -> dict[str, Any]:
    """Have the last save take longer than is to be waited for."""
    slow = Fault(operation="commit", calls=[2], delay_seconds=4 * SLOW_SECONDS)
    one = trainer(faults=(slow,), flush_timeout=SLOW_SECONDS / 2, abandon_grace_seconds=20.0)
    return error_of(lambda: one.fit(Model()))


class Raises(PL.Callback):  # type: ignore[misc]
    """Raises an error in a hook, on some ranks."""

    def __init__(self, hook: str, ranks: list[int]) -> None:
        super().__init__()

        def fail(trainer: Any, *_: Any, **__: Any) -> None:
            if RANK in ranks and trainer.global_step > 4:
                raise ValueError(f"rank {RANK}")

        setattr(self, hook, fail)


def fails_at_end() -> dict[str, Any]:
    """Raise an error of the user's as training ends, on one rank, then on the other."""
    errors = []
    for rank in (0, 1):
        one = trainer(Raises("on_train_end", [rank]), epochs=2)
        errors.append(error_of(partial(one.fit, Model())))
    return {"errors": errors, "files": files()}


def fails_everywhere() -> dict[str, Any]:
    """Raise an error in training, on every rank at once, while a save is pending."""
    return {
        **error_of(lambda: trainer(Raises("on_train_batch_start", [0, 1]), epochs=2).fit(Model())),
        "files": files(),
    }


def is_lost() -> dict[str, Any]:
    """Raise an error in training on rank 1 alone, while rank 0 has a save pending; the group is of no use then."""
    ended = error_of(lambda: trainer(Raises("on_train_batch_start", [1]), epochs=2).fit(Model()))
    return {**ended, "files": files()}


def first_is_killed() -> dict[str, Any]:
    """Kill rank 0 as it writes the last checkpoint, and waits for that; the group is gone with it."""

    def kill() -> StoreError:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("it is dead")

    one = trainer(faults=(Fault(operation="commit", calls=[2], error=kill),))
    return {**error_of(lambda: one.fit(Model())), "files": files()}


def fabric() -> dict[str, Any]:
    """Save with Fabric to one place twice, each time load it at once on every rank; have a third save fail."""
    lightning = importlib.import_module(
        {"pytorch_lightning": "lightning_fabric", "lightning.pytorch": "lightning.fabric"}[sys.argv[1]]
    )
    faults = [Fault(operation="commit", calls=[3], error=disk_full)]
    plugin = AsyncCheckpointIO(store_factory=storage(*faults))
    fabric = lightning.Fabric(accelerator="cpu", devices=2, strategy="ddp", plugins=[plugin])
    fabric.launch()
    path = folder() / "step.ckpt"
    loaded = []
    for step in (1, 2):
        fabric.save(path, {"step": step})
        loaded.append(fabric.load(path)["step"])
    fabric.save(path, {"step": 3})
    failed = error_of(lambda: fabric.load(path))
    loaded.append(fabric.load(path)["step"])  # what was there before is there still
    fabric.save(folder() / "other.ckpt", {"step": 4})
    plugin.wait()
    fabric.barrier()
    waited = files()
    plugin.teardown()
    return {"loaded": loaded, "waited": waited, **failed}


def main() -> None:
    """Carry out the runs, one after the other, in one process group."""
    for run in sys.argv[3:]:
        RUN[0] = run
        record = {"run": run, "rank": RANK, **globals()[run.partition(":")[0]]()}
        with (FOLDER / f"rank-{RANK}.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
