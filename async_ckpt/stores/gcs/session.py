"""The resumable session of one upload: it is begun, queried, fed in order, and cancelled.

Guarantees: after a missing answer, the server is asked which bytes it has before any are sent again; sending resumes
where the server says; a session that the server lost, or that is useless, is replaced by a new one from the first byte;
a session that was begun can be cancelled, even if beginning it was cancelled.

A session is invisible and costs nothing; if it is not cancelled, as after a crash, it expires after a week.

What does not belong here: the source of the bytes, and verifying them (`upload`).
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
from async_ckpt.stores.requests import Pace, Requests, stall_timeout

__all__ = ["CHUNK_MULTIPLE", "ResumableSession"]

#: The body of every request but the last is a multiple of this.
CHUNK_MULTIPLE = 256 * 1024

# The statuses of a lost session: expired or unknown; broken; cancelled.
_LOST = frozenset({404, 410, 499})


class ResumableSession:
    """At most one session at a time; methods raise only StoreErrors.

    Args:
        location: for messages.
        target: the object.
        nbytes: length of the file.
        metadata: the object's custom metadata.
        overwrite: whether an existing object may be replaced.
        client: makes the requests.
        requests: times and repeats requests.
        pace: limits the requests that carry data.

    Attributes:
        held: how many bytes, from the first, the server says it has.
        taken: how many bytes it has taken in total, including those it lost since.
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
        """Whether there is a session."""
        return self._url is not None

    async def open(self, stage: str) -> None:
        """Begin a session if there is none, in one attempt."""
        if self._useless is not None:
            with suppress(StoreError):  # it expires by itself
                await self._requests.once("abort", self._location, self._client.call, "DELETE", self._useless)
            self._useless = None
        if self._url is None:
            # Even if this is cancelled, the session's URL becomes known, so that it can be cancelled.
            with anyio.CancelScope(shield=True):
                self._url = await self._requests.once(stage, self._location, self._begin)

    async def ask(self, stage: str) -> Answer | None:
        """Query how many bytes the server has, if unknown; return the object's description if it is complete."""
        if self._url is None or not self._unsure:
            return None
        try:
            # Not */NBYTES, which a server may take for the end of the upload.
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
        """Send bytes, in one attempt."""
        span = f"bytes {start}-{stop - 1}/{self._nbytes}" if start < stop else f"bytes */{self._nbytes}"
        try:
            async with self._pace.turn():
                with (
                    self._requests.translating(stage, self._location),
                    stall_timeout(self._requests.stall_seconds) as moved,
                ):
                    self._sent, self._unsure = max(self._sent, stop), True
                    # Not PUT: aiohttp itself repeats a PUT when a kept connection breaks.
                    return await self._feed("POST", PartPayload(pieces, moved=moved), span, headers)
        except StoreError as error:
            if not refused_with(error, _LOST):
                raise
            self.forget()
            reason = OSError("the server has lost the upload")
            raise TransientStoreError.during(stage, self._location.url, reason) from error

    def note(self, answer: Answer, stage: str) -> None:
        """Note how many bytes the server says it has; it may be fewer than were sent, or none."""
        match = re.fullmatch(r"(?:bytes=)?0-(\d+)", answer.headers.get("Range", ""))
        held = int(match[1]) + 1 if match else 0
        if answer.status != CONTINUE or held > self._sent:
            raise self.broken(stage, f"of {self._sent} bytes the server says it holds {held}")
        self.taken += max(0, held - self.held)
        self.held, self._unsure = held, False

    def forget(self) -> None:
        """Forget the session, so that the next attempt begins a new one."""
        self._url, self.held, self._sent, self._unsure = None, 0, 0, False

    def broken(self, stage: str, reason: str) -> StoreError:
        """Return an error after which the next attempt cancels the session and begins a new one."""
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
