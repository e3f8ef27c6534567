"""From a sharded checkpoint to one plain file: what is in it, what is refused, and what a failure leaves."""

from __future__ import annotations

import dataclasses
import io
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

import async_ckpt
from async_ckpt import (
    CheckpointExistsError,
    CheckpointService,
    CorruptCheckpointError,
    IncompleteCheckpointError,
    OptionError,
    StoreError,
)
from async_ckpt.format import checksum
from async_ckpt.format.central_directory import LOCAL_HEADER, data_start, find_directory, list_entries
from async_ckpt.sharded.consolidating.consolidation import parts_at_a_time
from async_ckpt.sharded.manifest import write_manifest
from async_ckpt.stores import open_store
from async_ckpt.stores.base import Location, Workers
from async_ckpt.testing import Fault, FaultyStore, Gate
from tests.integration.sharded.load_scenes import CountingStore
from tests.integration.sharded.states import differences
from tests.unit.sharded.test_load import a_state, numbers

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning")

SMALL_PARTS = {"part_size": "64KiB"}


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The state as torch writes it in a directory."""
    dcp.save(a_state(), checkpoint_id=tmp_path / "it")
    return tmp_path / "it"


def by_torch(directory: Path) -> Any:
    """Return what torch makes of it."""
    file = directory.with_suffix(".theirs")
    dcp_to_torch_save(directory, file)
    return torch.load(file, weights_only=True)


def files_beside(directory: Path) -> list[str]:
    """Return what is there but the checkpoint itself."""
    return sorted(path.name for path in directory.parent.iterdir() if path != directory)


# -- what is in the file


@pytest.mark.parametrize("options", [{}, SMALL_PARTS], ids=["one part", "many parts"])
def test_the_file_is_what_torch_makes(sharded: Path, options: dict[str, Any]) -> None:
    """Key by key and bit by bit, loaded in any way; and its checksums are those of an ordinary archive."""
    file = sharded.with_suffix(".pt")
    with CheckpointService(**options) as service:
        service.consolidate(sharded, file)
    assert differences(by_torch(sharded), torch.load(file, weights_only=True)) == []
    assert differences(by_torch(sharded), torch.load(file, weights_only=True, mmap=True)) == []
    assert differences(by_torch(sharded), async_ckpt.load(file)) == []
    done = subprocess.run([sys.executable, "-m", "zipfile", "-t", file], capture_output=True, text=True)
    assert done.stdout == "Done testing\n", done.stderr


@pytest.mark.parametrize("options", [{}, SMALL_PARTS], ids=["one part", "many parts"])
def test_it_is_the_file_that_torch_would_have_written(sharded: Path, options: dict[str, Any]) -> None:
    """Byte for byte."""
    with CheckpointService(**options) as service:
        service.consolidate(sharded, sharded.with_suffix(".pt"))
    written = io.BytesIO()
    torch.save(by_torch(sharded), written)
    assert sharded.with_suffix(".pt").read_bytes() == written.getvalue()


def test_without_isal(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checksums are put together by Python then, and are the same."""
    monkeypatch.setattr(checksum, "crc32_combine", None)
    test_it_is_the_file_that_torch_would_have_written(sharded, SMALL_PARTS)


def test_of_thousands_of_small_tensors(tmp_path: Path) -> None:
    """All are there; a few requests have fetched them."""
    state = {f"w{number}": torch.full((number % 40 + 1,), float(number)) for number in range(2000)}
    dcp.save(state, checkpoint_id=tmp_path / "it")
    service, stores = counting()
    with service:
        service.consolidate(tmp_path / "it", tmp_path / "it.pt")
    assert differences(state, torch.load(tmp_path / "it.pt")) == []
    assert stores[0].ranges["__0_0.distcp"] <= 8


def test_no_keys_and_no_tensors(tmp_path: Path) -> None:
    """A state without tensors, and one without anything."""
    for number, state in enumerate(({}, {"epoch": 3}, {"empty": torch.empty(0, 4)})):
        dcp.save(state, checkpoint_id=tmp_path / f"{number}")
        async_ckpt.consolidate(tmp_path / f"{number}", tmp_path / f"{number}.pt")
        assert differences(state, torch.load(tmp_path / f"{number}.pt")) == []


def test_tensors_inside_of_values(tmp_path: Path) -> None:
    """A tuple of tensors is a value to DCP: it comes whole."""
    state = {"pair": (numbers(3), numbers(400, 5)), "weights": numbers(7, 3)}
    dcp.save(state, checkpoint_id=tmp_path / "it")
    async_ckpt.consolidate(tmp_path / "it", tmp_path / "it.pt")
    assert differences(state, torch.load(tmp_path / "it.pt")) == []


