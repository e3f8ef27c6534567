"""The client of one storage account: configured as adlfs would, but with one connection pool and without its retries.

Guarantees: accounts and credentials come from the sources that adlfs uses (``storage_options``, fsspec's configuration,
``AZURE_STORAGE_*``, a login); each call sends one request, as the retries are ours (E3); ``aclose`` leaves no
connection, and nothing is left to do at the interpreter's exit.

What does not belong here: the requests.
"""

from __future__ import annotations

import asyncio
import inspect
import weakref
from collections.abc import Mapping
from typing import Any

import aiohttp
import anyio
from azure.core.pipeline.transport import AioHttpTransport
from azure.storage.blob.aio import BlobServiceClient

from async_ckpt.stores.base import Workers

__all__ = ["AzureClient"]

_CONNECT_SECONDS = 10
_CONNECTIONS = 100
_READ_BUFFER_BYTES = 256 * 1024


class AzureClient:
    """The client of the account that adlfs would use; made at the first use, on the running loop.

    Args:
        file_system_class: adlfs's class.
        options: the options of the file system.
        workers: run its creation, which may block to look for a login.
    """

    def __init__(self, file_system_class: Any, options: Mapping[str, Any], *, workers: Workers) -> None:
        self._class = file_system_class
        self._options = dict(options)
        self._workers = workers
        self._lock = anyio.Lock()
        self._file_system: Any = None
        self._session: aiohttp.ClientSession | None = None
        self._service: BlobServiceClient | None = None

    async def get(self) -> BlobServiceClient:
        """Return the client of the account."""
        async with self._lock:
            if self._service is None:
                if self._file_system is None:
                    loop = asyncio.get_running_loop()
                    self._file_system = await self._workers.run(self._find_account, loop)
                self._service = self._connect(self._file_system.service_client)
            return self._service

    async def aclose(self) -> None:
        """Close every connection, and credentials that adlfs made; credentials from the user are left open."""
        with anyio.CancelScope(shield=True):
            async with self._lock:
                session, self._session, self._service = self._session, None, None
                file_system, self._file_system = self._file_system, None
                if session is not None:
                    await session.close()
                if file_system is not None and self._options.get("credential") is None:
                    for name in ("credential", "sync_credential"):
                        await _close(getattr(file_system, name, None))

    def _find_account(self, loop: asyncio.AbstractEventLoop) -> Any:
        # With a loop it does not start fsspec's own, which it never uses.
        file_system = self._class(
            **self._options | {"loop": loop, "asynchronous": False, "skip_instance_cache": True}
        )
        # It would close its client at exit, on a loop that has ended by then; it has no connection to close.
        for finalizer in list(getattr(weakref.finalize, "_registry", ())):
            if (alive := finalizer.peek()) is not None and alive[0] is file_system:
                finalizer.detach()
        return file_system

    def _connect(self, found: Any) -> BlobServiceClient:
        self._session = self._session or aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=_CONNECTIONS),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=True,
            read_bufsize=_READ_BUFFER_BYTES,
        )
        times = {
            name: self._options[name]
            for name in ("connection_timeout", "read_timeout")
            if self._options.get(name)
        }
        transport = AioHttpTransport(
            session=self._session, session_owner=False, **{"connection_timeout": _CONNECT_SECONDS, **times}
        )
        service = BlobServiceClient(
            found.primary_endpoint,
            credential=found.credential,
            secondary_hostname=found.secondary_hostname,
            transport=transport,
            retry_total=0,
        )
        if found.location_mode != service.location_mode:
            service.location_mode = found.location_mode
        return service


async def _close(credential: Any) -> None:
    close = getattr(credential, "close", None)
    if close is not None:
        result = close()
        if inspect.isawaitable(result):
            await result
