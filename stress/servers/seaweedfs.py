"""SeaweedFS: the S3 server that the tests use.

The one among those that install from a package which verifies checksums, honours ``If-None-Match`` at a put and at
the completion of a multipart upload, checks signatures and refuses parts that are too small, as S3 does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stress.servers import install
from stress.servers.process import HOST, Server, run_server
from stress.servers.s3 import ACCESS_KEY, SECRET_KEY, check, describe

__all__ = ["start"]

_NAMES = ("s3", "s3.grpc", "master", "master.grpc", "volume", "volume.grpc", "filer", "filer.grpc")


@contextmanager
def start() -> Iterator[Server]:
    """Run SeaweedFS for the time of a block; it takes about three seconds to serve."""
    weed = install.program("weed")
    with run_server(
        lambda ports, folder: [weed, *_arguments(ports, folder)], ports=8, check=check
    ) as started:
        yield describe(started)


def _arguments(ports: tuple[int, ...], folder: Path) -> list[str]:
    credentials = [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}]
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    identity = {"name": "tests", "credentials": credentials, "actions": actions}
    config = folder.parent / "s3.json"
    config.write_text(json.dumps({"identities": [identity]}))
    chosen = [f"-{_flag(name)}={port}" for name, port in zip(_NAMES, ports, strict=True)]
    return [
        "-logtostderr=true",
        "server",
        f"-dir={folder}",
        f"-ip={HOST}",
        f"-ip.bind={HOST}",
        *chosen,
        "-filer",
        f"-filer.localSocket={folder.parent / 'filer.sock'}",
        "-s3",
        f"-s3.config={config}",
        f"-s3.localSocket={folder.parent / 's3.sock'}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-master.telemetry=false",
        "-master.volumeSizeLimitMB=1024",
        "-volume.max=10000",  # each bucket takes seven, which take no room until written to
        "-volume.preStopSeconds=0",
        "-volume.minFreeSpace=1",
    ]


def _flag(name: str) -> str:
    """Return the flag of a port: by default the gRPC ones are 10000 above the others, which may be taken."""
    server, _, kind = name.partition(".")
    return f"{server}.port.{kind}" if kind else f"{server}.port"
