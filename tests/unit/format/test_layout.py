"""The laid-out file as a zip archive, and how it is read."""

from __future__ import annotations

import io
import mmap
import os
import resource
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from async_ckpt.errors import AsyncCheckpointError
from async_ckpt.format import Layout, lay_out
from async_ckpt.format.writing.archive import find_records
from async_ckpt.snapshot import HostBuffer, Snapshot, Storages, capture
from async_ckpt.snapshot.columns import Entries
from async_ckpt.snapshot.contents import Unfilled

Take = Callable[[Any], Snapshot]
Saved = Callable[[Any], bytes]
Whole = Callable[[Layout], bytes]


def _state() -> dict[str, torch.Tensor]:
    return {"a": torch.randn(50, 60), "b": torch.arange(7), "empty": torch.empty(0), "c": torch.randn(9000)}


def test_every_checksum_is_right(take: Take, whole: Whole, tmp_path: Path) -> None:
    """``python -m zipfile -t`` finds nothing wrong with the file."""
    path = tmp_path / "file.ckpt"
    path.write_bytes(whole(lay_out(take(_state()))))
    done = subprocess.run(
        [sys.executable, "-m", "zipfile", "-t", str(path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[0] == "Done testing"
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


def test_torch_loads_the_file_in_all_its_ways(take: Take, whole: Whole, tmp_path: Path) -> None:
    """The file loads by path, mapped, from a stream, to another device, with and without weights_only."""
    state = _state()
    path = tmp_path / "file.ckpt"
    path.write_bytes(whole(lay_out(take(state))))
    torch.testing.assert_close(torch.load(path, weights_only=True), state)
    torch.testing.assert_close(torch.load(path, mmap=True), state)
    with path.open("rb") as file:
        torch.testing.assert_close(torch.load(file, weights_only=False), state)
    moved = torch.load(str(path), map_location="meta")
    assert {tensor.device.type for tensor in moved.values()} == {"meta"}


def test_parts_read_at_once_are_right(take: Take, saved: Saved) -> None:
    """Parts that several threads read at the same time, over and over, make up the right file each time."""
    state = {str(index): torch.randn(700 + index) for index in range(60)}
    expected = saved(state)
    snapshot = take(state)
    with ThreadPoolExecutor(8) as threads:
        for size in (1, 37, 4096) * 3:
            layout = lay_out(snapshot)
            step = max(size, layout.nbytes // 400)
            starts = range(0, layout.nbytes, step)
            parts = threads.map(
                lambda start, layout=layout, step=step: b"".join(
                    layout.read(start, min(start + step, layout.nbytes))
                ),
                starts,
            )
            assert b"".join(parts) == expected


def test_checksums_of_parts_are_those_of_their_bytes(take: Take, saved: Saved) -> None:
    """However the file is cut, and by however many threads, each part has the CRC-32 of its bytes (E3)."""
    state = {str(index): torch.randn(7 + 100 * index) for index in range(60)}
    expected = saved(state)
    snapshot = take(state)
    with ThreadPoolExecutor(8) as threads:
        for step in (2999, 10_000, 1 << 20):
            layout = lay_out(snapshot)
            parts = [(at, min(at + step, layout.nbytes)) for at in range(0, layout.nbytes, step)]
            sums = threads.map(lambda part, layout=layout: layout.crc32(*part), parts)
            assert list(sums) == [zlib.crc32(expected[start:stop]) for start, stop in parts]
            assert b"".join(layout.read(0, layout.nbytes)) == expected


class _Watched:
    """A snapshot that counts how often a storage is read."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.reads = 0
        self._snapshot = snapshot

    def view(self, storage: int) -> memoryview:
        self.reads += 1
        return self._snapshot.view(storage)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._snapshot, name)


def test_bytes_are_summed_up_once(take: Take) -> None:
    """The checksum of a part and that of its records are one pass over the bytes."""
    snapshot = _Watched(take({"a": torch.randn(30_000), "b": torch.randn(30_000)}))
    layout = lay_out(snapshot)  # type: ignore[arg-type]
    half = layout.nbytes // 2 // 4096 * 4096
    snapshot.reads = 0
    layout.crc32(0, half)
    layout.crc32(half, layout.nbytes)
    assert snapshot.reads == 3  # one of the two storages lies on both sides of the cut
    layout.read(0, layout.nbytes)
    assert snapshot.reads == 5


def test_steps_are_the_bytes(take: Take, saved: Saved) -> None:
    """In steps of any length, of parts in any order and by several threads at once, the file is the same."""
    state = {str(index): torch.randn(7 + 100 * index) for index in range(60)}
    expected = saved(state)
    snapshot = take(state)
    for step in (100, 2999, 10_000, 1 << 20):
        layout = lay_out(snapshot)
        cuts = sorted({0, layout.nbytes, *range(5_000, layout.nbytes, 70_001)})
        parts = list(pairwise(cuts))

        def read(part: tuple[int, int], layout: Layout = layout, step: int = step) -> bytes:
            return b"".join(piece for pieces in layout.steps(*part, step) for piece in pieces)

        with ThreadPoolExecutor(4) as threads:
            found = dict(zip(reversed(parts), threads.map(read, reversed(parts)), strict=True))
        assert b"".join(found[part] for part in parts) == expected


def test_steps_read_bytes_for_a_checksum_and_for_the_file(take: Take) -> None:
    """What is longer than a step is summed up by the step, while it is in the cache, and not again at its end."""
    snapshot = _Watched(take({"a": torch.randn(30_000), "b": torch.randn(100)}))
    layout = lay_out(snapshot)  # type: ignore[arg-type]
    snapshot.reads = 0
    for step in layout.steps(0, layout.nbytes, 16_000):
        del step
    assert snapshot.reads == 2 * 8  # which is how many steps a storage of 120,000 bytes lies in


def test_a_part_may_be_read_again(take: Take) -> None:
    """Reading a range twice, as a retry does, gives the same bytes."""
    layout = lay_out(take(_state()))
    first = b"".join(layout.read(10, layout.nbytes - 10))
    assert b"".join(layout.read(10, layout.nbytes - 10)) == first


def test_storages_are_read_by_reference(take: Take) -> None:
    """Large storages reach the reader as views of the snapshot's memory, not as copies."""
    snapshot = take({"a": torch.randn(4096), "b": torch.randn(4096)})
    layout = lay_out(snapshot)
    views = layout.read(0, layout.nbytes)
    assert [view.nbytes for view in views if view.obj is snapshot.view(0).obj] == [16384, 16384]
    assert all(view.readonly for view in views)


@pytest.mark.parametrize(("start", "stop"), [(-1, 5), (5, 4), (0, 1 << 40)])
def test_a_range_outside_the_file_is_refused(take: Take, start: int, stop: int) -> None:
    """There are no bytes before the file or behind it."""
    with pytest.raises(ValueError, match="no bytes"):
        lay_out(take(_state())).read(start, stop)


def test_a_closed_snapshot_cannot_be_read(take: Take) -> None:
    """A layout never reads memory that was given back."""
    snapshot = take({"a": torch.randn(4096)})
    layout = lay_out(snapshot)
    snapshot.close()
    with pytest.raises(ValueError, match="released"):
        layout.read(0, layout.nbytes)


def test_a_layout_keeps_no_view(take: Take) -> None:
    """The host buffer is free for the next save as soon as the snapshot is closed."""
    made = capture({"a": torch.randn(4096), "s": torch.eye(3).to_sparse()})
    buffer = HostBuffer(made.nbytes)
    snapshot = made.stage(buffer)
    layout = lay_out(snapshot)
    layout.read(0, layout.nbytes)
    snapshot.close()
    assert not buffer.is_aliased


def _untouched(nbytes: int) -> Snapshot:
    """Return a snapshot of a large tensor of zeros, whose memory does not exist yet."""
    empty = capture(torch.empty(0, dtype=torch.uint8))._content
    assert isinstance(empty, Unfilled)
    tensors = empty.skeleton.entries.tensors._replace(sizes=[(nbytes,)])
    skeleton = empty.skeleton._replace(entries=Entries({}, tensors), sizes=[nbytes])
    return Snapshot(
        content=empty._replace(skeleton=skeleton),
        storages=Storages([nbytes], ["cpu"], [0]),
        buffer=HostBuffer(nbytes),
        nbytes=nbytes,
    )


def test_laying_out_touches_no_bulk_memory() -> None:
    """Neither the stand-ins nor the snapshot's own pages are touched, however large the state is."""
    snapshot = _untouched(3 << 30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    layout = lay_out(snapshot)
    assert layout.nbytes > 3 << 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10
    snapshot.close()


def test_a_storage_larger_than_a_classic_zip_allows(tmp_path: Path) -> None:
    """Records beyond 4 GiB are described by zip64 fields, which are understood and sealed."""
    nbytes = (4 << 30) + 4096
    snapshot = _untouched(nbytes)
    layout = lay_out(snapshot)
    # everything but the storage's own bytes goes into a sparse file; those are zeros in any case
    path = tmp_path / "large.ckpt"
    half = mmap.PAGESIZE * 2
    layout._checksums[layout._records.names.index("archive/data/0")] = 0x1234
    with path.open("wb") as file:
        os.truncate(path, layout.nbytes)
        for start, stop in ((0, half), (layout.nbytes - half, layout.nbytes)):
            file.seek(start)
            for view in layout.read(start, stop):
                file.write(view)
    with zipfile.ZipFile(path) as archive:
        (record,) = [found for found in archive.infolist() if found.filename.endswith("data/0")]
        assert (record.file_size, record.CRC) == (nbytes, 0x1234)
        assert archive.read("archive/version") == b"3\n"
    assert torch.load(path, mmap=True, weights_only=True).shape == (nbytes,)
    snapshot.close()


def test_an_unknown_archive_is_refused(take: Take, whole: Whole) -> None:
    """A file that torch might write in a way unknown here is refused, with its version."""
    file = bytearray(whole(lay_out(take(_state()))))
    file[-22:-18] = b"????"
    with pytest.raises(AsyncCheckpointError, match=torch.__version__.partition("+")[0]):
        find_records(len(file), lambda start, nbytes: bytes(file[start : start + nbytes]))


def test_records_of_any_zip_archive_are_found() -> None:
    """Records without data descriptors have their checksum in the local header."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("one", b"first")
        archive.writestr("two", b"")
    content = file.getvalue()
    records, start = find_records(len(content), lambda start, nbytes: content[start : start + nbytes])
    bounds = zip(records.starts, records.stops, strict=True)
    assert [content[begin:end] for begin, end in bounds] == [b"first", b""]
    assert content[start : start + 4] == b"PK\x01\x02"
    for checksum, near, central in zip(
        records.checksums, records.checksum_offsets, records.central_offsets, strict=True
    ):
        sealed = checksum.to_bytes(4, "little")
        assert content[near : near + 4] == sealed
        assert content[central : central + 4] == sealed


def test_compressed_records_are_refused() -> None:
    """A compressed record cannot be laid out by reference."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("one", b"first" * 100)
    content = file.getvalue()
    with pytest.raises(AsyncCheckpointError, match="compressed"):
        find_records(len(content), lambda start, nbytes: content[start : start + nbytes])
