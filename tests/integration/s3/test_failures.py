"""Trouble between the S3 store and a real server: what passes is repeated, what does not fails at once and says why."""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest

from async_ckpt.errors import StoreError, ThrottledError, TransientStoreError
from async_ckpt.retry import RetryPolicy
from async_ckpt.stores import locate
from stress.httpfaults import SLOW_DOWN, response
from tests.integration.s3.place import (
    LARGE,
    MIB,
    OLD,
    SMALL,
    Place,
    Times,
    refusal,
    running,
    save,
)

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("fault", ["stall_after", "reset_after"])
def test_a_part_that_does_not_arrive_is_sent_again(place: Place, fault: str) -> None:
    """A connection that is reset, or of which nothing moves any more, costs the part on it a second sending."""
    proxy = place.proxy()
    # A server that is busy for half a second is taken for a stall as well, so there may have to be many attempts.
    retry = RetryPolicy(attempts=100, initial_seconds=0.01, maximum_seconds=0.02, stall_seconds=0.5)
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
    retry = RetryPolicy(attempts=30, initial_seconds=0.01, maximum_seconds=0.02)
    store = place.store(
        place.proxy(lambda kind, headers: SLOW_DOWN if chance.random() < 0.3 else None),
        retry,
        max_concurrent_parts=8,
    )

    async def run() -> None:
        for number in range(5):
            await save(store, place.locate(f"{number}.ckpt"), LARGE, retry)

    running(store, run)
    for number in range(5):
        assert place.read(f"{number}.ckpt") == LARGE
    place.assert_nothing_left()


def test_errors_in_good_answers(place: Place) -> None:
    """An error that comes with status 200, as S3 may answer a completion, is one."""
    first = Times(1)

    def answer(kind: str, headers: Mapping[str, str]) -> bytes | None:
        return refusal(200, "InternalError") if kind == "Complete" and first() else None

    store = place.store(place.proxy(answer))
    running(store, lambda: save(store, place.locate(), LARGE))
    assert place.requests["Complete"] == 2
    assert place.read() == LARGE


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("List", SMALL),
        ("Head", SMALL),
        ("Put", SMALL),
        ("Create", LARGE),
        ("UploadPart", LARGE),
        ("Complete", LARGE),
    ],
)
def test_one_layer_of_retries(place: Place, kind: str, data: bytes) -> None:
    """A request that fails is made as often as the policy says, not once more by any library below."""
    three = RetryPolicy(attempts=3, initial_seconds=0.01)
    proxy = place.proxy(lambda it, headers: response(500) if it == kind else None)
    store = place.store(proxy, three, overwrite=kind != "Head")
    with pytest.raises(TransientStoreError):
        running(store, lambda: save(store, place.locate(), data, three, concurrent=1))
    if kind == "Head":
        assert place.requests["Put"] == 0
    assert place.requests[kind] == 3
    place.assert_nothing_left()


def test_a_refusal_slows_the_sender(place: Place) -> None:
    """After a SlowDown fewer parts go at a time, and S3 is asked for each whether it is welcome (E3)."""
    first = Times(1)
    asked: list[bool] = []

    def answer(kind: str, headers: Mapping[str, str]) -> bytes | None:
        if kind != "UploadPart":
            return None
        asked.append("expect" in headers)
        return SLOW_DOWN if first() else None

    store = place.store(place.proxy(answer))
    running(store, lambda: save(store, place.locate(), LARGE, concurrent=1))
    assert asked == [False, True, True, True]
    assert place.read() == LARGE


def test_everything_refused(place: Place) -> None:
    """A server that only asks to be left alone fails a save at the policy's deadline; the next one works."""
    place.put(OLD)
    refusing = True
    retry = RetryPolicy(initial_seconds=0.01, maximum_seconds=0.1, deadline_seconds=0.5)
    store = place.store(place.proxy(lambda kind, headers: SLOW_DOWN if refusing else None), retry)

    async def run() -> None:
        nonlocal refusing
        with pytest.raises(ThrottledError, match="SlowDown"):
            await save(store, place.locate(), LARGE)
        assert place.read() == OLD
        refusing = False
        await save(store, place.locate(), LARGE)

    running(store, run)
    assert place.read() == LARGE
    place.assert_nothing_left()


