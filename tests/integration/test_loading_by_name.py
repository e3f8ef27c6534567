"""What ``torch.load`` makes of a file by its name, of old files, and of arguments for the unpickler: so does ours.

From a local disk, and from stores that are read by ranges; compared with torch.load of a local copy.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import tarfile
import types
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import async_ckpt
from async_ckpt import CorruptCheckpointError
from async_ckpt.lightning.plugin import AsyncCheckpointIO
from stress.servers import s3
from stress.servers.process import Server
from tests.archives import written
from tests.loads import Counting
from tests.servers import fresh_bucket

pytestmark = pytest.mark.filterwarnings("ignore:.*TypedStorage is deprecated")

Put = Callable[[str, bytes], tuple[Path, Callable[..., Any]]]

NUMBERS: dict[str, torch.Tensor] = {
    "net.0.weight": torch.linspace(-1, 1, 600_000).reshape(3, -1),
    "net.0.bias": torch.arange(5, dtype=torch.int64),
    "half": torch.ones(7, 3, dtype=torch.bfloat16),
    "flags": torch.tensor([True, False, True]),
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "empty": torch.empty(0, 4, dtype=torch.int8),
    "eighth": torch.ones(9).to(torch.float8_e4m3fn),
}
_KINDS = {
    torch.float32: "F32",
    torch.int64: "I64",
    torch.bfloat16: "BF16",
    torch.bool: "BOOL",
    torch.float64: "F64",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
}


def bytes_of(tensor: torch.Tensor) -> bytes:
    """Return the bytes of what lies in memory without a gap."""
    return bytes(tensor.reshape(-1).view(torch.uint8).numpy())


def safetensors(tensors: dict[str, torch.Tensor], **metadata: str) -> bytes:
    """Return a file as the package safetensors writes it."""
    said: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    data = b""
    for name, each in tensors.items():
        raw = bytes_of(each)
        said[name] = {
            "dtype": _KINDS[each.dtype],
            "shape": list(each.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    head = json.dumps(said).encode()
    return struct.pack("<Q", len(head)) + head + data


def tar_of_torch_0_1(state: Callable[[Callable[[Any], Any]], Any], tensors: list[torch.Tensor]) -> bytes:
    """Return what torch 0.1 wrote: *state*, given a function that refers to a tensor, and *tensors*."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:", format=tarfile.PAX_FORMAT) as tar:

        def add(name: str, data: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))

        class Pickler(pickle.Pickler):
            def persistent_id(self, value: Any) -> str | None:
                return str(value.number) if isinstance(value, Reference) else None

        add("sys_info", pickle.dumps({"protocol_version": 1000, "little_endian": True}, 2))
        pickled = io.BytesIO()
        Pickler(pickled, 2).dump(state(Reference))
        add("pickle", pickled.getvalue())
        described = pickle.dumps(len(tensors), 2)
        for number, each in enumerate(tensors):
            described += pickle.dumps((number, 100 + number, torch.FloatTensor), 2)
            described += struct.pack("<ii", each.dim(), 0)
            described += struct.pack(f"<{each.dim()}q", *each.shape) + struct.pack(
                f"<{each.dim()}q", *each.stride()
            )
            described += struct.pack("<q", each.storage_offset())
        add("tensors", described)
        stored = pickle.dumps(len(tensors), 2)
        for number, each in enumerate(tensors):
            stored += pickle.dumps((100 + number, "cpu", torch.FloatStorage), 2)
            stored += struct.pack("<q", each.numel()) + bytes_of(each)
        add("storages", stored + pickle.dumps([], 2))
    return file.getvalue()


class Reference:
    """Stands for a tensor of a file of torch 0.1."""

    def __init__(self, number: int) -> None:
        self.number = number


