"""Decides when two URLs name one location, by the paths and the file systems' options.

Guarantees: no network is used, and the result contains no secret. In doubt, two spellings count as two locations;
otherwise a default port, the case of a host name, credentials and time-outs make no difference.

What does not belong here: local paths (trusted_paths), the choice of a store.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import posixpath
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

__all__ = ["path_of_place", "place_of_options"]

# Protocols of file systems whose servers have directories, like a disk.
_WITH_DIRECTORIES = frozenset(
    {"arrow_hdfs", "dbfs", "ftp", "hdfs", "jupyter", "sftp", "smb", "webdav", "webhdfs"}
)
_PORTS = {"ftp": 21, "sftp": 22, "smb": 445, "http": 80, "https": 443}
# Options of any file system that concern transport and credentials, not the server.
_NO_PLACE = frozenset(
    {
        "asynchronous", "batch_size", "block_size", "encoding", "listings_expiry_time", "loop", "max_paths",
        "password", "skip_instance_cache", "timeout", "use_listings_cache",
    }
)  # fmt: skip
_ACCOUNT = r"(?i)(?:^|;)\s*(AccountName|BlobEndpoint|EndpointSuffix)\s*=\s*([^;]*)"


def path_of_place(protocol: str, path: str) -> str:
    """Return a form of *path* that is the same for all its spellings.

    Args:
        protocol: the main protocol of the file system.
        path: the path without the protocol.

    Returns:
        The path without ``//``, ``/./`` and ``/../`` if the server has directories; otherwise, as for an object store,
        the path itself, as any text is a name there.
    """
    if protocol not in _WITH_DIRECTORIES:
        return path
    plain = posixpath.normpath(f"/{path}").lstrip("/")
    return f"/{plain}" if path.startswith("/") else plain


def place_of_options(file_system: Any, protocol: str, options: Mapping[str, Any]) -> str:
    """Return a token that differs if the same path names different locations in two file systems.

    Args:
        file_system: the class.
        protocol: the main protocol of the file system.
        options: the options of the file system.
    """
    package = file_system.__module__.partition(".")[0]
    chosen = _NATIVE[package](options) if package in _NATIVE else _of_any(file_system, protocol, options)
    chosen = {name: value for name, value in chosen.items() if value not in (None, "")}
    if not chosen:
        return ""
    text = repr(sorted(chosen.items()))
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def _of_s3(options: Mapping[str, Any]) -> dict[str, Any]:
    endpoint = options.get("endpoint_url") or (options.get("client_kwargs") or {}).get("endpoint_url")
    environment = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return {"endpoint": _endpoint(endpoint or environment), "profile": options.get("profile")}


def _of_gcs(options: Mapping[str, Any]) -> dict[str, Any]:
    return {"endpoint": _endpoint(options.get("endpoint_url") or os.environ.get("STORAGE_EMULATOR_HOST"))}


def _of_azure(options: Mapping[str, Any]) -> dict[str, Any]:
    connection = options.get("connection_string") or os.environ.get("AZURE_STORAGE_CONNECTION_STRING") or ""
    said = {name.lower(): value.strip() for name, value in re.findall(_ACCOUNT, str(connection))}
    account = (
        options.get("account_name") or os.environ.get("AZURE_STORAGE_ACCOUNT_NAME") or said.get("accountname")
    )
    host = options.get("account_host") or said.get("blobendpoint") or said.get("endpointsuffix")
    usual = (None, "core.windows.net", f"{account}.blob.core.windows.net")
    host = _endpoint(host)
    return {"account": account, "host": None if host in usual else host}


def _of_any(file_system: Any, protocol: str, options: Mapping[str, Any]) -> dict[str, Any]:
    defaults = _defaults(file_system)
    chosen = {
        name: value
        for name, value in options.items()
        if name not in _NO_PLACE and not (name in defaults and defaults[name] == value)
    }
    if chosen.get("port") in (_PORTS.get(protocol, -1), str(_PORTS.get(protocol, -1))):
        del chosen["port"]
    if isinstance(chosen.get("host"), str):
        chosen["host"] = chosen["host"].lower()
    return {name: value if isinstance(value, (str, int)) else repr(value) for name, value in chosen.items()}


@lru_cache(maxsize=16)  # a signature takes ten times as long as the rest of a URL
def _defaults(file_system: Any) -> Mapping[str, Any]:
    try:
        parameters = inspect.signature(file_system.__init__).parameters.values()
    except (TypeError, ValueError):
        return {}
    return {each.name: each.default for each in parameters if each.default is not inspect.Parameter.empty}


def _endpoint(url: Any) -> str | None:
    """Return a server's address without a default port and other insignificant parts."""
    if not url:
        return None
    parts = urlsplit(str(url) if "//" in str(url) else f"//{url}")
    try:
        port = parts.port
    except ValueError:
        return str(url)
    host = (parts.hostname or "") if port in (None, _PORTS.get(parts.scheme)) else f"{parts.hostname}:{port}"
    return host + parts.path.rstrip("/")


_NATIVE: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "s3fs": _of_s3,
    "gcsfs": _of_gcs,
    "adlfs": _of_azure,
}
