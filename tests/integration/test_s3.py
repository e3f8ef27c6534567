"""The S3 store on a real server, over a network that behaves badly."""

from __future__ import annotations

import asyncio
import gc
import io
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import s3fs
import torch

from async_ckpt import CheckpointService
from async_ckpt.errors import CheckpointExistsError, StoreError, TransientStoreError
from async_ckpt.events import Event, Swept
from async_ckpt.format.parts import plan_parts
from async_ckpt.retry import RetryPolicy, call_with_retry
from async_ckpt.stores import locate
from async_ckpt.stores.base import Content, Location, Part, Receipt
from async_ckpt.stores.s3 import S3Store
from async_ckpt.stores.s3.journal import Journal
from async_ckpt.stores.s3.upload import S3Upload
from async_ckpt.testing import BytesContent, ThreadWorkers
from stress.httpfaults import SLOW_DOWN, response
from stress.proxy import FaultProxy
from stress.servers import s3
from stress.servers.process import Server
from tests.servers import fresh_bucket
from tests.support import PATIENCE_SECONDS, python

pytestmark = pytest.mark.integration

MIB = 1 << 20
OLD = b"old" * 1000
SMALL = bytes(range(256)) * 4096
LARGE = SMALL * 11 + b"tail"  # three parts
QUICK = RetryPolicy(attempts=6, initial_seconds=0.01, maximum_seconds=0.05, stall_seconds=5.0)


@dataclass
class Place:
    """A bucket, and what tests do to it.

    Attributes:
        options: reach the server itself.
        requests: what the proxy has seen, by method and kind.
    """

    server: Server
    bucket: str
    folder: Path
    workers: ThreadWorkers
    stack: ExitStack
    requests: Counter[str] = field(default_factory=Counter)

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.server.storage_options)

    def locate(self, name: str = "x.ckpt") -> Location:
        return locate(f"s3://{self.bucket}/run/{name}", storage_options=self.options)

    def proxy(
        self,
        answer: Callable[[str, Mapping[str, str]], bytes | None] = lambda kind, headers: None,
        lose: Callable[[str], bool] = lambda kind: False,
        **options: Any,
    ) -> FaultProxy:
        """Return a proxy in front of the server that knows kinds of requests."""

        def answered(method: str, target: str, headers: Mapping[str, str]) -> bytes | None:
            self.requests[kind_of(method, target)] += 1
            return answer(kind_of(method, target), headers)

        proxy = FaultProxy(
            self.server.url,
            answer=answered,
            lose_answer=lambda method, target: lose(kind_of(method, target)),
            **options,
        )
        return self.stack.enter_context(proxy)

    def store(self, proxy: FaultProxy | None = None, retry: RetryPolicy = QUICK, **options: Any) -> S3Store:
        own = {**self.options, **options.pop("storage_options", {})}
        if proxy is not None:
            own["endpoint_url"] = proxy.url
        chosen = {"part_size": 5 * MIB, "journal": Journal(self.folder / "journal"), **options}
        return S3Store(s3fs.S3FileSystem, own, workers=self.workers, retry=retry, **chosen)

    def ask(self, method: str, target: str = "", body: bytes = b"") -> bytes:
        """Ask the server itself, as whoever else uses the bucket does."""
        return s3.call(self.server.url, method, f"{self.bucket}/{target}", body)

    def read(self, name: str = "x.ckpt") -> bytes:
        return self.ask("GET", f"run/{name}")

    def put(self, data: bytes, name: str = "x.ckpt") -> None:
        self.ask("PUT", f"run/{name}", data)

    def names(self) -> list[str]:
        return re.findall("<Key>(.*?)</Key>", self.ask("GET", "?list-type=2").decode())

    def open_uploads(self) -> list[str]:
        return re.findall("<UploadId>(.*?)</UploadId>", self.ask("GET", "?uploads=").decode())

    def journals(self) -> list[Path]:
        return sorted((self.folder / "journal").glob(".*"))

    def assert_nothing_left(self) -> None:
        assert self.open_uploads() == []
        assert self.journals() == []


@pytest.fixture
def place(seaweedfs: Server, tmp_path: Path) -> Iterator[Place]:
    """A bucket of one's own."""
    workers = ThreadWorkers(4)
    with ExitStack() as stack:
        stack.callback(workers.close)
        bucket = fresh_bucket(seaweedfs)
        yield Place(server=seaweedfs, bucket=bucket, folder=tmp_path, workers=workers, stack=stack)


