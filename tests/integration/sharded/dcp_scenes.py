"""What each of several processes does in a test of ``async_ckpt.dcp``: one function a scene."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp

import async_ckpt.dcp as dcp
from async_ckpt import CheckpointService, ShardedSaveError
from async_ckpt.stores import open_store
from async_ckpt.stores.base import Location, Store, Workers
from async_ckpt.testing import Fault, FaultyStore
from tests.integration.sharded.states import Training, differences, every_kind, whole
from tests.integration.sharded.torch_names import ALONE


def save_for_torch(folder: Path, url: str) -> Any:
    """Save in place of torch, have torch load it, and tell what differs; and what is returned."""
    metadata = dcp.save(every_kind(1.0), checkpoint_id=url)
    other = every_kind(2.0)
    torch_dcp.load(other, checkpoint_id=url)
    names = None if metadata is None else sorted(metadata.state_dict_metadata)
    known = sorted(torch_dcp.FileSystemReader(url).read_metadata().state_dict_metadata)
    dcp.close()
    return {
        "differences": differences(whole(every_kind(1.0)), whole(other)),
        "returned": None if names is None else names == known,
    }


def overlap(folder: Path, saves: int) -> Any:
    """Save again and again, and change the weights right after each call; tell what torch then finds in each."""
    dcp.configure(queue_depth=3, max_concurrent_saves=2)
    training = Training()
    expected, found, futures = [], [], []
    for number in range(saves):
        training.step()
        state = training.state()
        futures.append(dcp.async_save(state, checkpoint_id=folder / f"step-{number}"))
        expected.append(whole(state)["model"]["0.weight"].clone())
        with torch.no_grad():
            for parameter in training.model.parameters():
                parameter.to_local().add_(1.0)  # type: ignore[attr-defined]
                parameter.to_local().sub_(1.0)  # type: ignore[attr-defined]
    _, pending = concurrent.futures.wait(futures, timeout=60)
    assert not pending
    returned = [future.result() is not None for future in futures]
    for number in range(saves):
        state = training.state()
        torch_dcp.load(state, checkpoint_id=str(folder / f"step-{number}"))
        found.append(
            state["steps"] == number + 1 and torch.equal(whole(state["model"]["0.weight"]), expected[number])
        )
    dcp.close()
    return {"found": found, "returned": returned}


def a_failure(folder: Path, url: str, look: str) -> Any:
    """Save with a rank that names another place; tell where its error comes out, and whether it does once."""
    rank = dist.get_rank()
    state = every_kind(1.0, with_planes=False)
    future = dcp.async_save(state, checkpoint_id=f"{url}-{min(rank, 1)}")
    told: dict[str, Any] = {}
    if look == "result":
        try:
            future.result(30)
        except ShardedSaveError as error:
            told["first"] = str(error).replace(f"{url}-0", "it").replace(f"{url}-1", "it")
    elif look == "exception":
        told["first"] = str(future.exception(30)).replace(f"{url}-0", "it").replace(f"{url}-1", "it")
    elif look == "awaited":
        told["first"] = asyncio.run(_awaited(future)).replace(f"{url}-0", "it").replace(f"{url}-1", "it")
    else:
        concurrent.futures.wait([future], 30)
    dist.barrier()  # every rank knows of it
    try:
        told["next"] = dcp.save(state, checkpoint_id=url) is not None
    except ShardedSaveError:
        told["next"] = "raised"
    told["then"] = dcp.save(state, checkpoint_id=url) is not None
    dcp.close()
    return told


async def _awaited(future: Any) -> str:
    try:
        await asyncio.wait_for(asyncio.wrap_future(future), 30)
    except ShardedSaveError as error:
        return str(error)
    return ""


def groups(folder: Path) -> Any:
    """Save in two groups of two and in the group of all, overlapping, and each rank by itself."""
    rank = dist.get_rank()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine, other = pairs[rank // 2], pairs[1 - rank // 2]
    state = {"number": torch.full((3,), float(rank // 2)), "name": f"pair {rank // 2}"}
    futures = [
        dcp.async_save(state, checkpoint_id=folder / f"pair-{rank // 2}", process_group=mine),
        dcp.async_save(every_kind(3.0), checkpoint_id=folder / "all"),
        dcp.async_save({"rank": rank}, checkpoint_id=folder / f"alone-{rank}", no_dist=True),
    ]
    firsts = [future.result(60) is not None for future in futures]
    loaded: dict[str, Any] = {"number": torch.zeros(3), "name": ""}
    torch_dcp.load(loaded, checkpoint_id=str(folder / f"pair-{rank // 2}"), process_group=mine)
    alone = {"rank": -1}
    torch_dcp.load(alone, checkpoint_id=str(folder / f"alone-{rank}"), **ALONE)
    everybody = every_kind(4.0)
    torch_dcp.load(everybody, checkpoint_id=str(folder / "all"))
    try:
        dcp.save(state, checkpoint_id=folder / "not", process_group=other)
        refused = ""
    except ValueError as error:
        refused = str(error)
    dcp.close()
    return {
        "firsts": firsts,
        "pair": loaded["name"] == state["name"] and torch.equal(loaded["number"], state["number"]),
        "alone": alone["rank"] == rank,
        "all": differences(whole(every_kind(3.0)), whole(everybody)),
        "refused": refused,
    }


def slow_callback(folder: Path, url: str) -> Any:
    """Have a callback block for longer than a silent rank is waited for, while the next save is under way."""
    dcp.configure(silence_timeout=1.5)
    begun, may_end = [], concurrent.futures.Future()  # type: ignore[var-annotated]
    state = every_kind(1.0, with_planes=False)
    first = dcp.async_save(state, checkpoint_id=f"{url}-1")
    first.add_done_callback(lambda future: begun.append(future is first and future.done()))
    first.add_done_callback(lambda future: may_end.result(60))
    first.add_done_callback(lambda future: begun.append(True))
    first.result(30)
    started = time.monotonic()
    seconds = 0.0
    number = 1
    while seconds < 3.0 or number < 4:  # one that is not heard of for so long counts as ended
        number += 1
        dcp.save(state, checkpoint_id=f"{url}-{number}")
        seconds_here = torch.tensor([time.monotonic() - started])
        dist.all_reduce(seconds_here, op=dist.ReduceOp.MAX)  # so that all make as many saves
        seconds = float(seconds_here)
    may_end.set_result(None)
    dcp.close()
    return begun[:1]


def again(folder: Path, url: str) -> Any:
    """Leave the process group, found another one, and save in that."""
    dcp.async_save(every_kind(1.0), checkpoint_id=f"{url}-1").result(30)
    dist.destroy_process_group()
    # Within the launcher's store, where keys of the first group still are.
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), None, False)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", store=dist.PrefixStore("second", store), rank=rank, world_size=world_size)
    dcp.save(every_kind(2.0), checkpoint_id=f"{url}-2")
    other = every_kind(3.0)
    torch_dcp.load(other, checkpoint_id=f"{url}-2")
    dcp.close()
    return differences(whole(every_kind(2.0)), whole(other))


def round_trips(folder: Path, url: str, options: dict[str, Any]) -> Any:
    """Save by us, by torch, by torch with our writer; load by us, and by torch with our reader; tell what differs."""
    dcp.configure(storage_options=options)
    dcp.async_save(every_kind(1.0), checkpoint_id=f"{url}/ours").result(60)
    torch_dcp.save(every_kind(1.0), storage_writer=dcp.StorageWriter(f"{url}/theirs by ours"))
    future = torch_dcp.async_save(
        every_kind(1.0), storage_writer=dcp.StorageWriter(f"{url}/staged"), async_stager=dcp.Stager()
    )
    future.result(60)  # type: ignore[union-attr]
    names = ["ours", "theirs by ours", "staged"]
    if not options:
        torch_dcp.save(every_kind(1.0), checkpoint_id=f"{url}/theirs")
        names.append("theirs")
    found = {}
    for name in names:
        mine, through = every_kind(2.0), every_kind(3.0)
        dcp.load(mine, checkpoint_id=f"{url}/{name}")
        torch_dcp.load(through, storage_reader=dcp.StorageReader(f"{url}/{name}"))
        found[name] = differences(whole(every_kind(1.0)), whole(mine))
        found[name] += differences(whole(every_kind(1.0)), whole(through))
        if not options:
            theirs = every_kind(4.0)
            torch_dcp.load(theirs, checkpoint_id=f"{url}/{name}")
            found[name] += differences(whole(every_kind(1.0)), whole(theirs))
    dcp.close()
    return found


def failing_under_torch(folder: Path, url: str) -> Any:
    """Have torch save by our writer, where one rank's storage refuses; tell what every rank gets, and what is there."""
    torch_dcp.save(every_kind(1.0), storage_writer=dcp.StorageWriter(url))
    fault = Fault(operation="put", calls={1}, error=lambda: PermissionError(13, "no"))

    def make(location: Location, workers: Workers) -> Store:
        return FaultyStore(open_store(location, workers=workers), [fault] if dist.get_rank() == 1 else [])

    with CheckpointService(store_factory=make) as service:
        try:
            torch_dcp.save(every_kind(2.0), storage_writer=dcp.StorageWriter(url, service=service))
            told = "durable"
        except torch_dcp.CheckpointException as error:
            told = ",".join(map(str, error.failures))
        other = every_kind(3.0)
        dcp.load(other, checkpoint_id=url)
        there = differences(whole(every_kind(1.0)), whole(other))
        torch_dcp.save(every_kind(4.0), storage_writer=dcp.StorageWriter(url, service=service))
    dcp.load(other, checkpoint_id=url)
    dcp.close()
    return {"told": told, "there": there, "next": differences(whole(every_kind(4.0)), whole(other))}
