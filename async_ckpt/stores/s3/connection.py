"""The connection to S3: s3fs's file system with the user's settings, on the loop that uses it.

Guarantees: all sources of s3fs's settings count (storage_options, fsspec's configuration, the environment, AWS
profiles); a request is made once, as the store repeats it (E3); expired credentials are read again, if possible, and
the clients that used them are closed (B2); ``aclose`` leaves no client.

What does not belong here: the requests.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import anyio
import botocore.config
from botocore.parsers import ResponseParserError

from async_ckpt.errors import StoreError
from async_ckpt.stores.base import Workers
from async_ckpt.stores.s3.errors import is_expired

__all__ = ["Connection", "with_our_settings"]

_log = logging.getLogger("async_ckpt.stores.s3")

_CONNECT_SECONDS = 10.0
_CONNECTIONS_BESIDE_PARTS = 28  # for reading and small requests
# A key of every answer of S3's; if it is missing, something in between has answered.
_TOLD = {
    "complete_multipart_upload": "ETag",
    "create_multipart_upload": "UploadId",
    "head_object": "ContentLength",
    "put_object": "ETag",
    "upload_part": "ETag",
}


def with_our_settings(config: dict[str, Any], *, stall_seconds: float, parts: int) -> dict[str, Any]:
    """Return botocore's configuration: the user's *config*, completed by our settings.

    Args:
        config: s3fs's ``config_kwargs``.
        stall_seconds: how long to wait for the next byte of an answer.
        parts: how many parts are sent at a time.

    Returns:
        A new dictionary. The number of attempts and the minimum number of connections are always ours.
    """
    defaults: dict[str, Any] = {
        # We send a checksum of our own; hashing every body costs ten times as much.
        "s3": {"payload_signing_enabled": False},
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
        "connect_timeout": min(_CONNECT_SECONDS, stall_seconds),
        "read_timeout": stall_seconds,
    }
    known = botocore.config.Config.OPTION_DEFAULTS  # checksums came with botocore 1.36
    merged = {name: value for name, value in defaults.items() if name in known}
    merged |= config
    merged["s3"] = {**defaults["s3"], **(config.get("s3") or {})}
    merged["max_pool_connections"] = max(
        config.get("max_pool_connections") or 0, parts + _CONNECTIONS_BESIDE_PARTS
    )
    mode = {key: value for key, value in (config.get("retries") or {}).items() if key == "mode"}
    merged["retries"] = {**mode, "total_max_attempts": 1}
    return merged


@dataclass(slots=True, kw_only=True, eq=False)
class _Client:
    """A connected file system, and the number of its running requests."""

    file_system: Any
    requests: int = 0

    async def aclose(self) -> None:
        with anyio.CancelScope(shield=True):
            await self.file_system._s3creator.__aexit__(None, None, None)


class Connection:
    """Requests to one S3 with one set of storage options.

    Args:
        file_system_class: s3fs's class, or a subclass.
        options: the options of the file system.
        workers: run its creation, which reads files.
        stall_seconds: how long to wait for the next byte of an answer.
        parts: how many parts are sent at a time.
        slowed: returns whether S3 has recently asked for fewer requests.

    Attributes:
        expects: whether to send ``Expect: 100-continue``.
    """

    def __init__(
        self,
        file_system_class: Any,
        options: dict[str, Any],
        *,
        workers: Workers,
        stall_seconds: float,
        parts: int,
        slowed: Callable[[], bool] = lambda: False,
    ) -> None:
        self.expects = True
        self._slowed = slowed
        self._class = file_system_class
        self._options = options
        self._workers = workers
        self._stall_seconds = stall_seconds
        self._parts = parts
        self._lock = anyio.Lock()
        self._client: _Client | None = None
        self._clients: set[_Client] = set()  # those before it as well, while a request of theirs is under way

    async def call(self, operation: str, **arguments: Any) -> Any:
        """Make one request, with s3fs's ``s3_additional_kwargs`` for it.

        Args:
            operation: botocore's name of the operation, such as ``"put_object"``.
            **arguments: its parameters.

        Returns:
            botocore's answer, which is surely from S3.
        """
        client = await self._connected()
        client.requests += 1
        try:
            return await self._call(client.file_system, operation, arguments)
        except Exception as error:
            if is_expired(error):
                self._forget(client)
            raise
        finally:
            client.requests -= 1
            if client is not self._client and not client.requests and client in self._clients:
                self._clients.remove(client)
                await client.aclose()

    async def file_system(self) -> Any:
        """Return the file system; make and connect it the first time."""
        return (await self._connected()).file_system

    async def aclose(self) -> None:
        """Close all connections."""
        self._client = None
        while self._clients:
            await self._clients.pop().aclose()

    async def _connected(self) -> _Client:
        async with self._lock:
            if self._client is None:
                file_system = await self._workers.run(self._make)
                client = await file_system.set_session()
                self._client = _Client(file_system=file_system)
                self._clients.add(self._client)
                for operation in ("PutObject", "UploadPart"):
                    client.meta.events.register(f"before-send.s3.{operation}", self._expect_nothing)
            return self._client

    async def _call(self, file_system: Any, operation: str, arguments: dict[str, Any]) -> Any:
        client = await file_system.get_s3(arguments.get("Bucket"))
        method = getattr(client, operation)
        allowed = file_system._get_s3_method_kwargs(method, **arguments)
        if "IfNoneMatch" in arguments and "IfNoneMatch" not in allowed:
            raise StoreError("overwrite=False needs a newer botocore; upgrade s3fs and aiobotocore")
        answer = await method(**allowed)
        told = _TOLD.get(operation)
        if told is not None and told not in answer:
            raise ResponseParserError(f"the answer to {operation} has no {told}, so it is not S3's own")
        return answer

    def _make(self) -> Any:
        # Without loop=, with which it would close itself at any time: its own calls are not used.
        own = {"asynchronous": True, "skip_instance_cache": True}
        file_system = self._class(**{**self._options, **own})
        file_system.config_kwargs = with_our_settings(
            file_system.config_kwargs, stall_seconds=self._stall_seconds, parts=self._parts
        )
        return file_system

    def _forget(self, client: _Client) -> None:
        """Let the next request connect anew and read the credentials again, unless they were given as options."""
        given = client.file_system.key or client.file_system.token
        if client is self._client and not given:
            _log.info("the credentials have expired; reading them again")
            self._client = None

    def _expect_nothing(self, request: Any, event_name: str, **_: Any) -> None:
        """Send a part without ``Expect: 100-continue``, which would cost a round trip.

        Not while S3 throttles: its answer could be lost when the server closes the connection.
        """
        if not self.expects or (event_name.endswith(".UploadPart") and not self._slowed()):
            request.headers.pop("Expect", None)
