"""A copy of bulk data that goes on after the call, and the fences that have it done before it is too late.

Guarantees: what is copied is what was there at the call, or the copy fails (S1): after the bytes, the versions,
storages and sizes of the tensors are compared with those at the call. A fence that is passed has all of its optimizer's
memory copied and compared; it waits for copies in memory only, never for a lock that is held for longer. The memory is
kept until it is copied, and no longer. Each step may be interrupted at any line, by a signal handler that does the same
(L1).

What torch does not count, it does not see: a write through a new ``.data``, or memory that others wrote to (`choice`
excludes those that exist at the call).

What does not belong here: which storages (`choice`), the threads, what a failure means (`snapshot`).
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from operator import length_hint
from typing import Any, NamedTuple, TypeAlias

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from async_ckpt.snapshot.host_pool import HostBuffer
from async_ckpt.snapshot.lazy.optimizers import Stepper
from async_ckpt.snapshot.lazy.switch import Switch
from async_ckpt.snapshot.parallel_copy import PIECE_BYTES, populate, work_together
from async_ckpt.snapshot.sources import address_of, without_modes_if_any
from async_ckpt.system.priority import bulk_work, is_waited_for, waiting

__all__ = ["DeferredCopy", "Item"]


_NOTHING = torch.empty(0, device="cpu")
_Held: TypeAlias = "tuple[Sequence[Item], torch.Tensor]"


class Item(NamedTuple):
    """One storage, as it was at the call.

    Attributes:
        number: its number in the state.
        tensor: the optimizer's tensor, whose version counts what is written to it.
        storage: itself.
        alias: the capture's own tensor over it.
        skip: how many bytes after the beginning of the alias's data it begins.
        nbytes: its size.
        start: where its copy begins in the buffer.
        version: of the tensor.
        address: of its memory.
        shown: the state's tensors over it, and their versions: a ``.data`` among them counts on its own.
    """

    number: int
    tensor: torch.Tensor
    storage: torch.UntypedStorage
    alias: torch.Tensor
    skip: int
    nbytes: int
    start: int
    version: int
    address: int
    shown: Sequence[tuple[torch.Tensor, int]]

    def is_there(self) -> bool:
        """Return whether the memory is where it was."""
        return self.storage.nbytes() == self.nbytes and address_of(self.alias) + self.skip == self.address

    def is_as_it_was(self) -> bool:
        """Return whether torch knows of no change since the call."""
        return (
            self.tensor._version == self.version
            and all(tensor._version == version for tensor, version in self.shown)
            and self.is_there()
            and self.tensor.untyped_storage()._cdata == self.storage._cdata
        )


class _Trace(NamedTuple):
    """What is kept of an item when it is copied: no memory, and no reference to the tensor.

    Attributes:
        number: its number in the state.
        counter: a tensor of nothing that has the version of the item's.
        storage: that it was in; as long as this lives, no other storage has its identity.
        version: at the call.
    """

    number: int
    counter: torch.Tensor
    storage: StorageWeakRef
    version: int

    @classmethod
    def of(cls, item: Item) -> _Trace:
        counter = item.tensor.detach()
        counter.data = _NOTHING  # this leaves the version with it
        return cls(item.number, counter, StorageWeakRef(item.storage), item.version)


class DeferredCopy:
    """All that one snapshot has left to be copied. Snapshots that share the memory share it.

    Args:
        chosen: what is to be copied, by the optimizer that will change it.
        buffer: where to.
        switch: turned off where the program changes weights otherwise than by steps.
    """

    def __init__(self, chosen: Mapping[Stepper, Sequence[Item]], buffer: HostBuffer, switch: Switch) -> None:
        self._users: set[object] = set()
        self._shares = [_Share(stepper, items, buffer, switch) for stepper, items in chosen.items()]

    def stand(self) -> None:
        """Have the optimizers' next steps wait for the copy."""
        for share in self._shares:
            share.stepper.stand(share)

    @property
    def is_complete(self) -> bool:
        """Whether everything is copied and compared."""
        return all(share.is_decided for share in self._shares)

    def copy(self) -> None:
        """Copy what is left; called by a worker."""
        for share in self._shares:
            share.copy(spared=1)

    def complete(self) -> list[tuple[int, str]]:
        """Wait until everything is copied; return what had changed, by its number, and whose it was.

        While nobody waits for the save, one worker copies, and this one only looks on.
        """
        for share in self._shares:
            share.look_on()
            share.finish(spared=not is_waited_for())
        if not self.is_complete:
            raise RuntimeError("the copy of a snapshot was given up by another save; please report it")
        return [found for share in self._shares for found in share.changed]

    def look_again(self) -> list[tuple[int, str]]:
        """Return what has changed since the end of the copy, but not by a step.

        An operator counts its write when it has ended: one that was in the middle when the copy ended is seen now.
        """
        return [found for share in self._shares for found in share.changed_since()]

    def unchanged(self, owners: Sequence[torch.UntypedStorage]) -> set[int]:
        """Return the numbers of those storages that another save has again, unchanged, as *owners*, before any step."""
        return {number for share in self._shares for number in share.unchanged(owners)}

    def is_readable(self, known: set[int]) -> bool:
        """Return whether all but what is *known* is copied, and was not changed before."""
        return all(share.is_readable(known) for share in self._shares)

    def join(self) -> object:
        """Return a new user, for whom the copy is kept."""
        user = object()
        self._users.add(user)
        return user

    def leave(self, user: object) -> None:
        """Give the copy up unless another user wants it. Idempotent; the garbage collector may call it."""
        self._users.discard(user)
        if not self._users:
            for share in self._shares:
                share.give_up()


