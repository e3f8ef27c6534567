"""What is copied after the call, and what stands before a step."""

from __future__ import annotations

import gc
import io
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from async_ckpt.errors import StateChangedError
from async_ckpt.format import lay_out
from async_ckpt.snapshot import HostBuffer, Snapshot, capture
from async_ckpt.snapshot.lazy import Switch, optimizers, watch
from tests.lazy_training import left_to_copy

LARGE = 1 << 14  # of floats: just what is copied after the call

watch()


def _param(numel: int = LARGE) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(numel))


def _step(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    optimizer.step()


def _take(state: Any, switch: Switch | None = None) -> Snapshot:
    captured = capture(state)
    return captured.stage(HostBuffer(captured.nbytes), lazy=switch or Switch(is_on=True))


def _deferred(state: Any) -> int:
    """Return how many bytes of *state* are left to be copied."""
    snapshot = _take(state)
    nbytes = left_to_copy(snapshot)
    snapshot.close()
    return nbytes


def _file(snapshot: Snapshot) -> bytes:
    snapshot.complete()
    layout = lay_out(snapshot)
    return b"".join(bytes(piece) for piece in layout.read(0, layout.nbytes))


def _file_of_torch(state: Any) -> bytes:
    torch.save(state, file := io.BytesIO())
    return file.getvalue()


class TestChoice:
    """Which storages are copied after the call."""

    def test_parameters_and_the_state_of_an_optimizer_that_has_stepped(self) -> None:
        """Those of 64 KiB and more, save after save; nothing that a save leaves behind owns them."""
        param, small = _param(), _param(9)
        optimizer = torch.optim.AdamW([param, small])
        state = {"p": param.detach(), "small": small.detach(), "buffer": torch.ones(LARGE)}
        assert _deferred({**state, "o": optimizer.state_dict()}) == 0
        for _ in range(3):
            _step(optimizer)
            assert _deferred({**state, "o": optimizer.state_dict()}) == 3 * 4 * LARGE

    def test_a_capture_keeps_nothing_until_the_collector_runs(self) -> None:
        """Neither an owner that would make the next save copy at once, nor the memory of a state that is gone."""
        gc.disable()
        try:
            for state in ({"a": torch.ones(9)}, {"a": torch.ones(9), "b": torch.ones(9).untyped_storage()}):
                gone = StorageWeakRef(state["a"].untyped_storage())  # type: ignore[union-attr]
                capture(state)
                state.clear()
                assert gone.expired()
        finally:
            gc.enable()

    def test_a_parameter_itself(self) -> None:
        """In a state, a parameter may be detached, or not."""
        param = _param()
        optimizer = torch.optim.SGD([param])
        _step(optimizer)
        as_it_is, detached, data = _deferred([param]), _deferred([param.detach()]), _deferred([param.data])
        assert as_it_is == detached == data == 4 * LARGE

    @pytest.mark.parametrize(
        "alias",
        [
            lambda param: param.detach().numpy(),
            lambda param: param.data,
            lambda param: param.detach().view(-1)[3:],
            lambda param: torch.utils.dlpack.to_dlpack(param.detach()),
            lambda param: torch.nn.Parameter(param.data),
        ],
        ids=["numpy", "data", "view", "dlpack", "parameter"],
    )
    def test_memory_that_somebody_else_has(self, alias: Callable[[torch.Tensor], Any]) -> None:
        """An alias that exists at the call may be written to without a count: that is copied at once.

        Of an array torch notes for good that it was made.
        """
        param, other = _param(), _param()
        optimizer = torch.optim.SGD([param, other], momentum=0.9)
        _step(optimizer)
        buffer = optimizer.state[param]["momentum_buffer"]
        kept = alias(param)
        nbytes = _deferred([param.detach(), other.detach()])
        assert nbytes == 4 * LARGE
        kept = alias(buffer)
        nbytes = _deferred([buffer, other.detach()])
        assert nbytes == 4 * LARGE
        is_for_good = isinstance(kept, numpy.ndarray)
        del kept
        nbytes = _deferred([param.detach(), buffer, other.detach()])
        assert nbytes == (1 if is_for_good else 3) * 4 * LARGE

    @pytest.mark.parametrize(
        "foreign",
        [
            lambda: torch.from_numpy(numpy.ones(LARGE, numpy.float32)),
            lambda: torch.frombuffer(bytearray(4 * LARGE), dtype=torch.float32),
            lambda: torch.ones(LARGE).share_memory_(),
        ],
        ids=["numpy", "buffer", "shared"],
    )
    def test_memory_that_is_not_torchs_own(self, foreign: Callable[[], torch.Tensor]) -> None:
        """Who had it before, or another process, may write to it without a count, and is no owner that is counted."""
        param, other = torch.nn.Parameter(foreign()), _param()
        optimizer = torch.optim.SGD([param, other])
        _step(optimizer)
        assert _deferred([param.detach(), other.detach()]) == 4 * LARGE

    def test_two_optimizers(self) -> None:
        """What two of them change is copied at once."""
        param, other = _param(), _param()
        one, two = torch.optim.SGD([param]), torch.optim.SGD([param, other])
        _step(one)
        _step(two)
        assert _deferred([param.detach(), other.detach()]) == 4 * LARGE

    def test_steps_that_call_no_hook(self) -> None:
        """What changed the weights since the last step that was seen may do so again, unseen."""
        param = _param()
        optimizer = torch.optim.SGD([param])
        _step(optimizer)
        type(optimizer).step.__wrapped__(optimizer)  # type: ignore[attr-defined]  # as a compiled one
        assert _deferred([param.detach()]) == 0
        _step(optimizer)
        assert _deferred([param.detach()]) == 4 * LARGE

    def test_a_step_that_failed_or_goes_on(self) -> None:
        """During a step, and after one that did not come to its end, all is copied at once."""
        param = _param()
        optimizer = torch.optim.LBFGS([param])
        inside: list[int] = []

        def closure() -> torch.Tensor:
            inside.append(_deferred([param.detach()]))
            param.grad = torch.ones_like(param)
            return param.sum()

        optimizer.step(closure)  # type: ignore[arg-type]
        assert set(inside) == {0}
        assert _deferred([param.detach()]) == 4 * LARGE
        with pytest.raises(ZeroDivisionError):
            optimizer.step(lambda: 1 / 0)
        assert _deferred([param.detach()]) == 0

    def test_inference_tensors_and_sharded_regions_and_other_tensors(self) -> None:
        """What has no version, or is no plain tensor, is copied at once, without an error."""
        with torch.inference_mode():
            param = _param()
        optimizer = torch.optim.SGD([_param()])
        optimizer.param_groups[0]["params"].append(param)
        _step(torch.optim.SGD([_param()]))
        assert _deferred([param]) == 0

    def test_a_switch_that_is_off(self) -> None:
        """Then nothing is left to be copied."""
        param = _param()
        _step(torch.optim.SGD([param]))
        assert _take([param.detach()], Switch(is_on=False)).later is None

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    @pytest.mark.parametrize("fused", [False, True])
    def test_a_compiled_step(self, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """A step that torch compiles has no trace of the hooks. It is found out.

        By the weights that it changed or, as a fused one leaves no count, by the compiling. What was to be copied is
        copied before the first one runs.
        """
        monkeypatch.setattr(optimizers, "_are_any_compiled", False)
        torch._dynamo.reset()
        param = _param()
        optimizer = torch.optim.SGD([param], fused=fused)
        _step(optimizer)
        step = torch.compile(optimizer.step, backend="eager")
        for nbytes in (4 * LARGE, 0, 0):
            state = [param.detach()]
            expected = _file_of_torch(state)
            snapshot = _take(state)
            assert left_to_copy(snapshot) == nbytes
            step()
            assert _file(snapshot) == expected
            assert _file_of_torch(state) != expected


class TestFence:
    """What a step waits for."""

    KINDS = (
        *(
            "SGD",
            "Adam",
            "AdamW",
            "Adadelta",
            "Adagrad",
            "Adamax",
            "ASGD",
            "NAdam",
            "RAdam",
            "RMSprop",
            "Rprop",
        ),
        *("LBFGS", "Adafactor", "Muon"),
    )

    @pytest.mark.parametrize("name", KINDS)
    def test_a_closure_is_called_before_the_copy_is_waited_for(self, name: str) -> None:
        """Every optimizer of torch's goes forward and backward first: meanwhile, workers can copy."""
        kind = getattr(torch.optim, name, None)
        if kind is None:
            pytest.skip("this torch does not have it")
        param = torch.nn.Parameter(torch.randn(128, 128)) if name == "Muon" else _param()
        optimizer = kind([param], lr=0.1)
        _step(optimizer) if name != "LBFGS" else optimizer.step(lambda: (param * param).sum())
        param.grad = torch.ones_like(param)
        if name == "LBFGS":
            optimizer.step(lambda: (param * param).sum().detach())
        state = {"p": param.detach(), "o": optimizer.state_dict()}
        expected = _file_of_torch(state)
        snapshot = _take(state)
        later = snapshot.later
        assert later is not None
        seen: list[bool] = []

        def closure() -> torch.Tensor:
            seen.append(later.is_complete)
            optimizer.zero_grad()
            loss = (param * param).sum()
            loss.backward()
            return loss.detach()

        if len(inspect_step(optimizer)) > 1:
            optimizer.step(closure)
        else:
            optimizer.step(closure=closure)
        assert seen[0] is False
        assert later.is_complete
        assert _file(snapshot) == expected

    def test_an_optimizer_of_the_users_own(self) -> None:
        """One that writes before it calls the closure, as for sharpness-aware minimisation, waits at the beginning."""

        class Own(torch.optim.SGD):
            def step(self, closure: Any = None) -> Any:
                with torch.no_grad():
                    for param in self.param_groups[0]["params"]:
                        param.add_(1)
                return closure() if closure is not None else None

        param = _param()
        optimizer = Own([param])
        _step(optimizer)
        expected = _file_of_torch([param.detach()])
        snapshot = _take([param.detach()])
        optimizer.step(lambda: torch.zeros(()))
        assert _file(snapshot) == expected

    def test_another_optimizer_that_is_given_the_parameter(self) -> None:
        """It waits, though it had other ones at the save; its fused step would leave no version to see."""
        param = _param()
        one, two = torch.optim.SGD([param], fused=True), torch.optim.SGD([_param()], fused=True)
        _step(one)
        _step(two)
        expected = _file_of_torch([param.detach()])
        snapshot = _take([param.detach()])
        _step(two)
        assert left_to_copy(snapshot) == 4 * LARGE
        two.add_param_group({"params": [param]})
        _step(two)
        assert _file(snapshot) == expected

    def test_an_optimizer_unlike_torchs(self) -> None:
        """One without parameters steps as ever, while a fence of another stands."""

        class Unlike(torch.optim.SGD):
            def step(self, closure: Any = None) -> Any:
                self.__dict__.pop("param_groups", None)
                return 7

        param = _param()
        unlike, optimizer = Unlike([_param()]), torch.optim.SGD([param])
        unlike.step()
        _step(optimizer)
        expected = _file_of_torch([param.detach()])
        snapshot = _take([param.detach()])
        assert unlike.step() == 7
        assert _file(snapshot) == expected

    def test_a_write_through_the_state_itself(self) -> None:
        """A ``.data`` in the state counts its writes on its own: they are seen, too."""
        param = _param()
        optimizer = torch.optim.SGD([param])
        _step(optimizer)
        state = {"w": param.data}
        snapshot = _take(state)
        state["w"].zero_()
        with pytest.raises(StateChangedError, match=r"state\['w'\]"):
            snapshot.complete()

    def test_an_interruption_keeps_nobody_waiting(self) -> None:
        """Wherever Ctrl-C comes to who copies: others who wait for it go on."""
        param = _param()
        optimizer = torch.optim.SGD([param])
        _step(optimizer)
        snapshot = _take([param.detach()])
        assert snapshot.later is not None
        (share,) = snapshot.later._shares
        busy: list[Any] = []

        class Interrupted(dict[Any, Any]):
            def pop(self, key: Any, default: Any = None) -> Any:
                busy.append(self[key][1])
                super().pop(key, default)
                raise KeyboardInterrupt

        share._busy = Interrupted()
        with pytest.raises(KeyboardInterrupt):
            share.finish()
        assert [lock.locked() for lock in busy] == [False]
        share._busy = {}
        snapshot.complete()

    def test_an_optimizer_for_each_parameter_in_the_backward_pass(self) -> None:
        """Each step copies what its optimizer changes, and no more."""
        params = [_param() for _ in range(4)]
        optimizers = {param: torch.optim.Adam([param]) for param in params}

        def step(param: torch.Tensor) -> None:
            optimizers[param].step()
            optimizers[param].zero_grad()

        for param in params:
            param.register_post_accumulate_grad_hook(step)
        torch.stack([param.sum() for param in params]).sum().backward()
        for param in params:
            _step(optimizers[param])
        state = {
            "p": [param.detach() for param in params],
            "o": [o.state_dict() for o in optimizers.values()],
        }
        expected = _file_of_torch(state)
        snapshot = _take(state)
        assert snapshot.later is not None
        assert len(snapshot.later._shares) == 4
        params[0].sum().backward()
        assert [share.is_decided for share in snapshot.later._shares] == [True, False, False, False]
        torch.stack([param.sum() for param in params]).sum().backward()
        assert _file(snapshot) == expected

    def test_a_write_in_progress_when_the_copy_ends(self) -> None:
        """An operator counts its write at its end: what it changed is found by the second look."""
        param = _param()
        optimizer = torch.optim.SGD([param])
        _step(optimizer)
        snapshot = _take([param.detach()])
        snapshot.complete()
        snapshot.check()
        with torch.no_grad():
            param.add_(1)
        with pytest.raises(StateChangedError, match=r"state\[0\]"):
            snapshot.check()
        snapshot.close()
        snapshot = _take([param.detach()])
        snapshot.close()

    def test_a_step_is_no_write_in_progress(self) -> None:
        """The second look finds nothing where a step came between."""
        param = _param()
        optimizer = torch.optim.SGD([param])
        _step(optimizer)
        snapshot = _take([param.detach()])
        snapshot.complete()
        _step(optimizer)
        snapshot.check()

    def test_a_save_that_shares_the_copy_of_one_that_fails(self) -> None:
        """What the first save no longer wants is still copied for the second one."""
        param = _param()
        optimizer = torch.optim.SGD([param])
        _step(optimizer)
        expected = _file_of_torch([param.detach()])
        first = capture([param.detach()])
        buffer = HostBuffer(first.nbytes)
        snapshot = first.stage(buffer, lazy=Switch(is_on=True))
        second = capture([param.detach()])
        assert second.resembles(snapshot)
        assert second.equals(buffer)
        snapshot.close()
        shared = second.share(buffer)
        _step(optimizer)
        assert _file(shared) == expected
        third = capture([param.detach()])
        assert not third.resembles(shared)
        shared.close()

    def test_torch_modes_of_the_program_change_nothing(self) -> None:
        """A default device, or inference mode, around the save and the step."""
        param = _param()
        optimizer = torch.optim.SGD([param])
        _step(optimizer)
        state = [param.detach()]
        expected = _file_of_torch(state)
        with torch.device("meta"):
            snapshot = _take(state)
        assert left_to_copy(snapshot) == 4 * LARGE
        with torch.device("meta"), torch.inference_mode():
            optimizer.step()
        assert _file(snapshot) == expected

    def test_an_optimizer_that_cannot_be_looked_through(self) -> None:
        """If it is not known what one changes, nothing is left to be copied."""
        param = _param()
        optimizer = torch.optim.SGD([param])
        _step(optimizer)
        odd = torch.optim.SGD([_param()])
        _step(odd)
        del odd.param_groups
        assert _deferred([param.detach()]) == 0

    def test_what_is_copied_is_not_kept(self) -> None:
        """The memory of the weights lives until it is copied, and no longer."""
        param = _param()
        optimizer = torch.optim.SGD([param])
        _step(optimizer)
        expected = _file_of_torch([param.detach()])
        snapshot = _take([param.detach()])
        gone = StorageWeakRef(param.untyped_storage())
        del param, optimizer
        gc.collect()
        assert not gone.expired()
        assert _file(snapshot) == expected
        assert gone.expired()

    def test_a_snapshot_that_is_closed_is_waited_for_by_nobody(self) -> None:
        """Nothing is copied for a save that has failed, and no fence stands."""
        param = _param()
        optimizer = torch.optim.SGD([param])
        _step(optimizer)
        snapshot = _take([param.detach()])
        later = snapshot.later
        assert later is not None
        snapshot.close()
        assert not later._shares[0].stepper.fences
        _step(optimizer)
        assert not later.is_complete

    def test_a_save_that_fails_in_the_call_leaves_no_fence(self) -> None:
        """Nor does one that was interrupted before anybody else knew of it."""
        param = _param()
        optimizer = torch.optim.SGD([param])
        _step(optimizer)
        state = [param.detach(), numpy.ones(1 << 14)]
        snapshot = _take(state)
        assert snapshot.later is not None
        stepper = snapshot.later._shares[0].stepper
        assert len(stepper.fences) == 1
        del snapshot
        assert not stepper.fences
        captured = capture(state)
        extracted = captured._extracted
        assert extracted is not None
        number, data = extracted.arrays[0]
        answers = iter([True, False])  # another thread comes in between

        class Changed:
            array, dtype = data.array, data.dtype

            def is_still(self, array: Any) -> bool:
                return next(answers)

        extracted.arrays[0] = number, Changed()  # type: ignore[assignment]
        with pytest.raises(StateChangedError):
            captured.stage(HostBuffer(captured.nbytes), lazy=Switch(is_on=True))
        assert not stepper.fences

    @pytest.mark.parametrize("fused", [False, True])
    def test_a_failure_of_ours_breaks_no_step(self, caplog: Any, fused: bool) -> None:
        """The step goes on, and the save fails, even if the step leaves no version to see."""
        param = _param()
        optimizer = torch.optim.SGD([param], fused=fused)
        _step(optimizer)
        snapshot = _take([param.detach()])
        assert snapshot.later is not None
        share, move = snapshot.later._shares[0], snapshot.later._shares[0]._move

        def fail(*args: Any) -> None:
            raise MemoryError

        share._move = fail  # type: ignore[method-assign]
        before = param.detach().clone()
        _step(optimizer)
        assert not torch.equal(before, param)
        assert "please report it" in caplog.text
        share._move = move  # type: ignore[method-assign]
        with pytest.raises(StateChangedError):
            snapshot.complete()


def inspect_step(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Return the names of the arguments of its step."""
    code = type(optimizer).step.__wrapped__.__code__  # type: ignore[attr-defined]
    return tuple(code.co_varnames[: code.co_argcount])
