"""A state that changes from save to save: each file is torch.save's, whatever the file before it looked like (S1)."""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from async_ckpt import CheckpointService, UnpicklableStateError

State: TypeAlias = "dict[str, Any]"
Change: TypeAlias = Callable[[st.DataObject, State], object]

VALUES: list[Any] = [
    *(0, 1, 254, 255, 256, 257, 65_535, 65_536, -1, (1 << 31) - 1, 1 << 31, 1 << 40, 1 << 200, -(1 << 2100)),
    *(0.0, -0.0, 1.5, float("nan"), True, False, None, 1j),
    *(
        "",
        "a",
        "b",
        "0",
        "7",
        "10",
        "cpu",
        "storage",
        "K\x01Q",
        "epoch=1",
        "epoch=2",
        "epoch=10",
        "é",
        "ë\ud800",
    ),
    *(b"", b"a", b"b", b"latin1", torch.float32, torch.float8_e5m2, OrderedDict, torch.FloatStorage),
    *((1, 2), (1, 3), [1], {"x": 2}, OrderedDict(y=1), torch.Size([2]), numpy.float64(3), numpy.arange(300)),
    *(b"x" * 70_000, "y" * 70_000),
]


class Tagged(torch.Tensor):
    """A subclass."""


def first_state() -> State:
    """Return a state of small and large tensors, some of them tied, and of numbers."""
    model: dict[str, Any] = OrderedDict(
        (f"layer.{index}", torch.full((6, 2), float(index))) for index in range(12)
    )
    model.update(
        large=torch.arange(700.0), larger=torch.arange(5000.0), scalar=torch.tensor(1), bias=torch.ones(3)
    )
    model.update(tied=model["layer.3"], view=model["large"][5:9], weight=torch.nn.Parameter(torch.ones(2, 3)))
    return {
        "model": model,
        "numbers": {"epoch": 1, "step": 255, "loss": 0.5, "name": "epoch=1", "fitting": True, "best": None},
        "list": [1, "cpu", OrderedDict(a=1)],
    }


def _name(data: st.DataObject, state: State) -> str:
    return data.draw(st.sampled_from(list(state["model"])), "which")


