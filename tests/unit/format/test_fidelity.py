"""Whatever a state consists of, the file laid out from its snapshot is the one torch.save would write (S1, S2)."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import enum
import fractions
import functools
import io
import itertools
import pathlib
import pickle
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy
import pytest
import torch
import torch.distributed as dist

from async_ckpt.errors import UnpicklableStateError
from async_ckpt.format import Layout, lay_out
from async_ckpt.format.writing.recorder import record_writing
from async_ckpt.format.writing.torch_writer import skip_writing
from async_ckpt.snapshot import Snapshot, capture

Take = Callable[[Any], Snapshot]
Saved = Callable[[Any], bytes]


class Colour(enum.Enum):
    """A value that is a constant."""

    RED = 1


class Point(NamedTuple):
    """A tuple with names."""

    x: Any
    y: Any


@dataclasses.dataclass
class Record:
    """A dataclass."""

    weight: torch.Tensor
    note: str = "note"


class Slotted:
    """An object without a dict."""

    __slots__ = ("first", "second")

    def __init__(self) -> None:
        self.first, self.second = torch.arange(3), "second"


class Reader:
    """Reads a tensor when it is rebuilt: a rebuild over stand-ins would find zeros."""

    def __init__(self, count: torch.Tensor) -> None:
        self.count = int(count)

    def __getstate__(self) -> dict[str, torch.Tensor]:
        return {"count": torch.tensor(self.count)}

    def __setstate__(self, state: dict[str, torch.Tensor]) -> None:
        self.count = int(state["count"])


class Bomb:
    """Cannot be rebuilt at all here, as an object that needs a device or a connection cannot."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _explode, (torch.arange(4),)


def _explode(_: torch.Tensor) -> None:
    raise RuntimeError("the state was rebuilt")


class Pairs(dict[Any, Any]):
    """A dict with attributes, and one that refers to itself."""


class Items(list[Any]):
    """A list with attributes."""


