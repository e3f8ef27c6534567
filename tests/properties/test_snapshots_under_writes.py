"""Random states, written to in every way there is while a snapshot of them is being made (S1).

Each file holds the state as it was at the call, or the save fails and says so. The copy goes on at random points
between the writes, and is otherwise as late as it may be: nothing is left to the timing of threads.
"""

from __future__ import annotations

import copy
import gc
import io
import itertools
import pickle
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from async_ckpt.errors import StateChangedError
from async_ckpt.format import lay_out
from async_ckpt.snapshot import HostBuffer, Snapshot, capture
from async_ckpt.snapshot.lazy import Switch, watch

watch()

OPTIMIZERS: list[Callable[[Any], torch.optim.Optimizer]] = [
    lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, foreach=True),
    lambda params: torch.optim.SGD(params, lr=0.1, foreach=False),
    lambda params: torch.optim.AdamW(params, fused=True),
    lambda params: torch.optim.AdamW(params, foreach=True, amsgrad=True),
    lambda params: torch.optim.Adam(params, foreach=False),
    lambda params: torch.optim.Adagrad(params),
    lambda params: torch.optim.RMSprop(params, momentum=0.1),
    lambda params: torch.optim.LBFGS(params, max_iter=3),
    lambda params: torch.optim.Adadelta(params),
    lambda params: torch.optim.NAdam(params),
    lambda params: torch.optim.Adamax(params),
    lambda params: torch.optim.RAdam(params),
    lambda params: torch.optim.ASGD(params),
    lambda params: torch.optim.Rprop(params),
]


class Program:
    """A training, as far as it changes memory: the draws of *random* decide everything."""

    def __init__(self, random: Random) -> None:
        self.random = random
        sizes = [random.choice((3, 1 << 14, (1 << 14) + 1)) for _ in range(random.randint(1, 4))]
        self.model = torch.nn.Module()
        for number, size in enumerate(sizes):
            self.model.register_parameter(f"p{number}", torch.nn.Parameter(torch.randn(size)))
        self.model.register_buffer("mean", torch.randn(1 << 14))
        self.params = list(self.model.parameters())
        halves = [self.params[:1], self.params[1:]] if random.random() < 0.3 else [self.params]
        self.optimizers = [random.choice(OPTIMIZERS)(half) for half in halves if half]
        self.array = torch.randn(1 << 12).numpy()
        self.ema = [param.detach().clone() for param in self.params]
        for _ in range(random.randint(0, 2)):
            self.step()
        self.alias: torch.Tensor | None = None
        self.numpy: Any = None
        self.is_lent = False  # to somebody who does not notice if the memory is freed
        param = random.choice(self.params)
        match random.randrange(6):  # made before the call
            case 0:
                self.alias = param.detach().view(-1)[:2]
            case 1:
                self.alias = param.data
            case 2:
                self.numpy = param.detach().numpy()
            case 3:
                self.alias = torch.from_dlpack(param.detach())
                self.is_lent = True

    def state(self) -> dict[str, Any]:
        """Return what is saved."""
        return {
            "model": self.model.state_dict(keep_vars=self.random.random() < 0.2),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "array": self.array,
            "ema": self.ema,
        }

    # -- what a training does

    def loss(self) -> torch.Tensor:
        """Go forward, and backward."""
        for param in self.params:
            param.grad = None
        loss = torch.stack([(param * param).sum() for param in self.params]).sum()
        loss.backward()
        return loss.detach()

    def step(self) -> None:
        """Step every optimizer, with a closure or without."""
        for optimizer in self.optimizers:
            if isinstance(optimizer, torch.optim.LBFGS) or self.random.random() < 0.3:
                optimizer.step(self.loss)  # type: ignore[arg-type]
            else:
                self.loss()
                optimizer.step()

    def accumulate(self) -> None:
        """Go forward and backward, without a step."""
        self.loss()

    def forget_gradients(self) -> None:
        """Zero the gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=self.random.random() < 0.5)

    def change_the_rest(self) -> None:
        """Write to what is no optimizer's."""
        self.model.mean.add_(1)  # type: ignore[operator,union-attr]
        self.array += 1
        for average, param in zip(self.ema, self.params, strict=True):
            average.lerp_(param.detach().view_as(average), 0.5)

    def write_to_old_alias(self) -> None:
        """Write to what was made before the call."""
        if self.alias is not None:
            self.alias.add_(1)
        if self.numpy is not None:
            self.numpy += 1

    def copy_the_optimizer(self) -> None:
        """Copy and pickle it; the copy, too, may step."""
        optimizer = self.random.choice(self.optimizers)
        pickle.loads(pickle.dumps(optimizer.state_dict()))
        if not isinstance(optimizer, torch.optim.LBFGS):  # its copy cannot step
            copy.deepcopy(optimizer).step(lambda: torch.zeros(()))

    def load_the_optimizer(self) -> None:
        """Load its state, which replaces its tensors."""
        optimizer = self.random.choice(self.optimizers)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    def drop_the_optimizer(self) -> None:
        """Go on with another one."""
        number = self.random.randrange(len(self.optimizers))
        params = [param for group in self.optimizers[number].param_groups for param in group["params"]]
        self.optimizers[number] = torch.optim.SGD(params, lr=0.1)
        gc.collect() if self.random.random() < 0.05 else None

    # -- what else changes weights: torch counts it, or replaces the memory

    @torch.no_grad()
    def write_in_place(self) -> None:
        """Write to weights."""
        param = self.random.choice(self.params)
        match self.random.randrange(7):
            case 0:
                param.add_(1)
            case 1:
                torch.mul(param, 2, out=param)
            case 2:
                torch._foreach_add_([param], 1)
            case 3:
                param.detach().view(-1)[0] = 7
            case 4:
                param.copy_(torch.zeros_like(param))
            case 5:
                torch.nn.init.normal_(param)
            case 6:
                self.model.load_state_dict({k: v.clone() + 1 for k, v in self.model.state_dict().items()})

    def write_to_optimizer_state(self) -> None:
        """Write to an optimizer's state."""
        for optimizer in self.optimizers:
            for values in optimizer.state.values():
                for value in values.values():
                    if isinstance(value, torch.Tensor):
                        value.zero_()

    def replace_memory(self) -> None:
        """Give a parameter other memory."""
        param = self.random.choice(self.params)
        match self.random.randrange(3):
            case 0:
                param.data = torch.zeros_like(param)
            case 1:
                torch.utils.swap_tensors(param, torch.nn.Parameter(torch.zeros_like(param)))
                self.params = list(self.model.parameters())
            case 2:
                with torch.no_grad():
                    param.set_(torch.zeros_like(param))  # type: ignore[call-overload]

    def free_memory(self) -> None:
        """Free the memory of a parameter."""
        storage = self.random.choice(self.params).untyped_storage()
        if storage.resizable():  # else numpy has it
            storage.resize_(0)

    # -- what torch does not count

    def write_unseen(self) -> None:
        """Write behind torch's back, to an alias that did not exist at the call, or to memory at the same address."""
        param = self.random.choice(self.params)
        storage = param.untyped_storage()
        match self.random.randrange(3):
            case 0:
                param.data.add_(1)
            case 1:
                param.detach().numpy()[...] = 3
            case 2 if storage.resizable() and not self.is_lent:
                nbytes = storage.nbytes()
                storage.resize_(0)
                storage.resize_(nbytes)  # it often gets the memory that it had
                param.data.zero_()