@pytest.mark.parametrize(
    ("kind", "data"), [("Put", SMALL), ("Create", LARGE), ("UploadPart", LARGE), ("Complete", LARGE)]
)
def test_good_answers_of_somebody_else(place: Place, kind: str, data: bytes) -> None:
    """A status of 200 without what S3 says with it, as from a gateway in between, is not believed (D1)."""
    first = Times(1)
    store = place.store(place.proxy(lambda it, headers: response(200) if it == kind and first() else None))
    running(store, lambda: save(store, place.locate(), data))
    assert place.read() == data
    place.assert_nothing_left()


def test_another_region(place: Place) -> None:
    """Where S3 names another region, the request is made there."""
    first = Times(1)
    answer = refusal(301, "PermanentRedirect", **{"x-amz-bucket-region": "eu-west-1"})
    store = place.store(place.proxy(lambda kind, headers: answer if kind == "List" and first() else None))
    running(store, lambda: save(store, place.locate(), LARGE))
    assert place.requests["List"] == 2
    assert place.read() == LARGE


def test_a_server_that_ignores_ranges(place: Place) -> None:
    """Answers that do not begin where they were asked to are refused; more than what was asked for is left out."""
    place.put(LARGE)
    store = place.store(place.proxy(lambda kind, _: response(200, LARGE) if kind == "Get" else None))
    data = bytearray(3 * MIB)

    async def run() -> None:
        source = await store.source(place.locate())
        await source.read_into(0, memoryview(data))
        assert data == LARGE[: len(data)]
        with pytest.raises(StoreError, match="the range it was asked for"):
            await source.read_into(1, memoryview(data))

    running(store, run)


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


@pytest.mark.parametrize("wrong", [{"secret": "wrong"}, {"key": "unknown"}])
def test_wrong_credentials(place: Place, wrong: dict[str, str]) -> None:
    """A wrong secret or key fails at the first request, and the message says what to look at."""
    store = place.store(place.proxy(), storage_options=wrong)
    with pytest.raises(StoreError, match="Check the credentials") as caught:
        running(store, lambda: save(store, place.locate(), SMALL))
    assert place.requests.total() == 1
    assert caught.value.location == place.locate().url
    assert caught.value.stage == "begin"


def test_a_wrong_endpoint(place: Place) -> None:
    """Where nobody answers, it is tried as often as the policy says, and the message says who was asked."""
    store = place.store(storage_options={"endpoint_url": "http://127.0.0.1:9"})
    with pytest.raises(TransientStoreError, match=r"127\.0\.0\.1:9") as caught:
        running(store, lambda: save(store, place.locate(), SMALL))
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
    denied = refusal(403, "AccessDenied")
    store = place.store(place.proxy(lambda kind, headers: denied if kind == "UploadPart" else None))
    with pytest.raises(StoreError, match="s3:PutObject"):
        running(store, lambda: save(store, place.locate(), LARGE))
    assert place.requests["UploadPart"] <= 3
    assert place.read() == OLD
    place.assert_nothing_left()


@pytest.mark.parametrize("overwrite", [True, False])
def test_only_what_saving_needs(place: Place, overwrite: bool) -> None:
    """With no more than s3:PutObject and s3:AbortMultipartUpload, a save succeeds, and a failed one cleans up."""
    denied = refusal(403, "AccessDenied")
    allowed = {"Create", "UploadPart", "Complete", "Abort", "Put"}
    store = place.store(place.proxy(lambda kind, headers: None if kind in allowed else denied))

    async def run() -> None:
        await save(store, place.locate(), LARGE)
        upload = await store.begin(place.locate(), len(LARGE))
        await upload.abort()

    running(store, run)
    assert place.read() == LARGE
    place.assert_nothing_left()


def test_a_server_without_checksums(place: Place) -> None:
    """A server that refuses our checksums is sent parts without."""
    text = "A header you provided implies functionality that is not implemented: x-amz-checksum-algorithm"

    def answer(kind: str, headers: Mapping[str, str]) -> bytes | None:
        return refusal(501, "NotImplemented", text) if any("checksum" in name for name in headers) else None

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
    refused = refusal(400, "MissingContentMD5")
    for name in ("tree/a", "tree/b/c", "treehouse"):
        place.put(OLD, name)
    store = place.store(place.proxy(lambda kind, headers: refused if kind == "DeleteObjects" else None))
    running(store, lambda: store.delete(place.locate("tree")))
    assert place.names() == ["run/treehouse"]
