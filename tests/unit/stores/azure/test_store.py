"""What of the store of Azure needs no server: where it finds its account, and what it leaves."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest
from adlfs import AzureBlobFileSystem

from async_ckpt.errors import StoreError
from async_ckpt.retry import RetryPolicy
from async_ckpt.stores import locate
from async_ckpt.stores.azure import AzureStore
from async_ckpt.stores.azure.client import AzureClient
from async_ckpt.stores.azure.store import block_size
from async_ckpt.testing import ThreadWorkers

KEY = "a2V5"


class Credential:
    """A login of the user's own."""

    closed = False

    async def get_token(self, *scopes: str, **options: Any) -> Any:
        raise NotImplementedError

    async def close(self) -> None:
        self.closed = True


def with_client(options: dict[str, Any], test: Callable[[AzureClient], Awaitable[None]]) -> None:
    """Run *test* with a client made of adlfs's *options*, and close it."""

    async def run() -> None:
        workers = ThreadWorkers(1)
        client = AzureClient(AzureBlobFileSystem, options, workers=workers)
        try:
            await test(client)
        finally:
            await client.aclose()
            workers.close()

    anyio.run(run)
    gc.collect()


ACCOUNTS: dict[str, tuple[dict[str, Any], str]] = {
    "key": ({"account_name": "me", "account_key": KEY}, "https://me.blob.core.windows.net/"),
    "sas": (
        {"account_name": "me", "sas_token": "sv=1&sig=x"},
        "https://me.blob.core.windows.net/?sv=1&sig=x",
    ),
    "host": (
        {"account_name": "me", "account_key": KEY, "account_host": "me.blob.core.example"},
        "https://me.blob.core.example/",
    ),
    "connection string": (
        {"connection_string": f"AccountName=me;AccountKey={KEY};BlobEndpoint=http://127.0.0.1:1/me"},
        "http://127.0.0.1:1/me/",
    ),
    "anonymous": ({"account_name": "me", "anon": True}, "https://me.blob.core.windows.net/"),
    "secondary": (
        {"account_name": "me", "account_key": KEY, "location_mode": "secondary"},
        "https://me-secondary.blob.core.windows.net/",
    ),
    "login": ({"account_name": "me", "anon": False}, "https://me.blob.core.windows.net/"),
}


@pytest.mark.parametrize("how", ACCOUNTS)
def test_accounts(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever adlfs accepts leads to the account that it would use, with the same credentials; closing is clean."""
    for name in ("CONNECTION_STRING", "ACCOUNT_NAME", "ACCOUNT_KEY", "SAS_TOKEN", "CLIENT_ID", "ANON"):
        monkeypatch.delenv(f"AZURE_STORAGE_{name}", raising=False)
    options, url = ACCOUNTS[how]

    async def test(client: AzureClient) -> None:
        service = await client.get()
        assert service.url == url
        assert await client.get() is service

    with_client(options, test)


def test_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables that adlfs reads name the account."""
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", f"AccountName=them;AccountKey={KEY}")

    async def test(client: AzureClient) -> None:
        assert (await client.get()).url == "https://them.blob.core.windows.net/"

    with_client({}, test)


def test_a_login_of_the_users_own() -> None:
    """A credential object that the user passes is used, and left open: the user may need it again."""
    credential = Credential()

    async def test(client: AzureClient) -> None:
        assert (await client.get()).credential is credential

    with_client({"account_name": "me", "credential": credential}, test)
    assert not credential.closed


def test_no_finalizer_is_left() -> None:
    """The file system that adlfs made is freed: nothing of it waits for the interpreter's exit."""
    made: list[weakref.ref[Any]] = []

    class Watched(AzureBlobFileSystem):  # type: ignore[misc]
        def do_connect(self) -> None:
            made.append(weakref.ref(self))
            super().do_connect()

    async def run() -> None:
        workers = ThreadWorkers(1)
        client = AzureClient(Watched, {"account_name": "me", "account_key": KEY}, workers=workers)
        await client.get()
        await client.aclose()
        await client.aclose()
        workers.close()

    anyio.run(run)
    gc.collect()
    assert [reference() for reference in made] == [None]


def test_a_closed_client_opens_again() -> None:
    """After ``aclose`` the next use makes a new connection."""

    async def test(client: AzureClient) -> None:
        first = await client.get()
        await client.aclose()
        assert await client.get() is not first

    with_client({"account_name": "me", "account_key": KEY}, test)


REFUSED: dict[str, tuple[dict[str, Any], str, int, str]] = {
    "no account": ({}, "c/a.ckpt", 1, "Must provide either a connection_string or account_name"),
    "a container": ({"account_name": "me", "account_key": KEY}, "c", 1, "names a container"),
    "too large": ({"account_name": "me", "account_key": KEY}, "c/a.ckpt", 1 << 50, "50000 parts"),
    "a version": (
        {"account_name": "me", "account_key": KEY, "version_aware": True},
        "c/a.ckpt?versionid=2026",
        1,
        "leave .versionid= out",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_no_save_can_do(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be saved is told before any request."""
    monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING", raising=False)
    monkeypatch.setenv("AZURE_STORAGE_ANON", "true")
    options, path, nbytes, said = REFUSED[what]

    async def run() -> None:
        workers = ThreadWorkers(1)
        store = AzureStore(AzureBlobFileSystem, options, workers=workers, retry=RetryPolicy(attempts=1))
        try:
            with pytest.raises(StoreError, match=f"cannot begin.*{said}"):
                await store.begin(locate(f"abfs://{path}", storage_options=options), nbytes)
        finally:
            await store.aclose()
            workers.close()

    anyio.run(run)


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("az://c/run/a.ckpt", {"account_name": "me"}),
        ("abfs://c@me.dfs.core.windows.net/run/a.ckpt", {}),
        ("abfss://c@me.dfs.core.windows.net/run/a.ckpt", {}),
    ],
)
def test_spellings_of_one_place(url: str, options: dict[str, Any]) -> None:
    """However the account is named, in the URL or in the options, it is one place (O1)."""
    expected = locate("abfs://c/run/a.ckpt", storage_options={"account_name": "me"})
    found = locate(url, storage_options=options)
    assert (found.key, found.path) == (expected.key, expected.path)


@pytest.mark.parametrize("nbytes", [0, 1, 10 << 30, 5 << 40, 50_000 * (4000 << 20)])
def test_any_size_fits_within_the_limits(nbytes: int) -> None:
    """A file of up to 190 TiB is cut into at most 50,000 blocks of at most 4000 MiB each."""
    block = block_size(nbytes, wanted=128 << 20, at_a_time=4)
    assert block <= 4000 << 20
    assert block * 50_000 >= nbytes
