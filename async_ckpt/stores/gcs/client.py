"""Requests to Google Cloud Storage: gcsfs's session and credentials, its JSON interface spoken by ourselves.

Guarantees: one call is one request (gcsfs's own would be repeated six times, beneath our retries, E3); what
is not a success, or not what Google would say, raises a ``Refusal``; a resumable upload's 308 is an answer.
Nothing blocks the loop: credentials are looked for and refreshed in a worker.

The file system is gcsfs's plain one, whatever gcsfs offers under its protocol: the extended one asks another
interface (gRPC) about each bucket first, and keeps threads of its own.

What does not belong here: retries, patience, and what a request is for.
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

#: A resumable upload's answer to bytes that are not the last.
CONTINUE = 308

#: What is read ahead of a download: less costs more wake-ups, more holds the loop longer.
_READ_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """An object's name.

    Attributes:
        bucket: the bucket.
        key: the object in it; empty for the bucket itself.
        generation: one version of the object, where the URL names one.
    """

    bucket: str
    key: str
    generation: str | None = None

    @property
    def path(self) -> str:
        """The object as the JSON interface names it."""
        return f"b/{quote(self.bucket, safe='')}/o/{quote(self.key, safe='')}"

    @property
    def bucket_path(self) -> str:
        """All objects of the bucket, likewise."""
        return f"b/{quote(self.bucket, safe='')}/o"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the server said."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> dict[str, Any]:
        """Return what the body describes; a Refusal if that is nothing, as where somebody else has answered."""
        try:
            value: Any = json.loads(self.body)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise Refusal(self.status, self.body)
        return value


class Client:
    """One gcsfs file system, made on the loop that first uses it.

    Args:
        options: what gcsfs is made with; environment and fsspec configuration it reads by itself.
        workers: where what blocks runs.
    """

    def __init__(self, options: Mapping[str, Any], workers: Workers) -> None:
        self._options = options
        self._workers = workers
        self._lock = anyio.Lock()
        self._fs: Any = None

    async def target(self, path: str) -> Target:
        """Take a location's path apart."""
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
            method: HTTP's verb.
            path: below *root*, or a whole URL, which is taken as it is.
            root: which of the interfaces.
            params: of the query; None values are left out.
            headers: beside those of the credentials.
            body: what to send.

        Returns:
            The answer, wholly read.

        Raises:
            Refusal: it is neither a success nor a resumable upload's 308.
        """
        async with self.open(method, path, root=root, params=params, headers=headers, body=body) as response:
            return Answer(status=response.status, headers=response.headers, body=await response.read())

    async def describe(self, path: str, params: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Ask for what is described in JSON."""
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
        """Make one request, and leave the body of the answer to be read; see ``call``."""
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
