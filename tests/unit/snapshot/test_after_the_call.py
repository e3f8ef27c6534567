"""Once a save was called, nothing of the user's is run, looked up by its name or referred to for its file (S1).

What pickle would be told is asked at the call; the file is the one that ``torch.save`` would have written then.
"""

from __future__ import annotations

import collections
import copyreg
import enum
import functools
import io
import operator
import pickle
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch

from async_ckpt.errors import StateChangedError, UnpicklableStateError
from async_ckpt.format import lay_out
from async_ckpt.snapshot import Capture, HostBuffer, capture, capture_objects


def _saved(state: Any) -> bytes:
    torch.save(state, file := io.BytesIO())
    return file.getvalue()


def _written(captured: Capture) -> bytes:
    snapshot = captured.stage(HostBuffer(captured.nbytes))
    layout = lay_out(snapshot)
    file = b"".join(layout.read(0, layout.nbytes))
    snapshot.close()
    return file


def _weights() -> Any:
    weight = torch.nn.Parameter(torch.arange(1.0, 2001.0))
    return collections.OrderedDict(
        a=weight, view=weight.data[3:9], b=torch.arange(1, 50), again=weight, c=b"x" * 70_000
    )


# -- who else says how tensors are pickled


@pytest.fixture
def calls() -> list[str]:
    """What of the user's was called."""
    return []


@pytest.fixture
def reducers() -> Iterator[Callable[..., None]]:
    """Register reducers with ``copyreg``, for one test."""
    before = dict(copyreg.dispatch_table)
    yield copyreg.pickle
    copyreg.dispatch_table.clear()
    copyreg.dispatch_table.update(before)


def _as_array(calls: list[str]) -> Callable[[torch.Tensor], Any]:
    def reduce(tensor: torch.Tensor) -> Any:
        calls.append("reduce")
        return torch.from_numpy, (tensor.detach().numpy().copy(),)

    return reduce


def _as_list(calls: list[str]) -> Callable[[torch.Tensor], Any]:
    def reduce(tensor: torch.Tensor) -> Any:
        calls.append("reduce")
        return torch.tensor, (tensor.tolist(),)

    return reduce


@pytest.mark.parametrize("make", [_as_array, _as_list])
@pytest.mark.parametrize(
    "kinds", [(torch.Tensor,), (torch.nn.Parameter,), (torch.Tensor, torch.nn.Parameter)]
)
def test_registered_reducers_are_asked_at_the_call(
    make: Any, kinds: Any, reducers: Any, calls: list[str]
) -> None:
    """With reducers for tensors or parameters, the file is torch.save's; they are called by the save, not after it."""
    for kind in kinds:
        reducers(kind, make(calls))
    state = _weights()
    expected = _saved(state)
    captured = capture(state)
    asked = len(calls)
    assert asked > 0
    for kind in kinds:
        del copyreg.dispatch_table[kind]
    written = _written(captured)
    assert written == expected
    assert len(calls) == asked


@pytest.mark.parametrize("kind", [torch.Tensor, torch.nn.Parameter, collections.OrderedDict, type])
def test_what_is_registered_after_the_call_is_not_asked(kind: Any, reducers: Any, calls: list[str]) -> None:
    """A reducer that comes between the save and the writing changes nothing."""
    state = _weights()
    expected = _saved(state)
    captured = capture(state)
    reducers(kind, _as_array(calls))
    assert _written(captured) == expected
    assert calls == []


class Registers:
    """Registers a reducer for tensors as it is pickled."""

    def __reduce__(self) -> Any:
        copyreg.pickle(torch.Tensor, _as_list([]))
        return Registers, ()


def test_what_registers_a_reducer_while_it_is_pickled_is_obeyed(reducers: Any) -> None:
    """What follows it in the state is pickled as torch.save would pickle it."""
    state = [torch.ones(3), Registers(), torch.zeros(3)]
    written = _written(capture(state))
    assert written == _saved(state)  # by now it is registered for what comes before it, too
    assert copyreg.dispatch_table[torch.Tensor]


