"""The conformance suite finds what it is there to find: each planted bug fails a fact, and the sound store none."""

from __future__ import annotations

import sys
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from itertools import count
from typing import Any

import anyio.lowlevel
import pytest

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup

from async_ckpt.errors import CheckpointExistsError, StoreError
from async_ckpt.stores.base import Child, Content, Location, Part, Receipt, Workers
from async_ckpt.testing import StoreConformance

DEAD = "dead.tmp"


class Sound:
    """A store in two dictionaries, as somebody else might write it."""

    repeats_parts = True
    names = count()

    def __init__(
        self, files: dict[str, bytes], temporary: dict[str, bytearray], overwrite: bool = True
    ) -> None:
        self.files, self.temporary, self.overwrite = files, temporary, overwrite

    async def begin(self, location: Location, nbytes: int) -> Any:
        if any(path.startswith(f"{location.path}/") for path in self.files):
            raise StoreError("a directory")
        self.refuse(location.path)
        return Upload(self, location.path, nbytes, self.sweep())

    def refuse(self, path: str) -> None:
        if not self.overwrite and path in self.files:
            raise CheckpointExistsError("taken")

    def refuse_late(self, path: str) -> None:
        self.refuse(path)

    def sweep(self) -> tuple[str, ...]:
        return () if self.temporary.pop(DEAD, None) is None else (DEAD,)

    def name(self, path: str) -> str:
        return f"{path}.{next(self.names)}"

    async def replace(self, upload: Upload) -> None:
        self.files[upload.path] = bytes(self.temporary.pop(upload.name))

    async def discard(self, upload: Upload) -> None:
        self.temporary.pop(upload.name, None)

    async def delete(self, location: Location) -> None:
        for path in list(self.files):
            if f"{path}/".startswith(f"{location.path}/"):
                del self.files[path]

    async def exists(self, location: Location) -> bool:
        return any(f"{path}/".startswith(f"{location.path}/") for path in self.files)

    async def list(
        self, location: Location, *, starting_with: str = ""
    ) -> AsyncGenerator[Sequence[Child], None]:
        directory = f"{location.path}/"
        below = [path.removeprefix(directory) for path in self.files if path.startswith(directory)]
        for name, rest in self.of(below):
            if name.startswith(starting_with):
                yield [Child(name=name, is_directory=bool(rest), modified_seconds=time.time())]

    def of(self, below: Sequence[str]) -> Iterable[tuple[str, str]]:
        return {name: (name, rest) for name, _, rest in (path.partition("/") for path in below)}.values()

    async def source(self, location: Location) -> Any:
        if location.path not in self.files:
            raise FileNotFoundError(location.url)
        return Source(self, self.files[location.path])

    def read(self, data: bytes, start: int, target: memoryview) -> None:
        target[:] = data[start : start + target.nbytes]

    async def aclose(self) -> None:
        return


class Upload:
    """One file on its way."""

    part_size = 1 << 16
    max_concurrent_parts = None
    is_paced = False

    def __init__(self, store: Sound, path: str, nbytes: int, swept: tuple[str, ...]) -> None:
        self.path, self.swept, self.name = path, swept, store.name(path)
        self.store, self.missing, self.ended = store, nbytes, False
        self.put_parts: set[int] = set()
        store.temporary[self.name] = bytearray(nbytes)

    async def put(self, part: Part, content: Content) -> Receipt:
        await anyio.lowlevel.checkpoint()
        if self.ended:
            raise StoreError("ended")
        self.store.temporary[self.name][part.start : part.stop] = b"".join(
            content.read(part.start, part.stop)
        )
        self.missing -= 0 if part.index in self.put_parts else part.nbytes
        self.put_parts.add(part.index)
        return Receipt(index=part.index)

    async def commit(self, receipts: Sequence[Receipt]) -> None:
        if self.ended or self.missing:
            raise StoreError("not every byte was put")
        self.store.refuse_late(self.path)
        await self.store.replace(self)
        self.ended = True

    async def abort(self) -> None:
        if not self.ended:
            await self.store.discard(self)
        self.ended = True


class Source:
    """Bytes, open for reading."""

    max_concurrent_reads = None

    def __init__(self, store: Sound, data: bytes) -> None:
        self.nbytes, self._data, self._store = len(data), data, store

    async def read_into(self, start: int, *targets: memoryview) -> None:
        for target in targets:
            self._store.read(self._data, start, target)
            start += target.nbytes

    async def aclose(self) -> None:
        return


class VisibleEarly(Sound):
    """What is being written has its final name already."""

    async def begin(self, location: Location, nbytes: int) -> Any:
        upload = await super().begin(location, nbytes)
        self.files.setdefault(location.path, b"torn")
        return upload


class NotAtOnce(Sound):
    """A commit removes the earlier file first."""

    async def replace(self, upload: Upload) -> None:
        self.files.pop(upload.path, None)
        await anyio.lowlevel.checkpoint()
        await super().replace(upload)


