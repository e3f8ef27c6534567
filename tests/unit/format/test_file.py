"""The file that torch reads, over sources that answer late, out of order, wrongly, or not at all."""

from __future__ import annotations

import io
import os
import random
import signal
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import IO, Any, cast

import anyio
import anyio.lowlevel
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from async_ckpt.engine import runtime as runtimes
from async_ckpt.engine.runtime import Runtime
from async_ckpt.errors import CorruptCheckpointError, ServiceClosedError, StoreError
from async_ckpt.format.reading.file import CheckpointFile
from async_ckpt.format.reading.readahead import ReadAhead
from async_ckpt.stores.base import Source
from async_ckpt.testing import Gate
from tests.archives import edited, written
from tests.support import PATIENCE_SECONDS

CHUNK_BYTES = 4096
MIDDLE = 200_000
NOISE = random.Random(1).randbytes(600_000)


class Holder:
    """Keeps the runtime alive."""

    def drain_at_exit(self) -> bool:
        return True


@pytest.fixture(scope="module")
def loop() -> Iterator[Runtime]:
    """The loop thread."""
    user = runtimes.RuntimeUser(Holder())
    runtime = runtimes.acquire(user)
    yield runtime
    runtimes.release(runtime, user)


class Bytes:
    """A source that answers in an order of its own.

    Attributes:
        reads: what was asked for, in order.
        most: reads that were under way at a time.
        closed: how often it was closed.
        gate: holds every read of the middle of the file, which no window reaches.
    """

    def __init__(
        self,
        data: bytes,
        *,
        seed: int | None = None,
        most: int | None = None,
        failing: Callable[[int], Exception | None] = lambda _: None,
    ) -> None:
        self.nbytes = len(data)
        self.max_concurrent_reads = most
        self.reads: list[tuple[int, int]] = []
        self.most = self.under_way = self.closed = 0
        self._data = data
        self._random = random.Random(seed)
        self._shuffles = seed is not None
        self._failing = failing
        self.gate: Gate | None = None

    async def open(self) -> Source:
        return self

    async def read_into(self, start: int, *targets: memoryview) -> None:
        stop = start + sum(target.nbytes for target in targets)
        assert start < stop <= self.nbytes
        self.reads.append((start, stop))
        number = len(self.reads)
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            if self.gate is not None and MIDDLE <= start < self.nbytes - MIDDLE:
                await self.gate.passage()
            for _ in range(self._random.randrange(1, 12) if self._shuffles else 1):
                await anyio.lowlevel.checkpoint()
            if (error := self._failing(number)) is not None:
                raise error
            for target in targets:
                target[:] = self._data[start : start + target.nbytes]
                start += target.nbytes
        finally:
            self.under_way -= 1

    async def aclose(self) -> None:
        assert not self.under_way
        self.closed += 1

    @property
    def moved(self) -> int:
        """Bytes that were read."""
        return sum(stop - start for start, stop in self.reads)


def opened(source: Bytes, loop: Runtime, *, readers: int = 3, **options: Any) -> CheckpointFile:
    """Return a file over *source*, with small chunks, started."""
    ahead = ReadAhead(
        source.open, max_concurrent_reads=readers, chunk_bytes=CHUNK_BYTES, longest_read_bytes=4 * CHUNK_BYTES
    )
    file = CheckpointFile(ahead, loop=loop, url="memory://x.ckpt", **options)
    try:
        file.start()
        file.fetch_all_but()
    except BaseException:
        file.close()
        raise
    return file


def torch_load(file: CheckpointFile) -> Any:
    """Call torch.load, which says that it wants more than it needs."""
    return torch.load(cast(IO[bytes], file), weights_only=True)


def archive(state: dict[str, Any], *, names: list[str] | None = None) -> bytes:
    """Return what torch.save writes; with *names*, its records in that order and nothing else."""
    file = io.BytesIO()
    torch.save(state, file)
    if names is None:
        return file.getvalue()
    made = io.BytesIO()
    with zipfile.ZipFile(file) as before, zipfile.ZipFile(made, "w") as after:
        for name in names:
            after.writestr(f"archive/{name}", before.read(f"archive/{name}"))
    return made.getvalue()


STATE = {"large": torch.arange(40_000), "more": torch.arange(30_000.0), "few": torch.ones(3)}
STATE |= {f"small{number}": torch.full((100 + number,), number) for number in range(60)}
ARCHIVE = archive(STATE)

OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("seek"), st.integers(0, 600_100), st.just(os.SEEK_SET)),
        st.tuples(st.just("seek"), st.integers(-9000, 9000), st.just(os.SEEK_CUR)),
        st.tuples(st.just("seek"), st.integers(-700_000, 10), st.just(os.SEEK_END)),
        st.tuples(st.just("read"), st.sampled_from([0, 1, 30, 100, 4096, 20_000, 300_000])),
        st.tuples(st.just("readinto"), st.sampled_from([0, 1, 30, 100, 1024, 4096, 5000, 70_000])),
    ),
    max_size=25,
)


