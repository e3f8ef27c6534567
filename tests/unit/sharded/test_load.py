"""Sharded loads by one process: what is read how, what is refused, and what is said of a damaged checkpoint."""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemReader

import async_ckpt
from async_ckpt import CheckpointService, CorruptCheckpointError, IncompleteCheckpointError, StoreError
from async_ckpt.errors import ServiceClosedError, TransientStoreError
from async_ckpt.format import checksum
from async_ckpt.sharded.manifest import write_manifest
from async_ckpt.sharded.reading.extents import blocks_of, run_of
from async_ckpt.stores.base import Location, Workers
from async_ckpt.stores.local.store import LocalStore
from async_ckpt.testing import Fault, FaultyStore, Gate
from tests.integration.sharded.states import differences

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning")


def numbers(*shape: int, seed: float = 1.0) -> torch.Tensor:
    """Return a tensor of always the same numbers."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape) + seed


def a_state(seed: float = 1.0) -> dict[str, Any]:
    """Return tensors that are read in every way, and values."""
    big = numbers(200, 300, seed=seed)
    return {
        "large": numbers(500, 300, seed=seed),
        "also large": numbers(300, 500, seed=seed),
        "line": numbers(70_000, seed=seed),
        "small": numbers(3, 4, seed=seed),
        "scalar": torch.tensor(seed),
        "empty": torch.empty(0, 4),
        "turned": numbers(300, 400, seed=seed).t(),
        "half": numbers(300, 400, seed=seed).bfloat16(),
        "eighth": numbers(300, 400, seed=seed).to(torch.float8_e4m3fn),
        "flags": numbers(300, 400, seed=seed) > 60_000 * seed,
        "complex": torch.view_as_complex(numbers(30_000, 2, seed=seed)),
        "conjugate": torch.view_as_complex(numbers(30_000, 2, seed=seed)).conj(),
        "parameter": torch.nn.Parameter(big.clone()),
        "view": big[50:150],
        "big": big,
        "nested": {"list": [numbers(3, seed=seed), {"deep": numbers(2, seed=seed)}], "name": f"run {seed}"},
        "optimizer": {
            "state": {0: {"step": torch.tensor(seed), "exp_avg": numbers(200, 300, seed=seed)}},
            "param_groups": [{"lr": seed, "betas": (0.9, 0.999), "params": ["a", "b"], "fused": None}],
        },
        "epoch": int(seed),
    }


@pytest.fixture(params=["sharded", "plain"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The state as torch writes it, in a directory and in a file."""
    folder = tmp_path / request.param
    if request.param == "sharded":
        dcp.save(a_state(), checkpoint_id=folder)
    else:
        torch.save(a_state(), folder)
    return folder


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The state as torch writes it in a directory."""
    dcp.save(a_state(), checkpoint_id=tmp_path / "it")
    return tmp_path / "it"


def test_every_kind_of_tensor_and_value(place: Path) -> None:
    """All of it is there afterwards, bit for bit, in the memory that was there before."""
    state = a_state(2.0)
    memory = {name: value.data_ptr() for name, value in state.items() if isinstance(value, torch.Tensor)}
    versions = {name: value._version for name, value in state.items() if isinstance(value, torch.Tensor)}
    async_ckpt.load_sharded(state, place)
    assert differences(a_state(), state) == []
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            assert value.data_ptr() == memory[name]
            assert value._version > versions[name] or not value.numel()


def test_into_other_dtypes_and_layouts(place: Path) -> None:
    """What cannot go straight into the state's memory is converted, as torch's copy does."""
    state: dict[str, Any] = {
        "large": torch.zeros(500, 300, dtype=torch.float64),
        "also large": torch.zeros(500, 300).t(),
        "half": torch.zeros(300, 400),
        "turned": torch.zeros(400, 300),
        "line": torch.zeros(140_000)[::2],
    }
    async_ckpt.load_sharded(state, place)
    for name, value in state.items():
        assert torch.equal(value, a_state()[name].to(value.dtype))


def test_memory_that_a_snapshot_shares(place: Path) -> None:
    """A copy-on-write clone of the state, as a pending save has it, keeps what it was."""
    state = {"large": torch.zeros(500, 300)}
    clone = state["large"]._lazy_clone()  # type: ignore[operator]
    async_ckpt.load_sharded(state, place)
    assert torch.equal(state["large"], a_state()["large"])
    assert not clone.any()


def test_a_part_of_the_checkpoint(place: Path) -> None:
    """Only what is asked for is loaded; strict=False leaves what is not there as it is."""
    state = {"epoch": 0, "more": 5, "small": torch.zeros(3, 4), "others": {"a": torch.ones(2)}}
    with pytest.raises(KeyError, match=r"has no 'more', 'others.a'"):
        async_ckpt.load_sharded(state, place)
    async_ckpt.load_sharded(state, place, strict=False)
    assert state["epoch"] == 1
    assert state["more"] == 5
    assert torch.equal(state["small"], a_state()["small"])
    assert torch.equal(state["others"]["a"], torch.ones(2))  # type: ignore[index]


def test_other_sizes(place: Path) -> None:
    """All that have another size are named, and nothing is loaded."""
    state = {"small": torch.zeros(4, 3), "large": torch.zeros(500, 300), "line": torch.zeros(7)}
    with pytest.raises(
        ValueError,
        match=r"line: \(70000,\), but \(7,\) in the state, small: \(3, 4\), but \(4, 3\) in the state",
    ):
        async_ckpt.load_sharded(state, place, strict=False)
    assert not state["large"].any()


def test_nothing_there(tmp_path: Path) -> None:
    """A directory without .metadata is no checkpoint, nor is what is not there."""
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "__0_0.distcp").write_bytes(b"x")
    for name in ("begun", "none"):
        with pytest.raises(IncompleteCheckpointError, match="no complete checkpoint"):
            async_ckpt.load_sharded({"a": torch.ones(2)}, tmp_path / name)


class Ours:
    """A class that nobody has allowed."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ours)

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize("kind", ["sharded", "plain"])
def test_values_that_could_run_code(tmp_path: Path, kind: str) -> None:
    """They are refused by name, unless the caller trusts the checkpoint."""
    state = {"fine": torch.ones(3), "odd": Ours()}
    if kind == "sharded":
        dcp.save(state, checkpoint_id=tmp_path / "it")
    else:
        torch.save(state, tmp_path / "it")
    with pytest.raises(pickle.UnpicklingError, match="Ours"):
        async_ckpt.load_sharded({"fine": torch.zeros(3), "odd": None}, tmp_path / "it")
    other = {"fine": torch.zeros(3), "odd": None}
    async_ckpt.load_sharded(other, tmp_path / "it", weights_only=False)
    assert other["odd"] == Ours()


