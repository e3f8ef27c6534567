"""The end of a save to Azure: lost answers, others that save under the same name."""

from __future__ import annotations

import anyio
import anyio.lowlevel
import pytest
from azure.storage.blob import (
    BlobServiceClient,
)

from async_ckpt.errors import CheckpointExistsError, StoreError
from async_ckpt.retry import RetryPolicy
from async_ckpt.testing import BytesContent
from async_ckpt.testing.conformance import cut
from stress.httpfaults import response
from tests.integration.azure.network import (
    PART_BYTES,
    Network,
    body,
    read,
    run,
    save,
    store_part,
)

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_lost_answer_to_the_commit(network: Network, overwrite: bool) -> None:
    """After a commit of which the answer is lost, on a used connection (where aiohttp tries a new one) and on that
    new one, the blob is looked at, and it is ours.
    """
    answers = iter([True, True])
    network.traffic.lose = lambda kind: kind == "blocklist" and next(answers, False)
    data = body(2 * PART_BYTES)

    async def check() -> None:
        async with network.store(overwrite=overwrite) as store:
            await save(store, network.locate(), data)
            assert await read(store, network.locate()) == data

    run(check)
    assert network.traffic.requests[-4:] == ["blocklist", "look", "look", "read"]


def test_a_commit_that_did_not_arrive(network: Network) -> None:
    """A commit that failed and of which nothing is there is repeated."""
    answers = iter([response(500)])
    old, data = body(1000, 1), body(2 * PART_BYTES)

    async def check() -> None:
        async with network.store() as store:
            await save(store, network.locate(), old)
            network.traffic.requests.clear()
            network.traffic.answer = lambda kind: next(answers, None) if kind == "blocklist" else None
            await save(store, network.locate(), data)
            assert await read(store, network.locate()) == data

    run(check)
    assert network.traffic.requests.count("blocklist") == 2


def test_a_commit_of_which_nothing_can_be_learned(network: Network) -> None:
    """Where the blob cannot be seen after a failed commit, the error says that nobody knows the outcome, and why."""
    network.traffic.answer = lambda kind: response(500) if kind in ("blocklist", "look") else None

    async def check() -> None:
        async with network.store(retry=RetryPolicy(attempts=2, initial_seconds=0.001)) as store:
            upload = await store.begin(network.locate(), 3)
            receipt = await upload.put(cut(3, 3)[0], BytesContent(b"abc"))
            with pytest.raises(StoreError, match=r"500.*is unknown.*500") as told:
                await upload.commit([receipt])
            await upload.abort()
        assert str(told.value).count(f"cannot commit {network.url()!r}: ") == 1

    run(check)
    assert network.traffic.requests[2:] == [*2 * ["blocklist", "look"], "look"]


def test_the_last_look_is_repeated(network: Network) -> None:
    """Where no commit is left to be repeated, a look that fails is, before an outcome is claimed."""
    answers = iter([response(500), response(500)])
    network.traffic.answer = lambda kind: next(answers, None) if kind == "look" else None
    network.traffic.lose = lambda kind: kind == "blocklist"

    async def check() -> None:
        async with network.store(retry=RetryPolicy(attempts=2, initial_seconds=0.001)) as store:
            await save(store, network.locate(), body(1000))

    run(check)
    assert next(answers, None) is None
    assert network.traffic.requests[-1] == "look"


def test_whoever_may_not_look_commits_again(network: Network) -> None:
    """Where an identity may write and not look, a commit that failed in passing is repeated all the same."""
    failures = iter([response(500)])
    network.traffic.answer = lambda kind: (
        response(403) if kind == "look" else next(failures, None) if kind == "blocklist" else None
    )
    data = body(1000)

    async def check() -> None:
        async with network.store() as store:
            await save(store, network.locate(), data)
            network.traffic.answer = lambda kind: None
            assert await read(store, network.locate()) == data

    run(check)
    assert network.traffic.requests.count("blocklist") == 2


def test_a_commit_by_another_in_the_meantime(network: Network) -> None:
    """Blocks that another's commit of the same name has dropped are staged again, and the save ends durable."""
    mine, theirs = body(3 * PART_BYTES, 1), body(1000, 2)

    async def check() -> None:
        async with network.store() as store:
            upload = await store.begin(network.locate(), len(mine))
            receipts = [await upload.put(part, BytesContent(mine)) for part in cut(len(mine), PART_BYTES)]
            await save(store, network.locate(), theirs)
            assert await read(store, network.locate()) == theirs
            await upload.commit(receipts)
            assert await read(store, network.locate()) == mine

    run(check)
    assert network.traffic.requests.count("blocklist") == 3


def test_two_that_must_not_replace(network: Network) -> None:
    """Of two saves of a name with overwrite=False one commits, and the other is told and changes nothing."""
    first, second = body(1000, 1), body(1000, 2)

    async def check() -> None:
        async with network.store(overwrite=False) as store:
            upload = await store.begin(network.locate(), len(first))
            receipt = await upload.put(cut(1000, 1000)[0], BytesContent(first))
            await save(store, network.locate(), second)
            with pytest.raises(CheckpointExistsError, match="remove it first"):
                await upload.commit([receipt])
            await upload.abort()
            assert await read(store, network.locate()) == second

    run(check)


def test_of_many_that_must_not_replace_one_wins(network: Network) -> None:
    """Of 16 saves of a name at once with overwrite=False one is stored, and the others are told."""
    told: list[int] = []

    async def check() -> None:
        async with network.store(overwrite=False) as store:

            async def one(number: int) -> None:
                try:
                    await save(store, network.locate(), body(2 * PART_BYTES, number))
                except CheckpointExistsError:
                    told.append(number)

            async with anyio.create_task_group() as group:
                for number in range(16):
                    group.start_soon(one, number)
            (winner,) = set(range(16)) - set(told)
            assert await read(store, network.locate()) == body(2 * PART_BYTES, winner)

    run(check)


def test_blocks_of_another_program(network: Network) -> None:
    """Uncommitted blocks with ids of another length, which Azure does not mix with ours, are told with the cure."""
    with BlobServiceClient.from_connection_string(
        network.server.storage_options["connection_string"]
    ) as client:
        client.get_blob_client(network.container, "a.ckpt").stage_block("0000001", b"x")

    async def check() -> None:
        async with network.store() as store:
            with pytest.raises(StoreError, match="uncommitted blocks"):
                await store_part(store, network.locate())

    run(check)