class TornWhileCommitting(Sound):
    """A commit copies, which takes a while."""

    async def replace(self, upload: Upload) -> None:
        data = bytes(self.temporary.pop(upload.name))
        for stop in (len(data) // 2, len(data)):
            self.files[upload.path] = data[:stop]
            await anyio.lowlevel.checkpoint()


class Forgetful(Sound):
    """An abort removes nothing."""

    async def discard(self, upload: Upload) -> None:
        return


class Overzealous(Sound):
    """An abort removes the earlier file too."""

    async def discard(self, upload: Upload) -> None:
        await super().discard(upload)
        self.files.pop(upload.path, None)


class Misreading(Sound):
    """A range of some length begins one byte too early."""

    def read(self, data: bytes, start: int, target: memoryview) -> None:
        super().read(data, max(0, start - (target.nbytes > 1000)), target)


class Misplacing(Sound):
    """The first two parts change places."""

    async def replace(self, upload: Upload) -> None:
        data, size = self.temporary[upload.name], upload.part_size
        if len(data) >= 2 * size:
            data[: 2 * size] = data[size : 2 * size] + data[:size]
        await super().replace(upload)


class Silent(Sound):
    """What is swept is not told."""

    def sweep(self) -> tuple[str, ...]:
        super().sweep()
        return ()


class Untidy(Sound):
    """Nothing is swept."""

    def sweep(self) -> tuple[str, ...]:
        return ()


class Ruthless(Sound):
    """The living are swept."""

    def sweep(self) -> tuple[str, ...]:
        swept = tuple(self.temporary)
        self.temporary.clear()
        return swept


class Meeting(Sound):
    """Two uploads of one name have one temporary file."""

    def name(self, path: str) -> str:
        return path


class Careless(Sound):
    """``overwrite=False`` is looked at when a save begins, and not again."""

    def refuse_late(self, path: str) -> None:
        return


class ByPrefix(Sound):
    """A name is taken for there when a longer one is."""

    async def exists(self, location: Location) -> bool:
        return any(path.startswith(location.path) for path in self.files)


class Deep(Sound):
    """All that is below a directory is taken for its children."""

    def of(self, below: Sequence[str]) -> Iterable[tuple[str, str]]:
        return [(path, "") for path in below]


class Repeating(Sound):
    """A directory is named as often as there is something in it."""

    def of(self, below: Sequence[str]) -> Iterable[tuple[str, str]]:
        return [(name, rest) for name, _, rest in (path.partition("/") for path in below)]


class Unchoosing(Sound):
    """All children are named, whatever is asked for."""

    async def list(
        self, location: Location, *, starting_with: str = ""
    ) -> AsyncGenerator[Sequence[Child], None]:
        async for page in super().list(location):
            yield page


def suite(kind: Callable[..., Sound]) -> StoreConformance:
    """Return the suite for a kind of store, at an empty place."""

    class Suite(StoreConformance):
        def __init__(self) -> None:
            self.files: dict[str, bytes] = {}
            self.temporary: dict[str, bytearray] = {}

        def make_store(self, workers: Workers) -> Any:
            return kind(self.files, self.temporary)

        def make_careful_store(self, workers: Workers) -> Any:
            return kind(self.files, self.temporary, overwrite=False)

        def locate(self, name: str) -> Location:
            return Location(url=name, path=name, key=name, group="double")

        def leftovers(self) -> Sequence[str]:
            return list(self.temporary)

        def strand(self) -> str:
            self.temporary[DEAD] = bytearray(b"partial")
            return DEAD

    return Suite()


FACTS = [name for name in dir(StoreConformance) if name.startswith("test_")]


@pytest.mark.parametrize("fact", FACTS)
def test_a_sound_store_passes(fact: str) -> None:
    """A store that does what it should passes every fact."""
    getattr(suite(Sound), fact)()


@pytest.mark.parametrize(
    ("kind", "fact"),
    [
        (VisibleEarly, "test_invisible_before_commit"),
        (NotAtOnce, "test_a_reader_during_commit"),
        (NotAtOnce, "test_cancelled_commit"),
        (TornWhileCommitting, "test_a_reader_during_commit"),
        (Forgetful, "test_abort_at_each_moment"),
        (Overzealous, "test_abort_at_each_moment"),
        (Misreading, "test_reading"),
        (Misplacing, "test_parts_in_any_order_and_at_once"),
        (Silent, "test_sweeping"),
        (Untidy, "test_sweeping"),
        (Ruthless, "test_the_living_are_not_swept"),
        (Meeting, "test_two_uploads_of_one_name"),
        (Careless, "test_overwrite_is_refused_where_it_is_not_wanted"),
        (ByPrefix, "test_delete"),
        (Deep, "test_listing"),
        (Repeating, "test_listing"),
        (Unchoosing, "test_listing_what_begins_so"),
    ],
)
def test_a_planted_bug_is_found(kind: type[Sound], fact: str) -> None:
    """The fact that is about it fails."""
    with pytest.raises((AssertionError, StoreError, ExceptionGroup)):
        getattr(suite(kind), fact)()
