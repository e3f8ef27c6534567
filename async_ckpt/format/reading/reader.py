"""Loads a state from a file, by ``torch.load`` itself, on a file object that is fetched ahead of it.

Guarantees: the result is that of ``torch.load``, or the part of it that *keys* selects, for which only that part and
the pickle are fetched. A damaged file raises a ``CorruptCheckpointError``.

What does not belong here: storage, and the order of operations on a location.
"""

from __future__ import annotations

import ctypes
import logging
import pickle
import sys
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from async_ckpt.errors import AsyncCheckpointError, CorruptCheckpointError, StoreError
from async_ckpt.format.central_directory import Entry
from async_ckpt.format.reading.file import USUAL_ALIGNMENT, CheckpointFile
from async_ckpt.format.reading.legacy import is_tar, open_legacy
from async_ckpt.format.reading.plain_pickle import is_plain
from async_ckpt.format.reading.progress import Progress
from async_ckpt.format.reading.safetensors import (
    LENGTH_BYTES,
    SafeTensor,
    device_of,
    header_length,
    is_named_so,
    parse_header,
    runs_of,
)
from async_ckpt.format.reading.selection import part_of
from async_ckpt.format.reading.storages import storages_in
from async_ckpt.format.reading.unpickling import Unpickling
from async_ckpt.retry import is_transient

__all__ = ["Skeleton", "read_checkpoint", "read_skeleton"]

_log = logging.getLogger("async_ckpt.format")

_USUAL = Unpickling()
_WORTH_BYTES = 1 << 20
_AT_A_TIME = 16 << 10  # storages
_ZIP = b"PK\x03\x04"
_DAMAGED = (
    "archive is corrupted",
    "file read failed",
)  # in messages of miniz, with which torch reads archives


def read_checkpoint(
    open_file: Callable[[Callable[[int], None]], AbstractContextManager[CheckpointFile]],
    *,
    url: str,
    map_location: Any = None,
    unpickling: Unpickling = _USUAL,
    keys: Sequence[str] | None = None,
    progress: bool | None = None,
) -> Any:
    """Load a checkpoint.

    Args:
        open_file: makes a file that is not started yet, given a callback for the number of bytes that have arrived.
        url: for messages.
        map_location: as for ``torch.load``.
        unpickling: the other arguments of ``torch.load``.
        keys: patterns of the values to load; ``None`` loads everything.
        progress: whether to show progress; ``None`` shows it on a terminal if the load takes long.

    Returns:
        The state.

    Raises:
        FileNotFoundError: there is none.
        CorruptCheckpointError: the file is damaged.
        StoreError: it cannot be read.
        KeyError: a pattern of *keys* matches nothing.
        Exception: ``torch.load`` refuses the file.
    """
    again = False
    while True:
        with Progress(progress, url) as shown, open_file(shown.moved) as file:
            file.start()
            try:
                reading = _Reading(file, shown, url, map_location, unpickling)
                if is_named_so(url) and not reading.is_zip():
                    return reading.safetensors(keys)
                return reading.everything() if keys is None else reading.part(keys)
            except StoreError as error:
                # The file may have been replaced while we read it; the new one is the one to load.
                if again or isinstance(error, CorruptCheckpointError) or is_transient(error):
                    raise
                _log.info("reading %s again from its beginning: %s", url, error)
        again = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Skeleton:
    """A state of whose tensors nothing has been fetched.

    Attributes:
        state: with tensors on the device ``meta``.
        records: the entries of their storages, by ``_cdata`` of these.
        alignment: of the records, as far as it is known.
    """

    state: Any
    records: Mapping[int, Entry]
    alignment: int
    _storages: Any  # otherwise other storages could get their addresses


def read_skeleton(file: CheckpointFile, *, url: str, unpickling: Unpickling = _USUAL) -> Skeleton | None:
    """Return the skeleton of the state in a file; None if its layout is not that of recent versions of torch.

    Args:
        file: not started yet.
        url: for messages.
        unpickling: what ``torch.load`` is told.

    Raises:
        CorruptCheckpointError: the file is damaged.
        StoreError: it cannot be read.
        Exception: what ``torch.load`` raises for what it refuses.
    """
    with Progress(False, url) as shown:
        file.start()
        reading = _Reading(file, shown, url, None, unpickling)
        if not reading.is_zip():
            return None
        if not file.has_directory:  # as torch does, but with our own message
            reading.everything()
        if file.storages is None or not _is_native(file.record("byteorder")):
            return None
        state, stand_ins = reading.skeleton()
        entries = file.entries
        records = {storage: entries[name] for storage, (_, name) in stand_ins.items()}
        return Skeleton(
            state=state, records=records, alignment=file.alignment or USUAL_ALIGNMENT, _storages=stand_ins
        )