def test_flat_as_of_torch_without_a_planner(sharded: Path) -> None:
    """Where ``.metadata`` does not say how values are nested, they are not."""
    rewrite(sharded, lambda metadata: setattr(metadata, "planner_data", None))
    async_ckpt.consolidate(sharded, sharded.with_suffix(".pt"))
    found = torch.load(sharded.with_suffix(".pt"))
    assert torch.equal(found["nested.list.0"], numbers(3))
    assert differences(by_torch(sharded), found) == []


def rewrite(directory: Path, change: Callable[[Metadata], object]) -> None:
    """Change what ``.metadata`` says."""
    metadata = FileSystemReader(directory).read_metadata()
    change(metadata)
    (directory / ".metadata").write_bytes(write_manifest(metadata))


# -- how it is read


def counting() -> tuple[CheckpointService, list[CountingStore]]:
    """Return a service with small parts whose stores count what is read; the first is that of the directory."""
    stores: list[CountingStore] = []

    def make(location: Location, workers: Workers) -> Any:
        stores.append(CountingStore(open_store(location, workers=workers, part_size=64 << 10)))
        return stores[-1]

    return CheckpointService(store_factory=make, **SMALL_PARTS), stores


def test_each_byte_is_fetched_about_once(tmp_path: Path) -> None:
    """Also of tensors of many parts, and of those that are loaded whole: at most 1.1 times the directory."""
    state = {
        "large": numbers(2000, 300),
        "turned": numbers(600, 800).t(),
        "others": [numbers(50, 60) for _ in range(30)],
    }
    dcp.save(state, checkpoint_id=tmp_path / "it")
    service, stores = counting()
    with service:
        service.consolidate(tmp_path / "it", tmp_path / "it.pt")
    assert differences(state, torch.load(tmp_path / "it.pt")) == []
    assert stores[0].nbytes <= 1.1 * sum(path.stat().st_size for path in (tmp_path / "it").iterdir())


