"""The store of Azure on a bad network and with a server that refuses: what becomes of a save, and of a reading."""

from __future__ import annotations

import asyncio
import gc
import io
import itertools
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from datetime import datetime, timedelta, timezone
from typing import Any
from urllib.parse import parse_qs, urlsplit

import anyio
import anyio.lowlevel
import pytest
import torch
from azure.storage.blob import BlobServiceClient, generate_container_sas

from async_ckpt import CheckpointService
from async_ckpt.errors import CheckpointExistsError, StoreError, ThrottledError, TransientStoreError
from async_ckpt.retry import RetryPolicy, call_with_retry
from async_ckpt.stores import locate, open_store
from async_ckpt.stores.base import Location, Receipt, Store
from async_ckpt.testing import BytesContent, ThreadWorkers
from async_ckpt.testing.conformance import cut
from stress.httpfaults import response
from stress.proxy import FaultProxy
from stress.servers.process import Server
from tests.servers import fresh_bucket
from tests.support import PATIENCE_SECONDS, python, start_python

pytestmark = pytest.mark.integration

PART_BYTES = 256 * 1024
RETRY = RetryPolicy(attempts=5, initial_seconds=0.01, maximum_seconds=0.05, stall_seconds=1.0)
BUSY = response(503, headers={"x-ms-error-code": "ServerBusy"})


def body(nbytes: int, seed: int = 0) -> bytes:
    """Return bytes that differ from seed to seed."""
    return random.Random(seed).randbytes(nbytes)


class Traffic:
    """What passes the proxy, and what is done to it; the hooks are called on the proxy's thread.

    Attributes:
        requests: what was asked, oldest first: ``block``, ``blocklist``, ``list``, ``look``, ``read``, ``delete``.
        starts: where the ranges begin that were asked for.
        answer: of a kind of request: the answer to give in the server's place.
        lose: whether to lose the server's answer to a kind of request.
    """

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.starts: list[int] = []
        self.answer: Callable[[str], bytes | None] = lambda kind: None
        self.lose: Callable[[str], bool] = lambda kind: False

    def on_request(self, method: str, target: str, headers: Mapping[str, str]) -> bytes | None:
        self.requests.append(self.kind(method, target))
        if "x-ms-range" in headers:
            self.starts.append(int(headers["x-ms-range"].removeprefix("bytes=").split("-")[0]))
        return self.answer(self.requests[-1])

    def on_answer(self, method: str, target: str) -> bool:
        return self.lose(self.kind(method, target))

    def after(self, count: int) -> asyncio.Event:
        """Return an event of the running loop that is set by the *count*-th request from now on."""
        event, loop = asyncio.Event(), asyncio.get_running_loop()
        awaited = len(self.requests) + count

        def answer(kind: str) -> None:
            if len(self.requests) == awaited:
                loop.call_soon_threadsafe(event.set)

        self.answer = answer
        return event

    @staticmethod
    def kind(method: str, target: str) -> str:
        comp = parse_qs(urlsplit(target).query).get("comp")
        return comp[0] if comp else {"HEAD": "look", "GET": "read", "DELETE": "delete"}[method]


class Network:
    """Azurite behind a proxy, with a container of this test's own."""

    def __init__(self, server: Server, proxy: FaultProxy, traffic: Traffic) -> None:
        self.server = server
        self.proxy = proxy
        self.traffic = traffic
        self.container = fresh_bucket(server)
        connection = server.storage_options["connection_string"].replace(server.url, proxy.url)
        self.storage_options = {"connection_string": connection}

    def url(self, name: str = "a.ckpt") -> str:
        return f"abfs://{self.container}/{name}"

    def locate(self, name: str = "a.ckpt") -> Location:
        return locate(self.url(name), storage_options=self.storage_options)

    @property
    def fields(self) -> dict[str, str]:
        """What the connection string says."""
        return dict(
            item.split("=", 1) for item in self.storage_options["connection_string"].rstrip(";").split(";")
        )

    def with_token(self, *, permission: str, hours: float = 1) -> dict[str, str]:
        """Return storage options with a token for the container instead of the account's key."""
        token = generate_container_sas(
            self.fields["AccountName"],
            self.container,
            account_key=self.fields["AccountKey"],
            permission=permission,
            expiry=datetime.now(timezone.utc) + timedelta(hours=hours),
        )
        endpoint = self.fields["BlobEndpoint"]
        return {"connection_string": f"BlobEndpoint={endpoint};SharedAccessSignature={token}"}

    @asynccontextmanager
    async def store(self, **options: Any) -> AsyncIterator[Store]:
        """Open the store, and close it."""
        workers = ThreadWorkers()
        made = {"retry": RETRY, "part_size": PART_BYTES, "storage_options": self.storage_options, **options}
        store = open_store(self.locate(), workers=workers, **made)
        try:
            yield store
        finally:
            await store.aclose()
            workers.close()


@pytest.fixture
def network(azurite: Server) -> Iterator[Network]:
    """Azurite behind a proxy."""
    traffic = Traffic()
    with FaultProxy(azurite.url, answer=traffic.on_request, lose_answer=traffic.on_answer) as proxy:
        yield Network(azurite, proxy, traffic)