class Setter:
    """Is given its state by a function of its own."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __reduce__(self) -> tuple[Any, ...]:
        return Setter, (None,), {"value": self.value}, None, None, _set_value


def _set_value(target: Setter, state: dict[str, Any]) -> None:
    target.value = state["value"]


class Tagged(torch.Tensor):
    """A tensor subclass with state."""

    tag: Any


def _tagged() -> Tagged:
    tensor = torch.arange(6.0).as_subclass(Tagged)
    tensor.tag = {"scale": torch.ones(2)}
    return tensor


def _model() -> torch.nn.Module:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3))
    model[2].weight = torch.nn.Parameter(model[0].weight.detach().T.contiguous())
    model.register_buffer("tied", model[0].weight.data)
    return model


def _trained() -> dict[str, Any]:
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    return {
        "state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "rng": {
            "torch": torch.get_rng_state(),
            "python": random.getstate(),
            "numpy": numpy.random.get_state(),
        },
        "epoch": 3,
        "loss": torch.tensor(0.5),
    }


def _with_python_state(tensor: torch.Tensor) -> torch.Tensor:
    tensor.note = [1, 2]  # type: ignore[attr-defined]
    return tensor


def _cycle() -> Any:
    state: dict[str, Any] = {"t": torch.arange(3)}
    state["self"] = state
    items = Items([state])
    items.append(items)
    items.owner = items  # type: ignore[attr-defined]
    state["items"] = items
    pairs = Pairs(a=items)
    pairs["me"] = pairs
    pairs.note = "note"  # type: ignore[attr-defined]
    state["pairs"] = pairs
    return state


def _ties() -> Any:
    base = torch.arange(12.0)
    again = [base]
    return [
        base,
        base,
        base[3:9:2],
        base.view(3, 4).T,
        again,
        again,
        base.expand(2, 12),
    ]


def _structured() -> Any:
    return numpy.array([(1, 2.5)], dtype=[("a", "i4"), ("b", "f8")])


STATES: dict[str, Callable[[], Any]] = {
    "nothing": lambda: None,
    "plain values": lambda: {"i": 1, "f": 0.5, "s": "é", "b": b"\xff", "n": None, "l": [1, (2,)], 3: 1 << 80},
    "a trained model": _trained,
    "a module": _model,
    "a module in a list, twice": lambda: [m := _model(), m],
    "metadata of a state dict": lambda: _model().state_dict(),
    "ties and views": _ties,
    "overlapping strides": lambda: torch.arange(9.0).as_strided((3, 3), (1, 2), 1),
    "a view that ends early": lambda: torch.arange(100.0)[10:20],
    "no dimension": lambda: [torch.tensor(1.5), torch.tensor(True)],
    "no elements": lambda: [torch.empty(0), torch.empty(3, 0, 2), torch.empty(0, dtype=torch.int8)],
    "conjugate": lambda: torch.tensor([1 + 2j, 3 - 1j]).conj(),
    "negative": lambda: torch.tensor([1 + 2j, 3 - 1j]).conj().imag,
    "dtypes": lambda: [
        torch.arange(5).to(d) for d in (torch.bfloat16, torch.half, torch.bool, torch.complex64)
    ],
    "new dtypes": lambda: [torch.arange(5).to(d) for d in (torch.float8_e5m2, torch.float8_e4m3fn)],
    "a new dtype over bytes": lambda: [b := torch.arange(8, dtype=torch.uint8), b.view(torch.float8_e5m2)],
    "requires grad": lambda: [torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True) * 2],
    "parameters": lambda: [p := torch.nn.Parameter(torch.ones(2)), p, torch.nn.Parameter(p.data, False)],
    "a parameter with state": lambda: _with_python_state(torch.nn.Parameter(torch.ones(2))),
    "a tensor with state": lambda: _with_python_state(torch.ones(2)),
    "a subclass": lambda: [t := _tagged(), t],
    "a subclass of a new dtype": lambda: torch.arange(4).to(torch.float8_e5m2).as_subclass(Tagged),
    "sparse COO": lambda: torch.eye(4).to_sparse(),
    "sparse CSR": lambda: torch.eye(4).to_sparse_csr(),
    "sparse BSC": lambda: torch.eye(4).to_sparse_bsc((2, 2)),
    "quantized": lambda: torch.quantize_per_tensor(torch.arange(6.0), 0.1, 3, torch.qint8),
    "quantized by channel": lambda: torch.quantize_per_channel(
        torch.randn(3, 4), torch.tensor([0.1, 0.2, 0.3]), torch.tensor([1, 2, 3]), 0, torch.quint8
    ),
    "nested": lambda: torch.nested.nested_tensor([torch.arange(3.0), torch.arange(5.0)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.arange(3.0), torch.arange(5.0)], layout=torch.jagged),
    "meta": lambda: torch.empty(3, 4, device="meta"),
    "a generator": lambda: torch.Generator().manual_seed(7),
    "typed storage": lambda: torch.arange(4.0).storage(),
    "untyped storage": lambda: [s := torch.arange(4, dtype=torch.uint8).untyped_storage(), s],
    "a freed storage": lambda: _freed(),
    "ordered and default dicts": lambda: [collections.OrderedDict(a=1), collections.defaultdict(list, a=[2])],
    "more containers": lambda: [
        collections.deque([1, 2], 5),
        collections.Counter("aab"),
        slice(1, 2),
        range(3),
    ],
    "sets": lambda: [set(), {1, 2, 3}, frozenset([4, 5]), {"one"}],
    "a set of objects": lambda: {Colour.RED},
    "tensors and storages as keys": lambda: {
        (t := torch.ones(2)): 1,
        t.detach(): 2,
        (s := torch.arange(3, dtype=torch.uint8)).untyped_storage(): 3,
        s: {s},
    },
    "objects as keys": lambda: {Point(1, 2): torch.ones(1), Colour.RED: 1, (1, (2, 3)): 2},
    "values with a reduce": lambda: [
        1 + 2j,
        datetime.datetime(2020, 1, 1),
        fractions.Fraction(1, 3),
        Colour.RED,
    ],
    "paths and partials": lambda: [pathlib.PurePosixPath("a/b"), functools.partial(int, base=2)],
    "functions and classes": lambda: [
        len,
        torch.nn.Linear,
        _explode,
        "x".join,
        Colour,
        ...,
        NotImplemented,
        type(None),
    ],
    "namedtuples": lambda: [p := Point(torch.ones(1), [2]), p, torch.ones(2, 2).max(0)],
    "dataclasses": lambda: Record(torch.arange(3)),
    "slots": Slotted,
    "an object that reads its tensors": lambda: Reader(torch.tensor(41)),
    "an object that cannot be rebuilt here": Bomb,
    "a state setter": lambda: [s := Setter(torch.ones(2)), s],
    "an exception": lambda: ValueError("text", 3),
    "cycles": _cycle,
    "large strings": lambda: [s := "é" * 70_000, s, b := b"\xfe" * 70_000, b, bytearray(b"abc")],
    "numpy": lambda: [a := numpy.arange(6.0), a, a[::2], numpy.float32(1.5), a.dtype, numpy.arange(3) > 1],
    "numpy orders": lambda: [
        numpy.ones((3, 4), order="F"),
        numpy.ones((3, 4)).T[1:],
        numpy.ones((2, 3, 4)).swapaxes(0, 1),
    ],
    "numpy kinds": lambda: [
        numpy.array(["ab", "c"]),
        numpy.array(["2020"], "M8[Y]"),
        _structured(),
        numpy.empty((0, 3)),
    ],
    "numpy without dimension": lambda: numpy.array(3),
    "numpy objects": lambda: numpy.array([{"a": torch.ones(1)}, None, [1]], dtype=object),
    "masked arrays": lambda: numpy.ma.masked_array([1, 2], [0, 1]),
    "record arrays": lambda: numpy.rec.array([(1, 2.0)]),
    "numpy generators": lambda: numpy.random.default_rng(3),
    "words that torch writes": lambda: [
        "cpu",
        "storage",
        "0",
        torch.ones(2),
        "1",
        torch.arange(3),
        "data",
        (),
    ],
    "many larger tensors": lambda: {
        str(index): torch.full((250 + index % 17,), float(index)) for index in range(1200)
    },
    "many tensors": lambda: {str(index): torch.full((index % 7,), float(index)) for index in range(1200)},
}


def _freed() -> torch.Tensor:
    tensor = torch.arange(4.0)
    tensor.untyped_storage().resize_(0)
    return tensor


class _Scrambler(pickle.Pickler):
    """Overwrites every storage and array that pickling a state comes upon."""

    def persistent_id(self, obj: Any) -> int | None:
        if torch.is_storage(obj):
            (obj._untyped_storage if isinstance(obj, torch.TypedStorage) else obj).fill_(171)
            return 0
        if type(obj) is numpy.ndarray and not obj.dtype.hasobject:
            obj[...] = numpy.zeros((), obj.dtype)
        return None


def scramble(state: Any) -> None:
    """Change a state in every way that reaches its tensors, arrays and outer container."""
    _Scrambler(io.BytesIO(), 2).dump(state)
    if isinstance(state, (dict, list)):
        state.clear()


@pytest.mark.parametrize("name", STATES)
def test_the_file_is_the_one_torch_save_writes(name: str, take: Take, saved: Saved) -> None:
    """The file equals torch.save's, byte for byte, however it is cut and whatever happened to the state since."""
    state = STATES[name]()
    expected = saved(state)
    snapshot = take(state)
    scramble(state)
    can_skip = hasattr(torch._C.PyTorchFileWriter, "write_record_metadata")
    assert skip_writing(snapshot, snapshot.records()) or not can_skip, "the slow way"
    layout = lay_out(snapshot)
    draw = random.Random(name)
    cuts = sorted({0, layout.nbytes, *(draw.randrange(layout.nbytes) for _ in range(20))})
    ranges = list(itertools.pairwise(cuts))
    draw.shuffle(ranges)
    file = bytearray(layout.nbytes)
    for start, stop in ranges:
        file[start:stop] = b"".join(layout.read(start, stop))
    assert bytes(file) == expected


