"""The resumable session behind one upload: begun, asked, fed in order, cancelled.

Guarantees: bytes for which no answer came are not sent again before the server was asked what it holds; a
session that the server has lost is forgotten, and the next attempt begins a new one, from the first byte; one
that was begun is known to whoever has to cancel it, even if beginning it was cancelled.

A session is invisible and costs nothing; one that nobody cancels, as after a crash, expires after a week.

What does not belong here: where the bytes come from, and whether the right ones arrived (`upload`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

import anyio

from async_ckpt.errors import StoreError, TransientStoreError
from async_ckpt.stores.base import Location
from async_ckpt.stores.gcs.client import CONTINUE, Answer, Client, Target
from async_ckpt.stores.gcs.errors import refused_with
from async_ckpt.stores.payload import PartPayload
from async_ckpt.stores.requests import Pace, Requests, patience

__all__ = ["CHUNK_MULTIPLE", "LOST", "ResumableSession"]

#: Every request but the last carries a multiple of this.
CHUNK_MULTIPLE = 256 * 1024

#: How the server says that it has no such session: expired or unknown; broken; cancelled.
LOST = frozenset({404, 410, 499})


class ResumableSession:
    """At most one session at a time; every method raises only StoreErrors.

    Args:
        location: for messages.
        target: the object.
        nbytes: length of the file.
        metadata: what the object is to carry.
        overwrite: whether the object may be there already.
        client: makes the requests.
        requests: times and repeats them.
        pace: bounds how many carry data.

    Attributes:
        held: bytes from the first on that the server has said it holds.
    """

    def __init__(
        self,
        location: Location,
        target: Target,
        nbytes: int,
        *,
        metadata: Mapping[str, str],
        overwrite: bool,
        client: Client,
        requests: Requests,
        pace: Pace,
    ) -> None:
        self.held = 0
        self._location = location
        self._target = target
        self._nbytes = nbytes
        self._metadata = metadata
        self._overwrite = overwrite
        self._client = client
        self._requests = requests
        self._pace = pace
        self._url: str | None = None
        self._unsure = False  # bytes were sent, and no answer came

    @property
    def is_open(self) -> bool:
        """Whether there is one."""
        return self._url is not None

    async def open(self, stage: str) -> None:
        """Begin one, if there is none; one attempt."""
        if self._url is not None:
            return
        # Whoever is cancelled still learns the session's name, to cancel it.
        with anyio.CancelScope(shield=True):
            answer = await self._requests.once(stage, self._location, self._begin)
        self._url = answer.headers["Location"]
        self.held, self._unsure = 0, False

    async def ask(self, stage: str) -> Answer | None:
        """Learn what the server holds, where that is not known; return what it says of the whole object."""
        if self._url is None or not self._unsure:
            return None
        try:
            # Not */NBYTES, by which a server may understand that this is the end.
            answer = await self._requests.once(stage, self._location, self._feed, b"", "bytes */*", {})
        except StoreError as error:
            if not refused_with(error, LOST):
                raise
            self.forget()
            return None
        if answer.status != CONTINUE:
            return answer
        self.note(answer, 0, self._nbytes, stage)
        return None

    async def send(
        self, pieces: Sequence[memoryview], start: int, stop: int, stage: str, headers: Mapping[str, str]
    ) -> Answer:
        """Send bytes; one attempt."""
        span = f"bytes {start}-{stop - 1}/{self._nbytes}" if start < stop else f"bytes */{self._nbytes}"
        try:
            async with self._pace.turn():
                with (
                    self._requests.translating(stage, self._location),
                    patience(self._requests.stall_seconds) as moved,
                ):
                    self._unsure = True
                    return await self._feed(PartPayload(pieces, moved=moved), span, headers)
        except StoreError as error:
            # After the last bytes, a session is also gone where all went well: it is then asked for.
            if refused_with(error, LOST) and stop < self._nbytes:
                raise self.broken(stage, "the server has lost the upload") from error
            raise

    def note(self, answer: Answer, least: int, most: int, stage: str) -> None:
        """Take down how much the server says it holds."""
        match = re.fullmatch(r"(?:bytes=)?0-(\d+)", answer.headers.get("Range", ""))
        held = int(match[1]) + 1 if match else 0
        if answer.status != CONTINUE or not max(least, self.held) <= held <= most:
            raise self.broken(stage, f"of {most} bytes the server says it holds {held}")
        self.held, self._unsure = held, False

    def forget(self) -> None:
        """Begin a new one next time."""
        self._url, self.held, self._unsure = None, 0, False

    def broken(self, stage: str, reason: str) -> StoreError:
        """Forget the session; return the error that has the next attempt begin a new one."""
        self.forget()
        return TransientStoreError.during(stage, self._location.url, OSError(reason))

    async def cancel(self) -> None:
        """Cancel the session, if there is one."""
        if self._url is None:
            return
        try:
            await self._requests.step("abort", self._location, self._client.call, "DELETE", self._url)
        except StoreError as error:
            if not refused_with(error, LOST):  # 499 is how a cancellation is confirmed
                raise
        self.forget()

    async def _begin(self) -> Answer:
        description = {"metadata": self._metadata, "contentType": "application/octet-stream"}
        return await self._client.call(
            "POST",
            self._target.bucket_path,
            root="upload/storage/v1",
            params={
                "uploadType": "resumable",
                "name": self._target.key,
                "ifGenerationMatch": None if self._overwrite else 0,
            },
            headers={
                "Content-Type": "application/json; charset=UTF-8",
                "X-Upload-Content-Type": "application/octet-stream",
                "X-Upload-Content-Length": str(self._nbytes),
            },
            body=json.dumps(description).encode(),
        )

    async def _feed(self, body: PartPayload | bytes, span: str, headers: Mapping[str, str]) -> Answer:
        assert self._url is not None
        # Not PUT: aiohttp sends that again by itself when a kept connection breaks.
        return await self._client.call(
            "POST", self._url, headers={"Content-Range": span, **headers}, body=body
        )
