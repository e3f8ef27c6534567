"""Reading from Azure, and what a directory is there."""

from __future__ import annotations

import pytest
from azure.storage.blob import (
    BlobServiceClient,
)

from async_ckpt.errors import StoreError
from stress.httpfaults import response
from tests.integration.azure.network import (
    IMPATIENT,
    Network,
    body,
    read,
    run,
    save,
)

pytestmark = pytest.mark.integration


def test_reading_goes_on_where_it_stopped(network: Network) -> None:
    """A reading whose connections are reset asks only for what has not arrived."""
    data = body(4 << 20)

    async def check() -> None:
        async with network.store() as store:
            await save(store, network.locate(), data)
            network.proxy.set(reset_after=3 << 20)
            assert await read(store, network.locate()) == data

    run(check)
    assert network.traffic.starts[0] == 0 < network.traffic.starts[-1]
    assert network.traffic.starts == sorted(network.traffic.starts)


def test_a_stalled_reading(network: Network) -> None:
    """A reading of which nothing moves any more is repeated on another connection."""
    data = body(1 << 20)

    async def check() -> None:
        async with network.store(retry=IMPATIENT) as store:
            await save(store, network.locate(), data, IMPATIENT)
            network.proxy.set(stall_after=800_000)
            assert await read(store, network.locate()) == data

    run(check)


@pytest.mark.parametrize("status", [404, 412])
def test_a_blob_replaced_or_deleted_while_it_is_read(network: Network, status: int) -> None:
    """That the version which is read is gone is told as that, whichever way Azure says it."""

    async def check() -> None:
        async with network.store() as store:
            await save(store, network.locate(), b"abc")
            source = await store.source(network.locate())
            network.traffic.answer = lambda kind: response(status)
            with pytest.raises(StoreError, match="replaced or deleted"):
                await source.read_into(0, memoryview(bytearray(3)))

    run(check)


@pytest.mark.parametrize("mark", ["hdi_isfolder", "is_directory"])
def test_a_blob_that_stands_for_a_directory(network: Network, mark: str) -> None:
    """A marker is a directory: it exists, cannot be read, and is deleted after what is in it."""
    with BlobServiceClient.from_connection_string(
        network.server.storage_options["connection_string"]
    ) as client:
        client.get_blob_client(network.container, "run").upload_blob(b"", metadata={mark: "true"})

    async def check() -> None:
        async with network.store() as store:
            await save(store, network.locate("run/a.ckpt"), b"abc")
            assert await store.exists(network.locate("run"))
            with pytest.raises(StoreError, match="Is a directory"):
                await store.source(network.locate("run"))
            with pytest.raises(StoreError, match="Is a directory"):
                await store.begin(network.locate("run"), 1)
            await store.delete(network.locate("run"))
            assert not await store.exists(network.locate("run"))

    run(check)
    assert network.traffic.requests.count("delete") == 2
