"""A file by torch's own writer, which is given the pickle and told how long the storages are, not what is in them.

Guarantees: the segments are those of the file that ``torch.save`` would write, or there are none. Before a kind
of tensor is trusted to be pickled in the way known here, torch pickles a few of it, once a process; where the two
differ, or this torch cannot skip just the bytes of storages, there is nothing and `recorder` has to do it.

What does not belong here: the pickle (`pickled`), checksums (`layout`).
"""

from __future__ import annotations

import io
import logging
import pickle
from collections.abc import Iterator
from functools import cache
from typing import Any, TypeAlias

import torch

from async_ckpt.format.pickled import PicturePickler
from async_ckpt.format.recorder import INLINE_BYTES, Reference, Segment, alignment, open_writer
from async_ckpt.snapshot import HostBuffer, Snapshot, capture
from async_ckpt.snapshot.entries import StorageEntry, TensorEntry

__all__ = ["write"]

logger = logging.getLogger("async_ckpt.format")

_Kind: TypeAlias = "tuple[torch.dtype | None, bool, bool] | tuple[torch.dtype | None]"
_Record: TypeAlias = "tuple[str, bytes | str | int]"  # a name, and what it holds: a number is a storage's

_EXAMPLE_BYTES = 128
_EXAMPLES = 11  # the order of so many shows how their numbers are sorted


def write(snapshot: Snapshot) -> list[Segment] | None:
    """Return the file of *snapshot*, checksums missing, or ``None`` where this torch is not known well enough.

    Args:
        snapshot: its small storages are copied, the others referred to.
    """
    boundary = alignment()
    can_skip = hasattr(torch._C.PyTorchFileWriter, "write_record_metadata")
    if not can_skip or not all(_is_known(kind, boundary) for kind in _kinds(snapshot)):
        return None
    headers = _Headers()
    writer = open_writer(headers)
    if writer is None:
        return None
    skipped: list[Reference] = []
    for name, content in _records(snapshot, boundary):
        if not isinstance(content, int):
            writer.write_record(name, content, len(content))
        elif (nbytes := snapshot.storages[content].nbytes) <= INLINE_BYTES:
            writer.write_record(name, bytes(snapshot.view(content)), nbytes)
        else:
            skipped.append(Reference(storage=content, start=0, stop=nbytes))
            writer.write_record_metadata(name, nbytes)
    writer.write_end_of_file()
    if headers.skips != [(len(each), io.SEEK_CUR) for each in skipped]:
        return None
    return headers.segments(skipped)


class _Headers(io.BytesIO):
    """A file to torch's writer, without the bytes that it skips.

    Attributes:
        skips: what `seek` was called with.
    """

    def __init__(self) -> None:
        super().__init__()
        self.skips: list[tuple[int, int]] = []
        self._gaps: list[int] = []

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Note what is skipped and where, and stay there."""
        self.skips.append((offset, whence))
        self._gaps.append(self.tell())
        return self._gaps[-1]

    def segments(self, skipped: list[Reference]) -> list[Segment]:
        """Return what was written, with *skipped* where something was skipped."""
        segments: list[Segment] = []
        at, written = 0, self.getbuffer()
        for gap, reference in zip(self._gaps, skipped, strict=True):
            segments += bytearray(written[at:gap]), reference
            at = gap
        return [*segments, bytearray(written[at:])]


def _records(snapshot: Snapshot, boundary: int) -> Iterator[_Record]:
    """Yield what the archive is to hold, in its order, but for what the writer adds itself."""
    file = io.BytesIO()
    pickler = PicturePickler(file, snapshot.storages)
    pickler.dump(snapshot.picture())
    yield "data.pkl", file.getvalue()
    yield from _others(boundary)
    names = [(f"data/{key}", index) for index, key in pickler.keys.items()]
    yield from sorted(names) if _sorts() else names


# -- what torch itself does


class _Notes:
    """An archive to torch, which only notes what it is to hold."""

    def __init__(self) -> None:
        self.records: list[tuple[str, Any]] = []

    def write_record(self, name: str, content: Any, nbytes: int) -> None:
        """Note a record; of a storage, the bytes."""
        is_storage = isinstance(content, torch.UntypedStorage)
        self.records.append((name, bytes(content.tolist()) if is_storage else content))


def _torch_records(state: Any) -> list[tuple[str, Any]]:
    notes = _Notes()
    torch.serialization._save(state, notes, pickle, torch.serialization.DEFAULT_PROTOCOL, False)
    return notes.records


@cache
def _sorts() -> bool:
    """Tell whether torch writes storages in the order of their names, as 2.4 does, or in that in which it met them."""
    names = [name for name, _ in _torch_records(_example(None))]
    return names.index("data/10") < names.index("data/2")


@cache
def _others(boundary: int) -> tuple[_Record, ...]:
    """Return the records that torch puts between the pickle and the storages."""
    return tuple(_torch_records(None)[1:])


def _kinds(snapshot: Snapshot) -> set[_Kind]:
    """Return what of the snapshot's entries decides how they are pickled; numbers do not."""
    always: set[_Kind] = {(None,)}  # it shows in which order torch writes storages
    return always | {
        (entry.dtype, entry.requires_grad, entry.is_parameter)
        if isinstance(entry, TensorEntry)
        else (entry.dtype,)
        for entry in snapshot.entries
        if isinstance(entry, (TensorEntry, StorageEntry))
    }


@cache
def _is_known(kind: _Kind, boundary: int) -> bool:
    """Tell whether torch puts a few of a kind into the records that they are put into here."""
    try:
        example = _example(*kind)
        made = capture(example)
        snapshot = made.stage(HostBuffer(made.nbytes))
        records = [
            (name, bytes(snapshot.view(content)) if isinstance(content, int) else content)
            for name, content in _records(snapshot, boundary)
        ]
        known = records == _torch_records(example)
    except Exception:  # a torch that does everything otherwise must not break a save that is possible
        logger.debug("torch %s cannot be asked about %s", torch.__version__, kind, exc_info=True)
        return False
    logger.debug("torch %s pickles %s in the way known here: %s", torch.__version__, kind, known)
    return known


def _example(dtype: torch.dtype | None, requires_grad: bool = False, is_parameter: bool | None = None) -> Any:
    """Return objects of a kind, some tied, some views of one storage, with numbers that tell them apart."""
    storages = [
        torch.full((_EXAMPLE_BYTES,), number, dtype=torch.uint8, device="cpu").untyped_storage()
        for number in range(_EXAMPLES)
    ]
    if is_parameter is None and dtype is None:
        return [*storages, storages[0]]
    assert dtype is not None
    if is_parameter is None:
        typed = [torch.TypedStorage(wrap_storage=each, dtype=dtype, _internal=True) for each in storages]
        return [*typed, typed[0]]
    views = [
        torch.empty(0, dtype=dtype, device="cpu").set_(storages[number], offset, (1, 2), (1, offset))
        for number, offset in ((0, 1), (0, 2), (1, 1))
    ]
    if is_parameter:
        views = [torch.nn.Parameter(view, requires_grad) for view in views]
    elif requires_grad:
        views = [view.requires_grad_() for view in views]
    return [*views, views[0]]