def kind_of(method: str, target: str) -> str:
    """Return what S3 calls a request."""
    path, _, query = target.partition("?")
    is_key = path.count("/") > 1 and not path.endswith("/")
    if "uploads" in query:
        return "Create" if method == "POST" else "ListUploads"
    if "uploadId" in query:
        return {"POST": "Complete", "DELETE": "Abort", "GET": "ListParts"}.get(method, "UploadPart")
    if method == "POST":
        return "DeleteObjects"
    return {"PUT": "Put", "HEAD": "Head", "DELETE": "Delete"}.get(method, "Get" if is_key else "List")


async def send(
    upload: S3Upload,
    content: Content,
    retry: RetryPolicy = QUICK,
    *,
    concurrent: int = 4,
    failed: Callable[[], object] = lambda: None,
) -> list[Receipt]:
    """Put every part, as a writer does; tell when one has failed."""
    receipts: list[Receipt] = []
    parts = iter(plan_parts(content.nbytes, upload.part_size))

    async def put(part: Part) -> Receipt:
        try:
            return await upload.put(part, content)
        except StoreError:
            failed()
            raise

    async def send_some() -> None:
        for part in parts:
            receipts.append(await call_with_retry(retry, put, part))

    async with anyio.create_task_group() as group:
        for _ in range(concurrent):
            group.start_soon(send_some)
    return sorted(receipts, key=lambda receipt: receipt.index)


async def save(
    store: S3Store,
    location: Location,
    data: bytes | Content,
    retry: RetryPolicy = QUICK,
    failed: Callable[[], object] = lambda: None,
) -> None:
    """Save as a writer does: abort after any error."""
    content = BytesContent(data, piece_bytes=MIB) if isinstance(data, bytes) else data
    upload = await store.begin(location, content.nbytes)
    try:
        await upload.commit(await send(upload, content, retry, failed=failed))
    except BaseException:
        with anyio.CancelScope(shield=True):
            await upload.abort()
        raise


def running(store: S3Store, function: Callable[[], Awaitable[Any]]) -> Any:
    """Run *function* on a loop, and close the store; return the only error of a group."""

    async def run() -> Any:
        try:
            return await function()
        except BaseExceptionGroup as error:
            only: BaseException = error
            while isinstance(only, BaseExceptionGroup):
                only = only.exceptions[0]
            raise only from None
        finally:
            await store.aclose()

    return anyio.run(run)


class Times:
    """Says yes the first so many times."""

    def __init__(self, count: int) -> None:
        self.left = count

    def __call__(self) -> bool:
        self.left -= 1
        return self.left >= 0


# -- the bytes


@pytest.mark.parametrize("data", [b"", SMALL, LARGE], ids=["empty", "one part", "three parts"])
def test_round_trip(place: Place, data: bytes) -> None:
    """What was saved is what anybody reads."""
    store = place.store()
    running(store, lambda: save(store, place.locate(), data))
    assert place.read() == data
    place.assert_nothing_left()


