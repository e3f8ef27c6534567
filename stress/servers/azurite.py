"""Azurite: Azure's blob storage, with block blobs, conditions and its checks of keys and of MD5 sums."""

from __future__ import annotations

import secrets
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager

from stress.servers import install
from stress.servers.process import HOST, Server, StartedServer, run_server

__all__ = ["start"]

ACCOUNT = "tests"
KEY_BYTES = 64
CALL_SECONDS = 10.0


@contextmanager
def start() -> Iterator[Server]:
    """Run Azurite for the time of a block, in memory, with an account of its own."""
    script = install.installed() / "azurite/node_modules/azurite/dist/src/blob/main.js"
    flags = [
        "--blobHost",
        HOST,
        "--inMemoryPersistence",
        "--silent",
        "--skipApiVersionCheck",
        "--disableTelemetry",
    ]
    command = [install.node(), str(script), *flags]
    key = b64encode(secrets.token_bytes(KEY_BYTES)).decode()
    with run_server(
        lambda ports, _: [*command, "--blobPort", str(ports[0])],
        ports=1,
        check=_check,
        environment={"AZURITE_ACCOUNTS": f"{ACCOUNT}:{key}"},
    ) as started:
        connection = _connection_string(started.url, key)
        yield Server(
            protocol="abfs",
            url=started.url,
            storage_options={"connection_string": connection},
            environment={"AZURE_STORAGE_CONNECTION_STRING": connection},
            make_bucket=lambda name: _make_container(connection, name),
            pid=started.pid,
        )


def _connection_string(url: str, key: str) -> str:
    return (
        f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={key};BlobEndpoint={url}/{ACCOUNT};"
    )


def _check(started: StartedServer) -> None:
    """Ask without a key, which must be refused: only a whole server does."""
    try:
        urllib.request.urlopen(f"{started.url}/{ACCOUNT}?comp=list", timeout=CALL_SECONDS).close()
    except urllib.error.HTTPError as error:
        with error:
            if error.code != 403:
                raise
    else:
        raise ConnectionError("a list of containers was given to a stranger")


def _make_container(connection: str, name: str) -> None:
    from azure.storage.blob import BlobServiceClient

    with BlobServiceClient.from_connection_string(connection) as client:
        client.create_container(name)
