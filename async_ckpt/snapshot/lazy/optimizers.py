"""The program's optimizers, known by their steps, and the fences that stand before their next ones.

Guarantees: training is the same with and without the hooks, which torch has for this purpose: they take a microsecond a
step where no fence stands, hold no optimizer alive, and leave nothing on one that is copied or pickled. An optimizer's
step changes nothing before each fence that stands for it has been passed; this takes no lock that storage could hold.
No exception of ours comes out of a step. In a forked child, no fence stands.

A step that is compiled or replayed calls no hook. It is known by what it leaves: a tensor changed since the last step
that did call it. torch's fused steps leave nothing: they are trusted until torch is seen to compile any step, at which
all fences are passed.

What does not belong here: what a fence does (`deferred`), which memory is an optimizer's (`choice`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol
from weakref import ref

import torch

if TYPE_CHECKING:
    from torch.optim.optimizer import Optimizer

__all__ = ["Fence", "Stepper", "pass_all", "steppers", "watch"]

logger = logging.getLogger("async_ckpt.snapshot")

_MOST_LOOKED_AT = 64  # parameters, for one that has a gradient


class Fence(Protocol):
    """Something that has to be done before an optimizer's next step."""

    def guards(self, tensors: Iterable[torch.Tensor]) -> bool:
        """Return whether it stands for any of *tensors*, too."""

    def pass_by(self) -> None:
        """Do it, on the thread that is about to step."""

    def let_by(self) -> None:
        """Do it, for who is about to change weights in another way."""


class Stepper:
    """An optimizer that has called our hook. Compared by identity.

    Attributes:
        optimizer: a weak reference to it.
        fences: those that stand before its next step.
    """

    __slots__ = ("_sample", "fences", "optimizer")

    def __init__(self, optimizer: ref[Optimizer]) -> None:
        self.optimizer = optimizer
        self.fences: dict[Fence, None] = {}
        # A parameter that each step changes: where it is, its id, and its version. A weak reference would do, but that
        # has torch.utils.swap_tensors refuse the parameter.
        self._sample: tuple[int, int, int, int] | None = None

    @property
    def is_between_steps(self) -> bool:
        """Whether its last step has ended, called the hooks, and was the last to change its parameters."""
        sample, optimizer = self._sample, self.optimizer()
        if sample is None or optimizer is None or any(map(_may_be_unseen, optimizer.param_groups)):
            return False
        group, position, identity, version = sample
        parameter = optimizer.param_groups[group]["params"][position]
        return id(parameter) == identity and parameter._version == version

    def begin(self) -> None:
        """Note that a step has begun."""
        self._sample = None

    def end(self, groups: Iterable[Mapping[str, Any]]) -> None:
        """Note that a step of the parameters in *groups* has ended."""
        left = _MOST_LOOKED_AT
        for number, group in enumerate(groups):
            for position, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    if not _is_captured(parameter, group):
                        self._sample = number, position, id(parameter), parameter._version
                    return
                left -= 1
                if not left:
                    return

    def stand(self, fence: Fence) -> None:
        """Have the next step pass *fence*."""
        self.fences[fence] = None
        _standing[fence] = None

    def fall(self, fence: Fence) -> None:
        """Take *fence* away. Idempotent."""
        self.fences.pop(fence, None)
        _standing.pop(fence, None)


_steppers: dict[int, Stepper] = {}  # by the id of the optimizer
_standing: dict[Fence, None] = {}  # all fences
_hooks: list[Any] = []
_are_any_compiled = False


def watch() -> None:
    """Get to know each optimizer at its next step. Idempotent."""
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    if not _hooks:
        # Not a decorator: it imports the compiler, which takes a second. A program that makes an optimizer has done so.
        torch.compiler.assume_constant_result(_note_compiling)
        _hooks.append(None)  # first: a signal handler may call this, too
        _hooks.append(register_optimizer_step_pre_hook(_before_step))
        _hooks.append(register_optimizer_step_post_hook(_after_step))


def pass_all() -> None:
    """Have everything copied: the program is about to change weights otherwise than by steps."""
    _try_all(fence.let_by for fence in list(_standing))


def steppers() -> list[Stepper]:
    """Return the optimizers that are known."""
    return list(_steppers.values())


def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if torch.compiler.is_compiling():  # nothing of this is to be in the compiled step
        _note_compiling()
        return None
    stepper = _steppers.get(id(optimizer))
    is_new = stepper is None
    if stepper is None:
        stepper = _meet(optimizer)
    stepper.begin()
    if not _standing:
        return None
    # It may have been given what was another's: one that is new, most of all. A fused step leaves no versions to see.
    fences = [
        fence
        for fence in list(_standing)
        if is_new or fence in stepper.fences or _is_of_concern(fence, optimizer)
    ]
    if not fences:
        return None
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if closure is None or not _calls_closure_first(optimizer):
        _pass(fences)
        return None
    waiting = _then_pass(closure, fences)
    return (
        ((args[0], waiting, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": waiting})
    )


def _after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if torch.compiler.is_compiling():
        return
    stepper = _steppers.get(id(optimizer))
    if stepper is not None:
        with suppress(Exception):  # an optimizer that is unlike torch's
            stepper.end(optimizer.param_groups)


def _is_of_concern(fence: Fence, optimizer: Optimizer) -> bool:
    try:
        return fence.guards(parameter for group in optimizer.param_groups for parameter in group["params"])
    except Exception:  # an optimizer that is unlike torch's
        return True


def _note_compiling() -> bool:
    """Called when a step is being compiled, not when it runs: from now on, there may be steps that call no hook."""
    global _are_any_compiled
    _are_any_compiled = True
    pass_all()
    return True


def _meet(optimizer: Optimizer) -> Stepper:
    key = id(optimizer)
    _steppers[key] = stepper = Stepper(ref(optimizer, partial(_forget, key)))
    return stepper


def _forget(key: int, optimizer: ref[Optimizer]) -> None:
    stepper = _steppers.get(key)
    if stepper is not None and stepper.optimizer is optimizer:
        del _steppers[key]


def _pass(fences: Iterable[Fence]) -> None:
    _try_all(fence.pass_by for fence in fences)


def _try_all(calls: Iterable[Callable[[], object]]) -> None:
    for call in calls:
        try:
            call()
        except Exception:  # training goes on; the save will fail
            with suppress(Exception):  # of the program's own log handlers
                logger.exception("internal error in %r; please report it", call)


def _then_pass(closure: Callable[[], Any], fences: Iterable[Fence]) -> Callable[[], Any]:
    """Return *closure*, such that it passes *fences* at its end: it computes what the step will then change."""

    def evaluate() -> Any:
        result = closure()
        _pass(fences)
        return result

    return evaluate


def _calls_closure_first(optimizer: Optimizer) -> bool:
    """Return whether its step changes nothing before the closure's first call, as those of torch's own."""
    return str(getattr(type(optimizer).step, "__module__", "")).startswith("torch.optim.")


def _may_be_unseen(group: Mapping[str, Any]) -> bool:
    """Return whether there may be steps of the parameters that neither call a hook nor leave a count."""
    return _are_any_compiled and bool(group.get("fused"))


def _is_captured(parameter: torch.Tensor, group: Mapping[str, Any]) -> bool:
    """Return whether the step is made to be captured, and then replayed without a hook or a count."""
    return bool(group.get("capturable")) and not parameter.is_cpu


def _forget_in_child() -> None:
    """No thread of the parent's copies in a forked child, and no save of the parent's is the child's."""
    _standing.clear()
    for stepper in steppers():
        stepper.fences.clear()


os.register_at_fork(after_in_child=_forget_in_child)
