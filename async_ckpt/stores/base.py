"""The protocol of stores, between the writers and the storage.

Guarantees that every store gives:

* Nothing is visible under the final name before ``commit`` begins, and the whole checkpoint is visible after it (D2).
  An earlier file of that name stays whole until then.
* ``commit`` returns only once the checkpoint would survive the loss of this process (D1).
* ``abort`` leaves neither a file nor an open upload. It may be called at any moment, more than once, and after a failed
  ``commit``.
* Parts may be put in any order, and ``max_concurrent_parts`` of them at the same time.
* ``commit`` refuses an incomplete file.

What does not belong here: ordering, retries of whole saves, memory accounting, events.
"""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ParamSpec, Protocol, TypeVar

import anyio

from async_ckpt.errors import CheckpointExistsError, StoreError
from async_ckpt.stores.redaction import presentable, redacted_text
from async_ckpt.system.trusted_paths import Look

__all__ = [
    "MARKER",
    "Child",
    "Content",
    "Continuing",
    "Copying",
    "Location",
    "Part",
    "Receipt",
    "Source",
    "Store",
    "Upload",
    "Workers",
    "aborted_on_error",
    "exists_already",
    "markers_first",
]

MARKER = ".metadata"
"""The file that makes a directory a sharded checkpoint: DCP's name for what says what is where."""

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Location:
    """The location of a checkpoint.

    Attributes:
        url: as the user wrote it, with passwords and signatures hidden; for messages, events and reports.
        path: the path within the store.
        key: equal for two locations that name the same file; the key of a file begins with its directory's key and a
            slash. For ordering (O1).
        group: identifies the file system; base CheckpointIOs run one at a time in a group.
        address: as the user wrote it, with secrets; never shown. ``url`` by default.
        foreign_link: a symlink on the path that another user put into a directory that anyone may write to; nothing is
            written through it.
        links: on a local disk, the keys of the symlinks on the path.
        follows: on a local disk, whether a symlink at the location stands for its target.
        secrets: the parts of the address and of the storage options that must not be shown.
        in_directory: on a local disk, whether the directory existed when the location was made.
        look: on a local disk, the file's status when the location was made; ``None`` if it was not looked up.
        seen_seconds: on a local disk, the monotonic time at which a save saw that the directory exists.
        options: options for the file system that are part of the location itself.
        writers: how many processes write to the directory at the same time, this one included.
    """

    url: str
    path: str = field(repr=False)
    key: str = field(repr=False)
    group: str = field(repr=False)
    address: str = field(default="", repr=False)
    foreign_link: str = field(default="", repr=False)
    links: tuple[str, ...] = field(default=(), repr=False)
    follows: bool = field(default=False, repr=False)
    secrets: tuple[str, ...] = field(default=(), repr=False)
    in_directory: bool = field(default=False, repr=False, compare=False)
    look: Look | None = field(default=None, repr=False, compare=False)
    seen_seconds: float | None = field(default=None, repr=False, compare=False)
    options: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    writers: int = field(default=1, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "address", self.address or self.url)

    def below(self, name: str) -> Location:
        """Return the location of *name*, which may have slashes in it, in the directory at this one."""
        longer: dict[str, Any] = {
            each: f"{getattr(self, each).rstrip('/')}/{name}" for each in ("url", "path", "key", "address")
        }
        return replace(self, **longer, in_directory=False, look=None, seen_seconds=None)

    def redacted(self, text: str) -> str:
        """Return *text*, such as another library's message, with the secrets in it hidden."""
        return redacted_text(text, self.secrets)

    def presentable(self, error: Exception) -> Exception:
        """Return *error*, or, if its text contains secrets, a copy without them."""
        shown = presentable(error, self.secrets)
        assert isinstance(shown, Exception)
        return shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Child:
    """An entry of a directory.

    Attributes:
        name: its own, without the directory's.
        is_directory: whether it is one. Where directories are but the beginnings of names, one and a file may have
            the same name.
        nbytes: length of a file, where it is known.
        modified_seconds: when it was written, in seconds of Unix time, where that is known.
    """

    name: str
    is_directory: bool = False
    nbytes: int | None = None
    modified_seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One storage request: the bytes ``start`` to ``stop`` of the file."""

    index: int
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """The part's length in bytes."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """The storage's answer for one part; only the store knows the meaning of ``token``."""

    index: int
    token: str = ""


class Content(Protocol):
    """The bytes of a file, by reference."""

    @property
    def nbytes(self) -> int:
        """Length of the file in bytes."""

    def read(self, start: int, stop: int) -> Sequence[memoryview]:
        """Return the bytes *start* to *stop* as a scatter list. Computes checksums: call it in a worker."""

    def steps(self, start: int, stop: int, step_bytes: int) -> Iterable[Sequence[memoryview]]:
        """Return these bytes in order, in steps, each of which is read when it is asked for. Use it in a worker.

        Where the bytes are in memory, a step has just been summed up: if it is short, it is in the CPU's cache.
        """

    def crc32(self, start: int, stop: int) -> int:
        """Return the CRC-32 of these bytes. Call it in a worker, and before ``read``, which then is faster."""


class Workers(Protocol):
    """A bounded pool of threads for blocking calls."""

    async def run(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call *function* in a worker. A cancellation waits until the call has returned."""