@pytest.mark.parametrize("kind", [torch.UntypedStorage, torch.TypedStorage, numpy.ndarray, numpy.dtype])
def test_other_registered_reducers(kind: Any, reducers: Any) -> None:
    """torch.save does not ask reducers for storages, and asks those for arrays: so does a save."""
    reducers(kind, lambda value: (operator.itemgetter, ("replaced",)))
    state = [torch.arange(4.0), torch.arange(3).untyped_storage(), numpy.arange(900.0)]
    assert _written(capture(state)) == _saved(state)


@pytest.mark.parametrize("kind", [collections.OrderedDict, torch.dtype, type(len), type(torch.FloatStorage)])
def test_reducers_of_what_tensors_are_pickled_with(kind: Any, reducers: Any, calls: list[str]) -> None:
    """They are asked as torch.save asks them, for each tensor, and at the call."""
    state = [_weights()["b"], torch.arange(3).to(torch.float8_e5m2), b"x" * 70_000, numpy.arange(9.0)]

    def reduce(value: Any) -> Any:
        calls.append("reduce")
        return str, ("replaced",)

    reducers(kind, reduce)
    expected = _saved(state)
    captured = capture(state)
    asked = len(calls)
    assert asked > 0
    del copyreg.dispatch_table[kind]
    assert _written(captured) == expected
    assert len(calls) == asked


def test_another_pickler_is_used_as_torch_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the pickler that torch.save takes has been replaced, it writes the file, too."""

    class Other(pickle.Pickler):
        def reducer_override(self, obj: Any) -> Any:
            return (str, ("replaced",)) if isinstance(obj, enum.Enum) else NotImplemented

    monkeypatch.setattr(pickle, "Pickler", Other)
    state = [Colour.RED, torch.ones(3)]
    expected = _saved(state)
    captured = capture(state)
    monkeypatch.undo()
    assert b"replaced" in expected
    assert _written(captured) == expected


def _doubled(original: Any, calls: list[str]) -> Any:
    def replaced(self: torch.Tensor, protocol: Any) -> Any:
        calls.append("reduce")
        return torch.from_numpy, (self.detach().numpy() * 2,)

    return replaced


def _passing(original: Any, calls: list[str]) -> Any:
    @functools.wraps(original)
    def replaced(self: torch.Tensor, protocol: Any) -> Any:
        calls.append("reduce")
        if self.numel() > 1000:  # what it does with small ones tells nothing of what it does with these
            return torch.from_numpy, (self.detach().numpy() * 2,)
        return original(self, protocol)

    return replaced


@pytest.mark.parametrize("make", [_doubled, _passing])
@pytest.mark.parametrize("kind", [torch.Tensor, torch.nn.Parameter])
@pytest.mark.parametrize("method", ["__reduce_ex__", "_reduce_ex_internal"])
def test_replaced_methods_are_asked_at_the_call(make: Any, kind: Any, method: str, calls: list[str]) -> None:
    """Where a method by which tensors are pickled was replaced, by one that differs only now and then, it is obeyed."""
    state = _weights()
    plain = _saved(state)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, method, make(getattr(kind, method), calls))
        expected = _saved(state)
        captured = capture(state)
        asked = len(calls)
    assert _written(captured) == expected
    assert len(calls) == asked
    assert _written(capture(state)) == plain  # and afterwards torch is what it was


def test_a_method_that_is_replaced_after_the_call_is_not_asked(
    monkeypatch: pytest.MonkeyPatch, calls: list[str]
) -> None:
    """Nor are functions of torch by which tensors are pickled and rebuilt, which may be gone by then."""
    state = _weights()
    expected = _saved(state)
    captured = capture(state)
    for kind in (torch.Tensor, torch.nn.Parameter):
        monkeypatch.setattr(kind, "__reduce_ex__", _doubled(None, calls))
    monkeypatch.setattr(torch.serialization, "_save", None)
    monkeypatch.setattr(torch._utils, "_rebuild_parameter", None)
    monkeypatch.setattr(torch._utils, "_rebuild_tensor_v2", None)
    assert _written(captured) == expected
    assert calls == []


def test_a_state_of_tensors_that_somebody_adds_is_in_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ``__getstate__`` that tensors were given is asked, as torch.save asks it."""
    monkeypatch.setattr(torch.Tensor, "__getstate__", lambda self: {"note": "added"}, raising=False)
    state = _weights()
    assert _written(capture(state)) == _saved(state)