@pytest.mark.parametrize("mib", [1, 1_000, 100_000, 150_000, 300_000, 400_000])
def test_parts_under_way_are_bounded(mib: int) -> None:
    """The longer the file, the larger its parts and the fewer of them: but for one more, they have at most 48 MiB."""
    at_a_time = parts_at_a_time(mib << 20, 4)
    part_bytes = max(16 << 20, (mib << 20) // 10_000)
    assert at_a_time == 1 or at_a_time * part_bytes <= 48 << 20
    assert part_bytes <= 48 << 20
    assert parts_at_a_time(mib << 20, 1) == 1


# -- what comes before it


def test_pending_saves_come_first(tmp_path: Path) -> None:
    """Of the directory, and of the file (O1, O2)."""
    weights = torch.zeros(50_000)
    with CheckpointService() as service:
        for number in range(3):
            weights.fill_(number)
            service.save_sharded({"weights": weights}, tmp_path / "it")
            service.save({"weights": weights - 100}, tmp_path / "it.pt")
            service.consolidate(tmp_path / "it", tmp_path / "it.pt")
            assert torch.load(tmp_path / "it.pt")["weights"].unique().tolist() == [float(number)]


def test_into_the_directory_itself(sharded: Path) -> None:
    """The file may lie beside the checkpoint's own."""
    async_ckpt.consolidate(sharded, sharded / "model.pt")
    assert differences(by_torch(sharded), torch.load(sharded / "model.pt")) == []


# -- what is refused


def refused(error: type[BaseException], directory: Path, **options: Any) -> str:
    """Return the message of what is raised, when there was a file before: that stays, and nothing else is there."""
    file = directory.with_suffix(".pt")
    file.write_bytes(b"earlier")
    before = files_beside(directory)
    with pytest.raises(error) as caught:
        async_ckpt.consolidate(directory, file, **options)
    assert file.read_bytes() == b"earlier"
    assert files_beside(directory) == before
    return str(caught.value)


def test_an_earlier_file(sharded: Path) -> None:
    """It is replaced, unless that is refused."""
    assert "overwrite=False" in refused(CheckpointExistsError, sharded, overwrite=False)
    async_ckpt.consolidate(sharded, sharded.with_suffix(".pt"))
    assert torch.load(sharded.with_suffix(".pt"))["epoch"] == 1


def test_places_that_cannot_be(sharded: Path, tmp_path: Path) -> None:
    """What is no sharded checkpoint, and what cannot be a file."""
    (tmp_path / "empty").mkdir()
    for place in ("nowhere", "empty"):
        refused(IncompleteCheckpointError, tmp_path / place)
    torch.save({}, tmp_path / "plain.ckpt")
    with pytest.raises(IncompleteCheckpointError):
        async_ckpt.consolidate(tmp_path / "plain.ckpt", tmp_path / "out.pt")
    with pytest.raises(StoreError):
        async_ckpt.consolidate(sharded, tmp_path / "empty")
    with pytest.raises(OptionError, match="another name"):
        async_ckpt.consolidate(sharded, sharded)


def test_values_that_need_code(tmp_path: Path) -> None:
    """They are refused by name, unless they are asked for; the file then needs the same."""
    dcp.save({"path": tmp_path, "weights": numbers(3)}, checkpoint_id=tmp_path / "it")
    assert "'path'" in refused(pickle.UnpicklingError, tmp_path / "it")
    async_ckpt.consolidate(tmp_path / "it", tmp_path / "it.pt", weights_only=False)
    assert torch.load(tmp_path / "it.pt", weights_only=False)["path"] == tmp_path


# -- what is damaged


def middle_of_data(item: bytes) -> int:
    """Return a place amid the bytes of the tensor in an item."""
    (entry,) = (
        each
        for each in list_entries(item[slice(*find_directory(item, len(item)))])
        if each.name.endswith("/data/0")
    )
    return data_start(entry.header, item[entry.header : entry.header + LOCAL_HEADER.size]) + entry.nbytes // 2


@pytest.mark.parametrize("options", [{}, SMALL_PARTS], ids=["one part", "many parts"])
@pytest.mark.parametrize("name", ["large", "small", "line", "turned", "nested.name"])
def test_a_flipped_bit(sharded: Path, name: str, options: dict[str, Any]) -> None:
    """Wherever it is, in a tensor or a value: what ``load_sharded`` says of it is said, and there is no file."""
    metadata = FileSystemReader(sharded).read_metadata()
    (info,) = (each for index, each in metadata.storage_data.items() if index.fqn == name)
    path = sharded / info.relative_path
    data = bytearray(path.read_bytes())
    item = bytes(data[info.offset : info.offset + info.length])
    where = item.index(b"run 1.0") if name == "nested.name" else middle_of_data(item)
    data[info.offset + where] ^= 1
    path.write_bytes(data)
    file = sharded.with_suffix(".pt")
    file.write_bytes(b"earlier")
    before = files_beside(sharded)
    with CheckpointService(**options) as service:
        with pytest.raises(CorruptCheckpointError, match=f"'{name}'") as caught:
            service.consolidate(sharded, file)
        with pytest.raises(CorruptCheckpointError) as by_load:
            service.load_sharded(a_state(2.0), sharded)
    assert str(caught.value) == str(by_load.value)
    assert file.read_bytes() == b"earlier"
    assert files_beside(sharded) == before


@pytest.mark.parametrize("how", ["cut", "missing"])
def test_files_that_are_cut_short_or_missing(sharded: Path, how: str) -> None:
    """The file is named."""
    file = sharded / "__0_0.distcp"
    if how == "cut":
        file.write_bytes(file.read_bytes()[:-1000])
    else:
        file.unlink()
    assert "__0_0.distcp" in refused(CorruptCheckpointError, sharded)


def test_metadata_that_cannot_be(sharded: Path) -> None:
    """A tensor of which a part is nowhere, and values inside of values."""
    whole = FileSystemReader(sharded).read_metadata()

    def lose_rows(metadata: Metadata) -> None:
        described = metadata.state_dict_metadata["large"]
        assert isinstance(described, TensorStorageMetadata)
        described.size = torch.Size((501, 300))

    rewrite(sharded, lose_rows)
    assert "'large' is damaged: its chunks have 150000 elements, but it has 150300" in refused(
        CorruptCheckpointError, sharded
    )
    paths = {"epoch": ("large", "below"), "small": ("nested", 1 << 40), "scalar": ("nested", "list", -1)}
    for name, path in paths.items():
        changed = dataclasses.replace(whole, planner_data={**whole.planner_data, name: path})
        (sharded / ".metadata").write_bytes(write_manifest(changed))
        assert f"'{name}'" in refused(CorruptCheckpointError, sharded)


def test_chunks_that_overlap_and_leave_a_gap(sharded: Path) -> None:
    """What is in the gap is not known: it is not written as zeros, and no load leaves it out without a word."""
    torch.manual_seed(0)
    state = {"rows": torch.randn(40, 3)}
    with CheckpointService() as service:
        service.save_sharded(state, sharded).wait(60)
        whole = FileSystemReader(sharded).read_metadata()
        (info,) = whole.storage_data.values()
        parts = [(0, 20), (10, 20)]
        described = whole.state_dict_metadata["rows"]
        assert isinstance(described, TensorStorageMetadata)
        described.chunks = [
            ChunkStorageMetadata(torch.Size((start, 0)), torch.Size((length, 3))) for start, length in parts
        ]
        found = {MetadataIndex("rows", torch.Size((start, 0))): info for start, _ in parts}
        changed = dataclasses.replace(whole, storage_data=found)
        (sharded / ".metadata").write_bytes(write_manifest(changed))
        assert "'rows' is damaged: its chunks overlap" in refused(CorruptCheckpointError, sharded)
        with pytest.raises(CorruptCheckpointError, match="its chunks overlap"):
            service.load_sharded({"rows": torch.zeros(40, 3)}, sharded)


# -- storage that fails


def faulty(*faults: Fault, of: int) -> CheckpointService:
    """Return a service with small parts, of whose stores that with this number has faults: 0 is the directory's."""
    stores: list[Any] = []

    def make(location: Location, workers: Workers) -> Any:
        store = open_store(location, workers=workers, part_size=64 << 10)
        stores.append(FaultyStore(store, faults) if len(stores) == of else store)
        return stores[-1]

    return CheckpointService(store_factory=make, **SMALL_PARTS)


@pytest.mark.parametrize(
    ("of", "operation", "call"),
    [
        *((0, "source", 1), (0, "source", 2), (0, "read", 3), (0, "read", 9)),
        *((1, "begin", 1), (1, "put", 4), (1, "commit", 1)),
    ],
)
def test_storage_that_fails(sharded: Path, of: int, operation: Any, call: int) -> None:
    """Of either place: its error is raised as it is, what was there before stays, and nothing else."""
    error, cause = StoreError("away"), OSError(5, "Input/output error")
    error.__cause__ = cause
    file = sharded.with_suffix(".pt")
    file.write_bytes(b"earlier")
    before = files_beside(sharded)
    with faulty(Fault(operation=operation, calls=[call], error=lambda: error), of=of) as service:
        with pytest.raises(StoreError) as caught:
            service.consolidate(sharded, file)
        assert caught.value is error
        assert error.__cause__ is cause
    assert file.read_bytes() == b"earlier"
    assert files_beside(sharded) == before


def test_a_checkpoint_that_is_replaced_while_it_is_read(sharded: Path, tmp_path: Path) -> None:
    """It is read again from its beginning: the file is of one checkpoint."""
    dcp.save(a_state(3.0), checkpoint_id=tmp_path / "new")

    def replace() -> BaseException:
        (sharded / "__0_0.distcp").unlink()
        (tmp_path / "new" / "__0_0.distcp").rename(sharded / "__9_0.distcp")
        metadata = FileSystemReader(tmp_path / "new").read_metadata()
        for info in metadata.storage_data.values():
            info.relative_path = "__9_0.distcp"
        (sharded / ".metadata").write_bytes(write_manifest(metadata))
        return FileNotFoundError(2, "No such file")

    with faulty(Fault(operation="source", calls=[2], error=replace), of=0) as service:
        service.consolidate(sharded, tmp_path / "it.pt")
    found = torch.load(tmp_path / "it.pt")
    assert torch.equal(found["large"], a_state(3.0)["large"])
    assert found["epoch"] == 3


@pytest.mark.parametrize("of", [0, 1])
def test_closing_the_service_ends_it(sharded: Path, of: int) -> None:
    """Though storage hangs, of the one place or the other: who waits is told, and the file is not there."""
    gate = Gate()
    service = faulty(Fault(operation="read" if of == 0 else "put", calls=[3], gate=gate), of=of)
    with ThreadPoolExecutor(1) as pool:
        consolidating = pool.submit(service.consolidate, sharded, sharded.with_suffix(".pt"))
        assert gate.reached.wait(60)
        service.close()
        gate.open()
        error = consolidating.exception(60)
    assert (error is None) == sharded.with_suffix(".pt").exists()
    assert of == 1 or error is not None


def test_ctrl_c(sharded: Path) -> None:
    """When the call has ended, nothing is left of the file, though storage takes its time to clean up (D2)."""
    gate = Gate()
    file, main = sharded.with_suffix(".pt"), threading.get_ident()
    file.write_bytes(b"earlier")
    before = files_beside(sharded)
    faults = Fault(operation="put", calls=[3], gate=gate), Fault(operation="abort", delay_seconds=1.3)

    def interrupt() -> None:
        assert gate.reached.wait(60)
        signal.pthread_kill(main, signal.SIGINT)

    with faulty(*faults, of=1) as service, ThreadPoolExecutor(1) as pool:
        interrupted = pool.submit(interrupt)
        with pytest.raises(KeyboardInterrupt):
            service.consolidate(sharded, file)
        assert file.read_bytes() == b"earlier"
        assert files_beside(sharded) == before
        interrupted.result(60)
