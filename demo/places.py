"""Where the demo's checkpoints go: a local directory, or a bucket on a real server.

The training only gets a URL. Endpoint and keys are in the environment, where s3fs, gcsfs and adlfs look for them; in
your own programs, you have set them already.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import fsspec
import torch

__all__ = ["STORES", "Place", "files", "intact", "load", "place", "remove"]

STORES = {"local": "", "s3": "seaweedfs", "gcs": "fake_gcs", "azure": "azurite"}
BUCKET = "demo"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Somewhere to save.

    Attributes:
        root: a path or a URL, to which names can be added with a slash.
        unfinished: lists what saves that were killed have left below a folder, out of everyone's sight; ``None``
            where the storage does not tell. Google and Azure drop it by themselves, after a week.
    """

    root: str
    unfinished: Callable[[str], list[str]] | None


@contextmanager
def place(store: str, directory: Path | None, *, keep: bool) -> Iterator[Place]:
    """Yield a fresh place in *store*; it is gone afterwards, but for a local one that is to be kept."""
    if STORES[store]:
        with _server(store) as place:
            yield place
    elif keep:
        yield _local(tempfile.mkdtemp(dir=directory, prefix="digits-"))
    else:
        with tempfile.TemporaryDirectory(dir=directory, prefix="digits-") as name:
            yield _local(name)


def _local(directory: str) -> Place:
    return Place(
        root=directory, unfinished=lambda folder: sorted(map(str, Path(folder).glob(".async_ckpt.*")))
    )


@contextmanager
def _server(store: str) -> Iterator[Place]:
    """Start the server of *store*, make a bucket there, and let the environment lead to it."""
    module = import_module(f"stress.servers.{STORES[store]}")
    with module.start() as server:
        os.environ.update(server.environment)
        fsspec.config.set_conf_env(fsspec.config.conf)  # fsspec has read the environment already
        server.make_bucket(BUCKET)
        yield Place(root=f"{server.protocol}://{BUCKET}", unfinished=_open_uploads if store == "s3" else None)


def _open_uploads(folder: str) -> list[str]:
    """Return the multipart uploads that were begun below *folder* and neither completed nor aborted."""
    s3, path = fsspec.url_to_fs(folder)
    bucket, _, prefix = path.partition("/")
    answer = s3.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{prefix}/")
    return sorted(f"{each['Key']} (upload {each['UploadId']})" for each in answer.get("Uploads", ()))


def files(folder: str) -> list[str]:
    """Return the visible files in *folder*."""
    file_system, path = fsspec.url_to_fs(folder)
    file_system.invalidate_cache()  # another process has been there
    names = (name.rpartition("/")[2] for name in file_system.ls(path, detail=False))
    return sorted(f"{folder}/{name}" for name in names if not name.startswith("."))


def load(file: str) -> Any:
    """Load a checkpoint without this library."""
    with fsspec.open(file) as opened:
        return torch.load(opened, weights_only=True)


def intact(file: str) -> bool:
    """Return whether *file* is intact, by the checksums in it."""
    with fsspec.open(file) as opened, ZipFile(opened) as archive:
        return archive.testzip() is None


def remove(folder: str) -> None:
    """Remove *folder*."""
    file_system, path = fsspec.url_to_fs(folder)
    file_system.rm(path, recursive=True)