def test_same_bytes_as_torch(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save of a state through a service has the bytes of torch.save, and settings from the environment count."""
    for name, value in place.server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_STATE_HOME", str(place.folder))
    state = {"weights": torch.arange(3_000_000, dtype=torch.float32), "step": 7}
    with CheckpointService(part_size="5MiB") as service:
        service.save(state, f"s3://{place.bucket}/run/x.ckpt").wait(PATIENCE_SECONDS)
    expected = io.BytesIO()
    torch.save(state, expected)
    assert place.read() == expected.getvalue()
    place.assert_nothing_left()


def test_ranges(place: Place) -> None:
    """Any range of a file can be read, several at a time."""
    place.put(LARGE)
    store = place.store()

    async def read() -> None:
        source = await store.source(place.locate())
        assert source.nbytes == len(LARGE)
        data = bytearray(len(LARGE))
        view = memoryview(data)
        bounds = [0, 1, 5 * MIB, 5 * MIB + 3, len(LARGE)]
        async with anyio.create_task_group() as group:
            for start, stop in pairwise(bounds):
                group.start_soon(source.read_into, start, view[start:stop])
        assert bytes(data) == LARGE

    running(store, read)


def test_bytes_that_change_are_refused(place: Place) -> None:
    """A part whose bytes change after its checksum was taken is not stored, however often it is sent."""
    place.put(OLD)
    data = bytearray(LARGE)

    class Changing(BytesContent):
        def read(self, start: int, stop: int) -> list[memoryview]:
            pieces = [memoryview(data)[start:stop]]
            later.append(stop - 1)  # not sent yet when the request's head arrives
            return pieces

    later: list[int] = []

    def answer(kind: str, headers: Mapping[str, str]) -> None:
        if kind == "UploadPart":  # the checksum is in the headers already
            for each in later:
                data[each] = LARGE[each] ^ 1
            later.clear()

    store = place.store(place.proxy(answer))
    with pytest.raises(TransientStoreError, match="UploadPart"):
        running(store, lambda: save(store, place.locate(), Changing(LARGE)))
    assert place.read() == OLD
    place.assert_nothing_left()


# -- trouble that passes


@pytest.mark.parametrize("fault", ["stall_after", "reset_after"])
def test_a_part_that_does_not_arrive_is_sent_again(place: Place, fault: str) -> None:
    """A connection that is reset, or of which nothing moves any more, costs the part on it a second sending."""
    proxy = place.proxy()
    retry = RetryPolicy(attempts=6, initial_seconds=0.01, maximum_seconds=0.02, stall_seconds=0.5)
    store = place.store(proxy, retry)
    failures: list[None] = []

    def failed() -> None:
        failures.append(None)
        proxy.clear()

    proxy.set(**{fault: 3 * MIB})
    running(store, lambda: save(store, place.locate(), LARGE, retry, failed))
    assert failures
    assert place.read() == LARGE
    place.assert_nothing_left()


def test_a_third_of_the_requests_refused(place: Place) -> None:
    """Thirty per cent of the requests answered 503 cost time only."""
    chance = random.Random(7)
    store = place.store(
        place.proxy(lambda kind, headers: SLOW_DOWN if chance.random() < 0.3 else None),
        RetryPolicy(attempts=12, initial_seconds=0.01, maximum_seconds=0.02),
        max_concurrent_parts=8,
    )
    retry = RetryPolicy(attempts=12, initial_seconds=0.01, maximum_seconds=0.02)

    async def run() -> None:
        for number in range(5):
            await save(store, place.locate(f"{number}.ckpt"), LARGE, retry)

    running(store, run)
    for number in range(5):
        assert place.read(f"{number}.ckpt") == LARGE
    place.assert_nothing_left()


def test_errors_in_good_answers(place: Place) -> None:
    """An error that comes with status 200, as S3 may answer a completion, is one."""
    error = b"<?xml version='1.0'?><Error><Code>InternalError</Code><Message>Try again.</Message></Error>"
    first = Times(1)

    def answer(kind: str, headers: Mapping[str, str]) -> bytes | None:
        return response(200, error) if kind == "Complete" and first() else None

    store = place.store(place.proxy(answer))
    running(store, lambda: save(store, place.locate(), LARGE))
    assert place.requests["Complete"] == 2
    assert place.read() == LARGE


def test_one_layer_of_retries(place: Place) -> None:
    """A request that fails is made as often as the policy says, not once more by any library below."""
    store = place.store(place.proxy(lambda kind, headers: response(500)), RetryPolicy(attempts=1))
    with pytest.raises(TransientStoreError):
        running(store, lambda: save(store, place.locate(), LARGE))
    assert sum(place.requests.values()) == 1


def test_reading_goes_on_where_it_broke_off(place: Place) -> None:
    """A read whose connection is cut asks for the rest only."""
    place.put(LARGE)
    ranges: list[str] = []

    def answer(kind: str, headers: Mapping[str, str]) -> None:
        if kind == "Get":
            ranges.append(headers["range"])

    proxy = place.proxy(answer)
    proxy.set(reset_after=4 * MIB)
    store = place.store(proxy)

    async def run() -> None:
        source = await store.source(place.locate())
        data = bytearray(len(LARGE))
        await source.read_into(0, memoryview(data))
        assert bytes(data) == LARGE

    running(store, run)
    starts = [int(each.removeprefix("bytes=").partition("-")[0]) for each in ranges]
    assert len(starts) >= 3
    assert starts == sorted(set(starts))


# -- lost answers


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize(("kind", "data"), [("Put", SMALL), ("Complete", LARGE)])
def test_a_lost_answer_to_the_commit(place: Place, kind: str, data: bytes, overwrite: bool) -> None:
    """Where the answer to the last request is lost, the object is found to be ours, and not written twice."""
    first = Times(1)
    store = place.store(place.proxy(lose=lambda it: it == kind and first()), overwrite=overwrite)
    running(store, lambda: save(store, place.locate(), data))
    # aiohttp repeats a PUT whose kept connection turns out to be closed.
    assert place.requests[kind] <= (2 if kind == "Put" else 1)
    assert place.read() == data
    place.assert_nothing_left()


def test_every_answer_to_the_commit_lost(place: Place) -> None:
    """Even where the policy allows no second request, the outcome is looked up."""
    store = place.store(
        place.proxy(lose=lambda kind: kind == "Complete"), RetryPolicy(attempts=1), overwrite=False
    )
    running(store, lambda: save(store, place.locate(), LARGE))
    assert place.read() == LARGE


def test_a_commit_that_never_arrives(place: Place) -> None:
    """Where the last request fails and what is there is another's, the save has failed, and nothing is left."""
    place.put(OLD)
    store = place.store(place.proxy(lambda kind, _: response(500) if kind == "Complete" else None))
    with pytest.raises(TransientStoreError, match="CompleteMultipartUpload"):
        running(store, lambda: save(store, place.locate(), LARGE))
    assert place.read() == OLD
    place.assert_nothing_left()


def test_a_lost_answer_to_the_beginning(place: Place) -> None:
    """An upload whose id was never learnt stays to the sweep by age; the save itself is durable."""
    first = Times(1)
    store = place.store(place.proxy(lose=lambda kind: kind == "Create" and first()))
    running(store, lambda: save(store, place.locate(), LARGE))
    assert place.read() == LARGE
    assert len(place.open_uploads()) == 1


# -- what may not be done


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["one part", "three parts"])
def test_nothing_is_replaced(place: Place, data: bytes) -> None:
    """With overwrite=False, a checkpoint that appears while ours is sent stays, and ours fails."""
    store = place.store(overwrite=False)

    async def run() -> None:
        upload = await store.begin(place.locate(), len(data))
        receipts = await send(upload, BytesContent(data, piece_bytes=MIB))
        other = place.store()
        await save(other, place.locate(), OLD)
        await other.aclose()
        with pytest.raises(CheckpointExistsError, match=r"x\.ckpt"):
            await upload.commit(receipts)

    running(store, run)
    assert place.read() == OLD
    place.assert_nothing_left()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"secret": "wrong"}, "Check the credentials"),
        ({"key": "unknown"}, "Check the credentials"),
        ({"endpoint_url": "http://127.0.0.1:9"}, "127.0.0.1:9"),
    ],
)
def test_wrong_settings(place: Place, wrong: dict[str, str], said: str) -> None:
    """A wrong secret, key or endpoint fails soon, and the message says what to look at."""
    store = place.store(storage_options=wrong)
    began = time.monotonic()
    with pytest.raises(StoreError, match=said) as caught:
        running(store, lambda: save(store, place.locate(), SMALL))
    assert time.monotonic() - began < 3.0
    assert caught.value.location == place.locate().url
    assert caught.value.stage == "begin"


