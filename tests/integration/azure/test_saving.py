"""Saving to Azure on a bad network: what is sent, how often, and what becomes of it."""

from __future__ import annotations

import io
import itertools
import random
import sys
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import torch

from async_ckpt import CheckpointService
from async_ckpt.errors import StoreError, ThrottledError, TransientStoreError
from async_ckpt.retry import RetryPolicy
from stress.httpfaults import response
from tests.integration.azure.network import (
    BUSY,
    IMPATIENT,
    PART_BYTES,
    RETRY,
    Network,
    body,
    read,
    run,
    save,
)
from tests.support import PATIENCE_SECONDS

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup

pytestmark = pytest.mark.integration


def test_the_same_bytes_as_torch_save(network: Network) -> None:
    """What the service saves to Azure is what ``torch.save`` writes, and loads again."""
    state: dict[str, Any] = {"weights": torch.arange(300_000, dtype=torch.float32), "step": 7}
    expected = io.BytesIO()
    torch.save(state, expected)

    with CheckpointService(storage_options=network.storage_options, part_size=PART_BYTES) as service:
        service.save(state, network.url()).wait(PATIENCE_SECONDS)
        loaded = service.load(network.url())

    async def check() -> None:
        async with network.store() as store:
            assert await read(store, network.locate()) == expected.getvalue()

    run(check)
    assert torch.equal(loaded["weights"], state["weights"])
    assert loaded["step"] == 7


def test_requests_of_a_save(network: Network) -> None:
    """A save costs one listing, one request a block, and one commit; with overwrite=False one look more."""

    async def check() -> None:
        for overwrite, name in ((True, "a"), (False, "b")):
            network.traffic.requests.clear()
            async with network.store(overwrite=overwrite) as store:
                await save(store, network.locate(name), body(4 * PART_BYTES))
            looks = [] if overwrite else ["look"]
            assert network.traffic.requests == ["list", *looks, *4 * ["block"], "blocklist"]

    run(check)


@pytest.mark.parametrize("attempts", [1, 3])
@pytest.mark.parametrize("kind", ["list", "block", "blocklist"])
def test_one_layer_of_retries(network: Network, kind: str, attempts: int) -> None:
    """A request that always fails is sent as often as the policy says: the client repeats nothing of its own."""
    network.traffic.answer = lambda asked: response(500) if asked == kind else None
    retry = RetryPolicy(attempts=attempts, initial_seconds=0.001)

    async def check() -> None:
        async with network.store(retry=retry) as store:
            with pytest.raises((TransientStoreError, ExceptionGroup)):
                await save(store, network.locate(), body(1000), retry)

    run(check)
    assert network.traffic.requests.count(kind) == attempts


def test_a_busy_server(network: Network) -> None:
    """With three of ten requests refused as too many, a save ends durable."""
    chance = random.Random(3)
    network.traffic.answer = lambda kind: BUSY if chance.random() < 0.3 else None
    patient = RetryPolicy(attempts=30, initial_seconds=0.01, maximum_seconds=0.02)
    data = body(12 * PART_BYTES)

    async def check() -> None:
        async with network.store(retry=patient) as store:
            await save(store, network.locate(), data, patient)
            network.traffic.answer = lambda kind: None
            assert await read(store, network.locate()) == data

    run(check)


def test_a_busy_server_is_called_that(network: Network) -> None:
    """What Azure says when it is asked too often is a ThrottledError, which slows the sender."""
    network.traffic.answer = lambda kind: BUSY

    async def check() -> None:
        async with network.store(retry=RetryPolicy(attempts=1)) as store:
            with pytest.raises(ThrottledError, match="ServerBusy"):
                await store.begin(network.locate(), 1)

    run(check)


def test_a_stalled_upload(network: Network) -> None:
    """A block of which nothing moves any more is sent again on another connection."""
    data = body(6 * PART_BYTES)

    async def check() -> None:
        async with network.store(retry=IMPATIENT) as store:
            network.proxy.set(stall_after=PART_BYTES + PART_BYTES // 2)
            await save(store, network.locate(), data, IMPATIENT)
            network.proxy.clear()
            assert await read(store, network.locate()) == data

    run(check)
    assert network.traffic.requests.count("block") > 6


def test_connections_reset_in_mid_block(network: Network) -> None:
    """A save whose connections are reset, each in its second block, ends durable."""
    data = body(6 * PART_BYTES)
    patient = RetryPolicy(attempts=20, initial_seconds=0.01, maximum_seconds=0.05)

    async def check() -> None:
        async with network.store(retry=patient) as store:
            network.proxy.set(reset_after=PART_BYTES + PART_BYTES // 2)
            await save(store, network.locate(), data, patient)
            network.proxy.clear()
            assert await read(store, network.locate()) == data

    run(check)


def test_nobody_answers(network: Network) -> None:
    """Where no connection comes about, it is tried as often as the policy says."""
    network.proxy.set(refuse=True)

    async def check() -> None:
        async with network.store() as store:
            with pytest.raises(TransientStoreError, match="cannot begin"):
                await store.begin(network.locate(), 1)

    run(check)
    assert network.proxy.connections >= RETRY.attempts


@pytest.mark.slow
def test_cancelled_at_any_moment(network: Network) -> None:
    """A save cancelled 200 times, any number of steps after each of its requests, leaves the old blob or the new."""
    old, new = body(1000, 1), body(3 * PART_BYTES, 2)
    seen = set()

    async def check() -> None:
        found = b""
        async with network.store() as store:
            for asked, steps in itertools.product(range(1, 6), range(0, 400, 10)):
                if found != old:
                    network.traffic.answer = lambda kind: None
                    await save(store, network.locate(), old)
                reached = network.traffic.after(asked)
                async with anyio.create_task_group() as group:
                    group.start_soon(save, store, network.locate(), new)
                    await reached.wait()
                    for _ in range(steps):
                        await anyio.lowlevel.checkpoint()
                    group.cancel_scope.cancel()
                try:
                    found = await read(store, network.locate())
                except StoreError:  # replaced while it was read, by a commit that was on its way
                    found = await read(store, network.locate())
                seen.add(found)

    run(check)
    assert old in seen <= {old, new}