@given(
    st.sampled_from([NOISE, ARCHIVE, NOISE[:5000], b""]), OPERATIONS, st.integers(1, 6), st.integers(0, 99)
)
def test_any_use_reads_the_bytes_of_the_file(
    loop: Runtime, data: bytes, operations: list[Any], readers: int, seed: int
) -> None:
    """Whatever is sought and read in whatever order, however late what arrives, it is what the file holds."""
    source = Bytes(data, seed=seed)
    expected = io.BytesIO(data)
    with opened(source, loop, readers=readers) as file:
        for name, *arguments in operations:
            if name == "readinto":
                ours, theirs = bytearray(arguments[0]), bytearray(arguments[0])
                assert file.readinto(ours) == expected.readinto(theirs)
                assert ours == theirs
            elif name == "seek":
                offset, whence = arguments
                base = {os.SEEK_SET: 0, os.SEEK_CUR: expected.tell(), os.SEEK_END: len(data)}[whence]
                assert file.seek(*arguments) == expected.seek(max(0, base + offset))
            else:
                assert file.read(*arguments) == expected.read(*arguments)
            assert file.tell() == expected.tell()
        assert file.read() == expected.read()
    assert source.closed == 1
    assert source.most <= readers


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("readers", [1, 2, 8])
def test_torch_loads_over_it(loop: Runtime, seed: int, readers: int) -> None:
    """torch.load returns the state whatever order the bytes come in, and most bytes move once."""
    source = Bytes(ARCHIVE, seed=seed)
    with opened(source, loop, readers=readers) as file:
        torch.testing.assert_close(torch_load(file), STATE)
    assert source.moved <= len(ARCHIVE) * 1.2  # the pickle is longer than a chunk here
    assert source.most == readers


def test_a_source_has_a_bound_of_its_own(loop: Runtime) -> None:
    """No more reads are under way than the source allows."""
    source = Bytes(NOISE, seed=1, most=2)
    with opened(source, loop, readers=8) as file:
        assert file.read() == NOISE
    assert source.most == 2


def test_records_in_any_order(loop: Runtime) -> None:
    """Storages that are written in the order of their numbers as text, as torch once did, are each fetched once."""
    numbers = sorted(map(str, range(len(STATE))))
    data = archive(
        STATE, names=["data.pkl", "byteorder", *(f"data/{number}" for number in numbers), "version"]
    )
    source = Bytes(data, seed=3)
    with opened(source, loop) as file:
        torch.testing.assert_close(torch_load(file), STATE)
    assert source.moved <= len(data) * 1.2


def test_archives_of_other_kinds(loop: Runtime) -> None:
    """An archive with a comment, a compressed one and one with a long directory load as well."""
    with_comment = bytearray(ARCHIVE[:-2]) + (9).to_bytes(2, "little") + b"a comment"
    packed = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(ARCHIVE)) as before,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as after,
    ):
        for name in before.namelist():
            after.writestr(name, before.read(name))
    many = {str(number): torch.full((3,), number) for number in range(2000)}
    for data, state in ((bytes(with_comment), STATE), (packed.getvalue(), STATE), (archive(many), many)):
        with opened(Bytes(data, seed=1), loop) as file:
            torch.testing.assert_close(torch_load(file), state)


def test_a_wrong_byte_is_found(loop: Runtime) -> None:
    """A byte that changed in any record is found, and the error names the record and the place."""
    with zipfile.ZipFile(io.BytesIO(ARCHIVE)) as opened_archive:
        names = [
            info.filename for info in opened_archive.infolist() if "serialization_id" not in info.filename
        ]
        contents = [opened_archive.read(name) for name in names]
    assert len(names) > 60
    for name, content in random.Random(1).sample(list(zip(names, contents, strict=True)), 10):
        if len(content) < 100:
            continue
        at = ARCHIVE.index(content) + len(content) // 2
        data = ARCHIVE[:at] + bytes([ARCHIVE[at] ^ 1]) + ARCHIVE[at + 1 :]
        with opened(Bytes(data), loop) as file:
            with pytest.raises(CorruptCheckpointError, match=rf"memory://x.ckpt.*'{name}'"):
                torch_load(file)


def test_every_failing_read_is_raised(loop: Runtime) -> None:
    """Whichever read fails, that error is raised, unless nobody wanted what was read ahead; the source is closed."""
    calm = Bytes(ARCHIVE)
    with opened(calm, loop) as file:
        torch_load(file)
    raised = 0
    for number in range(1, len(calm.reads) + 1):
        source = Bytes(ARCHIVE, seed=number, failing=_fails_at(number))
        errors: list[str] = []
        try:
            with opened(source, loop) as file:
                torch.testing.assert_close(torch_load(file), STATE)
        except StoreError as error:
            errors.append(str(error))
            raised += 1
        assert set(errors) <= {f"read {number}"}
        assert (source.under_way, source.closed) == (0, 1)
    assert raised >= len(calm.reads) - 5


