"""fake-gcs-server: Google Cloud Storage in memory, with its preconditions and resumable uploads.

What it does not do as Google does: it accepts chunks that are no multiples of 256 KiB, and chunks after a cancelled
upload; its answer to a status query is off by one. Keep objects below 128 MiB: a chunk costs more the more there are.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from stress.servers import install
from stress.servers.process import HOST, Server, StartedServer, run_server

__all__ = ["start"]

PROJECT = "tests"
CALL_SECONDS = 10.0


@contextmanager
def start() -> Iterator[Server]:
    """Run fake-gcs-server for the time of a block."""
    binary = install.fake_gcs()
    with run_server(lambda ports, _: [binary, *_arguments(ports)], ports=1, check=_check) as started:
        yield Server(
            protocol="gs",
            url=started.url,
            storage_options={"endpoint_url": started.url, "token": "anon", "project": PROJECT},
            environment={
                "STORAGE_EMULATOR_HOST": started.url,
                "FSSPEC_GS_TOKEN": "anon",
                "FSSPEC_GS_PROJECT": PROJECT,
                # Else gcsfs asks Google's gRPC interface about each bucket, which the emulator has not: a minute each.
                "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            },
            make_bucket=lambda name: _make_bucket(started.url, name),
            pid=started.pid,
        )


def _arguments(ports: tuple[int, ...]) -> list[str]:
    address = f"{HOST}:{ports[0]}"
    options = {
        "-scheme": "http",
        "-host": HOST,
        "-port": str(ports[0]),
        "-backend": "memory",
        "-public-host": address,
        "-external-url": f"http://{address}",
    }
    return [word for pair in options.items() for word in pair]


def _check(started: StartedServer) -> None:
    urllib.request.urlopen(f"{started.url}/storage/v1/b?project={PROJECT}", timeout=CALL_SECONDS).close()


def _make_bucket(url: str, name: str) -> None:
    request = urllib.request.Request(
        f"{url}/storage/v1/b?project={PROJECT}",
        json.dumps({"name": name}).encode(),
        {"Content-Type": "application/json"},
        method="POST",
    )
    urllib.request.urlopen(request, timeout=CALL_SECONDS).close()
