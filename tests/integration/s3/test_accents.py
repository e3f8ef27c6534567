"""Servers that speak S3 with an accent: what is asked of them beyond the save itself is gone without, once.

The accents are answers of a proxy in front of a real server, in words that have been seen of others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import repeat
from typing import Any

import pytest
import s3fs

from async_ckpt import CheckpointService, OptionError
from async_ckpt.errors import StoreError, TransientStoreError
from async_ckpt.testing import BytesContent
from stress.httpfaults import response
from tests.integration.s3.place import LARGE, OLD, SMALL, Place, refusal, running, save
from tests.support import PATIENCE_SECONDS, number_of, state

pytestmark = pytest.mark.integration

HTML = response(
    400, b"<!DOCTYPE html><html><body><h1>Bad request<br></body>", headers={"Content-Type": "text/html"}
)
XHTML = response(
    400, b"<html><body><h1>Bad request</h1></body></html>", headers={"Content-Type": "text/html"}
)

#: How a request that is not known, or not for us, is answered.
UNKNOWN = {
    "501": response(501),
    "NotImplemented": refusal(501, "NotImplemented"),
    "405": response(405),
    "MethodNotAllowed": refusal(405, "MethodNotAllowed"),
    "403": response(403),
    "AccessDenied": refusal(403, "AccessDenied"),
    "404": response(404, b"404 page not found"),
    "InvalidRequest": refusal(400, "InvalidRequest"),
    "InvalidArgument": refusal(400, "InvalidArgument", "Unsupported query."),
    "html": HTML,
    "xhtml": XHTML,
}
#: How a header that is not known is answered.
UNKNOWN_HEADER = {
    "501": response(501),
    "NotImplemented": refusal(
        501, "NotImplemented", "A header you provided implies functionality that is not."
    ),
    "InvalidArgument": refusal(400, "InvalidArgument", "Invalid header."),
    "InvalidRequest": refusal(400, "InvalidRequest", "Unsupported algorithm."),
    "XAmzContentSHA256Mismatch": refusal(400, "XAmzContentSHA256Mismatch"),
    "MalformedTrailer": refusal(400, "MalformedTrailerError"),
    "MalformedXML": refusal(400, "MalformedXML"),
    "html": HTML,
    "xhtml": XHTML,
}
#: What is wrong with the save itself, whatever it carries.
REAL = {
    "AccessDenied": refusal(403, "AccessDenied"),
    "NoSuchBucket": refusal(404, "NoSuchBucket"),
    "InvalidAccessKeyId": refusal(403, "InvalidAccessKeyId"),
    "SignatureDoesNotMatch": refusal(403, "SignatureDoesNotMatch"),
    "EntityTooLarge": refusal(400, "EntityTooLarge"),
    "InvalidToken": refusal(400, "InvalidToken"),
    "QuotaExceeded": refusal(403, "QuotaExceeded"),
}


class Unannounced(s3fs.S3FileSystem):  # type: ignore[misc]  # s3fs has no types
    """Has a server not know which checksums an upload is to have, so that it puts together what has none."""

    def _get_s3_method_kwargs(self, method: Any, *args: Any, **arguments: Any) -> Any:
        if method.__name__ == "create_multipart_upload":
            arguments.pop("ChecksumAlgorithm", None)
        return super()._get_s3_method_kwargs(method, *args, **arguments)


def has_checksum(headers: Mapping[str, str]) -> bool:
    """Tell whether a request carries one, or announces it."""
    return any("checksum" in name for name in headers)


def saves(place: Place, store: Any, *names: str, data: bytes = LARGE) -> None:
    """Save under each of the names, one after the other, and see that it is there."""

    async def run() -> None:
        for name in names:
            await save(store, place.locate(name), data)

    running(store, run)
    for name in names:
        assert place.read(name) == data
    place.assert_nothing_left()


@pytest.mark.parametrize("words", UNKNOWN)
@pytest.mark.parametrize("kind", ["List", "ListUploads"])
def test_a_listing_that_is_refused(place: Place, kind: str, words: str) -> None:
    """No save fails on a listing that the server will have none of; it is asked once, also for other directories."""
    store = place.store(place.proxy(lambda it, headers: UNKNOWN[words] if it == kind else None))
    saves(place, store, "a.ckpt", "deep/b.ckpt", "deeper/c.ckpt", data=SMALL)
    assert place.requests[kind] == 1
    assert place.requests["Put"] == 3


@pytest.mark.parametrize("words", ["501", "MethodNotAllowed", "AccessDenied", "html"])
def test_an_abort_that_cannot_be_looked_after(place: Place, words: str) -> None:
    """Whether an upload has gone is not asked again where the server does not tell."""
    store = place.store(place.proxy(lambda kind, headers: UNKNOWN[words] if kind == "ListParts" else None))

    async def run() -> None:
        for name in ("a.ckpt", "b.ckpt"):
            upload = await store.begin(place.locate(name), len(LARGE))
            await upload.abort()

    running(store, run)
    assert (place.requests["Abort"], place.requests["ListParts"]) == (2, 1)
    place.assert_nothing_left()


@pytest.mark.parametrize("words", ["501", "405", "403"])
def test_a_look_that_is_refused(place: Place, words: str) -> None:
    """With ``overwrite=False`` the look before the upload is a courtesy, and the condition of the commit is not."""
    store = place.store(
        place.proxy(lambda kind, headers: UNKNOWN[words] if kind == "Head" else None), overwrite=False
    )
    saves(place, store, "a.ckpt", data=SMALL)
    store = place.store(
        place.proxy(lambda kind, headers: UNKNOWN[words] if kind == "Head" else None), overwrite=False
    )
    with pytest.raises(StoreError, match="overwrite=False"):
        running(store, lambda: save(store, place.locate("a.ckpt"), OLD))
    assert place.read("a.ckpt") == SMALL


@pytest.mark.parametrize("words", UNKNOWN)
def test_a_removal_without_a_listing(place: Place, words: str) -> None:
    """A file is removed though what may lie below it cannot be listed."""
    place.put(OLD, "a.ckpt")
    store = place.store(place.proxy(lambda kind, headers: UNKNOWN[words] if kind == "List" else None))
    running(store, lambda: store.delete(place.locate("a.ckpt")))
    assert place.names() == []


@pytest.mark.parametrize("words", UNKNOWN_HEADER)
@pytest.mark.parametrize(
    "kinds", [("Put", "Create"), ("Put", "UploadPart"), ("Put", "Create", "UploadPart")], ids=str
)
def test_checksums_that_are_refused(
    place: Place, kinds: tuple[str, ...], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    """However and wherever a server refuses checksums, it is sent none from then on; the log says so once."""
    refused: Counter[str] = Counter()

    def answer(kind: str, headers: Mapping[str, str]) -> bytes | None:
        if kind not in kinds or not has_checksum(headers):
            return None
        refused[kind] += 1
        return UNKNOWN_HEADER[words]

    for data, kind in ((SMALL, "Put"), (LARGE, kinds[1])):
        caplog.clear()
        refused.clear()
        store = place.store(place.proxy(answer), max_concurrent_parts=1)
        saves(place, store, "a.ckpt", "b.ckpt", data=data)
        # One, for the parts are sent one by one where no more may be under way, and else as many as are.
        assert refused[kind] in range(1, 5)
        assert len([each for each in caplog.messages if "checksums" in each]) == 1


@pytest.mark.parametrize("words", ["InvalidRequest", "MalformedXML", "NotImplemented", "html"])
def test_checksums_that_are_refused_in_the_list_of_parts(place: Place, words: str) -> None:
    """A server that knows no checksum among the parts of a completion is told none."""
    first = iter([UNKNOWN_HEADER[words]])
    store = place.store(
        place.proxy(lambda kind, headers: next(first, None) if kind == "Complete" else None),
        file_system_class=Unannounced,
    )
    saves(place, store, "a.ckpt", "b.ckpt")
    assert place.requests["Complete"] == 3


@pytest.mark.parametrize("words", REAL)
@pytest.mark.parametrize("kind", ["Put", "Create", "UploadPart", "Complete"])
def test_what_is_wrong_with_the_save_fails_at_once(place: Place, kind: str, words: str) -> None:
    """No accent is made of a refusal of the save itself: one request, and its own words (E3)."""
    data = SMALL if kind == "Put" else LARGE
    place.put(OLD)
    store = place.store(place.proxy(lambda it, headers: REAL[words] if it == kind else None))
    with pytest.raises(StoreError, match=words) as told:
        running(store, lambda: save(store, place.locate(), data, concurrent=1))
    assert not isinstance(told.value, TransientStoreError)
    assert place.requests[kind] == 1
    assert place.read() == OLD
    place.assert_nothing_left()


@pytest.mark.parametrize(
    "words", ["NoSuchBucket", "InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken"]
)
def test_a_listing_that_tells_of_the_save(place: Place, words: str) -> None:
    """Where a listing is answered with what no save survives, nothing is sent."""
    store = place.store(place.proxy(lambda kind, headers: REAL[words] if kind == "List" else None))
    with pytest.raises(StoreError, match=words):
        running(store, lambda: save(store, place.locate(), SMALL))
    assert +place.requests == Counter(List=1)


def test_a_damaged_part_is_no_accent(place: Place) -> None:
    """A server that compares and finds a part damaged knows checksums: the part is sent again, with its own."""
    damaged = iter([refusal(400, "BadDigest"), refusal(400, "XAmzContentChecksumMismatch")])
    parts: list[bool] = []

    def answer(kind: str, headers: Mapping[str, str]) -> bytes | None:
        if kind != "UploadPart":
            return None
        parts.append(has_checksum(headers))
        return next(damaged, None)

    saves(place, place.store(place.proxy(answer)), "a.ckpt")
    assert parts == [True] * 5


@pytest.mark.parametrize("words", ["InvalidRequest", "XAmzContentSHA256Mismatch", "html"])
def test_bytes_that_have_changed_are_not_sent_without_a_checksum(place: Place, words: str) -> None:
    """A refusal in odd words may mean that the bytes are wrong: they are compared before they go without."""
    place.put(OLD)

    class Miscounted(BytesContent):
        def crc32(self, start: int, stop: int) -> int:
            return super().crc32(start, stop) ^ 1

    for data, kind in ((SMALL, "Put"), (LARGE, "UploadPart")):
        place.requests.clear()
        store = place.store(
            place.proxy(
                lambda it, headers, kind=kind: (
                    UNKNOWN_HEADER[words] if it == kind and has_checksum(headers) else None
                )
            )
        )
        with pytest.raises(StoreError):
            running(
                store,
                lambda store=store, data=data: save(store, place.locate(), Miscounted(data), concurrent=1),
            )
        assert place.requests[kind] == 1
        assert place.read() == OLD
        place.assert_nothing_left()


def test_a_server_that_is_not_to_be_asked_first(place: Place) -> None:
    """A proxy that answers 417 is sent bodies at once."""
    store = place.store(place.proxy(lambda kind, headers: response(417) if "expect" in headers else None))
    saves(place, store, "a.ckpt", "b.ckpt", data=SMALL)
    assert place.requests["Put"] == 3


@pytest.mark.parametrize("words", ["501", "InvalidArgument", "html"])
def test_reads_without_a_condition(place: Place, words: str) -> None:
    """A server that knows no If-Match is read without; that the file is the same is seen by its tag."""
    place.put(LARGE)
    conditions: list[bool] = []

    def answer(kind: str, headers: Mapping[str, str]) -> bytes | None:
        if kind != "Get":
            return None
        conditions.append("if-match" in headers)
        return UNKNOWN_HEADER[words] if conditions[-1] else None

    store = place.store(place.proxy(answer))

    async def read() -> None:
        source = await store.source(place.locate())
        data = bytearray(10)
        for start in (0, 100, 200):
            await source.read_into(start, memoryview(data))
            assert data == LARGE[start : start + 10]
        place.put(SMALL)
        with pytest.raises(StoreError, match="replaced"):
            await source.read_into(0, memoryview(data))

    running(store, read)
    assert conditions == [True, *repeat(False, 4)]


# -- switches


def watched(place: Place) -> tuple[Any, set[str]]:
    """Return a proxy, and what of courtesies has come by."""
    seen: set[str] = set()

    def answer(kind: str, headers: Mapping[str, str]) -> None:
        if kind in ("List", "ListUploads", "ListParts"):
            seen.add("listings")
        if has_checksum(headers):
            seen.add("checksums")
        if "if-match" in headers:
            seen.add("conditional_reads")

    return place.proxy(answer), seen


@pytest.mark.parametrize("name", ["checksums", "listings", "conditional_reads", ""])
def test_each_can_be_switched_off(place: Place, name: str) -> None:
    """What is switched off in ``storage_options`` is not asked for, and the rest is."""
    proxy, seen = watched(place)
    store = place.store(proxy, storage_options={"async_ckpt": {name: False}} if name else {})

    async def run() -> None:
        await save(store, place.locate(), LARGE)
        upload = await store.begin(place.locate("b.ckpt"), len(LARGE))
        await upload.abort()
        await (await store.source(place.locate())).read_into(0, memoryview(bytearray(10)))

    running(store, run)
    assert seen == {"checksums", "listings", "conditional_reads"} - {name}
    assert place.read() == LARGE
    place.assert_nothing_left()


@pytest.mark.parametrize("how", ["config_kwargs", "environment", "overruled"])
def test_botocores_own_switch(place: Place, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who tells botocore to send no checksum that is not required means ours as well, unless ours is told otherwise."""
    options: dict[str, Any] = {}
    if how == "environment":
        monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "WHEN_REQUIRED")
    else:
        options["config_kwargs"] = {
            **place.options.get("config_kwargs", {}),
            "request_checksum_calculation": "when_required",
        }
    if how == "overruled":
        options["async_ckpt"] = {"checksums": True}
    proxy, seen = watched(place)
    saves(place, place.store(proxy, storage_options=options), "a.ckpt")
    assert ("checksums" in seen) is (how == "overruled")


