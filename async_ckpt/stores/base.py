"""What a store is: the one protocol between the stream and wherever the bytes go.

Guarantees that every store gives:

* Nothing is visible under the final name before ``commit`` has begun, and afterwards the whole
  checkpoint is (D2). An earlier file of that name stays whole until then.
* ``commit`` returns only once the checkpoint would survive the loss of this process (D1).
* ``abort`` leaves neither file nor open upload behind. It may be called at any moment, more than
  once, and after a failed ``commit``.
* Parts may be put in any order and at the same time, as far as ``max_concurrent_parts`` allows.
* ``commit`` refuses a file of which not every byte was put.

What does not belong here: ordering, retries of whole saves, memory accounting, events.
"""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ParamSpec, Protocol, TypeVar

import anyio

from async_ckpt.errors import CheckpointExistsError, StoreError
from async_ckpt.stores.redaction import presentable, redacted_text
from async_ckpt.system.trust import Look

__all__ = [
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
]

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Location:
    """Where a checkpoint lives.

    Attributes:
        url: as the user wrote it, but with its passwords and signatures hidden: for messages, events and reports.
        path: what the store itself works with.
        key: equal for two locations if they name the same file; one in a directory begins with that one's, and a slash.
            For ordering (O1).
        group: names the file system; base CheckpointIOs run one at a time in a group.
        address: as the user wrote it; to connect with, never to be shown. ``url`` where none is given.
        foreign_link: a symlink on the way that another user has put where anybody may; nothing is written through it.
        links: on a local disk, the keys of the symlinks that the address leads through.
        follows: on a local disk, whether the last name of the address stands for what it leads to.
        secrets: what may not be shown of the address, and of the options that go with it.
        in_directory: on a local disk, whether the directory was there when it was named.
        look: on a local disk, at what was there when it was named; ``None`` where nobody has looked.
        seen_seconds: on a local disk, when its directory was seen to be there, as a save was asked for; monotonic time.
        options: what the file system is made with beside the storage options, where the location itself says it.
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "address", self.address or self.url)

    def below(self, name: str) -> Location:
        """Return the location of *name*, which may have slashes in it, in the directory at this one."""
        longer: dict[str, Any] = {
            each: f"{getattr(self, each).rstrip('/')}/{name}" for each in ("url", "path", "key", "address")
        }
        return replace(self, **longer, in_directory=False, look=None, seen_seconds=None)

    def redacted(self, text: str) -> str:
        """Return *text*, such as another library's, with the secrets in it hidden."""
        return redacted_text(text, self.secrets)

    def presentable(self, error: Exception) -> Exception:
        """Return *error*, another library's, or where it tells secrets, one just like it that does not."""
        shown = presentable(error, self.secrets)
        assert isinstance(shown, Exception)
        return shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Child:
    """What is right below a directory.

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
        """Length of the part in bytes."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What storage returned for one part; ``token`` is the store's own."""

    index: int
    token: str = ""


class Content(Protocol):
    """The bytes of a file, by reference."""

    @property
    def nbytes(self) -> int:
        """Length of the file in bytes."""

    def read(self, start: int, stop: int) -> Sequence[memoryview]:
        """Return the bytes *start* to *stop* as a scatter list. Blocks for checksums: call it in a worker."""

    def crc32(self, start: int, stop: int) -> int:
        """Return the CRC-32 of these bytes. Blocks: call it in a worker, and before ``read``, which it helps."""


