"""The clients of a real S3 server: their settings, their credentials, what they ask and when they end."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from typing import Any

import anyio
import fsspec.config
import pytest
import s3fs

from async_ckpt.errors import TransientStoreError
from stress.httpfaults import response
from tests.integration.s3.place import LARGE, SMALL, Place, refusal, running, save
from tests.support import python

pytestmark = pytest.mark.integration

NOTHING = {"key": None, "secret": None, "endpoint_url": None, "client_kwargs": None}
"""Leaves all to where s3fs takes it from if nothing is given."""


def watched(clients: list[Any]) -> type:
    """Return the file system of s3fs, which adds each client that it makes to *clients*."""

    class Watched(s3fs.S3FileSystem):  # type: ignore[misc]
        async def set_session(self, *args: Any, **kwargs: Any) -> Any:
            client = await super().set_session(*args, **kwargs)
            if client not in clients:
                clients.append(client)
            return client

    return Watched


def count_open(clients: list[Any]) -> int:
    """Return how many of *clients* may have connections."""
    pools = [client._endpoint.http_session._sessions or {} for client in clients]
    return sum(any(not each.closed for each in pool.values()) for pool in pools)


def refuse_old(answer: bytes) -> Callable[[str, Mapping[str, str]], bytes | None]:
    """Return what gives *answer* to requests that the key "old" has signed."""

    def answered(kind: str, headers: Mapping[str, str]) -> bytes | None:
        return answer if "Credential=old/" in headers.get("authorization", "") else None

    return answered


def test_the_training_thread_does_without_the_network(place: Place) -> None:
    """Whoever saves, loads and removes makes no connection in the thread that asks for it."""
    done = python(
        """
        import ast, sys, threading
        import s3fs, torch
        from async_ckpt import CheckpointService

        asking = threading.get_ident()

        def refuse(event, args):
            if event.startswith("socket.") and threading.get_ident() == asking:
                raise RuntimeError(f"{event} in the thread that asks")

        sys.addaudithook(refuse)
        with CheckpointService(part_size="5MiB", storage_options=ast.literal_eval(sys.argv[2])) as service:
            service.save({"x": torch.ones(3_000_000)}, sys.argv[1]).wait(60)
            print(float(service.load(sys.argv[1])["x"].mean()))
            service.remove(sys.argv[1])
        """,
        f"s3://{place.bucket}/run/x.ckpt",
        place.options,
        env={"XDG_STATE_HOME": str(place.folder)},
    )
    assert (done.stdout, done.stderr) == ("1.0\n", "")
    assert place.names() == []


def test_no_warning_at_exit(place: Place) -> None:
    """However a script ends, what it saved last is durable, and no connection is found open by the collector."""
    done = python(
        """
        import ast, gc, os, sys
        import s3fs, torch
        from async_ckpt import CheckpointService, load

        torch.set_num_threads(1)  # OpenMP does not survive a fork
        for number, ends in enumerate(("pass", "raise KeyboardInterrupt", "sys.exit(3)")):
            if (child := os.fork()) == 0:
                break
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        else:
            sys.exit()
        url = f"{sys.argv[1]}/{number}"
        options = ast.literal_eval(sys.argv[2])
        service = CheckpointService(part_size="5MiB", storage_options=options)
        service.save({"x": torch.ones(3_000_000)}, url + "/1.ckpt").wait(60)
        load(url + "/1.ckpt", storage_options=options)
        service.save({"x": torch.ones(3_000_000)}, url + "/2.ckpt")
        exec(ends)
        """,
        f"s3://{place.bucket}/run",
        place.options,
        env={
            "XDG_STATE_HOME": str(place.folder),
            "PYTHONWARNINGS": "always::ResourceWarning,always::RuntimeWarning",
        },
    )
    assert done.stdout.split() == ["0", "-2", "3"], done.stderr
    assert "Warning" not in done.stderr
    assert "Unclosed" not in done.stderr
    assert place.names() == [f"run/{number}/{name}.ckpt" for number in range(3) for name in (1, 2)]
    place.assert_nothing_left()


@pytest.mark.parametrize("source", ["storage_options", "environment", "fsspec"])
def test_settings_from_files(place: Place, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials and endpoint come from AWS profiles and fsspec's configuration as s3fs takes them."""
    config = place.folder / "config"
    config.write_text(f"[profile training]\nregion = us-east-1\nendpoint_url = {place.server.url}\n")
    secrets = place.folder / "credentials"
    key, secret = place.options["key"], place.options["secret"]
    secrets.write_text(f"[training]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(secrets))
    if source == "fsspec":
        monkeypatch.setitem(fsspec.config.conf, "s3", {"profile": "training"})
    elif source == "environment":
        monkeypatch.setenv("AWS_PROFILE", "training")
    given = "training" if source == "storage_options" else None
    store = place.store(storage_options={**NOTHING, "profile": given})
    running(store, lambda: save(store, place.locate(), SMALL))
    assert place.read() == SMALL


def test_settings_for_requests(place: Place) -> None:
    """What s3_additional_kwargs and requester_pays say goes with each request that knows it."""
    seen: dict[str, Mapping[str, str]] = {}
    options = {
        "s3_additional_kwargs": {"ACL": "private", "ContentType": "x/y", "Metadata": {"who": "me"}},
        "requester_pays": True,
    }
    store = place.store(
        place.proxy(lambda kind, headers: seen.update({kind: headers})), storage_options=options
    )

    async def run() -> None:
        await save(store, place.locate("small.ckpt"), SMALL)
        await save(store, place.locate(), LARGE)
        source = await store.source(place.locate())
        await source.read_into(0, memoryview(bytearray(10)))

    running(store, run)
    for kind in ("Put", "Create"):
        assert seen[kind]["x-amz-acl"] == "private"
        assert seen[kind]["content-type"] == "x/y"
        assert seen[kind]["x-amz-meta-who"] == "me"
    for kind in ("List", "Put", "Create", "UploadPart", "Complete", "Head", "Get"):
        assert seen[kind]["x-amz-request-payer"] == "requester"


def test_expired_credentials_are_read_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where S3 says that credentials have expired, they are read afresh from where they came."""
    for name, value in place.server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "old")
    store = place.store(place.proxy(refuse_old(refusal(400, "ExpiredToken"))), storage_options=NOTHING)

    async def run() -> None:
        with pytest.raises(TransientStoreError, match="have expired; renew them"):
            await save(store, place.locate(), LARGE)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", str(place.options["key"]))
        await save(store, place.locate(), LARGE)

    running(store, run)
    assert place.read() == LARGE


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (SMALL, {"List": 1, "Put": 1}),
        (LARGE, {"List": 1, "Create": 1, "UploadPart": 3, "Complete": 1}),
    ],
    ids=["one part", "three parts"],
)
def test_requests_of_a_save(place: Place, data: bytes, expected: dict[str, int]) -> None:
    """A save makes the requests that the documentation names; the first in a directory lists open uploads too."""
    store = place.store(place.proxy())

    async def run() -> None:
        await save(store, place.locate("first.ckpt"), SMALL)
        place.requests.clear()
        await save(store, place.locate(), data)

    running(store, run)
    assert place.requests == expected


def test_a_closed_store_leaves_no_connection(place: Place) -> None:
    """After aclose, nothing is left that the collector would warn of, also if a request was cancelled."""
    store = place.store()

    async def run() -> None:
        await save(store, place.locate(), SMALL)
        source = await store.source(place.locate())
        with anyio.move_on_after(0.0):
            await source.read_into(0, memoryview(bytearray(1000)))

    running(store, run)
    gc.collect()  # a warning is an error here


def test_expired_credentials_of_a_load(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer to a HeadObject cannot say that credentials have expired, for it has no body; they are read again."""
    place.put(SMALL)
    for name, value in place.server.environment.items():
        monkeypatch.setenv(name, value)
    key = place.options["key"]

    def renew(kind: str, headers: Mapping[str, str]) -> bytes | None:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
        return refuse_old(response(400))(kind, headers)

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "old")
    store = place.store(place.proxy(renew), storage_options=NOTHING)

    async def run() -> None:
        source = await store.source(place.locate())
        assert source.nbytes == len(SMALL)

    running(store, run)


def test_expired_credentials_keep_no_clients(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often expired credentials are read again, one client is open, and none after the end (B2)."""
    for name, value in place.server.environment.items():
        monkeypatch.setenv(name, value)
    clients: list[Any] = []
    store = place.store(
        place.proxy(lambda kind, headers: refusal(400, "ExpiredToken") if kind == "Create" else None),
        file_system_class=watched(clients),
        storage_options=NOTHING,
    )

    async def run() -> None:
        for _ in range(2):
            with pytest.raises(TransientStoreError, match="have expired"):
                await save(store, place.locate(), LARGE)
            assert count_open(clients) <= 1

    running(store, run)
    assert len(clients) > 4
    assert count_open(clients) == 0
    place.assert_nothing_left()