def test_who_insists_is_not_given_less(place: Place) -> None:
    """A courtesy that is switched on is demanded: that it is refused fails the save."""
    for name, kind in (("checksums", "Put"), ("listings", "List")):
        store = place.store(
            place.proxy(
                lambda it, headers, kind=kind: refusal(501, "NotImplemented") if it == kind else None
            ),
            storage_options={"async_ckpt": {name: True}},
        )
        with pytest.raises(StoreError, match="NotImplemented"):
            running(store, lambda store=store: save(store, place.locate(), SMALL))
    assert place.names() == []


def test_a_service_with_switches(place: Place) -> None:
    """A service takes them, and refuses what nobody knows at the call; other stores have none."""
    options = {**place.options, "async_ckpt": {"listings": False, "checksums": None}}
    url = f"s3://{place.bucket}/run/x.ckpt"
    with CheckpointService(storage_options=options) as service:
        service.save(state(3), url).wait(PATIENCE_SECONDS)
        assert number_of(service.load(url)) == 3
        with pytest.raises(OptionError, match="exist only for S3"):
            service.save(state(3), "memory://x")
    for wrong in ({"lists": False}, {"listings": 0}, "listings", {"listings": "no"}):
        with CheckpointService(storage_options={**place.options, "async_ckpt": wrong}) as service:
            with pytest.raises(OptionError, match="'checksums', 'listings', 'conditional_reads'"):
                service.save(state(3), url)