def _fails_at(number: int) -> Callable[[int], Exception | None]:
    return lambda call: StoreError(f"read {number}") if call == number else None


def test_a_file_that_cannot_be_opened(loop: Runtime) -> None:
    """What opening raises is raised."""

    async def fail() -> Source:
        raise FileNotFoundError("no such thing")

    with pytest.raises(FileNotFoundError, match="no such thing"):
        with CheckpointFile(ReadAhead(fail, max_concurrent_reads=2), loop=loop, url="x") as file:
            file.start()


def test_a_file_that_is_ended_before_it_is_opened(loop: Runtime) -> None:
    """Who closes the service just before a load opens its file ends that load, too: nothing is opened or waited for."""
    source = Bytes(NOISE)
    ahead = ReadAhead(source.open, max_concurrent_reads=2)
    with CheckpointFile(ahead, loop=loop, url="x") as file:
        assert file.end(ServiceClosedError("closed meanwhile"))
        with pytest.raises(ServiceClosedError, match="closed meanwhile"):
            file.start()
    assert source.reads == []


def test_an_interruption_leaves_nothing_under_way(loop: Runtime) -> None:
    """Ctrl-C in the middle of a read is raised once nothing writes to the memory that was to be filled."""
    source = Bytes(NOISE)
    gate = source.gate = Gate()

    def interrupt() -> None:
        if gate.reached.wait(PATIENCE_SECONDS):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    with opened(source, loop) as file:
        interrupting = threading.Thread(target=interrupt)
        interrupting.start()
        file.seek(MIDDLE)
        assert file.readinto(bytearray(100_000)) == 0
        interrupting.join()
        assert isinstance(file.error, KeyboardInterrupt)
        assert (source.under_way, source.closed) == (0, 1)
        with pytest.raises(KeyboardInterrupt):
            file.read(1)


def test_ended_from_another_thread(loop: Runtime) -> None:
    """Who ends a file from another thread has it closed when that returns; its reader gets the reason."""
    source = Bytes(NOISE)
    gate = source.gate = Gate()
    seen: list[BaseException | None] = []

    def read() -> None:
        file.seek(MIDDLE)
        with suppress(ServiceClosedError):
            file.read(100_000)
        seen.append(file.error)

    with opened(source, loop) as file:
        reading = threading.Thread(target=read)
        reading.start()
        assert gate.reached.wait(PATIENCE_SECONDS)
        file.end(ServiceClosedError("enough"))
        assert (source.under_way, source.closed) == (0, 1)
        reading.join()
    assert [str(error) for error in seen] == ["enough"]


def test_a_closed_file_reads_nothing(loop: Runtime) -> None:
    """A file can be closed twice, and then reads no more."""
    file = opened(Bytes(NOISE), loop)
    file.close()
    file.close()
    with pytest.raises(ServiceClosedError):
        file.read(1)


def test_skipped_storages_are_not_fetched(loop: Runtime) -> None:
    """What is skipped is neither fetched nor touched; the rest is right."""
    source = Bytes(ARCHIVE)
    with opened(source, loop) as file:
        assert file.storages is not None
        small = {name for name, place in file.storages.items() if place.stop - place.start < 10_000}
        file.fetch_all_but(file.storages.keys() - small)
        before = source.moved
        loaded = torch_load(file)
        assert source.moved - before < 120_000
    torch.testing.assert_close(
        {name: loaded[name] for name in STATE if "small" in name},
        {name: STATE[name] for name in STATE if "small" in name},
    )


@pytest.mark.parametrize("more", [-1, 1, 1 << 20])
def test_memory_of_another_length_is_not_filled(loop: Runtime, more: int) -> None:
    """More or less memory than a record has bytes, as a wrong pickle asks for, is not written to."""
    with opened(Bytes(ARCHIVE), loop) as file:
        assert file.storages is not None
        file.keep_beginning()
        name = next(iter(file.storages))
        right = STATE["large"].nbytes
        memory = bytearray(right + more)
        assert not file.read_storages({name: memoryview(memory)})
        assert not any(memory)
        assert file.read_storages({name: memoryview(memory := bytearray(right))})
        assert memory == STATE["large"].numpy().tobytes()


@pytest.mark.parametrize("alignment", [64, 4096])
def test_the_alignment_is_told(loop: Runtime, alignment: int) -> None:
    """How records are aligned is learned from a file that torch laid out, and not of one that something else did."""
    data = written(STATE, alignment=alignment)
    for each, expected in ((data, alignment), (edited(data, lambda _, content: content), None)):
        with opened(Bytes(each), loop) as file:
            file.keep_beginning()
            assert file.alignment == expected