def test_a_bucket_that_is_not_there(place: Place) -> None:
    """A bucket that does not exist fails at once, and is not made."""
    store = place.store()
    location = locate("s3://no-such-bucket-here/x.ckpt", storage_options=place.options)
    with pytest.raises(StoreError, match="never made here"):
        running(store, lambda: save(store, location, LARGE))


def test_a_permission_that_is_lacking(place: Place) -> None:
    """A refused request fails at once, and the message names the permission it needs."""
    place.put(OLD)
    denied = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>No.</Message></Error>"
    store = place.store(
        place.proxy(lambda kind, headers: response(403, denied) if kind == "UploadPart" else None)
    )
    with pytest.raises(StoreError, match="s3:PutObject"):
        running(store, lambda: save(store, place.locate(), LARGE))
    assert place.requests["UploadPart"] <= 3
    assert place.read() == OLD
    place.assert_nothing_left()


@pytest.mark.parametrize("overwrite", [True, False])
def test_only_what_saving_needs(place: Place, overwrite: bool) -> None:
    """With no more than s3:PutObject and s3:AbortMultipartUpload, a save succeeds, and a failed one cleans up."""
    denied = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>No.</Message></Error>"
    allowed = {"Create", "UploadPart", "Complete", "Abort", "Put"}
    store = place.store(place.proxy(lambda kind, headers: None if kind in allowed else response(403, denied)))

    async def run() -> None:
        await save(store, place.locate(), LARGE)
        upload = await store.begin(place.locate(), len(LARGE))
        await upload.abort()

    running(store, run)
    assert place.read() == LARGE
    place.assert_nothing_left()