class _Elsewhere(Exception):
    """A storage does not stay in the memory that torch allocated, or shares its record with another one."""


class _Reading:
    """One attempt to read a checkpoint."""

    def __init__(
        self, file: CheckpointFile, shown: Progress, url: str, map_location: Any, unpickling: Unpickling
    ) -> None:
        self._file = file
        self._shown = shown
        self._url = url
        self._map_location = map_location
        self._unpickling = unpickling

    def everything(self) -> Any:
        """Load the state."""
        self._shown.expect(self._file.nbytes)
        if self._may_gather():
            for state in self._gathered():
                return state
            _log.info("%s has another layout than torch writes: reading it record by record", self._url)
        self._file.fetch_all_but()
        return self._load(self._map_location)

    # -- without a pickle

    def safetensors(self, keys: Sequence[str] | None) -> dict[str, torch.Tensor]:
        """Load a safetensors file; only the tensors that *keys* selects are read and made."""
        self._unpickling.check()
        device = device_of(self._map_location)
        tensors = self._tensors()
        if keys is not None:
            chosen = part_of({each.name: None for each in tensors}, keys)
            tensors = [each for each in tensors if each.name in chosen]
        self._shown.expect(sum(each.nbytes for each in tensors))
        storages = [torch.UntypedStorage(each.nbytes) for each in tensors]
        for start, targets in runs_of(tensors, [_memory_of(each) for each in storages]):
            self._file.read_into(start, targets)
        try:
            placed = {each.name: each.over(storage) for each, storage in zip(tensors, storages, strict=True)}
        except RuntimeError as error:
            raise self._corrupt(f"a tensor has an impossible shape ({error})") from error
        return placed if device == "cpu" else {name: each.to(device) for name, each in placed.items()}

    def _tensors(self) -> list[SafeTensor]:
        file = self._file
        file.seek(0)
        try:
            length = header_length(file.read(LENGTH_BYTES), file.nbytes)
            return parse_header(file.read(length), file.nbytes)
        except ValueError as error:
            raise self._corrupt(f"of safetensors, as it is named: {error}") from error

    # -- the state first, and then what is in its tensors

    def _may_gather(self) -> bool:
        """Return whether storages may be filled after ``torch.load``."""
        storages = self._file.storages or {}
        if sum(each.stop - each.start for each in storages.values()) < _WORTH_BYTES:
            return False
        if callable(self._map_location) or not self._unpickling.is_usual:  # it may read the contents
            return False
        self._leave_storages_out()
        if self._file.alignment is None or not _is_native(self._file.record("byteorder")):
            return False
        pickled = self._file.record("data.pkl")
        return pickled is not None and is_plain(pickled)

    def _gathered(self) -> Iterator[Any]:
        """Yield the state; yield nothing if it cannot be loaded in this way."""
        found: dict[str, torch.UntypedStorage] = {}

        def keep(storage: torch.UntypedStorage, location: str) -> Any:
            placed = self._placed(storage, location)
            if (name := self._file.take_last()) is not None:
                if placed.data_ptr() != storage.data_ptr() or name in found:
                    raise _Elsewhere
                found[name] = storage
            return placed

        try:
            state = self._load(keep)
        except Exception:
            if self._file.error is not None:
                raise
            return  # with the caller's own map_location, torch.load raises its own error, or none
        if all(map(self._file.read_storages, self._targets(found))):
            yield state

    def _targets(self, found: dict[str, torch.UntypedStorage]) -> Iterator[dict[str, memoryview]]:
        """Yield the memory of some storages at a time, as each record being read takes another 2 KiB."""
        storages = self._file.storages or {}
        names = sorted(found, key=lambda name: storages[name].start)
        for start in range(0, len(names), _AT_A_TIME):
            yield {name: _memory_of(found[name]) for name in names[start : start + _AT_A_TIME]}

    def _leave_storages_out(self) -> None:
        assert self._file.storages is not None
        self._file.keep_beginning()
        self._file.fetch_all_but(self._file.storages.keys())

    # -- a part

    def part(self, keys: Sequence[str]) -> Any:
        """Load what *keys* selects: first the pickle, with empty tensors, then the storages that are needed."""
        # Another unpickler may treat empty tensors differently, so its result here would prove nothing.
        storages = None if self._unpickling.pickle_module is not None else self._file.storages
        needed = None if storages is None else self._needed(keys)
        if storages is None or needed is None:
            return part_of(self.everything(), keys)
        self._shown.expect(sum(storages[name].stop - storages[name].start for name in needed))
        skipped = storages.keys() - needed
        self._file.fetch_all_but(skipped)
        return part_of(self._load(self._placing(skipped)), keys)

    def skeleton(self) -> tuple[Any, dict[int, tuple[torch.UntypedStorage, str]]]:
        """Return the state with empty tensors, and by the ``_cdata`` of their storages the names of the records."""
        self._leave_storages_out()
        stand_ins: dict[int, tuple[torch.UntypedStorage, str]] = {}

        def stand_in(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
            name = self._file.take_last()
            if name is None:  # empty
                return storage
            empty = torch.UntypedStorage(storage.nbytes(), device="meta")
            stand_ins[empty._cdata] = (empty, name)
            return empty

        return self._load(stand_in), stand_ins

    def _needed(self, keys: Sequence[str]) -> set[str] | None:
        """Return the names of the storages that *keys* needs; None if that cannot be found out."""
        try:
            skeleton, stand_ins = self.skeleton()
            found = storages_in(part_of(skeleton, keys))
        except (AsyncCheckpointError, KeyError, pickle.UnpicklingError):
            raise
        except Exception as error:
            _log.info(
                "reading all of %s, as the storages of its parts cannot be told apart: %s", self._url, error
            )
            return None
        return {stand_ins[storage][1] for storage in found if storage in stand_ins}

    def _placing(self, skipped: Any) -> Callable[[Any, str], Any]:
        """Return a map_location that also frees the memory of skipped storages."""

        def place(storage: Any, location: str) -> Any:
            if self._file.take_last() in skipped:
                return torch.UntypedStorage(storage.nbytes(), device="meta")
            return self._placed(storage, location)

        return place

    # -- torch

    def _placed(self, storage: Any, location: str) -> Any:
        """Map a storage as ``torch.load`` does for our map_location."""
        wanted = self._map_location
        if callable(wanted):
            placed = wanted(storage, location)
            return (
                torch.serialization.default_restore_location(storage, location) if placed is None else placed
            )
        if isinstance(wanted, dict):
            location = wanted.get(location, location)
        elif wanted is not None:
            location = str(wanted)
        return torch.serialization.default_restore_location(storage, location)

    def _load(self, map_location: Any) -> Any:
        """Call torch.load, and report a damaged file as such."""
        file = self._file
        is_zip = self.is_zip()
        try:
            if is_zip:
                file.seek(0)
                return self._unpickling.load(file, map_location)
            return self._load_legacy(map_location)
        except Exception as error:
            if file.error is not None and file.error is not error:
                raise file.error from error
            if file.ended_early or (is_zip and not file.has_directory):
                raise self._corrupt(
                    f"it ends too early, after {file.nbytes} bytes, or its end is damaged"
                ) from error
            if is_zip and any(words in str(error) for words in _DAMAGED):
                raise self._corrupt(f"its archive is damaged ({error})") from error
            raise

    def _load_legacy(self, map_location: Any) -> Any:
        self._file.seek(0)
        tar = is_tar(self._file.read(tarfile.BLOCKSIZE))
        if tar:
            self._unpickling.refuse_tar()
        self._file.ended_early = False  # it may have less than a block
        with open_legacy(self._file, tar=tar) as old:
            return self._unpickling.load(old, map_location)

    def is_zip(self) -> bool:
        """Return whether the file begins like a zip archive, by which torch recognizes one."""
        self._file.seek(0)
        return self._file.read(len(_ZIP)) == _ZIP

    def _corrupt(self, reason: str) -> CorruptCheckpointError:
        return CorruptCheckpointError(
            f"{self._url!r} is not a complete checkpoint: {reason}. Load an earlier one.",
            location=self._url,
            stage="read",
        )


def _is_native(order: bytes | None) -> bool:
    """Return whether torch.load uses the stored byte order, given the archive's byteorder record."""
    if order is None:  # from torch before 2.1
        default = torch.serialization.get_default_load_endianness()
        if default is torch.serialization.LoadEndianness.NATIVE:
            return True
        order = b"big" if default is torch.serialization.LoadEndianness.BIG else b"little"
    return order == sys.byteorder.encode()


def _memory_of(storage: torch.UntypedStorage) -> memoryview:
    """Return a view that keeps the storage alive, as do all slices of it."""
    memory: Any = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    memory.owner = storage
    return memoryview(memory).cast("B")