class Tagged(torch.Tensor):
    """A subclass that says how it is pickled."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _tagged, (self.as_subclass(torch.Tensor) + 1, "tag")


class Watching(torch.Tensor):
    """A subclass that is asked by every function of torch, its own way of being pickled among them."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__reduce_ex__:
            return _tagged, (args[0].as_subclass(torch.Tensor) * 3, "watched")
        parent: Any = super()
        return parent.__torch_function__(func, types, args, kwargs or {})


def _tagged(tensor: torch.Tensor, tag: str) -> torch.Tensor:
    return tensor


class Impostor:
    """Says that it is a storage."""

    __class__ = property(lambda self: torch.UntypedStorage)  # type: ignore[assignment]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Impostor, ()


class Persistent:
    """Has what picklers have."""

    def persistent_id(self, obj: Any) -> Any:
        return "mine"

    def reducer_override(self, obj: Any) -> Any:
        raise AssertionError("nobody's business")


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.arange(9.0).as_subclass(Tagged),
        lambda: torch.nn.Parameter(torch.arange(9.0).as_subclass(Tagged)),
        lambda: torch.arange(9.0).as_subclass(Watching),
        lambda: [Persistent(), torch.ones(2)],
        lambda: Impostor(),
        lambda: (torch.arange(4, dtype=torch.int8)).view(torch.qint8),
        lambda: [
            torch.arange(8, dtype=torch.uint8).view(torch.quint8),
            torch.arange(8).to(torch.int32).view(torch.qint32),
        ],
    ],
)
def test_odd_kinds_are_what_torch_save_writes(make: Callable[[], Any]) -> None:
    """Or they are refused at the call where torch.save refuses them."""
    state = [make(), torch.ones(2)]
    try:
        expected = _saved(state)
    except Exception:
        with pytest.raises(UnpicklableStateError, match=r"state\[0\]"):
            capture(state)
    else:
        assert _written(capture(state)) == expected


def test_a_name_that_pickle_knows_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where names are registered by number, of what tensors are pickled with or of others, the file is torch.save's."""
    for number, name in (
        (240, ("collections", "OrderedDict")),
        (241, ("torch._utils", "_rebuild_tensor_v2")),
    ):
        copyreg.add_extension(*name, number)
        try:
            state = [_weights(), collections.OrderedDict]
            assert _written(capture(state)) == _saved(state)
        finally:
            copyreg.remove_extension(*name, number)
    state = [_weights(), collections.OrderedDict]
    assert _written(capture(state)) == _saved(state)


# -- what is changed or gone when the file is written


class Colour(enum.Enum):
    """A value that is a constant."""

    RED = 1


class Holder:
    """Holds things, and has a method."""

    def __init__(self) -> None:
        self.value = [1]

    def method(self) -> Any:
        return self.value


def _rename(array: Any) -> None:
    array.dtype.names = tuple(f"secret{number}" for number in range(len(array.dtype.names)))


def _structured(length: int) -> Any:
    return numpy.zeros(length, [("a", "i4"), ("b", [("c", "f8")])])


def _dtypes() -> tuple[Any, Callable[[], None]]:
    small, large, inner = _structured(3), _structured(3000), _structured(1).dtype
    alone, kept = numpy.dtype([("x", "i1")]), {"unit": ["m"]}
    noted = numpy.dtype("f8", metadata=kept)

    def change() -> None:
        for each in (small, large, small["b"]):
            _rename(each)
        inner["b"].names = ("secret",)
        alone.names = ("secret",)
        kept["unit"].append("secret")

    return [small, large, small[::2], inner, alone, noted], change