@pytest.mark.parametrize("name", STATES)
def test_torch_would_write_the_same_over_stand_ins(name: str, take: Take, saved: Saved) -> None:
    """The way that is taken where torch is not known well enough leads to the same file."""
    state = STATES[name]()
    expected = saved(state)
    snapshot = take(state)
    scramble(state)
    layout = Layout(snapshot, record_writing(snapshot, snapshot.records()))
    assert b"".join(layout.read(0, layout.nbytes)) == expected


NEVER_LIVE = {"an object that cannot be rebuilt here", "a freed storage"}
#: Unpickling interns the names of attributes, so a name that is also a key is written twice or once.
INTERNED = {"cycles", "dataclasses", "masked arrays", "slots"}


@pytest.mark.parametrize("name", sorted(set(STATES) - NEVER_LIVE - INTERNED))
def test_the_rebuilt_state_is_the_state(name: str, take_objects: Take, saved: Saved) -> None:
    """What a base CheckpointIO is given saves to the same bytes as the state did before it was changed."""
    state = STATES[name]()
    expected = saved(state)
    snapshot = take_objects(state)
    scramble(state)
    assert saved(snapshot.state()) == expected


def test_a_rebuild_leaves_nothing_in_torch(take_objects: Take) -> None:
    """Rebuilding sparse tensors queues none of them for a later torch.load to validate."""
    take_objects([torch.eye(4).to_sparse(), torch.eye(4).to_sparse_csr()]).state()
    waiting: Any = getattr(torch._utils, "_get_sparse_tensors_to_validate", None)  # from torch 2.15 on
    assert not (waiting() if waiting else torch._utils._sparse_tensors_to_validate)