def outcome(load: Callable[[], Any]) -> Any:
    """Return what was loaded, or the class of the error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return load()
        except Exception as error:
            return type(error)


def same(found: Any, expected: Any) -> bool:
    """Tell whether two states are equal, tensors and all."""
    if isinstance(expected, torch.Tensor):
        if (found.dtype, found.shape) != (expected.dtype, expected.shape):
            return False
        if found.itemsize == 1:  # some of which torch does not compare
            found, expected = found.view(torch.uint8), expected.view(torch.uint8)
        return torch.equal(found, expected)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(
            same(found[key], each) for key, each in expected.items()
        )
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    return bool(found == expected)


@pytest.fixture(params=["local", "memory"])
def put(request: pytest.FixtureRequest, tmp_path: Path) -> Put:
    """Put a file of some bytes somewhere; return a local copy, and what loads the file."""

    def put(name: str, data: bytes) -> tuple[Path, Callable[..., Any]]:
        copy = tmp_path / name
        copy.write_bytes(data)
        if request.param == "local":
            return copy, lambda **options: async_ckpt.load(copy, **options)

        def load_from_memory(**options: Any) -> Any:
            with async_ckpt.CheckpointService(store_factory=lambda *_: Counting(data)) as service:
                return service.load(f"memory://run/{name}", **options)

        return copy, load_from_memory

    return put


# -- safetensors


@pytest.mark.parametrize("weights_only", [True, False, None])
def test_safetensors(put: Put, weights_only: bool | None) -> None:
    """A file that is named so loads without the package that wrote it, whatever ``weights_only`` says."""
    _, load = put("model.safetensors", safetensors(NUMBERS, format="pt"))
    assert same(load(weights_only=weights_only), NUMBERS)
    assert {each.device.type for each in load(map_location="meta").values()} == {"meta"}
    assert same(
        load(keys=["net.*", "scalar"]),
        {key: NUMBERS[key] for key in ("net.0.weight", "net.0.bias", "scalar")},
    )
    with pytest.raises(KeyError, match=r"net\.0\.weight"):
        load(keys="net.0.wait")


def test_safetensors_as_torch_loads_them(put: Put) -> None:
    """Where torch and the package safetensors can, what is loaded, or refused, is what they load, or refuse."""
    package = pytest.importorskip("safetensors.torch")
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
        pytest.skip("torch.load knows them since 2.13")
    kinds = (torch.float16, torch.uint16, torch.uint32, torch.uint64, torch.complex64, torch.float8_e5m2)
    tensors = {**NUMBERS, **{str(kind): torch.ones(3, 2).to(kind) for kind in kinds}}
    copy, load = put("model.safetensors", package.save(tensors, metadata={"a": "b"}))
    expected = torch.load(copy)
    assert same(load(), expected)
    assert same(expected, tensors)
    for options in (
        {"map_location": {"cpu": "meta"}},
        {"map_location": lambda storage, _: storage},
        {"pickle_module": pickle},
        {"pickle_module": pickle, "weights_only": True},
        {"map_location": torch.device("cpu")},
        {"encoding": "latin1", "weights_only": False},
    ):
        ours = {"weights_only": None, **options}  # torch's default, and not ours
        assert same(
            outcome(lambda ours=ours: load(**ours)),
            outcome(lambda options=options: torch.load(copy, **options)),
        )


def test_a_torch_archive_that_is_named_so(put: Put) -> None:
    """What we, and torch.save, have written under such a name is the archive that it is."""
    _, load = put("odd.safetensors", written({"a": torch.ones(3)}))
    assert same(load(), {"a": torch.ones(3)})


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d[:-1],
        lambda d: d[:100],
        lambda d: d[:5],
        lambda d: b"",
        lambda d: d + b"x",
        lambda d: b"\xff" * 8 + d[8:],
    ],
)
def test_damaged_safetensors(put: Put, damage: Callable[[bytes], bytes]) -> None:
    """A file that is not whole is told to be damaged, and nothing is advised that would run code."""
    _, load = put("model.safetensors", damage(safetensors(NUMBERS)))
    with pytest.raises(CorruptCheckpointError, match=r"safetensors|too early") as told:
        load()
    assert "weights_only" not in str(told.value)


def test_only_what_is_wanted_of_safetensors_moves() -> None:
    """Of the tensors, no more is fetched than was asked for."""
    store = Counting(safetensors({**NUMBERS, "large": torch.zeros(5_000_000)}))
    with async_ckpt.CheckpointService(store_factory=lambda *_: store) as service:
        assert same(service.load("memory://x.safetensors", keys="half"), {"half": NUMBERS["half"]})
    assert store.moved < 1 << 20


# -- files of torch 0.1, and of the format after that


def test_tar_files_of_torch_0_1(put: Put) -> None:
    """They load with ``weights_only=False``, and are refused with torch's own words without."""
    tensors = [torch.linspace(0, 1, 60_000).reshape(300, 200), torch.ones(3)]
    data = tar_of_torch_0_1(lambda ref: OrderedDict(a=ref(0), b=[ref(1), "text"]), tensors)
    copy, load = put("old.pth", data)
    expected = torch.load(copy, weights_only=False)
    assert same(dict(expected), {"a": tensors[0], "b": expected["b"]})
    assert same(dict(load(weights_only=False)), dict(expected))
    assert same(load(weights_only=False, keys="a"), OrderedDict(a=tensors[0]))
    for weights_only in (True, None):
        with pytest.raises(RuntimeError, match=r"legacy \.tar format") as told:
            load(weights_only=weights_only)
        with pytest.raises(RuntimeError) as theirs:
            torch.load(copy, weights_only=weights_only)
        assert str(told.value) == str(theirs.value)


