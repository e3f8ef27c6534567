"""The public API as a type checker sees it: mypy --strict accepts this file, and nothing runs it.

A line with ``type: ignore[code]`` is a claim too: mypy reports an ignore that is not needed.
"""

from __future__ import annotations

import concurrent.futures
import os
import pickle
from pathlib import Path
from typing import Any

from typing_extensions import assert_type

import async_ckpt.dcp as dcp
from async_ckpt import (
    AsyncCheckpointCallback,
    AsyncCheckpointIO,
    CheckpointService,
    consolidate,
    latest,
    load,
)
from async_ckpt.errors import FlushError, StoreError
from async_ckpt.events import Durable, Event, Observer
from async_ckpt.handle import Handle, Report, State
from async_ckpt.lightning import attach
from async_ckpt.options import ServiceOptions
from async_ckpt.retry import RetryPolicy
from async_ckpt.telemetry.meter import SaveProgress


def a_blocking_loop(state: dict[str, Any], path: Path) -> None:
    """A service is a context manager, and its handles can be asked, waited for and timed."""
    with CheckpointService(queue_depth=2, memory_limit="8GiB", overflow="supersede") as service:
        handle = service.save(state, path)
        assert_type(handle, Handle)
        assert_type(handle.done(), bool)
        assert_type(handle.state, State)
        assert_type(handle.wait(timeout=60), Report)
        assert_type(handle.wait().nbytes, int)
        assert_type(service.save_sharded({"weight": state}, "s3://bucket/step-1"), Handle)
        assert_type(service.remove("s3://bucket/old.ckpt"), Handle)
        assert_type(service.options, ServiceOptions)
        assert_type(service.pending, tuple[Handle, ...])
        service.wait(timeout=600)
        service.save(state, 3)  # type: ignore[arg-type]


async def an_async_loop(state: object, url: str | os.PathLike[str]) -> Report:
    """A handle is awaited for its report."""
    async with CheckpointService(retry=RetryPolicy(attempts=3)) as service:
        report = await service.save(state, url)
        assert_type(report, Report)
        await service.flush()
        await service.flush(timeout=1.5)
    await service.aclose()
    return report


def an_observer(event: Event) -> None:
    """Any callable with one event observes."""
    if isinstance(event, Durable):
        assert_type(event.seconds, float)


def observers() -> CheckpointService:
    """An observer may return anything."""
    observer: Observer = an_observer
    return CheckpointService(observer=observer)


def errors(group: FlushError, error: StoreError) -> tuple[Exception, ...]:
    """Errors carry what a program needs to act on them."""
    assert_type(error.location, str)
    assert_type(error.stage, str)
    return group.exceptions


def a_plugin() -> AsyncCheckpointIO:
    """The plugin takes a base or none, and the same options by keyword."""
    plugin = AsyncCheckpointIO(queue_depth=2)
    assert_type(plugin.service, CheckpointService)
    plugin.wait(timeout=60)
    plugin.teardown()
    return plugin


def loading(url: str) -> None:
    """A state is loaded without a service."""
    state = load(url, map_location="cpu", weights_only=True)
    load(url, keys="state_dict.*", progress=True, storage_options={"anon": True})
    load(url, keys=["state_dict.encoder.*", "epoch"], progress=None)
    load(url, weights_only=False, pickle_module=pickle, encoding="latin1")
    assert_type(latest("s3://bucket/run", storage_options={"anon": True}), str | None)
    assert_type(latest(Path("run")), Path | None)
    consolidate("s3://bucket/run/step-1", Path("model.pt"), weights_only=False, overwrite=False)
    consolidate(
        Path("run"), "gs://bucket/model.pt", storage_options={}, file_storage_options={"token": "anon"}
    )
    assert_type(state, Any)


def in_place_of_torch(state: dict[str, Any], path: Path) -> None:
    """What torch's functions take and return, ours do."""
    assert_type(dcp.save(state, checkpoint_id=path, no_dist=True), dcp.Metadata | None)
    future = dcp.async_save(state, checkpoint_id="s3://bucket/step-1", planner=dcp.DefaultSavePlanner())
    assert_type(future.result(timeout=60), dcp.Metadata | None)
    assert_type(future.handle, Handle)
    dcp.load(state, checkpoint_id=path, planner=dcp.DefaultLoadPlanner(), weights_only=False)
    dcp.load(state, storage_reader=dcp.StorageReader(path))
    with CheckpointService() as service:
        dcp.save(state, storage_writer=dcp.StorageWriter("s3://bucket/step-1", service=service))
    plain: concurrent.futures.Future[dcp.Metadata | None] = future
    plain.add_done_callback(print)
    dcp.configure(queue_depth=2)
    dcp.close(timeout=60)


def a_companion(path: Path) -> None:
    """The callback takes three options, by name."""
    assert_type(AsyncCheckpointCallback(), AsyncCheckpointCallback)
    AsyncCheckpointCallback(log_metrics=False, progress_bar=False, timeline=path)
    AsyncCheckpointCallback(False)  # type: ignore[call-arg]


def trainers() -> None:
    """Both Trainers and both Fabrics take the plugin, and the Trainers the callback."""
    import lightning.fabric
    import lightning.pytorch
    import lightning_fabric
    import pytorch_lightning

    plugin = AsyncCheckpointIO(queue_depth=2)
    lightning.pytorch.Trainer(plugins=[plugin], callbacks=[AsyncCheckpointCallback()])
    pytorch_lightning.Trainer(plugins=[plugin], callbacks=[AsyncCheckpointCallback(timeline="run.json")])
    lightning.fabric.Fabric(plugins=[plugin])
    fabric = lightning_fabric.Fabric(plugins=[plugin])
    assert_type(attach(fabric), AsyncCheckpointIO)
    assert_type(attach(fabric, plugin), AsyncCheckpointIO)
    assert_type(plugin.will_exist("a.ckpt"), bool | None)
    assert_type(plugin.meter.pending, list[SaveProgress])