def test_weights_only_loads_what_it_would_have_loaded(take: Take) -> None:
    """A state that loads with weights_only=True after torch.save does so after a snapshot (S2)."""
    state = _model().state_dict()
    layout = lay_out(take(state))
    loaded = torch.load(io.BytesIO(b"".join(layout.read(0, layout.nbytes))), weights_only=True)
    assert loaded._metadata == state._metadata  # type: ignore[attr-defined]
    torch.testing.assert_close(loaded, state)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_unsigned_dtypes_are_saved_or_refused_as_torch_does(
    dtype: torch.dtype, take: Take, saved: Saved
) -> None:
    """Where torch.save refuses a dtype, as it did before 2.5, so does capture; else the files are equal."""
    state = torch.arange(5).to(dtype)
    try:
        expected = saved(state)
    except KeyError:
        with pytest.raises(UnpicklableStateError, match="not recognized"):
            capture(state)
    else:
        layout = lay_out(take(state))
        assert b"".join(layout.read(0, layout.nbytes)) == expected


@pytest.fixture
def world() -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:DTensor random operators")  # torch 2.4, on a CPU mesh
@pytest.mark.usefixtures("world")
def test_distributed_tensors(take: Take, take_objects: Take, saved: Saved) -> None:
    """A DTensor is saved as torch.save saves it, from the snapshot's memory."""
    from torch.distributed.device_mesh import init_device_mesh

    # the public name has been there since 2.5
    tensors: Any = pytest.importorskip(
        "torch.distributed.tensor" if hasattr(torch, "accelerator") else "torch.distributed._tensor"
    )

    mesh = init_device_mesh("cpu", (1,))
    state = {"w": tensors.distribute_tensor(torch.arange(8.0), mesh, [tensors.Shard(0)])}
    expected = saved(state)
    snapshot, objects = take(state), take_objects(state)
    state["w"].to_local().fill_(3)
    layout = lay_out(snapshot)
    assert b"".join(layout.read(0, layout.nbytes)) == expected
    rebuilt = objects.state()["w"]
    assert torch.equal(rebuilt.to_local(), torch.arange(8.0))