class Upload(Protocol):
    """The upload of one file."""

    @property
    def part_size(self) -> int | None:
        """The size of every part but the last; ``None`` leaves it to the options."""

    @property
    def max_concurrent_parts(self) -> int | None:
        """A bound on concurrent parts, in addition to the option's; 1 means in the order of the file."""

    @property
    def is_paced(self) -> bool:
        """Whether ``put`` itself limits the store's requests; then one more part may be prepared meanwhile."""

    @property
    def swept(self) -> tuple[str, ...]:
        """The names of leftovers of dead processes that ``begin`` removed."""

    async def put(self, part: Part, content: Content) -> Receipt:
        """Send one part. If the store ``repeats_parts``, this may be called again for it after an error (E3)."""

    async def commit(self, receipts: Sequence[Receipt]) -> None:
        """Make the file visible under its final name, whole and durable. Call it once, after every put."""

    async def abort(self) -> None:
        """Undo everything; errors of the clean-up are logged, not raised."""


@asynccontextmanager
async def aborted_on_error(upload: Upload) -> AsyncIterator[None]:
    """Abort *upload* if the body raises any error, cancellation included (D2)."""
    try:
        yield
    except BaseException:
        with anyio.CancelScope(shield=True):
            await upload.abort()
        raise


class Copying(Upload, Protocol):
    """An upload to a store that can copy from stored files."""

    @property
    def least_part_bytes(self) -> int:
        """The minimum size of every part but the last."""

    @property
    def max_parts(self) -> int:
        """The maximum number of parts."""

    @property
    def stored(self) -> object | None:
        """The committed file, for ``copy`` of another upload of the store; ``None`` if it cannot be copied from."""

    async def copy(self, part: Part, content: Content, stored: object, start: int) -> Receipt:
        """Like ``put``, with the bytes of the file *stored* from *start* on; fails if that file has changed."""


class Continuing(Upload, Protocol):
    """An upload whose repeated ``put`` resumes where the previous one broke off."""

    def progress(self) -> int:
        """Return a number that changes with progress; after a change, attempts and time are counted anew (E3)."""


class Source(Protocol):
    """One file as it was when it was opened; a later replacement is not seen.

    If the storage does not keep the old bytes, reading after a replacement raises a ``StoreError``.
    """

    @property
    def nbytes(self) -> int:
        """Length of the file in bytes."""

    @property
    def max_concurrent_reads(self) -> int | None:
        """A bound on concurrent reads, in addition to the caller's; 1 means one by one."""

    async def read_into(self, start: int, *targets: memoryview) -> None:
        """Fill *targets*, writable bytes, one after the other with the file's bytes from *start* on.

        The range lies within the file.

        Repeats transient failures itself (E3).
        """

    async def aclose(self) -> None:
        """Close the file."""


class Store(Protocol):
    """A kind of storage, with one set of storage options."""

    @property
    def repeats_parts(self) -> bool:
        """Whether a failed part may be put again; otherwise the whole file is begun again (E3)."""

    async def begin(self, location: Location, nbytes: int) -> Upload:
        """Begin a file of *nbytes* bytes. Sweeps leftovers of dead processes, once per directory."""

    async def delete(self, location: Location) -> None:
        """Delete the file or directory tree at *location*, if there is one."""

    async def exists(self, location: Location) -> bool:
        """Return whether a file or directory is at *location*."""

    def list(self, location: Location, *, starting_with: str = "") -> AsyncGenerator[Sequence[Child], None]:
        """Yield what is right below the directory at *location*, by the page, in no order; nothing where none is.

        Args:
            location: of a directory, or of a whole bucket.
            starting_with: how the names that are wanted begin; ``""`` wants all of them.

        Raises:
            StoreError: it cannot be told; of a bucket that is not there, too.
        """

    async def source(self, location: Location) -> Source:
        """Open the file for reading. Raises FileNotFoundError if it does not exist."""

    async def aclose(self) -> None:
        """Free connections and other resources."""


def exists_already(stage: str, location: Location) -> StoreError:
    """Return the error for a save that would replace a file with ``overwrite=False``."""
    cause = FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
    advice = "overwrite=False: remove it first, or save to another name."
    return CheckpointExistsError.during(stage, location.url, cause, advice)


def markers_first(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return which of *names*, of files to be deleted, go first, and the others, in their order.

    A sharded checkpoint has ceased to be one before the first of its parts is gone (D5).
    """
    markers: list[str] = []
    others: list[str] = []
    for name in names:
        (markers if name.rpartition("/")[2] == MARKER else others).append(name)
    return markers, others