def _bound() -> tuple[Any, Callable[[], None]]:
    holder, keywords, part = Holder(), {"base": [2]}, functools.partial(int, **{"base": 2})  # noqa: PIE804
    items: list[Any] = [1]
    space = types.SimpleNamespace(a=[1])

    def change() -> None:
        holder.value.append("secret")
        keywords["base"].append(3)
        part.keywords["secret"] = 3
        items.append("secret")
        space.a.append("secret")

    return [holder.method, keywords, part, items.append, space, Colour.RED], change


CHANGES: dict[str, Callable[[], tuple[Any, Callable[[], None]]]] = {"dtypes": _dtypes, "bound": _bound}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.filterwarnings("ignore:metadata on a dtype")
def test_nothing_is_shared_that_can_change(name: str) -> None:
    """Types of arrays, bound methods, partial functions and what they hold are in the file as they were."""
    state, change = CHANGES[name]()
    expected = _saved(state)
    captured = capture(state)
    snapshot = captured.stage(HostBuffer(captured.nbytes))
    change()
    layout = lay_out(snapshot)
    written = b"".join(layout.read(0, layout.nbytes))
    assert written == expected
    assert b"secret" not in written


@pytest.mark.filterwarnings("ignore:metadata on a dtype")
def test_objects_share_no_dtype_that_can_change() -> None:
    """Nor are types of arrays shared with a state that a base CheckpointIO is given."""
    state, change = _dtypes()
    captured = capture_objects(state)
    snapshot = captured.stage(HostBuffer(captured.nbytes))
    change()
    rebuilt = snapshot.state()
    assert [array.dtype.names for array in rebuilt[:3]] == [("a", "b")] * 3
    assert rebuilt[3]["b"].names == ("c",)
    assert rebuilt[4].names == ("x",)
    assert rebuilt[0].dtype is rebuilt[2].dtype


@pytest.fixture
def module() -> Iterator[types.ModuleType]:
    """A module that goes away."""
    made = types.ModuleType("a_module_that_goes_away")
    sys.modules[made.__name__] = made
    exec(
        "import enum\n"
        "class Thing:\n    pass\n"
        "class Made(Thing):\n    def __reduce__(self):\n        return make, (1,)\n"
        "class Word(enum.Enum):\n    ONE = 1\n"
        "def make(x, kind=Made):\n    return kind()\n"
        "class Constant:\n    def __reduce__(self):\n        return 'CONSTANT'\n"
        "CONSTANT = Constant()\n",
        vars(made),
    )
    yield made
    sys.modules.pop(made.__name__, None)


def _things(module: Any) -> Any:
    thing = module.Thing()
    thing.weight = torch.arange(600.0)
    return [thing, module.Made(), module.Word.ONE, module.Thing, module.make, module.CONSTANT, thing]


def _deleted(module: Any) -> None:
    for name in ("Thing", "Made", "Word", "make", "CONSTANT"):
        delattr(module, name)


def _dropped(module: Any) -> None:
    del sys.modules[module.__name__]


def _made_again(module: Any) -> None:
    for name in ("Thing", "Made", "Word", "make"):
        setattr(module, name, type(name, (), {"__module__": module.__name__}))


def _renamed(module: Any) -> None:
    for name in ("Thing", "Made", "Word", "make"):
        getattr(module, name).__qualname__ = "Other"
    module.__name__ = "other"


GONE = [_deleted, _dropped, _made_again, _renamed]


@pytest.mark.parametrize("go", GONE)
def test_what_is_gone_after_the_call_is_in_the_file(go: Callable[[Any], None], module: Any) -> None:
    """Classes that are deleted, renamed or made again, and modules that are dropped, do not fail a save."""
    state = _things(module)
    expected = _saved(state)
    captured = capture(state)
    go(module)
    assert _written(captured) == expected


