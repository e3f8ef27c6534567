"""``.metadata`` is read as torch wrote it, and a hostile or damaged one is refused before anything comes of it."""

from __future__ import annotations

import io
import os
import pickle
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties as OldTensorProperties
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from async_ckpt.errors import CorruptCheckpointError, IncompleteCheckpointError
from async_ckpt.sharded.manifest import known_to, parse_manifest, read_manifest, save_id_of, write_manifest
from async_ckpt.stores import locate
from async_ckpt.stores.local.store import LocalStore
from async_ckpt.testing import ThreadWorkers

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:torch.distributed is unavailable"),
]


@pytest.fixture
def workers() -> Iterator[ThreadWorkers]:
    """Threads for a store."""
    pool = ThreadWorkers(2)
    yield pool
    pool.close()


STATE = {
    "model": {
        "weight": torch.ones(3, 4),
        "half": torch.zeros(2, dtype=torch.bfloat16),
        "scalar": torch.ones(()),
    },
    "optim": {
        "state": {0: {"exp_avg": torch.ones(3, 4)}},
        "param_groups": [{"lr": 0.1, "params": ["weight"]}],
    },
    "step": 7,
    "empty": torch.empty(0, 5),
}


def written(folder: Path, **options: Any) -> bytes:
    """Return the ``.metadata`` of a checkpoint that torch writes."""
    dcp.save(STATE, storage_writer=FileSystemWriter(folder, **options))
    return (folder / ".metadata").read_bytes()


def small(path: str = "__0_0.distcp", **changes: Any) -> Metadata:
    """Return the description of one tensor."""
    size = torch.Size((4, 2))
    properties = changes.pop("properties", TensorProperties(dtype=torch.float32))
    chunk = ChunkStorageMetadata(torch.Size((0, 0)), changes.pop("chunk", size))
    values: dict[str, Any] = {
        "state_dict_metadata": {
            "a": TensorStorageMetadata(properties, size, [chunk]),
            "b": BytesStorageMetadata(),
        },
        "planner_data": {"a": ("a",), "b": ("b", 0)},
        "storage_data": {MetadataIndex("a", torch.Size((0, 0)), 0): _StorageInfo(path, 0, 1000)},
        "storage_meta": StorageMeta(
            **known_to(StorageMeta, {"checkpoint_id": Path("/run/step-7"), "save_id": "id", "modules": ["x"]})
        ),
        "version": "1.0.0",
    }
    return Metadata(**known_to(Metadata, {**values, **changes}))


@pytest.mark.parametrize("options", [{}, {"thread_count": 2}, {"single_file_per_rank": False}])
def test_what_torch_writes(tmp_path: Path, options: dict[str, Any]) -> None:
    """All of it is read as torch itself reads it."""
    data = written(tmp_path, **options)
    found, expected = parse_manifest(data, "run"), pickle.loads(data)
    assert found.storage_meta is not None
    assert expected.storage_meta is not None
    assert found.storage_meta.checkpoint_id == str(expected.storage_meta.checkpoint_id)
    expected.storage_meta.checkpoint_id = found.storage_meta.checkpoint_id
    assert found == expected


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol(protocol: int) -> None:
    """What other Pythons have written is read as well."""
    assert parse_manifest(pickle.dumps(small(), protocol), "run").storage_data == small().storage_data


def test_what_we_write(tmp_path: Path) -> None:
    """Torch's own reader reads it, and so do we."""
    (tmp_path / ".metadata").write_bytes(write_manifest(small()))
    found = FileSystemReader(tmp_path).read_metadata()
    assert found.state_dict_metadata == small().state_dict_metadata
    assert found.storage_data == small().storage_data
    assert found.storage_meta is not None
    assert found.storage_meta.save_id == "id"
    assert found.version == "1.0.0"
    assert parse_manifest(write_manifest(found), "run").storage_data == small().storage_data


def test_what_torch_2_0_wrote() -> None:
    """It had the properties of a tensor elsewhere, and less of everything else."""
    old = small(properties=OldTensorProperties(dtype=torch.float64))
    data = pickle.dumps(old, 4)
    assert b"sharded_tensor" in data
    tensor = parse_manifest(data, "run").state_dict_metadata["a"]
    assert isinstance(tensor, TensorStorageMetadata)
    assert tensor.properties == TensorProperties(dtype=torch.float64)


def test_transforms_are_told() -> None:
    """Who reads the items must know that they are packed."""
    packed = _StorageInfo("__0_0.distcp", 0, 10)
    packed.transform_descriptors = ["zstd"]
    found = parse_manifest(write_manifest(small(storage_data={MetadataIndex("b"): packed})), "run")
    assert found.storage_data[MetadataIndex("b")].transform_descriptors == ["zstd"]