def test_a_tar_that_is_refused_is_not_looked_into() -> None:
    """Its first block, and that it may not be read, are enough to refuse a tar, whatever else it says of itself."""
    head = tarfile.TarInfo("headers")
    head.type, head.size = (
        tarfile.XHDTYPE,
        1 << 40,
    )  # torch would read as much as there is of them into memory
    store = Counting(head.tobuf(tarfile.PAX_FORMAT) + bytes(8_000_000))
    with async_ckpt.CheckpointService(store_factory=lambda *_: store) as service:
        with pytest.raises(RuntimeError, match=r"legacy \.tar format"):
            service.load("memory://old.pth")


@pytest.mark.parametrize(
    "data",
    [
        tar_of_torch_0_1(lambda ref: ref(0), [torch.ones(9)])[:2000],
        tarfile.TarInfo("other").tobuf() + bytes(1024),
    ],
    ids=["cut", "another"],
)
@pytest.mark.parametrize("weights_only", [True, False])
def test_tar_files_that_torch_refuses(put: Put, data: bytes, weights_only: bool) -> None:
    """A tar file that is none of torch's is refused as torch.load refuses it, or as damaged."""
    copy, load = put("old.pth", data)
    expected = outcome(lambda: torch.load(copy, weights_only=weights_only))
    assert outcome(lambda: load(weights_only=weights_only)) in (expected, CorruptCheckpointError)
    assert isinstance(expected, type)


@pytest.mark.parametrize("weights_only", [True, False])
def test_files_of_the_format_before_archives(put: Put, weights_only: bool) -> None:
    """They load, in whole and in part."""
    state = {"a": torch.linspace(0, 1, 400_000), "b": {"c": torch.ones(3), "d": 4}}
    copy, load = put("old.pth", written(state, _use_new_zipfile_serialization=False))
    assert same(load(weights_only=weights_only), torch.load(copy, weights_only=weights_only))
    assert same(load(weights_only=weights_only, keys="b.*"), {"b": state["b"]})


# -- arguments for the unpickler


def of_python_2(*, old: bool) -> bytes:
    """Return a checkpoint with a text of Python 2 in it, beside much else."""
    data = written(
        {"padding": torch.ones(400_000), "key": 7}, _use_new_zipfile_serialization=not old, pickle_protocol=2
    )
    if old:
        return data.replace(b"X\x03\x00\x00\x00key", b"U\x06caf\xe9\xe9\xe9", 1)
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as before, zipfile.ZipFile(file, "w") as after:
        for name in before.namelist():
            record = before.read(name)
            if name.endswith("data.pkl"):
                record = record.replace(b"X\x03\x00\x00\x00key", b"U\x06caf\xe9\xe9\xe9", 1)
            after.writestr(name, record)
    return file.getvalue()


OPTIONS: list[dict[str, Any]] = [
    {},
    {"encoding": "latin1"},
    {"encoding": "bytes"},
    {"encoding": "ascii"},
    {"errors": "replace"},
    {"nonsense": 1},
]


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("weights_only", [True, False])
def test_encoding(put: Put, old: bool, options: dict[str, Any], weights_only: bool) -> None:
    """A checkpoint of Python 2 is read as ``encoding=`` and ``errors=`` say, or refused, as by torch.load."""
    copy, load = put("two.pth", of_python_2(old=old))
    expected = outcome(lambda: torch.load(copy, weights_only=weights_only, **options))
    assert same(outcome(lambda: load(weights_only=weights_only, **options)), expected)
    if options.get("encoding") == "latin1" and not weights_only:
        assert "caf\xe9\xe9\xe9" in expected


def renaming(kind: Any = None) -> Any:
    """Return a module that unpickles what has moved, as people write them."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) == ("collections", "OrderedDict"):
                return kind or Moved
            return super().find_class(module, name)

    def load(file: Any, **options: Any) -> Any:
        return Unpickler(file, **options).load()

    return types.SimpleNamespace(Unpickler=Unpickler, load=load, __name__="renaming")


class Moved(OrderedDict[str, Any]):
    """What an OrderedDict has become."""


class Looking(Moved):
    """One that looks at what it is given."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value.clone())


