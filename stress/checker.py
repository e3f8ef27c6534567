"""Checks whether a history keeps the promises. Pure: it takes records and returns violations.

* **O1, O2, O3, S1**: at each path, the operations on it, and the removals of directories that it lies in, fit into
  one order in which each takes effect at one moment of its call, a load reads what the last effective save before it
  had as content, and those that failed or were superseded, cancelled or dropped have no effect. A save counts from its
  call on, whenever its bytes arrive: so a load that follows it must see it.
* **D2**: who looks at the files without the service sees whole checkpoints only, of states that were saved.
* **D3**: no deletion took effect after a save accepted before it had failed, unless another checkpoint than the
  deleted one had become durable instead, or the program deleted what it had failed to save as well.
* **D2** also: no request failed but of an error that was injected, or because another had failed.
* **D4**: every accepted save ended exactly once.
* **E1**: every error was told, and by no more than one call besides its own handle.
* **B1**: never more saves accepted than the depth of the queue.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from stress.history import ABSENT, History, Operation
from stress.nemesis import INJECTED

__all__ = ["Violation", "check"]

_CONTEXT = 12
_EFFECTIVE = frozenset({"durable", "removed", "read", "unknown"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """A broken promise.

    Attributes:
        promise: its id.
        what: the fact.
        around: the operations that show it.
    """

    promise: str
    what: str
    around: Sequence[object] = ()

    def __str__(self) -> str:
        return "\n".join([f"{self.promise}: {self.what}", *(f"    {operation}" for operation in self.around)])


def check(
    history: History, *, final: Mapping[str, str], queue_depth: int, raises: bool = True
) -> list[Violation]:
    """Return every violation.

    Args:
        history: of a service that was closed.
        final: what is at each path in the end.
        queue_depth: of the service.
        raises: whether the service raises what failed, rather than warn.
    """
    found = [*_unknown_contents(history, final), *_unsafe_removals(history.operations)]
    found += [*_endings(history), *_uninjected(history)]
    if raises:
        found += _untold(history)
    if history.most_accepted > queue_depth:
        what = f"{history.most_accepted} saves accepted, queue_depth {queue_depth}"
        found.append(Violation(promise="B1", what=what))
    for path, content in final.items():
        operations = [
            each
            for each in history.operations
            if each.outcome in _EFFECTIVE
            and (each.path == path or (each.kind == "remove" and lies_in(path, each.path)))
        ]
        found += _order(path, operations, content)
    return found


def lies_in(path: str, place: str) -> bool:
    """Return whether *path* is *place*, or something in that directory."""
    return path == place or path.startswith(f"{place}/")


def _unknown_contents(history: History, final: Mapping[str, str]) -> Iterator[Violation]:
    saved = {(each.path, each.content) for each in history.operations if each.kind == "save"}
    loads = {(each.path, each.content) for each in history.operations if each.outcome == "read"}
    for path, content in (loads | history.seen | set(final.items())) - saved:
        if content != ABSENT:
            yield Violation(promise="D2", what=f"{path} held what was never saved there: {content}")


def _endings(history: History) -> Iterator[Violation]:
    for request_id, times in history.endings.items():
        if times != 1:
            yield Violation(promise="D4", what=f"save {request_id} ended {times} times")


def _uninjected(history: History) -> Iterator[Violation]:
    """Yield what failed on its own, or because of other processes."""
    for failure in history.failures.values():
        if not _is_injected(failure.error):
            yield Violation(
                promise="D2", what=f"{failure.url} failed though nothing was to: {failure.error!r}"
            )


def _is_injected(error: BaseException | None) -> bool:
    return error is not None and (INJECTED in str(error) or _is_injected(error.__cause__))


def _untold(history: History) -> Iterator[Violation]:
    for failure in history.failures.values():
        if failure.told_by_calls > 1 or not failure.told_by_calls + failure.told_by_handle:
            times_told = (
                f"by its handle {failure.told_by_handle} times, by calls {failure.told_by_calls} times"
            )
            yield Violation(promise="E1", what=f"{failure.error!r} of {failure.url} was raised {times_told}")
    for stray in history.strays:
        yield Violation(promise="E1", what=f"an error of no request: {stray!r}")


def _unsafe_removals(operations: Sequence[Operation]) -> Iterator[Violation]:
    failed = [each for each in operations if each.kind == "save" and each.outcome == "failed"]
    for removal in operations:
        if removal.kind != "remove" or removal.outcome != "removed":
            continue
        for save in failed:
            lost = -1 < save.returned < removal.called
            if lost and not any(_makes_up(other, save, removal) for other in operations):
                what = "deleted though a save before it had failed, and no other checkpoint had become durable since"
                yield Violation(promise="D3", what=what, around=[save, removal])


def _makes_up(other: Operation, lost: Operation, removal: Operation) -> bool:
    """Return whether *other* may have become durable in place of *lost*, or shows that nobody counts on it."""
    if other.returned < lost.called or other.called > removal.ended:
        return False
    if other.kind == "remove":
        return lies_in(lost.path, other.path)
    may_be_durable = other.outcome == "unknown" or (
        other.outcome == "durable" and other.ended < removal.ended
    )
    return other.kind == "save" and not lies_in(other.path, removal.path) and may_be_durable


def _order(path: str, operations: Sequence[Operation], final: str) -> Iterator[Violation]:
    """Search an order, depth first over (what is done, what is there), each visited once."""
    before = [
        sum(1 << index for index, other in enumerate(operations) if -1 < other.returned < each.called)
        for each in operations
    ]
    everything = (1 << len(operations)) - 1
    furthest = 0
    seen = {(0, ABSENT)}
    stack = [(0, ABSENT)]
    while stack:
        done, content = stack.pop()
        if done == everything and content == final:
            return
        furthest = max(furthest, done, key=int.bit_count)
        for index, each in enumerate(operations):
            if done >> index & 1 or before[index] & ~done:
                continue
            for after in _effects(each, content):
                if (node := (done | 1 << index, after)) not in seen:
                    seen.add(node)
                    stack.append(node)
    first = min(
        (index for index in range(len(operations)) if not furthest >> index & 1), default=len(operations)
    )
    what = f"at {path} is {final[:8]}, and no order of what was done explains all that was read there"
    yield Violation(promise="O1", what=what, around=operations[max(0, first - _CONTEXT) : first + 4])


def _effects(operation: Operation, content: str) -> Iterator[str]:
    """Yield what may be there afterwards: nothing at all where the operation cannot have come here."""
    if operation.outcome == "unknown":
        yield content
    if operation.kind == "save":
        yield operation.content
    elif operation.kind == "remove":
        yield ABSENT
    elif operation.content == content:
        yield content
