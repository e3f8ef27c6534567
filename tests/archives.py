"""Checkpoints as torch writes them, and nearly so."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch

from async_ckpt.format.central_directory import Entry, find_directory, list_entries

__all__ = ["edited", "entries_of", "set_in_directory", "with_pickle", "written"]


def written(state: Any, *, alignment: int | None = None, **options: Any) -> bytes:
    """Return what torch.save writes, with storages aligned to *alignment* if torch can do that."""
    file = io.BytesIO()
    with nullcontext() if alignment is None else _aligned(alignment):
        torch.save(state, file, **options)
    return file.getvalue()


def entries_of(data: bytes) -> dict[str, Entry]:
    """Return the entries of an archive's directory by name, less the archive's own."""
    start, stop = find_directory(data, len(data))
    return {entry.name.partition("/")[2]: entry for entry in list_entries(data[start:stop])}


def set_in_directory(data: bytes, name: str, *, header: int, checksum: int | None = None) -> bytes:
    """Return an archive whose directory says something else of the record *name*."""
    start, _ = find_directory(data, len(data))
    entry = entries_of(data)[name]
    changed = bytearray(data)
    struct.pack_into("<L", changed, start + entry.at + 42, header)
    struct.pack_into("<L", changed, start + entry.at + 16, entry.checksum if checksum is None else checksum)
    return bytes(changed)


def with_pickle(data: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """Return an archive with another pickle of the same length, and the right checksum."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        pickled = archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))
    changed = change(pickled)
    assert changed != pickled
    assert len(changed) == len(pickled)
    before, after = (struct.pack("<L", zlib.crc32(each)) for each in (pickled, changed))
    return data.replace(pickled, changed).replace(before, after)


def edited(data: bytes, change: Callable[[str, bytes], bytes | None], **options: Any) -> bytes:
    """Return an archive of the same records made by zipfile, each changed or, with None, left out."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as before, zipfile.ZipFile(file, "w", **options) as after:
        for name in before.namelist():
            content = change(name.partition("/")[2], before.read(name))
            if content is not None:
                after.writestr(name, content)
    return file.getvalue()


def _aligned(alignment: int) -> AbstractContextManager[Any]:
    serialization = pytest.importorskip("torch.utils.serialization", reason="torch before 2.7 aligns to 64")
    patch: AbstractContextManager[Any] = serialization.config.patch({"save.storage_alignment": alignment})
    return patch