@pytest.mark.parametrize("old", [False, True])
def test_a_pickle_module(put: Put, old: bool) -> None:
    """What another module unpickles is what it makes of it; with ``weights_only`` that is refused, as by torch."""
    state = OrderedDict(a=torch.linspace(0, 1, 400_000), b=OrderedDict(c=1))
    copy, load = put("moved.pth", written(state, _use_new_zipfile_serialization=not old))
    options = {"pickle_module": renaming(), "weights_only": False}
    expected = torch.load(copy, **options)
    found = load(**options)
    assert type(found) is type(found["b"]) is type(expected) is Moved
    assert same(dict(found), dict(expected))
    assert type(load(keys="b", **options)["b"]) is Moved
    with pytest.raises(RuntimeError, match="explicit pickle_module"):
        load(pickle_module=renaming())  # weights_only is True unless it is said otherwise


def test_a_pickle_module_that_looks_at_tensors(put: Put) -> None:
    """It finds them filled, as it does with torch.load of an archive."""
    state = OrderedDict(a=torch.linspace(0, 1, 400_000))
    _, load = put("moved.pth", written(state))
    for keys in (None, "a"):
        found = load(pickle_module=renaming(Looking), weights_only=False, keys=keys)
        assert same(dict(found), dict(state))


def test_dill(put: Put) -> None:
    """So is what dill has pickled, which nothing else reads."""
    dill = pytest.importorskip("dill")
    file = io.BytesIO()
    torch.save({"f": lambda x: x + 1, "a": torch.ones(3)}, file, pickle_module=dill)
    copy, load = put("dill.pth", file.getvalue())
    assert load(pickle_module=dill, weights_only=False)["f"](2) == 3
    assert outcome(lambda: load()) is outcome(lambda: torch.load(copy))


def test_torchscript(put: Put) -> None:
    """An archive of TorchScript is handed to ``torch.jit.load`` with ``weights_only=False``, and else refused."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(torch.nn.Linear(3, 2), torch.ones(1, 3)), file)
    copy, load = put("script.pt", file.getvalue())
    assert outcome(lambda: load()) is outcome(lambda: torch.load(copy)) is RuntimeError
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, expected = load(weights_only=False), torch.load(copy, weights_only=False)
    assert torch.equal(found(torch.ones(1, 3)), expected(torch.ones(1, 3)))


def test_the_plugin_passes_them_on(tmp_path: Path) -> None:
    """``load_checkpoint`` of the plugin takes what torch.load takes."""
    path = tmp_path / "two.pth"
    path.write_bytes(of_python_2(old=False))
    (tmp_path / "model.safetensors").write_bytes(safetensors(NUMBERS))
    with AsyncCheckpointIO() as plugin:
        assert "caf\xe9\xe9\xe9" in plugin.load_checkpoint(path, weights_only=False, encoding="latin1")
        assert same(plugin.load_checkpoint(tmp_path / "model.safetensors"), NUMBERS)
        path.write_bytes(written(OrderedDict(a=1)))
        options = {"weights_only": False, "pickle_module": renaming()}
        assert type(plugin.load_checkpoint(path, **options)) is Moved


@pytest.mark.integration
def test_all_of_it_from_s3(seaweedfs: Server, tmp_path: Path) -> None:
    """From a real server, what is loaded is what it is from a local copy."""
    bucket = fresh_bucket(seaweedfs)
    tar = tar_of_torch_0_1(lambda ref: OrderedDict(a=ref(0)), [torch.linspace(0, 1, 60_000)])
    unsafe: dict[str, Any] = {"weights_only": False}
    for name, data, options in [
        ("old.pth", tar, unsafe),
        ("refused.pth", tar, {}),
        ("legacy.pth", written(NUMBERS, _use_new_zipfile_serialization=False), {}),
        ("two.pth", of_python_2(old=False), {**unsafe, "encoding": "latin1"}),
        ("two-old.pth", of_python_2(old=True), {**unsafe, "encoding": "bytes"}),
        ("moved.pth", written(OrderedDict(a=torch.ones(400_000))), {**unsafe, "pickle_module": renaming()}),
    ]:
        (tmp_path / name).write_bytes(data)
        s3.call(seaweedfs.url, "PUT", f"{bucket}/{name}", data)
        expected = outcome(lambda name=name, options=options: torch.load(tmp_path / name, **options))
        found = outcome(lambda name=name, options=options: from_s3(seaweedfs, f"{bucket}/{name}", options))
        assert type(found).__name__ == type(expected).__name__
        assert same(found, expected)
    s3.call(seaweedfs.url, "PUT", f"{bucket}/model.safetensors", safetensors(NUMBERS))
    assert same(from_s3(seaweedfs, f"{bucket}/model.safetensors", {}), NUMBERS)


def from_s3(server: Server, name: str, options: dict[str, Any]) -> Any:
    """Load from a server."""
    return async_ckpt.load(f"s3://{name}", storage_options=server.storage_options, **options)