def _like(tensor: torch.Tensor) -> torch.Tensor:
    """Return another plain tensor of the same dtype and shape."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).random_(0, 2) if tensor.is_cpu else tensor


def _replaced(make: Callable[[torch.Tensor], Any]) -> Change:
    """Put into the place of a tensor what is made from it, where that is possible."""

    def change(data: st.DataObject, state: State) -> None:
        name = _name(data, state)
        try:
            state["model"][name] = make(state["model"][name])
        except (RuntimeError, TypeError, AttributeError, IndexError):  # not for such a tensor
            state["model"][name] = torch.ones(3)

    return change


def _written(data: st.DataObject, state: State) -> None:
    for name, tensor in state["model"].items():
        if type(tensor) is torch.Tensor and tensor.layout is torch.strided and tensor.dtype is torch.float32:
            torch.empty(0).set_(tensor.untyped_storage()).add_(len(name)) if tensor.is_cpu else None


def _numbers(data: st.DataObject, state: State) -> None:
    numbers = state["numbers"]
    numbers[data.draw(st.sampled_from(sorted(numbers)), "number")] = data.draw(
        st.sampled_from(VALUES), "value"
    )


def _counted(data: st.DataObject, state: State) -> None:
    numbers = state["numbers"]
    for name, value in list(numbers.items()):
        numbers[name] = value + 1 if type(value) in (int, float) else value
        numbers[name] = not value if type(value) is bool else numbers[name]
        if type(value) is str and len(value) > 2:  # another object, and often another value
            numbers[name] = value[:-1] + data.draw(st.sampled_from("012"), "digit")


def _added(data: st.DataObject, state: State) -> None:
    state["model"][f"new.{len(state['model'])}"] = torch.ones(
        data.draw(st.sampled_from([0, 3, 600]), "numel")
    )


def _removed(data: st.DataObject, state: State) -> None:
    if len(state["model"]) > 1:
        del state["model"][_name(data, state)]


def _moved(data: st.DataObject, state: State) -> None:
    state["model"].move_to_end(_name(data, state))


def _tied(data: st.DataObject, state: State) -> None:
    state["model"][_name(data, state)] = state["model"][_name(data, state)]


def _swapped(data: st.DataObject, state: State) -> None:
    model, one, other = state["model"], _name(data, state), _name(data, state)
    model[one], model[other] = model[other], model[one]


def _renamed(data: st.DataObject, state: State) -> None:
    name = _name(data, state)
    state["model"][name[:-1] + data.draw(st.sampled_from("xyz"), "letter")] = state["model"].pop(name)


def _listed(data: st.DataObject, state: State) -> None:
    state["list"].append(data.draw(st.sampled_from([*VALUES, *state["model"].values()]), "item"))


def _hooked(tensor: torch.Tensor) -> torch.Tensor:
    made = torch.ones(tensor.shape).requires_grad_()
    made.register_hook(lambda gradient: gradient)
    return made


def _noted(tensor: torch.Tensor) -> torch.Tensor:
    made: Any = torch.nn.Parameter(torch.ones(tensor.shape))
    made.note = 1
    return made  # type: ignore[no-any-return]


CHANGES: dict[str, Change] = {
    "bytes": _written,
    "counted": _counted,
    "number": _numbers,
    "another": _replaced(_like),
    "untied": _replaced(lambda tensor: tensor.detach().clone()),
    "added": _added,
    "removed": _removed,
    "moved": _moved,
    "tied": _tied,
    "swapped": _swapped,
    "renamed": _renamed,
    "listed": _listed,
    "view": _replaced(lambda tensor: tensor.detach()[1:]),
    "strides": _replaced(lambda tensor: tensor.detach().t()),
    "flat": _replaced(lambda tensor: tensor.detach().reshape(-1)),
    "dtype": _replaced(lambda tensor: tensor.detach().clone().view(torch.int32)),
    "half": _replaced(lambda tensor: tensor.detach().to(torch.bfloat16)),
    "grad": _replaced(lambda tensor: tensor.detach().requires_grad_(not tensor.requires_grad)),
    "parameter": _replaced(lambda tensor: torch.nn.Parameter(tensor.detach())),
    "hook": _replaced(_hooked),
    "attribute": _replaced(_noted),
    "subclass": _replaced(lambda tensor: torch.ones(tensor.shape).as_subclass(Tagged)),
    "negative": _replaced(lambda tensor: torch._neg_view(tensor.detach())),
    "sparse": _replaced(lambda tensor: tensor.detach().to_sparse()),
    "meta": _replaced(lambda tensor: tensor.detach().to("meta")),
    "device": _replaced(lambda tensor: torch.ones(ON_CUDA)),
    "storage": _replaced(lambda tensor: tensor.untyped_storage()),
}


EXAMPLES = 800
"""More of them, each of several saves, would take longer than a test may."""

ON_CUDA = 13
"""The length of tensors that are said to be on a GPU."""


def _device(storage: Any) -> str | None:
    """Say where a storage is, in words made anew, as torch does for GPUs."""
    return f"cuda:{ON_CUDA % 2}" if storage.nbytes() == 4 * ON_CUDA else None


@pytest.mark.parametrize("has_devices", [False, True])
@pytest.mark.filterwarnings("ignore:backward hook")
@pytest.mark.filterwarnings("ignore:.*[Ss]parse")
def test_every_file_of_a_service_is_the_one_that_torch_save_writes(
    has_devices: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever changes in between, of bytes, values, names, tensors, ties or kinds, nothing of an old file is left."""
    if has_devices:
        registered = [(0, _device, None), *torch.serialization._package_registry]
        monkeypatch.setattr(torch.serialization, "_package_registry", registered)
    steps = st.lists(st.sampled_from(list(CHANGES)), max_size=2)

    @settings(max_examples=min(EXAMPLES, settings.default.max_examples))
    @given(st.data())
    def run(data: st.DataObject) -> None:
        state = first_state()
        for _ in range(data.draw(st.integers(2, 6), "saves")):
            try:
                torch.save(state, file := io.BytesIO())
            except RuntimeError:  # two types over one memory
                with pytest.raises(UnpicklableStateError):
                    service.save(state, place)
                return
            service.save(state, place).wait()
            assert place.read_bytes() == file.getvalue()
            for name in ["counted", *data.draw(steps, "changes")]:
                CHANGES[name](data, state)

    place = tmp_path / "a.ckpt"
    with CheckpointService(durability="process") as service:
        run()