class Scaling(dcp.DefaultLoadPlanner):
    """A planner of a user's own, with memory of its own."""

    def resolve_tensor(self, read_item: Any) -> torch.Tensor:
        """Return memory for it."""
        self.read_item = read_item
        return torch.empty(read_item.lengths)

    def commit_tensor(self, read_item: Any, tensor: torch.Tensor) -> None:
        """Put it where it belongs."""
        self.lookup_tensor(read_item.dest_index).copy_(tensor * 2)


def test_a_planner_of_the_callers_own(place: Path) -> None:
    """It is asked where each tensor goes, and told when it is there."""
    state = {name: torch.zeros_like(a_state()[name]) for name in ("large", "small", "line")}
    async_ckpt.load_sharded(state, place, planner=Scaling())
    for name, value in state.items():
        assert torch.equal(value, a_state()[name] * 2)


def test_torch_makes_a_state_of_a_checkpoint(place: Path) -> None:
    """The planner that torch has for that fills an empty state."""
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner

    state: dict[str, Any] = {}
    async_ckpt.load_sharded(state, place, planner=_EmptyStateDictLoadPlanner())
    assert torch.equal(state["nested"]["list"][1]["deep"], a_state()["nested"]["list"][1]["deep"])
    assert state["optimizer"]["param_groups"] == a_state()["optimizer"]["param_groups"]


# -- damage


def spoil(path: Path, at: int) -> None:
    """Change one byte."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def middle_of(data: bytes, name: str) -> int:
    """Return where the middle of a record is in an archive."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        record = archive.getinfo(name)
    start = record.header_offset + 30 + sum(struct.unpack_from("<2H", data, record.header_offset + 26))
    return start + record.file_size // 2


@pytest.mark.parametrize("name", ["large", "small", "turned", "half", "epoch", "conjugate", "line"])
def test_a_damaged_item_is_named(sharded: Path, name: str) -> None:
    """One wrong byte in what is read whole is found, and the item and its file are named."""
    metadata = FileSystemReader(sharded).read_metadata()
    (info,) = [info for index, info in metadata.storage_data.items() if index.fqn == name]
    data = (sharded / info.relative_path).read_bytes()[info.offset : info.offset + info.length]
    record = "archive/data.pkl" if name == "epoch" else "archive/data/0"
    spoil(sharded / info.relative_path, info.offset + middle_of(data, record))
    with pytest.raises(CorruptCheckpointError, match=name):
        async_ckpt.load_sharded(a_state(2.0), sharded)


def test_a_file_that_is_short_or_missing(sharded: Path) -> None:
    """Both are a corrupt checkpoint, with the file's name."""
    path = sharded / "__0_0.distcp"
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(CorruptCheckpointError, match=r"__0_0\.distcp' has \d+ bytes instead of"):
        async_ckpt.load_sharded(a_state(2.0), sharded)
    path.unlink()
    with pytest.raises(CorruptCheckpointError, match=r"__0_0\.distcp' is missing"):
        async_ckpt.load_sharded(a_state(2.0), sharded)