def test_expired_credentials_are_read_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where S3 says that credentials have expired, they are read afresh from where they came."""
    for name, value in place.server.environment.items():
        monkeypatch.setenv(name, value)
    expired = b"<?xml version='1.0'?><Error><Code>ExpiredToken</Code><Message>Expired.</Message></Error>"

    def answer(kind: str, headers: Mapping[str, str]) -> bytes | None:
        return response(400, expired) if "Credential=old/" in headers.get("authorization", "") else None

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "old")
    nothing = {"key": None, "secret": None}
    store = place.store(place.proxy(answer), storage_options=nothing)

    async def run() -> None:
        with pytest.raises(TransientStoreError, match="have expired; renew them"):
            await save(store, place.locate(), LARGE)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", str(place.options["key"]))
        await save(store, place.locate(), LARGE)

    running(store, run)
    assert place.read() == LARGE


# -- servers that can do less


def test_a_server_without_checksums(place: Place) -> None:
    """A server that refuses our checksums is sent parts without."""
    text = b"A header you provided implies functionality that is not implemented: x-amz-checksum-algorithm"
    refusal = b"<?xml version='1.0'?><Error><Code>NotImplemented</Code><Message>%s</Message></Error>" % text

    def answer(kind: str, headers: Mapping[str, str]) -> bytes | None:
        return response(501, refusal) if any("checksum" in name for name in headers) else None

    store = place.store(place.proxy(answer))

    async def run() -> None:
        await save(store, place.locate("small.ckpt"), SMALL)
        await save(store, place.locate(), LARGE)

    running(store, run)
    assert place.read("small.ckpt") == SMALL
    assert place.read() == LARGE
    place.assert_nothing_left()


def test_a_server_that_deletes_one_by_one(place: Place) -> None:
    """Where several objects cannot be deleted by one request, each is by its own."""
    refusal = b"<?xml version='1.0'?><Error><Code>MissingContentMD5</Code><Message>No.</Message></Error>"
    for name in ("tree/a", "tree/b/c", "treehouse"):
        place.put(OLD, name)
    store = place.store(
        place.proxy(lambda kind, headers: response(400, refusal) if kind == "DeleteObjects" else None)
    )
    running(store, lambda: store.delete(place.locate("tree")))
    assert place.names() == ["run/treehouse"]


# -- nothing is left


@pytest.mark.slow
def test_two_hundred_cancellations(place: Place) -> None:
    """A save that is cancelled at any moment leaves no upload, and either the old object or, whole, the new."""
    place.put(OLD)
    chance = random.Random(11)
    store = place.store()

    async def cancelled_after(steps: int) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(save, store, place.locate(), LARGE)
            for _ in range(steps):
                await anyio.lowlevel.checkpoint()
            group.cancel_scope.cancel()

    async def run() -> None:
        await save(store, place.locate("other.ckpt"), SMALL)  # connects
        for _ in range(200):
            await cancelled_after(chance.randrange(1, 1 << chance.randrange(1, 15)))
            source = await store.source(place.locate())
            assert source.nbytes in (len(OLD), len(LARGE))
            if source.nbytes == len(LARGE):
                await save(store, place.locate(), OLD)

    running(store, run)
    assert place.read() == OLD
    place.assert_nothing_left()


@pytest.mark.parametrize("kind", ["List", "Create", "UploadPart", "Complete"])
def test_cancelled_while_a_request_is_under_way(place: Place, kind: str) -> None:
    """Whichever request is under way when a save is cancelled, no upload is left, and no part of an object."""
    place.put(OLD)
    cancel: list[Callable[[], object]] = []

    def answer(it: str, headers: Mapping[str, str]) -> None:
        if it == kind and cancel:
            cancel.pop()()

    store = place.store(place.proxy(answer))

    async def run() -> None:
        loop = asyncio.get_running_loop()
        with anyio.CancelScope() as scope:
            cancel.append(lambda: loop.call_soon_threadsafe(scope.cancel))
            await save(store, place.locate(), LARGE)
        assert scope.cancelled_caught

    running(store, run)
    assert place.read() in (OLD, LARGE)
    place.assert_nothing_left()


KILLED = """
    import os, signal, sys
    import torch
    from async_ckpt import CheckpointService
    from async_ckpt.events import PartWritten

    def observer(event):
        if isinstance(event, PartWritten):
            os.kill(os.getpid(), signal.SIGKILL)

    with CheckpointService(part_size="5MiB", observer=observer) as service:
        service.save(torch.zeros(3_000_000), sys.argv[1])