async def save(store: Store, location: Location, data: bytes, retry: RetryPolicy = RETRY) -> None:
    """Save as the writer does."""
    upload = await store.begin(location, len(data))
    try:
        receipts: list[Receipt] = []

        async def put(part: Any) -> None:
            receipts.append(
                await call_with_retry(retry, upload.put, part, BytesContent(data, piece_bytes=100_000))
            )

        async with anyio.create_task_group() as group:
            for part in cut(len(data), upload.part_size or PART_BYTES):
                group.start_soon(put, part)
        await upload.commit(receipts)
    except BaseException:
        with anyio.CancelScope(shield=True):
            await upload.abort()
        raise


async def store_part(store: Store, location: Location) -> None:
    """Begin a file of one part, put it, and give up."""
    upload = await store.begin(location, 3)
    await upload.put(cut(3, 3)[0], BytesContent(b"abc"))
    await upload.abort()


async def read(store: Store, location: Location) -> bytes:
    """Read all of a file."""
    source = await store.source(location)
    data = bytearray(source.nbytes)
    await source.read_into(0, memoryview(data))
    await source.aclose()
    return bytes(data)


def run(test: Callable[[], Awaitable[None]]) -> None:
    """Run a coroutine on a loop of its own; one that hangs fails."""

    async def bounded() -> None:
        with anyio.fail_after(3 * PATIENCE_SECONDS):
            await test()

    anyio.run(bounded)
    gc.collect()  # an unclosed connection warns here


def test_the_same_bytes_as_torch_save(network: Network) -> None:
    """What the service saves to Azure is what ``torch.save`` writes, and loads again."""
    state = {"weights": torch.arange(300_000, dtype=torch.float32), "step": 7}
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
    data = body(12 * PART_BYTES)

    async def check() -> None:
        async with network.store(retry=RetryPolicy(attempts=12, initial_seconds=0.01)) as store:
            await save(store, network.locate(), data, RetryPolicy(attempts=12, initial_seconds=0.01))
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
        async with network.store() as store:
            network.proxy.set(stall_after=PART_BYTES + PART_BYTES // 2)
            await save(store, network.locate(), data)
            network.proxy.clear()
            assert await read(store, network.locate()) == data

    run(check)


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
    """Where the blob cannot be looked at after a failed commit, the error says that the outcome is not known."""
    network.traffic.answer = lambda kind: response(500) if kind in ("blocklist", "look") else None

    async def check() -> None:
        async with network.store(retry=RetryPolicy(attempts=2, initial_seconds=0.001)) as store:
            upload = await store.begin(network.locate(), 3)
            receipt = await upload.put(cut(3, 3)[0], BytesContent(b"abc"))
            with pytest.raises(StoreError, match="is not known"):
                await upload.commit([receipt])
            await upload.abort()

    run(check)


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
        async with network.store() as store:
            await save(store, network.locate(), data)
            network.proxy.set(stall_after=800_000)
            assert await read(store, network.locate()) == data

    run(check)


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


def test_nobody_answers(network: Network) -> None:
    """Where no connection comes about, it is tried as often as the policy says."""
    network.proxy.set(refuse=True)

    async def check() -> None:
        async with network.store() as store:
            with pytest.raises(TransientStoreError, match="cannot begin"):
                await store.begin(network.locate(), 1)

    run(check)
    assert network.proxy.connections >= RETRY.attempts


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


def test_a_shared_access_signature(network: Network) -> None:
    """Who holds a token to read, create and write one container, but not to list it, can save and read there."""
    options = network.with_token(permission="rcw")
    data = body(3 * PART_BYTES)

    async def check() -> None:
        async with network.store(storage_options=options) as store:
            await save(store, network.locate(), data)
            assert await read(store, network.locate()) == data

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


KILLED = """
    import json, sys
    import torch
    from async_ckpt import CheckpointService
    url, options = sys.argv[1:]
    def tell(event):
        if type(event).__name__ == "PartWritten":
            print("under way", flush=True)
            sys.stdin.read()
    service = CheckpointService(storage_options=json.loads(options), part_size="64KiB", observer=tell)
    service.save({"weights": torch.zeros(1_000_000)}, url)
    service.wait()
"""


def test_a_killed_process_leaves_the_old_blob(network: Network) -> None:
    """A process killed in mid-upload leaves the earlier checkpoint, and the next save of the name ends durable."""
    old, new = body(1000, 1), body(1000, 2)

    async def first() -> None:
        async with network.store() as store:
            await save(store, network.locate(), old)

    async def then() -> None:
        async with network.store() as store:
            assert await read(store, network.locate()) == old
            await save(store, network.locate(), new)
            assert await read(store, network.locate()) == new

    run(first)
    with start_python(KILLED, network.url(), json.dumps(network.storage_options), stdin=-1) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "under way\n"
        finally:
            process.kill()
    run(then)


QUIET = """
    import gc, sys, threading, warnings
    warnings.simplefilter("error")
    import torch
    from async_ckpt import CheckpointService
    url, closed = sys.argv[1:]
    service = CheckpointService()
    handle = service.save({"weights": torch.zeros(10)}, url)
    handle.wait(20)
    assert float(service.load(url)["weights"].sum()) == 0
    if closed == "closed":
        service.close()
        gc.collect()
    print([thread.name for thread in threading.enumerate() if "fsspec" in thread.name])
"""


@pytest.mark.parametrize("closed", ["closed", "left open"])
def test_nothing_is_said_at_exit(network: Network, closed: str) -> None:
    """A process that saved to the account in its environment ends without a word, and never started fsspec's loop."""
    ran = python(
        QUIET,
        network.url(),
        closed,
        env={"PYTHONDEVMODE": "1", **network.server.environment},
    )

    assert (ran.stdout, ran.stderr, ran.returncode) == ("[]\n", "", 0)