def test_a_plain_file_that_is_damaged(tmp_path: Path) -> None:
    """Cut short, or with a wrong byte in a tensor that is read whole, it is corrupt."""
    torch.save(a_state(), tmp_path / "x.ckpt")
    spoil(tmp_path / "x.ckpt", middle_of((tmp_path / "x.ckpt").read_bytes(), "x/data/0"))
    with pytest.raises(CorruptCheckpointError, match="'large'"):
        async_ckpt.load_sharded(a_state(2.0), tmp_path / "x.ckpt")
    os.truncate(tmp_path / "x.ckpt", 1 << 20)
    with pytest.raises(CorruptCheckpointError):
        async_ckpt.load_sharded(a_state(2.0), tmp_path / "x.ckpt")


def change(sharded: Path, act: Callable[[Any], None]) -> None:
    """Change what the .metadata says of the item ``large``."""
    metadata = FileSystemReader(sharded).read_metadata()
    (info,) = [info for index, info in metadata.storage_data.items() if index.fqn == "large"]
    act(info)
    (sharded / ".metadata").write_bytes(write_manifest(metadata))


class Rows(dcp.DefaultLoadPlanner):
    """A planner that wants some rows of each tensor, as a rank does."""

    def create_local_plan(self) -> Any:
        """Return the usual plan, cut."""
        plan = super().create_local_plan()
        offsets, lengths = torch.Size((100, 0)), torch.Size((200, 300))
        cut = {"storage_offsets": offsets, "dest_offsets": offsets, "lengths": lengths}
        return dataclasses.replace(plan, items=[dataclasses.replace(item, **cut) for item in plan.items])


@pytest.mark.parametrize("kind", ["parameter", "turned", "longer"])
def test_rows_of_an_item_that_is_laid_out_otherwise(tmp_path: Path, kind: str) -> None:
    """Its rows are right, though those of all others of its kind begin elsewhere in the item."""
    names = [f"w{number}" for number in range(4)]
    dcp.save({name: numbers(500, 300) for name in names}, checkpoint_id=tmp_path)
    odd = {
        "parameter": torch.nn.Parameter(numbers(500, 300)),
        "turned": numbers(500, 300).t().contiguous().t(),
        "longer": numbers(700, 300)[100:600] - 30_000,
    }[kind]
    stream = io.BytesIO()
    torch.save(odd, stream)
    metadata = FileSystemReader(tmp_path).read_metadata()
    (info,) = [info for index, info in metadata.storage_data.items() if index.fqn == "w2"]
    info.relative_path, info.offset, info.length = "odd.distcp", 0, len(stream.getvalue())
    (tmp_path / "odd.distcp").write_bytes(stream.getvalue())
    (tmp_path / ".metadata").write_bytes(write_manifest(metadata))
    state = {name: torch.zeros(500, 300) for name in names}
    async_ckpt.load_sharded(state, tmp_path, planner=Rows())
    for value in state.values():
        assert torch.equal(value[100:300], numbers(500, 300)[100:300])
        assert not value[:100].any()
        assert not value[300:].any()


@pytest.mark.parametrize(
    ("act", "told"),
    [
        (lambda info: setattr(info, "offset", info.offset + 1), "corrupt"),
        (lambda info: setattr(info, "length", info.length - 1), "corrupt"),
        (lambda info: setattr(info, "length", 10), "too few"),
        (lambda info: setattr(info, "length", 1 << 50), "instead of at least"),
        (lambda info: setattr(info, "offset", 1 << 50), "instead of at least"),
    ],
)
def test_a_description_that_is_wrong(sharded: Path, act: Callable[[Any], None], told: str) -> None:
    """What the .metadata says of an item is not believed against the item, nor any memory taken for it."""
    change(sharded, act)
    with pytest.raises(CorruptCheckpointError, match=told):
        async_ckpt.load_sharded(a_state(2.0), sharded)


def test_items_that_went_through_extensions(sharded: Path) -> None:
    """They are refused with advice."""
    change(sharded, lambda info: setattr(info, "transform_descriptors", ["stream.zstd"]))
    with pytest.raises(StoreError, match=r"stream\.zstd.*torch\.distributed\.checkpoint"):
        async_ckpt.load_sharded(a_state(2.0), sharded)


# -- storage


def faulty(*faults: Fault) -> tuple[CheckpointService, list[FaultyStore]]:
    """Return a service on a local store with faults."""
    stores: list[FaultyStore] = []

    def make(location: Location, workers: Workers) -> FaultyStore:
        stores.append(FaultyStore(LocalStore(workers=workers), faults))
        return stores[-1]

    return CheckpointService(store_factory=make), stores