USUAL = (
    Program.step,
    Program.accumulate,
    Program.forget_gradients,
    Program.change_the_rest,
    Program.write_to_old_alias,
    Program.copy_the_optimizer,
    Program.load_the_optimizer,
    Program.drop_the_optimizer,
)
OTHERS = (Program.write_in_place, Program.write_to_optimizer_state, Program.replace_memory)


def take(state: Any, *, lazy: bool, verify: bool = False) -> tuple[Snapshot, bytes]:
    """Return a snapshot of *state*, and what ``torch.save`` writes now."""
    file = io.BytesIO()
    torch.save(state, file)
    captured = capture(state)
    snapshot = captured.stage(HostBuffer(captured.nbytes), lazy=Switch(is_on=lazy), verify=verify)
    return snapshot, file.getvalue()


def go_on(snapshot: Snapshot, random: Random) -> None:
    """Copy a random part of what is left."""
    for share in [] if snapshot.later is None else snapshot.later._shares:
        if share._held is not None:
            share._copy_pieces(share._held, itertools.islice(share._untaken, random.randint(0, 3)), 0)
            if random.random() < 0.2:
                share.finish()


def written(snapshot: Snapshot) -> bytes:
    """Return the file, as a writer makes it."""
    snapshot.complete()
    layout = lay_out(snapshot)
    snapshot.check()
    return b"".join(bytes(piece) for piece in layout.read(0, layout.nbytes))


def run(seed: int, *, lazy: bool, mutators: Any, verify: bool = False) -> str:
    """Save a random program's state, let the program go on, and return how the save ended."""
    random = Random(seed)
    program = Program(random)
    snapshot, expected = take(program.state(), lazy=lazy, verify=verify)
    for _ in range(random.randint(1, 5)):
        go_on(snapshot, random)
        random.choice(mutators)(program)
    try:
        file = written(snapshot)
    except StateChangedError:
        return "failed"
    finally:
        snapshot.close()
    return "right" if file == expected else "torn"


SEEDS = st.integers(0, 1 << 32)


@pytest.mark.parametrize("lazy", [False, True], ids=["copy", "lazy"])
@given(seed=SEEDS)
def test_what_a_training_does_tears_no_snapshot(lazy: bool, seed: int) -> None:
    """Steps of all kinds, and writes to what is no optimizer's: each file is right, and no save fails."""
    assert run(seed, lazy=lazy, mutators=USUAL) == "right"


@pytest.mark.parametrize("lazy", [False, True], ids=["copy", "lazy"])
@given(seed=SEEDS)
def test_any_other_write_leaves_it_right_or_fails_the_save(lazy: bool, seed: int) -> None:
    """Whatever torch counts, or gives other memory: each file is right, or the save fails; a copy never does."""
    ended = run(seed, lazy=lazy, mutators=USUAL[:5] + OTHERS * 2)
    assert ended == "right" or (lazy and ended == "failed")


@given(seed=SEEDS)
def test_freed_memory_is_not_read(seed: int) -> None:
    """Memory that is freed before it was copied fails the save."""
    assert run(seed, lazy=True, mutators=(Program.free_memory,)) in ("right", "failed")


@given(seed=SEEDS)
def test_what_torch_does_not_count_is_found_when_asked_for(seed: int) -> None:
    """With checksums, writes behind torch's back fail the save, too."""
    mutators = (*USUAL[:5], Program.write_unseen, Program.write_unseen)
    assert run(seed, lazy=True, mutators=mutators, verify=True) in ("right", "failed")


def test_the_tests_above_can_fail() -> None:
    """Writes that torch does not count do tear files if nobody compares checksums: the writes come early enough."""
    ends = [run(seed, lazy=True, mutators=(Program.write_unseen,)) for seed in range(40)]
    assert "torn" in ends
    assert "right" in ends
