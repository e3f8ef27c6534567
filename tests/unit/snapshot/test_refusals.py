"""What cannot be saved is refused by the call that saves it; or shared, with a writer that may not pickle."""

from __future__ import annotations

import copyreg
import io
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from async_ckpt.errors import UnpicklableStateError
from async_ckpt.format import lay_out
from async_ckpt.snapshot import HostBuffer, Snapshot, capture, capture_objects


def _take(state: Any) -> Snapshot:
    made = capture_objects(state, share_unpicklable=True)
    return made.stage(HostBuffer(made.nbytes))


class Broken:
    """Refuses to be pickled, in its own words."""

    def __reduce__(self) -> Any:
        raise ValueError("never")


class Holder:
    """Holds things."""

    def __init__(self, **things: Any) -> None:
        self.__dict__.update(things)


class Careful(Holder):
    """Knows that its lock cannot be saved."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: thing for name, thing in self.__dict__.items() if name != "lock"}


def _deep() -> Any:
    state: list[Any] = []
    for _ in range(100_000):
        state = [state]
    return state


@pytest.mark.parametrize(
    ("state", "where"),
    [
        ({"a": [1, {"f": lambda: 0}]}, "state['a'][1]['f']"),
        ({"h": Holder(ok=1, lock=threading.Lock())}, "state['h'].lock"),
        ({"c": Careful(lock=threading.Lock(), gen=(i for i in ""))}, "state['c'].gen"),
        ((torch.ones(1), Broken()), "state[1]"),
        ({"od": __import__("collections").OrderedDict(x=Broken())}, "state['od']['x']"),
        ({"m": torch.nn.Sequential(torch.nn.ReLU())}, None),
        (Broken(), "state"),
        (_deep(), "state"),
        ({(1, Broken): 1, "x": {2: memoryview(b"")}}, "state['x'][2]"),
    ],
)
def test_what_pickle_refuses_is_named(state: Any, where: str | None) -> None:
    """An object that cannot be saved is refused by capture, with the way to it and pickle's reason."""
    if where is None:
        state["m"][0].register_forward_hook(lambda *_: None)
        where = "state['m']._modules['0']._forward_hooks"
    with pytest.raises(UnpicklableStateError) as caught:
        capture(state)
    assert caught.value.where.startswith(where)
    assert caught.value.where in str(caught.value)
    assert isinstance(caught.value.__cause__, Exception)


def test_a_failing_reason_is_kept() -> None:
    """The error says what the object said."""
    with pytest.raises(UnpicklableStateError, match=r"state\[0\].*Broken.*never"):
        capture([Broken()])


def test_what_pickle_refuses_can_be_shared() -> None:
    """For a writer that does not pickle, the offending objects are passed on as they are, all else is copied."""
    lock, broken = threading.Lock(), Broken()
    state: dict[str, Any] = {
        "w": torch.ones(3),
        "h": Holder(lock=lock, w=torch.ones(2)),
        "b": [broken, broken],
    }
    snapshot = _take(state)
    state["w"].zero_()
    state["h"].w.zero_()
    rebuilt = snapshot.state()
    assert rebuilt["h"].lock is lock
    assert rebuilt["h"] is not state["h"]
    assert rebuilt["b"] == [broken, broken]
    assert torch.equal(rebuilt["w"], torch.ones(3))
    assert torch.equal(rebuilt["h"].w, torch.ones(2))


class Fresh:
    """Makes something unpicklable each time it is pickled."""

    def __getstate__(self) -> dict[str, Any]:
        return {"lock": threading.Lock()}


def test_what_is_made_unpicklable_while_pickling_is_shared_whole() -> None:
    """Where the offender exists only during pickling, the object that makes it is passed on."""
    fresh = Fresh()
    assert _take({"x": [fresh, 1]}).state() == {"x": [fresh, 1]}


class Reducing:
    """Says of itself what it is told to say."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def __reduce__(self) -> Any:
        return self.parts


class Threes:
    """Gives items of the wrong length, anew each time."""

    def __reduce__(self) -> Any:
        return Threes, (), None, None, iter([(1, 2, 3)])


class Disguised:
    """Says that it is of another class, as proxies do."""

    __class__ = property(lambda self: int)


@pytest.mark.parametrize(
    "state",
    [
        Reducing(Reducing),
        Reducing(Reducing, []),
        Reducing(Reducing, (), None, [1]),
        Threes(),
        Reducing(Reducing, (), {"a": 1}, None, None, 3),
        Reducing(copyreg.__newobj__, ()),  # type: ignore[attr-defined]
        Reducing(copyreg.__newobj__, (3,)),  # type: ignore[attr-defined]
        Reducing(copyreg.__newobj__, (Holder,)),  # type: ignore[attr-defined]
        Reducing(copyreg.__newobj_ex__, (Reducing, ())),  # type: ignore[attr-defined]
        Reducing(copyreg.__newobj_ex__, (Reducing, (), 3)),  # type: ignore[attr-defined]
        Disguised(),
        torch.ones(2, 2).to_mkldnn(),
    ],
)
def test_what_torch_refuses_is_refused_at_once(state: Any) -> None:
    """Not the writer finds out, when the save has been accepted, but the call that makes the save."""
    with pytest.raises(Exception):  # noqa: B017 - torch lets the errors of all kinds of objects through
        torch.save({"x": state}, io.BytesIO())
    with pytest.raises(UnpicklableStateError, match="cannot save state"):
        capture({"x": state})


def _named(make: Any) -> Any:
    ones: Any = torch.ones(2)
    if not hasattr(ones, "rename"):
        pytest.skip("this torch has no named tensors")
    return make(ones.rename("N"))


Grün = type("Grün", (), {})


@pytest.mark.parametrize("state", [torch.channels_last, Grün, Grün()])
def test_a_name_that_torch_cannot_write_is_refused(state: Any) -> None:
    """A name that is not ASCII, or leads through a module, fails at once, or not at all, as pickle's version has it."""
    try:
        torch.save(["x", state], io.BytesIO())
    except Exception:
        with pytest.raises(UnpicklableStateError, match=r"state\[1\]"):
            capture(["x", state])
    else:
        made = capture(["x", state])
        lay_out(made.stage(HostBuffer(made.nbytes)))


@pytest.mark.filterwarnings("ignore:Named tensors")
@pytest.mark.parametrize(
    "make",
    [lambda: torch._efficientzerotensor(3), lambda: _named(lambda t: t), lambda: _named(torch.nn.Parameter)],
    ids=["zero", "named", "named parameter"],
)
def test_a_tensor_that_torch_refuses_is_refused(make: Callable[[], Any]) -> None:
    """A tensor without memory, and names that no file keeps, are refused as torch.save refuses them."""
    tensor = make()
    with pytest.raises(RuntimeError, match="serializ"):
        torch.save(tensor, io.BytesIO())
    with pytest.raises(UnpicklableStateError, match="serializ"):
        capture([tensor])


def test_two_types_over_one_storage_are_refused_as_torch_refuses_them() -> None:
    """torch.save cannot save two dtypes over the same bytes; that is said before the save is accepted."""
    base = torch.arange(4.0)
    with pytest.raises(RuntimeError, match="different types"):
        torch.save([base, base.view(torch.int32)], io.BytesIO())
    with pytest.raises(UnpicklableStateError, match="different types"):
        capture([base, base.view(torch.int32)])


def test_a_storage_without_data_is_refused() -> None:
    """A bare storage on the meta device has no bytes to save."""
    with pytest.raises(UnpicklableStateError, match="meta"):
        capture({"s": torch.UntypedStorage(4, device="meta")})
