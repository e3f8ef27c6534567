"""Google Cloud Storage's JSON interface, request by request: everything is checked that Google documents."""

from __future__ import annotations

import itertools
import re
from typing import Any

from aiohttp import web

from async_ckpt.stores.checksums import as_text, crc32c
from tests.strict_gcs.faults import Fault
from tests.strict_gcs.objects import ALIGNMENT, Lost, No, Object, Session, names

__all__ = ["Interface"]


class Interface:
    """What the server does; ``StrictGCS`` says when, and what befalls it.

    Args:
        page: objects that a listing names at a time.

    Attributes:
        url: where it is served.
        objects: by bucket and name.
        received: bytes of data that came, over all uploads.
        served: bytes of data that were sent.
    """

    url: str

    def __init__(self, *, page: int) -> None:
        self.objects: dict[str, dict[str, Object]] = {"bucket": {}}
        self.received = 0
        self.served = 0
        self._page = page
        self._sessions: dict[str, Session] = {}
        self._late: list[Session] = []
        self._ids = itertools.count(1)

    @property
    def open_sessions(self) -> list[str]:
        """The names of what is being uploaded."""
        return [session.key for session in self._sessions.values() if session.done is None]

    def data(self, key: str) -> bytes | None:
        """Return what is stored under *key*."""
        found = self.objects["bucket"].get(key)
        return found.data if found else None

    def _bucket(self, name: str) -> dict[str, Object]:
        if name not in self.objects:
            raise No(404, "The specified bucket does not exist.", "notFound")
        return self.objects[name]

    def _find(self, http: web.Request, rest: str) -> tuple[str, str, Object]:
        bucket, key = names(rest)
        found = self._bucket(bucket).get(key)
        generation = http.query.get("generation")
        if found is None or generation not in (None, str(found.generation)):
            raise No(404, f"No such object: {bucket}/{key}", "notFound")
        return bucket, key, found

    async def _describe(self, http: web.Request, rest: str, _: Fault | None) -> web.Response:
        bucket, key, found = self._find(http, rest)
        return web.json_response(found.describe(bucket, key))

    async def _list(self, http: web.Request, rest: str, _: Fault | None) -> web.Response:
        bucket, _key = names(rest)
        held, prefix = self._bucket(bucket), http.query["prefix"]
        delimiter = http.query.get("delimiter", "\0")
        found = {key[len(prefix) :].partition(delimiter)[:2] for key in held if key.startswith(prefix)}
        after = http.query.get("pageToken", "")
        keys = sorted(key for beginning, rest in found if (key := prefix + beginning + rest) > after)
        page = keys[: min(self._page, int(http.query["maxResults"]))]
        items = [held[key].describe(bucket, key) for key in page if key in held]
        prefixes = [key for key in page if key not in held]
        body: dict[str, Any] = {"items": items} if items else {}
        if prefixes:
            body["prefixes"] = prefixes
        if len(page) < len(keys):
            body["nextPageToken"] = page[-1]
        return web.json_response(body)

    async def _delete(self, http: web.Request, rest: str, _: Fault | None) -> web.Response:
        bucket, key, found = self._find(http, rest)
        if http.query.get("ifGenerationMatch", str(found.generation)) != str(found.generation):
            raise No(412, "conditionNotMet", "conditionNotMet")
        del self.objects[bucket][key]
        return web.Response(status=204)

    async def _read(self, http: web.Request, rest: str, fault: Fault | None) -> web.StreamResponse:
        _bucket, _key, found = self._find(http, rest)
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", http.headers["Range"])
        assert match is not None
        start, stop = int(match[1]), min(int(match[2]) + 1, len(found.data))
        headers = {"Content-Range": f"bytes {start}-{stop - 1}/{len(found.data)}"}
        data = found.data[start:stop]
        if fault is not Fault.HALF:
            self.served += len(data)
            return web.Response(status=206, body=data, headers=headers)
        answer = web.StreamResponse(status=206, headers={**headers, "Content-Length": str(len(data))})
        await answer.prepare(http)
        data = data[: len(data) // 2]
        self.served += len(data)
        await answer.write(data)
        raise Lost

    # -- uploads

    async def _begin(self, http: web.Request, rest: str, _: Fault | None) -> web.Response:
        bucket, _key = names(rest)
        key = http.query["name"]
        while self._late:
            self._store(self._late.pop())
        self._match(bucket, key, http.query.get("ifGenerationMatch"))
        session = Session(
            bucket=bucket,
            key=key,
            metadata=(await http.json()).get("metadata", {}),
            match=http.query.get("ifGenerationMatch"),
            total=int(http.headers["X-Upload-Content-Length"]),
        )
        number = f"session-{next(self._ids)}"
        self._sessions[number] = session
        location = f"{self.url}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={number}"
        return web.Response(headers={"Location": location})

    async def _cancel(self, http: web.Request, _rest: str, _: Fault | None) -> web.Response:
        self._session(http)
        del self._sessions[http.query["upload_id"]]
        return web.Response(status=499)

    async def _ask(self, http: web.Request, _rest: str, _: Fault | None) -> web.Response:
        session = self._session(http)
        return web.json_response(session.done) if session.done is not None else self._continue(session)

    async def _chunk(self, http: web.Request, _rest: str, fault: Fault | None) -> web.Response:
        session, data = await self._receive(http)
        if len(data) % ALIGNMENT:
            raise No(400, "a chunk must be a multiple of 256 KiB")
        if fault in (Fault.HALF, Fault.SHORT):
            data = data[: len(data) // 2 // ALIGNMENT * ALIGNMENT]
        if fault is Fault.DROPPED:
            session.data.clear()
        if fault not in (Fault.DROPPED, Fault.NOTHING):
            session.data += data
        if fault is Fault.HALF:
            raise Lost
        if fault is Fault.BOASTED:
            return self._continue(session, len(session.data) + ALIGNMENT)
        return self._continue(session)

    async def _last(self, http: web.Request, _rest: str, fault: Fault | None) -> web.Response:
        session, data = await self._receive(http)
        if fault is Fault.SHORT:
            return self._continue(session)
        session.data += data
        if fault is Fault.DAMAGED:
            session.data[0] ^= 1
        if len(session.data) != session.total:
            raise No(400, "not every byte was sent")
        hashed = http.headers["X-Goog-Hash"]
        if hashed != f"crc32c={as_text(crc32c([memoryview(session.data)]))}":
            del self._sessions[http.query["upload_id"]]
            raise No(400, "Provided CRC32C doesn't match calculated CRC32C")
        self._match(session.bucket, session.key, session.match)
        if fault is Fault.CORRUPT:
            session.data[0] ^= 1
        if fault is Fault.LATE:
            self._late.append(self._sessions.pop(http.query["upload_id"]))
            raise Lost
        self._store(session)
        return web.json_response(session.done)

    def _store(self, session: Session) -> None:
        stored = Object(bytes(session.data), next(self._ids), session.metadata)
        self.objects[session.bucket][session.key] = stored
        session.done = stored.describe(session.bucket, session.key)

    async def _receive(self, http: web.Request) -> tuple[Session, bytes]:
        """Return the session and the bytes that are new to it."""
        session = self._session(http)
        data = await http.read()
        self.received += len(data)
        match = re.fullmatch(r"bytes (?:\*|(\d+)-(\d+))/(\d+)", http.headers["Content-Range"])
        assert match is not None
        start = int(match[1]) if match[1] is not None else len(session.data)
        stop = int(match[2]) + 1 if match[2] is not None else start
        if session.done is not None or stop - start != len(data) or int(match[3]) != session.total:
            raise No(400, "Content-Range and body do not go together")
        if start > len(session.data):
            raise No(400, "bytes were left out")
        return session, data[len(session.data) - start :]

    def _session(self, http: web.Request) -> Session:
        session = self._sessions.get(http.query["upload_id"])
        if session is None:
            raise No(404, "no such session", "notFound")
        return session

    def _match(self, bucket: str, key: str, generation: str | None) -> None:
        found = self._bucket(bucket).get(key)
        if generation is not None and int(generation) != (found.generation if found else 0):
            raise No(412, "At least one of the pre-conditions you specified did not hold.", "conditionNotMet")

    def _continue(self, session: Session, held: int | None = None) -> web.Response:
        held = len(session.data) if held is None else held
        return web.Response(status=308, headers={"Range": f"bytes=0-{held - 1}"} if held else {})
