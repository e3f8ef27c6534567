"""The local store: writing past the page cache, and where that is not possible."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_ckpt.errors import StoreError
from async_ckpt.stores import locate
from async_ckpt.stores.base import Part
from async_ckpt.stores.disk import Disk
from async_ckpt.stores.local.capabilities import Capabilities
from async_ckpt.stores.local.direct import BUFFER_BYTES, GRAIN_BYTES, LEAST_BYTES, Refusals, cut_at_grains
from async_ckpt.stores.local.store import LocalStore
from async_ckpt.testing import BytesContent, FaultyDisk, ThreadWorkers
from tests.direct_disk import DirectDisk, cached_bytes
from tests.local_saves import KNOWN, OLD, Known

GRAIN = GRAIN_BYTES
#: Neither its length nor that of its parts is a multiple of anything.
LONG = random.Random(0).randbytes(3 * BUFFER_BYTES + 12_345)
CUTS = (0, 1_000_003, 2_000_003, 2_000_010, 5_000_000, len(LONG))


def store(workers: ThreadWorkers, disk: Disk | None = None, **options: Any) -> LocalStore:
    """Return a store that drops what it writes, and has nothing to remember from other tests."""
    options = {"page_cache": "drop", "capability_cache": KNOWN, "refusals": Refusals(), **options}
    return LocalStore(workers=workers, disk=disk, **options)


async def save(
    into: LocalStore, path: Path, data: bytes = LONG, cuts: Sequence[int] = CUTS, *, seed: int = 0
) -> int | None:
    """Save in parts that are cut at *cuts*, in any order, all at once; return how many might be."""
    upload = await into.begin(locate(path), len(data))
    parts = [Part(index=index, start=cuts[index], stop=cuts[index + 1]) for index in range(len(cuts) - 1)]
    random.Random(seed).shuffle(parts)
    errors: list[Exception] = []

    async def put(part: Part) -> None:
        try:
            await upload.put(part, BytesContent(data, piece_bytes=300_007))
        except StoreError as error:
            errors.append(error)

    try:
        async with anyio.create_task_group() as together:
            for part in parts:
                together.start_soon(put, part)
        if errors:
            raise errors[0]
        await upload.commit([])
    except BaseException:
        await upload.abort()
        raise
    return upload.max_concurrent_parts


# -- what is written how


@given(st.integers(0, 5 * GRAIN), st.integers(0, 3 * BUFFER_BYTES))
def test_ranges(start: int, nbytes: int) -> None:
    """A part is cut into ranges that fit a buffer; what is no whole grain is at its ends, and within one grain."""
    ranges = list(cut_at_grains(start, start + nbytes))
    assert [at for at, _ in ranges] == [start, *(stop for _, stop in ranges[:-1])][: len(ranges)]
    assert (ranges[-1][1] if ranges else start) == start + nbytes
    for at, stop in ranges:
        assert 0 <= stop - at <= BUFFER_BYTES
        is_whole = at % GRAIN == stop % GRAIN == 0
        assert is_whole or (
            (at, stop) in (ranges[0], ranges[-1]) and at // GRAIN == max(at, stop - 1) // GRAIN
        )


@pytest.mark.parametrize("seed", range(5))
def test_the_bytes(tmp_path: Path, workers: ThreadWorkers, seed: int) -> None:
    """However the file is cut, and in whatever order and threads its parts come, the bytes are the same."""
    chance = random.Random(seed)
    cuts = sorted({0, len(LONG), *(chance.randrange(len(LONG)) for _ in range(chance.randrange(12)))})
    disk = DirectDisk()
    anyio.run(lambda: save(store(workers, disk), tmp_path / "x", cuts=cuts, seed=seed))
    assert (tmp_path / "x").read_bytes() == LONG
    assert sum(stop - start for start, stop in disk.direct) >= len(LONG) - 2 * GRAIN * (len(cuts) - 1)


def test_whole_grains_are_direct(tmp_path: Path, workers: ThreadWorkers) -> None:
    """Of a file in parts of whole grains, only the end goes through the page cache."""
    disk = DirectDisk()
    anyio.run(lambda: save(store(workers, disk), tmp_path / "x", cuts=(0, BUFFER_BYTES, len(LONG))))
    assert [start for start, _ in sorted(disk.direct)] == list(range(0, len(LONG) - GRAIN, BUFFER_BYTES))
    assert disk.cached == [(3 * BUFFER_BYTES, len(LONG))]


def test_no_page_is_written_both_ways(tmp_path: Path, workers: ThreadWorkers) -> None:
    """No page of the cache holds anything of what is written directly, so neither can undo the other."""
    disk = DirectDisk()
    anyio.run(lambda: save(store(workers, disk), tmp_path / "x"))
    grains = [
        {grain for start, stop in ranges for grain in range(start // GRAIN, -(-stop // GRAIN))}
        for ranges in (disk.direct, disk.cached)
    ]
    assert grains[0]
    assert grains[1]
    assert not grains[0] & grains[1]


def test_synced_before_it_gets_its_name(tmp_path: Path, workers: ThreadWorkers) -> None:
    """What went past the page cache is synced all the same: a disk has a cache of its own (D1)."""
    disk = DirectDisk()
    anyio.run(lambda: save(store(workers, disk), tmp_path / "x"))
    assert disk.calls[-3:] == ["fsync", "drop", "replace"]
    assert disk.calls.count("fsync") == 1


def test_one_part_is_filled_while_another_is_written(tmp_path: Path, workers: ThreadWorkers) -> None:
    """Several parts at a time are asked for, as what waits for the disk takes no CPU; but no more than eight."""
    most = anyio.run(lambda: save(store(workers, DirectDisk()), tmp_path / "x"))
    assert most is not None
    assert 2 <= most <= 8


def test_two_writes_at_once(tmp_path: Path, workers: ThreadWorkers) -> None:
    """A part does not wait until another one has been written."""
    both = threading.Barrier(2, timeout=30)

    class Meeting(DirectDisk):
        def write(self, fd: int, pieces: Sequence[memoryview], offset: int) -> int:
            if offset in (0, 2 * BUFFER_BYTES):
                both.wait()
            return super().write(fd, pieces, offset)

    anyio.run(lambda: save(store(workers, Meeting()), tmp_path / "x", cuts=(0, 2 * BUFFER_BYTES, len(LONG))))
    assert (tmp_path / "x").read_bytes() == LONG


# -- where it is used


def is_direct(
    path: Path, workers: ThreadWorkers, disk: DirectDisk, nbytes: int = LEAST_BYTES, **options: Any
) -> bool:
    """Save; return whether anything went past the page cache."""
    data = (LONG * (nbytes // len(LONG) + 1))[:nbytes]
    anyio.run(lambda: save(store(workers, disk, **options), path, data, (0, nbytes // 2, nbytes)))
    assert path.read_bytes() == data
    return bool(disk.direct)


@pytest.mark.parametrize(
    ("options", "nbytes", "is_used"),
    [
        ({"page_cache": "auto"}, LEAST_BYTES, True),
        ({"page_cache": "auto"}, LEAST_BYTES - 1, False),
        ({"page_cache": "auto", "durability": "process"}, LEAST_BYTES, False),
        ({"page_cache": "keep"}, LEAST_BYTES, False),
        ({"page_cache": "drop"}, 3 * GRAIN, True),
        ({"page_cache": "drop", "durability": "process"}, 3 * GRAIN, True),
        ({"page_cache": "drop"}, GRAIN - 1, False),
        ({"page_cache": "drop", "capability_cache": Known(Capabilities(offset=errno.EINVAL))}, None, False),
    ],
)
def test_when(
    tmp_path: Path, workers: ThreadWorkers, options: dict[str, Any], nbytes: int | None, is_used: bool
) -> None:
    """By itself for large files that are synced; otherwise as asked for; never where bytes are to come in order."""
    if nbytes is None:

        async def in_order() -> None:
            upload = await store(workers, disk, **options).begin(locate(tmp_path / "x"), len(LONG))
            await upload.put(Part(index=0, start=0, stop=len(LONG)), BytesContent(LONG))
            await upload.commit([])

        disk = DirectDisk()
        anyio.run(in_order)
        assert not disk.opened
        return
    assert is_direct(tmp_path / "x", workers, DirectDisk(), nbytes, **options) is is_used


@pytest.mark.parametrize("page_cache", ["auto", "drop"])
@pytest.mark.parametrize(
    "disk",
    [{"memory": 0, "offset": 0}, {"offset": 2 * GRAIN}, {"offset": 3000}, {"memory": 1 << 20}],
    ids=["none", "too long", "odd", "unusual memory"],
)
def test_a_file_without_direct_io(
    tmp_path: Path, workers: ThreadWorkers, disk: dict[str, Any], page_cache: str
) -> None:
    """Where the system says that there is none, or needs what nobody has, it is not tried."""
    strange = DirectDisk(**disk)
    assert not is_direct(tmp_path / "x", workers, strange, page_cache=page_cache)
    assert not strange.opened


def test_where_nothing_is_told(tmp_path: Path, workers: ThreadWorkers) -> None:
    """Where the system does not tell, it is tried only if it is asked for."""
    untold: dict[str, Any] = {"told": False, "memory": 512, "offset": 512}
    assert not is_direct(tmp_path / "x", workers, DirectDisk(**untold), page_cache="auto")
    assert is_direct(tmp_path / "x", workers, DirectDisk(**untold), page_cache="drop")


# -- where it is refused


@pytest.mark.parametrize("refusal", [errno.EINVAL, errno.EOPNOTSUPP])
@pytest.mark.parametrize(
    "disk", [{"opens": 0}, {"refuses": 1}, {"refuses": 3}], ids=["open", "first", "later"]
)
def test_a_refusal_is_remembered(
    tmp_path: Path, workers: ThreadWorkers, disk: dict[str, Any], refusal: int
) -> None:
    """A file system that refuses, even in the midst of a file, gets the rest as any other, and is not asked again."""
    refusing = DirectDisk(**({"opens": refusal} if "opens" in disk else {**disk, "error": refusal}))
    refusals, cuts = Refusals(), (0, len(LONG))
    for name in ("x", "y"):
        saving = store(workers, refusing, refusals=refusals)
        anyio.run(lambda: save(saving, tmp_path / name, cuts=cuts))  # noqa: B023 - it has run before the next one
        assert (tmp_path / name).read_bytes() == LONG
    assert refusing.opened == 1
    assert refusing.asked == disk.get("refuses", 0)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOENT, errno.EACCES])
def test_what_does_not_open_today(tmp_path: Path, workers: ThreadWorkers, number: int) -> None:
    """Where another reason keeps the file from being opened a second time, the next save tries again."""
    busy, refusals = DirectDisk(opens=number), Refusals()
    for name in ("x", "y"):
        anyio.run(lambda: save(store(workers, busy, refusals=refusals), tmp_path / name))  # noqa: B023
        assert (tmp_path / name).read_bytes() == LONG
    assert busy.opened == 2


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_write_that_fails(tmp_path: Path, workers: ThreadWorkers, number: int) -> None:
    """No room, or a broken disk, is no refusal: the save fails, the earlier file is whole, nothing is left (D2)."""
    target = tmp_path / "x"
    target.write_bytes(OLD)
    disk = DirectDisk(refuses=2, error=number)
    with pytest.raises(StoreError) as caught:
        anyio.run(lambda: save(store(workers, disk), target, cuts=(0, len(LONG))))
    assert (caught.value.errno, caught.value.stage) == (number, "write")
    assert target.read_bytes() == OLD
    assert os.listdir(tmp_path) == ["x"]


def test_another_file_under_the_name(tmp_path: Path, workers: ThreadWorkers) -> None:
    """What is opened a second time is the file itself, or it is not written to."""
    other = tmp_path / "other"
    other.write_bytes(OLD)

    class Swapped(DirectDisk):
        def open_direct(self, path: str) -> int:
            return super().open_direct(str(other))

    disk = Swapped()
    anyio.run(lambda: save(store(workers, disk), tmp_path / "x"))
    assert (disk.opened, disk.direct) == (1, [])
    assert ((tmp_path / "x").read_bytes(), other.read_bytes()) == (LONG, OLD)


@pytest.mark.parametrize(
    "call", ["alignment", "open_direct", "duplicate", "write", "fsync", "drop_cache", "close"]
)
def test_a_call_that_fails(tmp_path: Path, workers: ThreadWorkers, call: str) -> None:
    """Whichever call fails, no descriptor is left open, and the file is whole under its name or not there."""
    disk = FaultyDisk({call: (1, errno.EIO)}, after=call == "close")
    try:
        anyio.run(lambda: save(store(workers, disk), tmp_path / "x"))
    except StoreError:
        assert os.listdir(tmp_path) == []
    else:
        assert os.listdir(tmp_path) == ["x"]
        assert (tmp_path / "x").read_bytes() == LONG
    assert disk.open_descriptors == 0


# -- for real


@pytest.fixture
def real(tmp_path: Path) -> Iterator[Path]:
    """A directory on a file system with direct I/O."""
    (tmp_path / "probe").write_bytes(b"")
    about = Disk().alignment(str(tmp_path / "probe"))
    (tmp_path / "probe").unlink()
    if about is None or not about.memory:
        pytest.skip("no direct I/O in the directory for tests")
    return tmp_path


@pytest.mark.parametrize("page_cache", ["auto", "drop"])
def test_past_the_page_cache(real: Path, workers: ThreadWorkers, page_cache: str) -> None:
    """Nothing of the file but its end is in the page cache afterwards; with "drop", not even that."""
    data = LONG * (LEAST_BYTES // len(LONG) + 1)
    anyio.run(lambda: save(store(workers, page_cache=page_cache), real / "x", data, (0, len(data))))
    assert cached_bytes(real / "x") <= (GRAIN if page_cache == "auto" else 0)
    assert (real / "x").read_bytes() == data


def test_through_the_page_cache(real: Path, workers: ThreadWorkers) -> None:
    """With "keep", all of it is there."""
    anyio.run(lambda: save(store(workers, page_cache="keep"), real / "x"))
    assert cached_bytes(real / "x") >= len(LONG)


def test_dropped_though_it_was_refused(real: Path, workers: ThreadWorkers) -> None:
    """With "drop", what had to go through the page cache is taken out of it."""
    anyio.run(lambda: save(store(workers, DirectDisk(opens=errno.EINVAL)), real / "x"))
    assert cached_bytes(real / "x") == 0
