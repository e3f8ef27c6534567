"""Whether one snapshot's memory serves another save (S1, B1)."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch

from async_ckpt.format.writing.layout import lay_out
from async_ckpt.snapshot import HostBuffer, HostPool, Snapshot, capture
from async_ckpt.snapshot.budget import Budget
from async_ckpt.snapshot.locations import mark

LARGE = 5 << 20  # elements of four bytes: more than one piece, and work for two threads


def _state(**more: Any) -> dict[str, Any]:
    weights = torch.arange(float(LARGE))
    return {
        "weights": weights,
        "view": weights[3:7],
        "steps": [torch.tensor(float(step)) for step in range(40)],
        "empty": torch.empty(0),
        "table": numpy.arange(30.0).reshape(5, 6),
        "columns": numpy.asfortranarray(numpy.arange(6).reshape(2, 3)),
        "frozen": numpy.empty((0, 3)),
        **more,
    }


def _take(state: Any) -> tuple[Snapshot, HostBuffer]:
    captured = capture(state)
    buffer = HostBuffer(captured.nbytes)
    return captured.stage(buffer), buffer


def _equals(state: Any, snapshot: Snapshot, buffer: HostBuffer) -> bool:
    captured = capture(state)
    return captured.resembles(snapshot) and captured.equals(buffer)


def _write_through_data(state: dict[str, Any]) -> None:
    state["weights"].data[7] = -1.0


def _write_through_alias(state: dict[str, Any]) -> None:
    state["weights"].numpy()[LARGE // 3] = -1.0


def _write_last_byte(state: dict[str, Any]) -> None:
    state["last"].view(torch.uint8)[-1] = 1


def _write_small(state: dict[str, Any]) -> None:
    state["steps"][1].add_(1)


def _write_array(state: dict[str, Any]) -> None:
    state["table"][4, 5] = -1.0


def _write_negative_zero(state: dict[str, Any]) -> None:
    state["weights"][0] = -0.0


@pytest.mark.parametrize(
    "change",
    [
        _write_through_data,
        _write_through_alias,
        _write_last_byte,
        _write_small,
        _write_array,
        _write_negative_zero,
    ],
)
def test_one_changed_byte_is_seen(change: Callable[[dict[str, Any]], None]) -> None:
    """Whatever wrote it, and wherever it is, a state that differs by a byte from the snapshot does not equal it."""
    state = _state(last=torch.zeros(LARGE))
    held = _take(state)
    assert _equals(state, *held)
    change(state)
    assert not _equals(state, *held)


def test_equal_bytes_in_other_objects_are_equal() -> None:
    """Other tensors with the same bytes, NaN among them, and other metadata: the snapshot serves them."""
    nan = torch.full((100,), float("nan"))
    held = _take(_state(nan=nan))
    assert _equals(_state(nan=nan.clone(), last_model_path="somewhere"), *held)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.update(more=torch.ones(3)),
        lambda state: state.update(steps=state["steps"][:-1]),
        lambda state: state.update(view=torch.arange(3.0, 7.0)),
        lambda state: state.update(table=numpy.arange(60.0).reshape(5, 12)[:, ::2]),
        lambda state: mark(state["weights"].untyped_storage(), "cuda:0"),
    ],
)
def test_another_build_is_not_compared(change: Callable[[dict[str, Any]], Any]) -> None:
    """More or fewer storages, an untied view, a scattered array, another device: such a state gets its own memory."""
    state = _state()
    held = _take(state)
    change(state)
    assert not _equals(state, *held)


def test_mere_metadata_is_not_shared() -> None:
    """A state that is hardly more than its skeleton gets memory of its own, for that is where skeletons count (B1)."""
    state = {"numbers": list(range(1000)), "w": torch.ones(10)}
    assert not _equals(state, *_take(state))


def test_changed_weights_are_told_without_the_memory() -> None:
    """After a step of training the sampled bytes differ, so the buffer is not even asked for."""
    state = _state()
    snapshot, buffer = _take(state)
    state["weights"] += 1
    captured = capture(state)
    snapshot.close()
    buffer.close()
    assert not captured.resembles(snapshot)


def test_a_shared_snapshot_writes_its_own_file() -> None:
    """Each of two snapshots over one buffer gives the file of its own state, byte for byte, whatever comes later."""
    states = [_state(last_model_path=""), _state(last_model_path="a longer one than before")]
    expected = []
    for state in states:
        torch.save(state, file := io.BytesIO())
        expected.append(file.getvalue())
    first, buffer = _take(states[0])
    captured = capture(states[1])
    assert captured.resembles(first)
    assert captured.equals(buffer)
    second = captured.share(buffer)
    states[1]["weights"].zero_()
    layouts = [lay_out(first), lay_out(second)]
    assert [b"".join(layout.read(0, layout.nbytes)) for layout in layouts] == expected


def test_comparing_keeps_copy_on_write() -> None:
    """A source that shares its memory lazily goes on sharing it."""
    if not hasattr(torch.Tensor, "const_data_ptr"):
        pytest.skip("this torch has no access for reading only")
    weights = torch.arange(float(LARGE))
    lazy = torch.ops.aten._lazy_clone(weights)
    held = _take({"w": weights})
    assert _equals({"w": lazy}, *held)
    private: Any = torch._C
    assert private._is_cow_tensor(lazy)


def test_a_shared_lease_ends_with_its_last_holder() -> None:
    """A buffer that two hold counts once (B1) and makes no room while one is left; afterwards it is as good as new."""
    budget = Budget(10 << 20)
    pool = HostPool(budget)
    buffer = pool.lease(8 << 20)
    assert buffer is not None
    buffer.written = "a file"
    pool.share(buffer)
    assert budget.held_bytes == 8 << 20
    assert not pool.would_fit(4 << 20, without=buffer)
    pool.release(buffer)
    assert pool.idle_bytes == 0
    assert buffer.written == "a file"
    assert pool.would_fit(4 << 20, without=buffer)
    pool.release(buffer)
    assert pool.idle_bytes == 8 << 20
    assert buffer.written is None
    with pytest.raises(ValueError, match="not on lease"):
        pool.release(buffer)
