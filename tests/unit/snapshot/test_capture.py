"""Capturing a state and staging it (S1)."""

from __future__ import annotations

import gc
import io
import weakref
from typing import Any

import numpy
import pytest
import torch

from async_ckpt.snapshot import HostBuffer, Snapshot, capture, capture_objects
from async_ckpt.snapshot.locations import mark

_is_cow: Any = getattr(torch._C, "_is_cow_tensor", None)


def _take(state: Any) -> Snapshot:
    made = capture_objects(state)
    return made.stage(HostBuffer(made.nbytes))


class Holder:
    """Holds things."""

    def __init__(self, **things: Any) -> None:
        self.__dict__.update(things)


def test_storages_are_counted_once() -> None:
    """Ties and views need the memory of one storage."""
    base = torch.zeros(1 << 20)
    captured = capture([base, base[5:], base.view(2, -1), torch.nn.Parameter(base)])
    assert [storage.nbytes for storage in captured.storages] == [4 << 20]
    assert 4 << 20 < captured.nbytes < (4 << 20) + 4096


def test_staging_lets_go_of_the_state() -> None:
    """After staging neither the capture nor the snapshot keeps anything of the state alive."""
    tensor, array, holder = torch.ones(10), numpy.ones(10), Holder(a=1)
    alive = [weakref.ref(thing) for thing in (tensor, array, holder)]
    storage = weakref.ref(tensor.untyped_storage())
    captured = capture({"t": tensor, "a": array, "h": holder})
    snapshot = captured.stage(HostBuffer(captured.nbytes))
    del tensor, array, holder
    gc.collect()
    assert [reference() for reference in alive] == [None] * 3
    assert storage() is None
    snapshot.close()


def test_a_capture_is_staged_once() -> None:
    """A second staging, and one into too small a buffer, is an error."""
    captured = capture(torch.ones(10_000))
    with pytest.raises(ValueError, match="cannot hold"):
        captured.stage(HostBuffer(1))
    captured.stage(HostBuffer(captured.nbytes))
    with pytest.raises(RuntimeError, match="once"):
        captured.stage(HostBuffer(captured.nbytes))


def test_storages_are_released_one_by_one() -> None:
    """A storage that was released is gone, the others stay; with the last the snapshot is closed."""
    captured = capture_objects([torch.ones(3), torch.ones(4)])
    buffer = HostBuffer(captured.nbytes)
    snapshot = captured.stage(buffer)
    snapshot.release(0)
    snapshot.release(0)
    assert snapshot.view(1).nbytes == 16
    with pytest.raises(ValueError, match="released"):
        snapshot.view(0)
    snapshot.release(1)
    snapshot.close()
    assert not buffer.is_aliased
    with pytest.raises(ValueError, match="closed"):
        snapshot.state()


@pytest.mark.skipif(
    not hasattr(torch.Tensor, "const_data_ptr"), reason="this torch reads by mutable pointers only"
)
def test_a_copy_on_write_source_goes_on_sharing() -> None:
    """Staging reads through const access only, so a lazy clone is not materialised by it."""
    original = torch.arange(100_000.0)
    lazy = [torch.ops.aten._lazy_clone(original), torch.ops.aten._lazy_clone(torch.ones(5))]
    snapshot = _take(lazy)
    assert all(_is_cow(tensor) for tensor in lazy)
    assert torch.equal(snapshot.state()[0], original)


def test_large_immutable_values_are_not_copied() -> None:
    """Long strings and bytes cannot change, so they need no memory of ours."""
    text, data = "x" * (1 << 20), b"y" * (1 << 20)
    captured = capture_objects([text, data])
    assert captured.nbytes < 4096
    rebuilt = captured.stage(HostBuffer(captured.nbytes)).state()
    assert rebuilt[0] is text
    assert rebuilt[1] is data


def test_capturing_works_within_any_mode() -> None:
    """Inference mode, a default device and disabled gradients change nothing."""
    with torch.inference_mode(), torch.device("meta"):
        tensor = torch.arange(3.0, device="cpu")
        parameter = torch.nn.Parameter(torch.ones(2, device="cpu"))
        rebuilt = _take([tensor, parameter]).state()
    assert torch.equal(rebuilt[0], tensor.clone())
    assert isinstance(rebuilt[1], torch.nn.Parameter)


def test_hooks_are_warned_of_once() -> None:
    """The warning that torch has about backward hooks comes at capture, and not again when the file is laid out."""
    tensor = torch.ones(2, requires_grad=True)
    tensor.register_hook(lambda grad: grad)
    with pytest.warns(UserWarning, match="backward hook"):
        snapshot = _take(tensor)
    torch.save(snapshot.state(), io.BytesIO())


def test_a_marked_storage_is_saved_under_its_original_location() -> None:
    """torch.save of host memory that stands for a GPU's names the GPU, and only for that memory."""
    marked, plain = torch.arange(4.0), torch.arange(5.0)
    mark(marked.untyped_storage(), "cuda:3")
    mark(plain.untyped_storage(), "cpu")
    file = io.BytesIO()
    torch.save([marked, plain], file)
    locations: list[str] = []

    def note(storage: Any, location: str) -> Any:
        locations.append(location)
        return storage

    file.seek(0)
    torch.load(file, map_location=note, weights_only=True)
    assert locations == ["cuda:3", "cpu"]


def test_a_location_is_what_torch_would_be_told_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a program has replaced torch's ``location_tag``, its answer is in the file, as in torch's own (S1)."""
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "elsewhere:0")
    assert _take({"w": torch.ones(3)}).storages[0].location == "elsewhere:0"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_state_is_staged_before_it_changes() -> None:
    """What the current stream was given before the save is in the snapshot, what it is given later is not."""
    tensor = torch.zeros(1 << 24, device="cuda")
    tensor += 1
    snapshot = _take({"w": tensor})
    tensor += 1
    assert snapshot.storages[0].location == "cuda:0"
    assert torch.equal(snapshot.state()["w"], torch.ones(1 << 24))
