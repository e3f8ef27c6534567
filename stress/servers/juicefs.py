"""The JuiceFS gateway: the S3 server that benchmarks use, for it costs the least CPU of the real ones.

It ignores preconditions and checksums, so it is no server to test correctness with.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stress.servers import install
from stress.servers.process import HOST, Server, run_server
from stress.servers.s3 import ACCESS_KEY, SECRET_KEY, check, describe

__all__ = ["start"]

_FORMAT_SECONDS = 60.0


@contextmanager
def start() -> Iterator[Server]:
    """Run the gateway for the time of a block."""
    juicefs = install.program("juicefs")

    def command(ports: tuple[int, ...], folder: Path) -> list[str]:
        meta = f"sqlite3://{folder}/meta.db"
        form = ["format", "--storage", "file", "--bucket", f"{folder}/objects/", "--trash-days", "0"]
        made = subprocess.run(
            [juicefs, *form, "--no-update", meta, "bench"], capture_output=True, timeout=_FORMAT_SECONDS
        )
        made.check_returncode()
        return [juicefs, "--no-agent", "gateway", *_arguments(ports, folder), meta, f"{HOST}:{ports[0]}"]

    environment = {"MINIO_ROOT_USER": ACCESS_KEY, "MINIO_ROOT_PASSWORD": SECRET_KEY}
    with run_server(command, ports=2, check=check, environment=environment) as started:
        yield describe(started)


def _arguments(ports: tuple[int, ...], folder: Path) -> list[str]:
    options = {
        "--metrics": f"{HOST}:{ports[1]}",
        "--log": str(folder.parent / "gateway.log"),
        "--backup-meta": "0",
        "--cache-dir": str(folder / "cache"),
        "--cache-size": "0",
    }
    flags = ["--multi-buckets", "--keep-etag", "--object-meta", "--no-usage-report", "--no-banner"]
    return flags + [word for pair in options.items() for word in pair]