@pytest.mark.parametrize("go", GONE)
def test_what_is_gone_after_the_call_is_given_to_a_base(go: Callable[[Any], None], module: Any) -> None:
    """A base CheckpointIO is given objects of the classes that were there at the call."""
    state = _things(module)
    captured = capture_objects(state)
    snapshot = captured.stage(HostBuffer(captured.nbytes))
    go(module)
    rebuilt = snapshot.state()
    assert [type(each) for each in rebuilt] == [type(each) for each in state]
    assert rebuilt[2] is state[2]
    assert rebuilt[5] is state[5]
    assert rebuilt[0] is not state[0]
    assert torch.equal(rebuilt[0].weight, torch.arange(600.0))


def test_a_quantized_look_at_bytes_is_given_to_a_base() -> None:
    """A tensor that looks at bytes as a quantized type, which torch does not make by itself, is made again."""
    state = torch.arange(12, dtype=torch.int8)[2:].view(torch.qint8)
    captured = capture_objects(state)
    rebuilt = captured.stage(HostBuffer(captured.nbytes)).state()
    assert rebuilt.dtype is torch.qint8
    assert rebuilt.view(torch.int8).tolist() == list(range(2, 12))


# -- how deep a state may be


class Nested:
    """Holds another one, and is pickled by a function."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __reduce__(self) -> Any:
        return Nested, (self.inner,)


def _nested(depth: int) -> Any:
    state: Any = torch.ones(1)
    for _ in range(depth):
        state = Nested(state)
    return state


def _deepest(accepts: Callable[[Any], object]) -> int:
    """Return how many levels are accepted."""
    least, most = 0, 40_000
    while least + 1 < most:
        depth = (least + most) // 2
        try:
            accepts(_nested(depth))
        except (RecursionError, UnpicklableStateError):
            most = depth
        else:
            least = depth
    return least


def test_what_torch_save_reaches_is_reached() -> None:
    """A state may be nested as deeply as for torch.save, but for the few calls around it; all of it is written."""
    ours = _deepest(capture)
    assert ours >= _deepest(_saved) - 20
    assert _written(capture(_nested(ours))) == _saved(_nested(ours))


def test_a_small_stack_bears_what_was_accepted() -> None:
    """However deep a state is for which the caller's stack and recursion limit were enough, any thread lays it out."""
    limit, stack = sys.getrecursionlimit(), threading.stack_size()
    written: list[bytes] = []
    try:
        sys.setrecursionlimit(50_000)
        expected, captured = _saved(_nested(8000)), capture(_nested(8000))
        threading.stack_size(256 << 10)
        thread = threading.Thread(target=lambda: written.append(_written(captured)))
        thread.start()
        thread.join()
    finally:
        sys.setrecursionlimit(limit)
        threading.stack_size(stack)
    assert written == [expected]


# -- memory that is gone


@pytest.mark.parametrize(
    "go",
    [
        lambda state: state["large"].untyped_storage().resize_(0),
        lambda state: state["large"].untyped_storage().resize_(8 << 20),
        lambda state: state["small"].untyped_storage().resize_(0),
        lambda state: state["array"].resize((3,), refcheck=False),
        lambda state: state["array"].resize((0,), refcheck=False),
    ],
)
@pytest.mark.parametrize("take", [capture, capture_objects])
def test_memory_that_was_freed_is_not_read(take: Any, go: Callable[[Any], None]) -> None:
    """Where another thread frees or resizes memory before it is copied, the save fails with an ordinary error."""
    state = {"large": torch.ones(1 << 20), "small": torch.ones(10), "array": numpy.ones(900)}
    other = take(state).stage(HostBuffer(8 << 20))
    captured = take(state)
    assert captured.resembles(other)
    go(state)
    assert not captured.equals(HostBuffer(captured.nbytes))
    with pytest.raises(StateChangedError, match="freed or resized"):
        captured.stage(HostBuffer(captured.nbytes))