@pytest.mark.parametrize(("operation", "call"), [("source", 1), ("source", 2), ("read", 1), ("read", 3)])
def test_storage_that_fails(place: Path, operation: Any, call: int) -> None:
    """Its error is raised as it is; the service is as good as before, and the next load gets everything."""
    error = TransientStoreError("away")
    service, stores = faulty(Fault(operation=operation, calls=[call], error=lambda: error))
    state = a_state(2.0)
    with service:
        with suppress(TransientStoreError):
            service.load_sharded(state, place)
            assert stores[0].calls[operation] < call
        service.load_sharded(state, place)
    assert differences(a_state(), state) == []


def test_a_checkpoint_that_is_replaced_while_it_is_read(sharded: Path, tmp_path: Path) -> None:
    """It is read again from its beginning: what is loaded is of one checkpoint."""
    dcp.save(a_state(3.0), checkpoint_id=tmp_path / "new")

    def replace() -> BaseException:
        (sharded / "__0_0.distcp").unlink()
        os.replace(tmp_path / "new" / "__0_0.distcp", sharded / "__9_0.distcp")
        metadata = FileSystemReader(tmp_path / "new").read_metadata()
        for info in metadata.storage_data.values():
            info.relative_path = "__9_0.distcp"
        (sharded / ".metadata").write_bytes(write_manifest(metadata))
        return FileNotFoundError(2, "No such file")

    service, _ = faulty(Fault(operation="source", calls=[2], error=replace))
    state = a_state(2.0)
    with service:
        service.load_sharded(state, sharded)
    assert differences(a_state(3.0), state) == []


def test_a_pending_save_comes_first(tmp_path: Path) -> None:
    """A load waits for the save of that place which was accepted before it (O2)."""
    state = {"weights": torch.zeros(50_000)}
    with CheckpointService() as service:
        for number in range(1, 4):
            service.save({"weights": torch.full((50_000,), float(number))}, tmp_path / "x.ckpt")
            service.load_sharded(state, tmp_path / "x.ckpt")
            assert state["weights"].unique().tolist() == [float(number)]


def test_closing_the_service_ends_a_load(place: Path) -> None:
    """Who loads is told at once, though storage hangs; nothing is left running."""
    gate = Gate()
    service, _ = faulty(Fault(operation="read", calls=[2], gate=gate))
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(service.load_sharded, a_state(2.0), place)
        assert gate.reached.wait(60)
        service.close()
        with pytest.raises(ServiceClosedError):
            loading.result(60)
    with pytest.raises(ServiceClosedError):
        service.load_sharded(a_state(2.0), place)


def test_checksums_of_pieces() -> None:
    """Put together they are the checksum of the whole, with ISA-L and without."""
    first, second = bytes(range(250)) * 9, b"x" * 1234
    one, other, both = zlib.crc32(first), zlib.crc32(second), zlib.crc32(first + second)
    assert checksum.joined_crc32(one, other, len(second)) == both
    assert checksum._joined(one, other, len(second)) == both
    assert checksum._joined(one, 0, 0) == one


# -- geometry


@pytest.mark.parametrize("sizes", [(), (5,), (4, 6), (3, 1, 4), (2, 3, 4, 5)])
@pytest.mark.parametrize("most", [1, 7, 1000])
def test_blocks_cover_every_part(sizes: tuple[int, ...], most: int) -> None:
    """Put together, the blocks are the part; a run is the part exactly, where there is one."""
    generator = torch.Generator().manual_seed(len(sizes))
    whole = torch.arange(torch.Size(sizes).numel()).view(sizes)
    for _ in range(50):
        offsets = [int(torch.randint(size, (), generator=generator)) for size in sizes]
        lengths = [
            1 + int(torch.randint(size - offset, (), generator=generator))
            for size, offset in zip(sizes, offsets, strict=True)
        ]
        cut = tuple(slice(first, first + n) for first, n in zip(offsets, lengths, strict=True))
        part, flat = whole[cut] if cut else whole, whole.reshape(-1)
        made = torch.full_like(part, -1)
        for block in blocks_of(sizes, offsets, lengths, most):
            rows = flat[block.start : block.start + block.count].view(block.shape)
            inner = (slice(None), *block.cut)
            if block.place:
                made[block.place] = rows[inner]
            else:
                made.copy_(rows)
            assert block.count <= max(most, 1) or block.shape[:1] == (1,)
        assert torch.equal(made, part)
        run = run_of(sizes, offsets, lengths)
        if run is not None:
            assert torch.equal(flat[run[0] : run[0] + run[1]], part.reshape(-1))
        elif part.numel():
            numbers_of = part.reshape(-1)
            assert not torch.equal(
                numbers_of, torch.arange(int(numbers_of[0]), int(numbers_of[0]) + part.numel())
            )