class _Share:
    """What one optimizer's next step waits for; satisfies ``optimizers.Fence``."""

    def __init__(self, stepper: Stepper, items: Sequence[Item], buffer: HostBuffer, switch: Switch) -> None:
        self.stepper = stepper
        self._owner = type(stepper.optimizer()).__name__
        self._switch = switch
        self._fresh = buffer.is_fresh
        self._held: _Held | None = (items, buffer.as_tensor())
        self._pieces = [(item, at) for item in items for at in range(0, item.nbytes, PIECE_BYTES)]
        self._untaken: Iterator[int] = iter(range(len(self._pieces)))
        self._done = bytearray(len(self._pieces))
        # Who copies: the thread, and a lock that it frees at the end.
        self._busy: dict[object, tuple[int, Any]] = {}
        self._verdicts: list[list[tuple[int, str]]] = []  # only the first counts
        self._is_passed = False
        self._is_breached = False  # what is not copied may have been changed, counted or not
        self._is_given_up = False
        self._indices = [item.number for item in items]
        self._tensors = frozenset(id(item.tensor) for item in items)  # which are kept until all is copied
        self._traces: list[_Trace] = []

    # -- on any thread

    def guards(self, tensors: Iterable[torch.Tensor]) -> bool:
        """Return whether any of *tensors* is yet to be copied."""
        return not self.is_decided and any(id(tensor) in self._tensors for tensor in tensors)

    @property
    def is_decided(self) -> bool:
        """Whether all is copied and compared."""
        return bool(self._verdicts)

    @property
    def changed(self) -> list[tuple[int, str]]:
        """What was changed before it was copied."""
        return self._verdicts[0] if self._verdicts else []

    def copy(self, *, spared: int = 0) -> None:
        """Copy what nobody else has begun to, on as many threads as are worthwhile, without *spared*."""
        if self._held is not None and not self._is_given_up:
            self._copy_pieces(self._held, self._untaken, spared)

    def look_on(self) -> None:
        """Wait for who copies, and be the one where there is none, as long as nobody waits for us."""
        while (held := self._held) is not None and length_hint(self._untaken) and not is_waited_for():
            others = self._others()
            if not others:
                self._copy_pieces(held, islice(self._untaken, 1), 1)
            for lock in others:
                with lock:
                    pass

    def finish(self, *, spared: int = 0) -> None:
        """Have everything copied and compared."""
        while not self._verdicts and not self._is_given_up:
            held = self._held
            if held is None:
                return
            self._copy_pieces(held, self._untaken, spared)
            self._await_others()
            missing = [number for number, is_done in enumerate(self._done) if not is_done]
            if missing:  # taken by one who was interrupted, maybe on this thread
                self._copy_pieces(held, iter(missing), spared)
                continue
            self._decide(held[0])

    def _copy_pieces(self, held: _Held, numbers: Iterator[int], spared: int) -> None:
        copy = partial(self._copy_piece, held[1].data_ptr())
        left = length_hint(numbers) * PIECE_BYTES
        work_together(numbers, copy, nbytes=left, held=held, spared=spared)

    def _await_others(self) -> None:
        others = self._others()
        if others:
            with waiting():
                for lock in others:
                    with lock:
                        pass

    def _others(self) -> list[Any]:
        here = threading.get_ident()
        return [lock for thread, lock in list(self._busy.values()) if thread != here]

    def _copy_piece(self, begin: int, number: int) -> None:
        key, lock = object(), threading.Lock()
        lock.acquire()
        self._busy[key] = threading.get_ident(), lock  # first: from here on, who finishes waits for us
        try:
            if not self._done[number]:
                self._move(begin, number, *self._pieces[number])
        finally:
            try:
                lock.release()
            finally:  # even if this is interrupted, nobody waits for ever
                self._busy.pop(key, None)

    def _move(self, begin: int, number: int, item: Item, at: int) -> None:
        nbytes = min(PIECE_BYTES, item.nbytes - at)
        # Else the memory has gone, and the comparison will say so.
        if item.is_there():
            target = begin + item.start + at
            with bulk_work(nbytes):
                if self._fresh:
                    populate(target, nbytes)
                if not self._done[number]:  # still: a signal handler may have copied it, and stepped
                    ctypes.memmove(target, item.address + at, nbytes)
        self._done[number] = 1

    def _decide(self, items: Sequence[Item]) -> None:
        with without_modes_if_any():
            changed = [
                (item.number, self._owner) for item in items if self._is_breached or not item.is_as_it_was()
            ]
            self._traces = list(map(_Trace.of, items))  # first: the others look there when there is a verdict
        self._verdicts.append(changed)
        self._held = None
        self._pieces = []

    def give_up(self) -> None:
        """Copy no more, as nobody wants it."""
        self._is_given_up = True
        for _ in self._untaken:
            pass
        self._held = None
        self.stepper.fall(self)

    # -- after the copy

    def pass_by(self) -> None:
        """Let the optimizer step, when all is copied. Ctrl-C leaves the fence where it is."""
        try:
            self.finish()
            since = self.changed_since() if self.is_decided and not self.changed else []
        except Exception:
            self._is_breached = True
            self._open()
            raise
        self._open()
        if since:
            self._switch.turn_off(
                f"the weights of {self._owner} were changed otherwise than by its step, after they had been copied"
            )

    def let_by(self) -> None:
        """Let anybody change the weights, when all is copied."""
        try:
            self.finish()
        except Exception:
            self._is_breached = True
            raise
        self._open()

    def _open(self) -> None:
        self._is_passed = True
        self.stepper.fall(self)

    def changed_since(self) -> list[tuple[int, str]]:
        """Return what has been changed by others than a step."""
        changed = [
            (trace.number, self._owner) for trace in self._traces if trace.counter._version != trace.version
        ]
        return [] if self._is_passed else changed  # asked last: a step passes first, and changes then

    def is_readable(self, known: set[int]) -> bool:
        """Return whether all but what is *known* is copied, and was not changed before."""
        if self._verdicts:
            return not self.changed
        return not self._is_given_up and known.issuperset(self._indices)

    def unchanged(self, owners: Sequence[torch.UntypedStorage]) -> list[int]:
        """Return the numbers of storages that are the same in *owners*, and not changed since."""
        held = self._held
        if self._verdicts:
            same = [
                trace.number
                for trace in self._traces
                if trace.storage.cdata == owners[trace.number]._cdata
                and trace.counter._version == trace.version
            ]
        elif held is not None:
            same = [
                item.number
                for item in held[0]
                if item.storage._cdata == owners[item.number]._cdata and item.is_as_it_was()
            ]
        else:
            same = []
        return [] if self._is_passed else same
