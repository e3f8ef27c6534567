"""The resumable session behind one upload: begun, asked, fed in order, cancelled.

Guarantees: bytes for which no answer came are not sent again before the server was asked what it holds; sending
goes on from where the server says; a session that the server has lost, or that is of no use any more, makes room for
a new one, from the first byte; one that was begun is known to whoever has to cancel it, even if beginning it was
cancelled.

A session is invisible and costs nothing; one that nobody cancels, as after a crash, expires after a week.

What does not belong here: where the bytes come from, and whether the right ones arrived (`upload`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress

import anyio

from async_ckpt.errors import StoreError, TransientStoreError
from async_ckpt.stores.base import Location
from async_ckpt.stores.gcs.client import CONTINUE, Answer, Client, Target
from async_ckpt.stores.gcs.errors import Refusal, refused_with
from async_ckpt.stores.payload import PartPayload
from async_ckpt.stores.requests import Pace, Requests, patience

__all__ = ["CHUNK_MULTIPLE", "ResumableSession"]

#: Every request but the last carries a multiple of this.
CHUNK_MULTIPLE = 256 * 1024

# How the server says that it has no such session: expired or unknown; broken; cancelled.
_LOST = frozenset({404, 410, 499})


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
        taken: bytes that it has taken in all, those that it has lost since among them.
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
        self.taken = 0
        self._location = location
        self._target = target
        self._nbytes = nbytes
        self._metadata = metadata
        self._overwrite = overwrite
        self._client = client
        self._requests = requests
        self._pace = pace
        self._url: str | None = None
        self._sent = 0  # bytes from the first on, with or without an answer
        self._unsure = False  # no answer came to the last of them
        self._useless: str | None = None  # one that is still to be cancelled

    @property
    def is_open(self) -> bool:
        """Whether there is one."""
        return self._url is not None

    async def open(self, stage: str) -> None:
        """Begin one, if there is none; one attempt."""
        if self._useless is not None:
            with suppress(StoreError):  # it expires by itself
                await self._requests.once("abort", self._location, self._client.call, "DELETE", self._useless)
            self._useless = None
        if self._url is None:
            # Whoever is cancelled still learns the session's name, to cancel it.
            with anyio.CancelScope(shield=True):
                self._url = await self._requests.once(stage, self._location, self._begin)

    async def ask(self, stage: str) -> Answer | None:
        """Learn what the server holds, where that is not known; return what it says of the whole object."""
        if self._url is None or not self._unsure:
            return None
        try:
            # Not */NBYTES, by which a server may understand that this is the end.
            answer = await self._requests.once(stage, self._location, self._feed, "PUT", b"", "bytes */*", {})
        except StoreError as error:
            if not refused_with(error, _LOST):
                raise
            self.forget()
            return None
        if answer.status != CONTINUE:
            return answer
        self.note(answer, stage)
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
                    self._sent, self._unsure = max(self._sent, stop), True
                    # Not PUT: aiohttp sends that again by itself when a kept connection breaks.
                    return await self._feed("POST", PartPayload(pieces, moved=moved), span, headers)
        except StoreError as error:
            if not refused_with(error, _LOST):
                raise
            self.forget()
            reason = OSError("the server has lost the upload")
            raise TransientStoreError.during(stage, self._location.url, reason) from error

    def note(self, answer: Answer, stage: str) -> None:
        """Take down how much the server says it holds; it may be less than was sent, or nothing."""
        match = re.fullmatch(r"(?:bytes=)?0-(\d+)", answer.headers.get("Range", ""))
        held = int(match[1]) + 1 if match else 0
        if answer.status != CONTINUE or held > self._sent:
            raise self.broken(stage, f"of {self._sent} bytes the server says it holds {held}")
        self.taken += max(0, held - self.held)
        self.held, self._unsure = held, False

    def forget(self) -> None:
        """Begin a new one next time."""
        self._url, self.held, self._sent, self._unsure = None, 0, 0, False

    def broken(self, stage: str, reason: str) -> StoreError:
        """Return the error that has the next attempt cancel the session and begin a new one."""
        self._useless = self._url
        self.forget()
        return TransientStoreError.during(stage, self._location.url, OSError(reason))

    async def cancel(self) -> None:
        """Cancel the session, if there is one."""
        for url in filter(None, (self._useless, self._url)):
            try:
                await self._requests.step("abort", self._location, self._client.call, "DELETE", url)
            except StoreError as error:
                if not refused_with(error, _LOST):  # 499 is how a cancellation is confirmed
                    raise
        self._useless = None
        self.forget()

    async def _begin(self) -> str:
        description = {"metadata": self._metadata, "contentType": "application/octet-stream"}
        answer = await self._client.call(
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
        if "Location" not in answer.headers:
            raise Refusal(answer.status, answer.body)
        return answer.headers["Location"]

    async def _feed(
        self, method: str, body: PartPayload | bytes, span: str, headers: Mapping[str, str]
    ) -> Answer:
        assert self._url is not None
        answer = await self._client.call(
            method, self._url, headers={"Content-Range": span, **headers}, body=body
        )
        if answer.status != CONTINUE and "generation" not in answer.json():
            raise Refusal(answer.status, answer.body)  # no object came to be
        return answer
