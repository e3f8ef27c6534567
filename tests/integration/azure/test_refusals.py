"""What Azure does not allow, told at once and with what to do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from azure.storage.blob import (
    BlobServiceClient,
)

from async_ckpt.errors import StoreError, TransientStoreError
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


def test_a_wrong_key(network: Network) -> None:
    """A wrong key is told at once, with what to check."""
    key = network.fields["AccountKey"]
    wrong = network.storage_options["connection_string"].replace(key, "d3Jvbmc=")

    async def check() -> None:
        async with network.store(storage_options={"connection_string": wrong}) as store:
            with pytest.raises(StoreError, match=r"cannot begin.*Check the account's name and key") as caught:
                await store.begin(network.locate(), 1)
            assert not isinstance(caught.value, TransientStoreError)

    run(check)
    assert len(network.traffic.requests) == 1


@pytest.mark.parametrize("call", ["begin", "source", "delete", "exists"])
def test_a_container_that_does_not_exist(network: Network, call: str) -> None:
    """A missing container is an error that says so, whatever is asked, after one request."""
    network.container = "not-there"

    async def check() -> None:
        async with network.store() as store:
            arguments = [network.locate(), 1][: 2 if call == "begin" else 1]
            with pytest.raises(StoreError, match="Create the container"):
                await getattr(store, call)(*arguments)

    run(check)
    assert len(network.traffic.requests) == 1


def _for_the_container(network: Network) -> dict[str, str]:
    return network.with_token(permission="rcw")


def _for_blobs(network: Network) -> dict[str, str]:
    return network.with_token_for_blobs()


@pytest.mark.parametrize("token", [_for_the_container, _for_blobs])
def test_a_shared_access_signature(network: Network, token: Callable[[Network], dict[str, str]]) -> None:
    """Who holds a token to read, create and write, but not to list the container, can save and read there."""
    data = body(3 * PART_BYTES)

    async def check() -> None:
        async with network.store(storage_options=token(network)) as store:
            await save(store, network.locate(), data)
            assert await read(store, network.locate()) == data

    run(check)


def test_a_lease(network: Network) -> None:
    """A blob on which somebody holds a lease is neither replaced nor deleted, and the error says why."""
    with BlobServiceClient.from_connection_string(
        network.server.storage_options["connection_string"]
    ) as client:
        blob = client.get_blob_client(network.container, "a.ckpt")
        blob.upload_blob(b"theirs")
        blob.acquire_lease()

    async def check() -> None:
        async with network.store() as store:
            with pytest.raises(StoreError, match="holds a lease"):
                await store_part(store, network.locate())
            with pytest.raises(StoreError, match="holds a lease"):
                await store.delete(network.locate())
            assert await read(store, network.locate()) == b"theirs"

    run(check)


def test_a_token_that_does_not_allow_it(network: Network) -> None:
    """Who may only read is told which permissions a save needs, and that token's secret is not in the message."""
    options = network.with_token(permission="rl")

    async def check() -> None:
        async with network.store(storage_options=options) as store:
            with pytest.raises(StoreError, match=r"cannot write.*Storage Blob Data Contributor") as caught:
                await store_part(store, network.locate())
            assert "sig=" not in str(caught.value)

    run(check)


def test_an_expired_token(network: Network) -> None:
    """A token that has expired is told at once, with what to check."""
    options = network.with_token(permission="racwdl", hours=-1)

    async def check() -> None:
        async with network.store(storage_options=options) as store:
            with pytest.raises(StoreError, match="Check the account's name and key, the SAS token"):
                await store.begin(network.locate(), 1)

    run(check)
    assert len(network.traffic.requests) == 1
