"""The connection to one storage account: as adlfs finds it, but with one connection pool and no retries of its own.

Guarantees: accounts and credentials come from wherever adlfs takes them (``storage_options``, fsspec's configuration,
``AZURE_STORAGE_*``, a login); each call sends one request, for the retries are ours (E3); ``aclose`` leaves no
connection, and neither adlfs nor this leave anything to do for the interpreter's exit.

What does not belong here: what is asked of the account.
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
    """A client of the account that adlfs would use; made at the first use, on the loop of that use.

    Args:
        file_system_class: adlfs's.
        options: what it is made with.
        workers: where it is made: it may look for a login, which blocks.
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
        """Close every connection, and the credentials that adlfs made; those of the user's are the user's."""
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
        # Given a loop it does not start fsspec's own; it never uses it.
        file_system = self._class(
            **self._options | {"loop": loop, "asynchronous": False, "skip_instance_cache": True}
        )
        # It would close its client at exit, on a loop that has ended by then; ours has no connection to close.
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