class Workers(Protocol):
    """A bounded set of threads for what blocks."""

    async def run(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call *function* in a worker. Cancellation waits until the call has returned."""


class Upload(Protocol):
    """One file on its way."""

    @property
    def part_size(self) -> int | None:
        """Bytes a part should have here, the last one excepted; ``None`` leaves it to the options."""

    @property
    def max_concurrent_parts(self) -> int | None:
        """Parts that may be put at a time beside the options' bound; 1 means in the order of the file."""

    @property
    def is_paced(self) -> bool:
        """Whether ``put`` itself keeps to the store's bound on requests: then one more may be got ready meanwhile."""

    @property
    def swept(self) -> tuple[str, ...]:
        """Names of the leftovers of dead processes that ``begin`` removed; mostly empty."""

    async def put(self, part: Part, content: Content) -> Receipt:
        """Send one part. Where the store ``repeats_parts``, safe to call again for it after an error (E3)."""

    async def commit(self, receipts: Sequence[Receipt]) -> None:
        """Make the file visible under its final name, whole and durable. Call once, after every put."""

    async def abort(self) -> None:
        """Undo everything; errors of the cleaning itself are logged, not raised."""


@asynccontextmanager
async def aborted_on_error(upload: Upload) -> AsyncIterator[None]:
    """Abort *upload* if the body ends in any error, cancellation included (D2)."""
    try:
        yield
    except BaseException:
        with anyio.CancelScope(shield=True):
            await upload.abort()
        raise


class Copying(Upload, Protocol):
    """An upload to a store that can copy inside itself, which few can."""

    @property
    def least_part_bytes(self) -> int:
        """Bytes that every part but the last must have."""

    @property
    def max_parts(self) -> int:
        """How many parts there may be."""

    @property
    def stored(self) -> object | None:
        """By what another upload of the store knows the committed file; ``None`` where it cannot be copied from."""

    async def copy(self, part: Part, content: Content, stored: object, start: int) -> Receipt:
        """Like ``put``, with the bytes that the file *stored* has from *start* on; fails if that file has changed."""


class Continuing(Upload, Protocol):
    """An upload whose repeated ``put`` goes on where the one before broke off, however much is left to send."""

    def progress(self) -> int:
        """Return a number that changes when something has got on; then attempts and time count anew (E3)."""


class Source(Protocol):
    """One file as it was when it was opened; what replaces it later is not seen.

    Where storage cannot hold on to the old bytes, reading on after a replacement raises a ``StoreError``.
    """

    @property
    def nbytes(self) -> int:
        """Length of the file in bytes."""

    @property
    def max_concurrent_reads(self) -> int | None:
        """Reads that may be under way beside the caller's own bound; 1 means one by one."""

    async def read_into(self, start: int, *targets: memoryview) -> None:
        """Fill *targets*, writable bytes, one after the other with what the file holds from *start* on.

        All of it lies within the file.

        Repeats transient failures itself (E3).
        """

    async def aclose(self) -> None:
        """Let go of the file."""


class Store(Protocol):
    """One kind of storage with one set of storage options."""

    @property
    def repeats_parts(self) -> bool:
        """Whether a part that failed may be put again; else the whole file has to be begun again (E3)."""

    async def begin(self, location: Location, nbytes: int) -> Upload:
        """Start a file of *nbytes* bytes. Sweeps, once a place, what processes that have died left there."""

    async def delete(self, location: Location) -> None:
        """Delete the file, or the directory tree, at *location*; nothing there is not an error."""

    async def exists(self, location: Location) -> bool:
        """Return whether anything is at *location*."""

    def list(self, location: Location, *, starting_with: str = "") -> AsyncGenerator[Sequence[Child], None]:
        """Yield what is right below the directory at *location*, by the page, in no order; nothing where none is.

        Args:
            location: of a directory, or of a whole bucket.
            starting_with: how the names that are wanted begin; ``""`` wants all of them.

        Raises:
            StoreError: it cannot be told; of a bucket that is not there, too.
        """

    async def source(self, location: Location) -> Source:
        """Open the file for reading. Raises FileNotFoundError where there is none."""

    async def aclose(self) -> None:
        """Free connections and the like."""


def exists_already(stage: str, location: Location) -> StoreError:
    """Return the error of a save that would replace a file with ``overwrite=False``."""
    cause = FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
    advice = "overwrite=False: remove it first, or save to another name."
    return CheckpointExistsError.during(stage, location.url, cause, advice)