"""


def test_a_killed_process(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL in the midst of an upload leaves the old object, and the next save aborts the dead one's upload."""
    place.put(OLD)
    monkeypatch.setenv("XDG_STATE_HOME", str(place.folder))
    for name, value in place.server.environment.items():
        monkeypatch.setenv(name, value)
    url = f"s3://{place.bucket}/run/x.ckpt"
    assert python(KILLED, url).returncode == -signal.SIGKILL
    assert place.read() == OLD
    (orphan,) = place.open_uploads()
    place.ask("POST", "run/x.ckpt?uploads=")
    (other,) = {*place.open_uploads()} - {orphan}
    events: list[Event] = []
    with CheckpointService(observer=events.append) as service:
        service.save({"x": 1}, f"s3://{place.bucket}/elsewhere.ckpt").wait(PATIENCE_SECONDS)
    (swept,) = [event for event in events if isinstance(event, Swept)]
    assert orphan in swept.names[0]
    assert place.open_uploads() == [other]
    assert not list((place.folder / "async_ckpt" / "uploads").iterdir())


def test_uploads_of_the_distant_past(place: Place) -> None:
    """A save aborts uploads of its own key that are more than a week old; others stay."""
    for name in ("x.ckpt", "other.ckpt"):
        place.ask("POST", f"run/{name}?uploads=")
    uploads = place.ask("GET", "?prefix=run%2F&uploads=")

    def save_when_begun(day: bytes) -> None:
        listed = re.sub(b"<Initiated>.*?<", b"<Initiated>%s<" % day, uploads)
        proxy = place.proxy(lambda kind, _: response(200, listed) if kind == "ListUploads" else None)
        store = place.store(proxy)
        running(store, lambda: save(store, place.locate(), LARGE))
        assert place.read() == LARGE

    save_when_begun(b"2999-01-01T00:00:00.000Z")
    assert len(place.open_uploads()) == 2
    save_when_begun(b"2020-01-01T00:00:00.000Z")
    assert re.findall("other.ckpt", place.ask("GET", "?uploads=").decode())
    assert len(place.open_uploads()) == 1


def test_a_part_that_lands_after_the_abort(place: Place) -> None:
    """An abort is repeated until S3 does not know the upload any more."""
    first = Times(1)
    store = place.store(place.proxy(lambda kind, _: response(204) if kind == "Abort" and first() else None))

    async def run() -> None:
        upload = await store.begin(place.locate(), len(LARGE))
        await upload.abort()

    running(store, run)
    assert place.requests["Abort"] == 2
    place.assert_nothing_left()


def test_an_abort_that_fails(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """An upload that cannot be aborted is left to the next process's sweep, and the log tells."""
    failing = True

    def answer(kind: str, headers: Mapping[str, str]) -> bytes | None:
        return response(500) if kind == "Abort" and failing else None

    proxy = place.proxy(answer)
    store = place.store(proxy)

    async def begin() -> None:
        upload = await store.begin(place.locate(), len(LARGE))
        await upload.abort()

    running(store, begin)
    assert "cleaning up" in caplog.text
    assert len(place.open_uploads()) == 1
    failing = False
    later = place.store(proxy)
    running(later, lambda: save(later, place.locate("elsewhere.ckpt"), SMALL))
    place.assert_nothing_left()


# -- what it costs


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