class Evil:
    """Calls what it names, once it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        """Return the call."""
        return self.call


@pytest.mark.parametrize(
    ("function", "name"),
    [(os.mkdir, "posix.mkdir"), (eval, "builtins.eval"), (getattr, "builtins.getattr"), (io.open, "io.open")],
)
def test_a_name_that_does_not_belong_there(tmp_path: Path, function: Any, name: str) -> None:
    """It is refused by name, wherever in the pickle it stands, and not called."""
    made = tmp_path / "made"
    for at in ("planner_data", "storage_meta", "version", "storage_data"):
        data = pickle.dumps(small(**{at: Evil(function, str(made))}), 4)
        with pytest.raises(CorruptCheckpointError, match=name):
            parse_manifest(data, "run")
    assert not made.exists()


def test_classes_stay_as_they_are() -> None:
    """A pickle that gives a class, not an object, a state changes nothing outside of it."""
    before = dict(vars(Metadata))
    # GLOBAL Metadata, (None, {"__module__": "other"}), BUILD, STOP
    module = b"torch.distributed.checkpoint.metadata\nMetadata\n"
    data = b"\x80\x04c" + module + b"N}\x8c\x0a__module__\x8c\x05others\x86b."
    with pytest.raises(CorruptCheckpointError):
        parse_manifest(data, "run")
    assert dict(vars(Metadata)) == before


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"path": "../other/secret"}, "leads out"),
        ({"path": "/etc/passwd"}, "leads out"),
        ({"path": "a/../../b"}, "leads out"),
        ({"path": "..\\b"}, "leads out"),
        ({"chunk": torch.Size((5, 2))}, "not within its tensor"),
        ({"chunk": torch.Size((8,))}, "not within its tensor"),
        ({"chunk": torch.Size((-1, 2))}, "a size that is not valid"),
        ({"state_dict_metadata": {"a": 3}}, "int instead of"),
        ({"state_dict_metadata": {3: BytesStorageMetadata()}}, "int instead of a name"),
        ({"state_dict_metadata": None}, "NoneType instead of a dict"),
        ({"storage_data": {MetadataIndex("a"): _StorageInfo("x", -1, 5)}}, "-1 instead of a"),
        ({"storage_data": {MetadataIndex("a"): _StorageInfo("x", 0, True)}}, "True instead of a"),
        ({"storage_data": {"a": _StorageInfo("x", 0, 5)}}, "str instead of a MetadataIndex"),
        ({"planner_data": {"a": (b"a",)}}, "path to a value"),
        ({"version": 3}, "int instead of a name"),
    ],
)
def test_what_dcp_would_not_say(changes: dict[str, Any], told: str) -> None:
    """What is well-formed as a pickle, but no description of a checkpoint in this directory, is refused."""
    with pytest.raises(CorruptCheckpointError, match=told):
        parse_manifest(pickle.dumps(small(**changes), 4), "run")


@pytest.mark.parametrize("op", [b"r\xff\xff\xff\x7f", b"q\xff"])
def test_memory_for_what_is_memorized(op: bytes) -> None:
    """A few bytes do not make Python take gigabytes."""
    with pytest.raises(CorruptCheckpointError, match="memo number"):
        parse_manifest(b"\x80\x04}" + op + b".", "run")


@pytest.mark.parametrize("data", [b"", b"\x80\x04N.", b"PK\x03\x04", b"\x80\x04Va\n.", b"\x8d" + b"\xff" * 8])
def test_what_is_no_manifest(data: bytes) -> None:
    """Any other file is refused."""
    with pytest.raises(CorruptCheckpointError, match=r"\.metadata of 'run'"):
        parse_manifest(data, "run")


def test_a_file_that_is_cut_short_or_damaged(tmp_path: Path) -> None:
    """Wherever it ends, it is refused; whatever byte is wrong, it is refused or read, and nothing else happens."""
    data = written(tmp_path)
    for length in range(len(data)):
        with pytest.raises(CorruptCheckpointError):
            parse_manifest(data[:length], "run")
    chance = random.Random(1)
    refused = 0
    for _ in range(2000):
        damaged = bytearray(data)
        damaged[chance.randrange(len(data))] ^= chance.randrange(1, 256)
        try:
            parse_manifest(bytes(damaged), "run")
        except CorruptCheckpointError:
            refused += 1
    assert refused > 1000


def test_from_a_directory(tmp_path: Path, workers: ThreadWorkers) -> None:
    """It is read where it is, and where it is not, that is said, with what to do."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / ".metadata").write_bytes(write_manifest(small()))
    (tmp_path / "begun").mkdir()
    store = LocalStore(workers=workers)

    async def read(name: str) -> Metadata:
        found = await read_manifest(store, locate(tmp_path / name))
        assert await read_manifest(store, locate(tmp_path / name), workers) == found
        return found

    assert save_id_of(anyio.run(read, "whole")) == "id"
    for name in ("begun", "none", "whole/.metadata"):
        with pytest.raises(IncompleteCheckpointError, match="no complete checkpoint") as caught:
            anyio.run(read, name)
        assert isinstance(caught.value, FileNotFoundError)
    os.truncate(tmp_path / "whole" / ".metadata", 50)
    with pytest.raises(CorruptCheckpointError, match="damaged"):
        anyio.run(read, "whole")
