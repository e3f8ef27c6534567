"""Requests to Google Cloud Storage's JSON API, with gcsfs's session and credentials.

Guarantees: one call is one request (gcsfs's own calls would be repeated six times beneath our retries, E3); an answer
that is no success, or not Google's, raises a ``Refusal``; a resumable upload's 308 is a valid answer. The loop is not
blocked: credentials are found and refreshed in a worker.

The file system is always gcsfs's plain one: its extended one first queries another API (gRPC) about each bucket, and
keeps threads of its own.

What does not belong here: retries, time limits, and the meaning of a request.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode

import aiohttp
import anyio
from aiohttp.payload import Payload
from gcsfs.core import GCSFileSystem
from yarl import URL

from async_ckpt.stores.base import Workers
from async_ckpt.stores.gcs.errors import Refusal

__all__ = ["CONTINUE", "Answer", "Client", "Target"]

#: The answer to bytes of a resumable upload that are not the last.
CONTINUE = 308

#: The read buffer of a download: a smaller one costs more wake-ups, a larger one blocks the loop longer.
_READ_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """An object's name.

    Attributes:
        bucket: the bucket.
        key: the object's key in the bucket; empty for the bucket itself.
        generation: the object's version, if the URL names one.
    """

    bucket: str
    key: str
    generation: str | None = None

    @property
    def path(self) -> str:
        """The object's path in the JSON API."""
        return f"b/{quote(self.bucket, safe='')}/o/{quote(self.key, safe='')}"

    @property
    def bucket_path(self) -> str:
        """The path of the bucket's objects in the JSON API."""
        return f"b/{quote(self.bucket, safe='')}/o"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The server's answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> dict[str, Any]:
        """Return the parsed body; raise a Refusal if it is no JSON, as when a proxy has answered."""
        try:
            value: Any = json.loads(self.body)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise Refusal(self.status, self.body)
        return value


class Client:
    """A gcsfs file system, made on the loop that first uses it.

    Args:
        options: the options of gcsfs, which also reads the environment and fsspec's configuration.
        workers: run blocking calls.
    """

    def __init__(self, options: Mapping[str, Any], workers: Workers) -> None:
        self._options = options
        self._workers = workers
        self._lock = anyio.Lock()
        self._fs: Any = None

    async def target(self, path: str) -> Target:
        """Parse a location's path."""
        bucket, key, generation = (await self._file_system()).split_path(path)
        return Target(bucket=bucket, key=key, generation=generation)

    async def call(
        self,
        method: str,
        path: str,
        *,
        root: str = "storage/v1",
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        body: Payload | bytes | None = None,
    ) -> Answer:
        """Make one request.

        Args:
            method: the HTTP method.
            path: a path below *root*, or a whole URL.
            root: selects the API.
            params: the query parameters; None values are left out.
            headers: further headers, besides the credentials.
            body: the request's body.

        Returns:
            The answer, completely read.

        Raises:
            Refusal: the answer is neither a success nor a resumable upload's 308.
        """
        async with self.open(method, path, root=root, params=params, headers=headers, body=body) as response:
            return Answer(status=response.status, headers=response.headers, body=await response.read())

    async def describe(self, path: str, params: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Make a GET request, and return its JSON."""
        return (await self.call("GET", path, params=params)).json()

    @asynccontextmanager
    async def open(
        self,
        method: str,
        path: str,
        *,
        root: str = "storage/v1",
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        body: Payload | bytes | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Like ``call``, but leave the body of the answer unread."""
        fs = await self._file_system()
        in_session = path.startswith(("http://", "https://"))
        if in_session:
            url = path
        else:
            query = urlencode(fs._get_params(dict(params or {})), quote_via=quote)
            url = f"{fs._location}/{root}/{path}?{query}"
        await fs._set_session()
        async with fs.session.request(
            method,
            URL(url, encoded=True),  # yarl would decode what names contain
            headers=await self._workers.run(fs._get_headers, headers),
            data=body,
            allow_redirects=False,
            timeout=aiohttp.ClientTimeout(total=fs.requests_timeout),
            read_bufsize=_READ_BYTES,
        ) as response:
            if response.status >= 300 and not (in_session and response.status == CONTINUE):
                anonymous = fs.credentials.credentials is None
                raise Refusal(response.status, await response.read(), anonymous=anonymous)
            yield response

    async def aclose(self) -> None:
        """Close the connections."""
        fs, self._fs = self._fs, None
        if fs is not None and fs.session is not None:
            with anyio.CancelScope(shield=True):
                await fs.session.close()

    async def _file_system(self) -> Any:
        async with self._lock:
            if self._fs is None:
                options = {**self._options, "asynchronous": False, "skip_instance_cache": True}
                # asynchronous=True would make fsspec forget the loop.
                options["loop"] = asyncio.get_running_loop()
                self._fs = await self._workers.run(GCSFileSystem, **options)
            return self._fs
