"""The walk over a state: pickle itself, with the bulk data lifted out.

Guarantees: what pickle or torch refuses is refused here, on the caller's thread, and the error says
where in the state it is; storages are met once each, so ties and views stay tied; nothing is copied
before `Capture.stage`, and after it nothing here refers to the state.

What does not belong here: memory (`copying`), rebuilding (`rebuild`).
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterable
from typing import Any

from async_ckpt.errors import UnpicklableStateError
from async_ckpt.snapshot.copying import HostBuffer, aligned, copy_storages
from async_ckpt.snapshot.diagnosis import Offence, find_offences
from async_ckpt.snapshot.entries import ArrayEntry
from async_ckpt.snapshot.pickler import Lifted, LiftingPickler
from async_ckpt.snapshot.picture import Snapshot, Storages
from async_ckpt.snapshot.sharing import are_same, outline, resembles, sizes_of
from async_ckpt.snapshot.xla import bring

__all__ = ["Capture", "capture"]

logger = logging.getLogger("async_ckpt.snapshot")

_LEAST_SHARE = 20  # in the skeleton's own size: where memory is shared nobody counts the skeleton (B1)


def capture(state: Any, *, share_unpicklable: bool = False) -> Capture:
    """Take stock of *state* without copying its bulk data.

    Args:
        state: anything that ``torch.save`` takes.
        share_unpicklable: pass objects that pickle refuses by reference, for a writer that may not
            pickle at all, instead of refusing them.

    Returns:
        The capture, to be staged before *state* changes.

    Raises:
        UnpicklableStateError: pickle or torch refuses something in *state*.
    """
    try:
        return _walk(state)
    except Exception as error:  # whatever a __reduce__ in the state raises
        failure = error
    offences = find_offences(state, failure, _probe)
    if not share_unpicklable:
        raise _refusal(offences[0]) from offences[0].error
    for into_objects in (True, False):
        if not into_objects:
            offences = find_offences(state, failure, _probe, into_objects=False)
        try:
            made = _walk(state, shared=[offence.value for offence in offences])
        except Exception as error:  # what was found does not exist twice: try the objects around it
            failure = error
        else:
            names = ", ".join(offence.where for offence in offences)
            logger.info("not picklable, so passed on as they are, not as they were: %s", names)
            return made
    raise _refusal(offences[0]) from offences[0].error


class Capture:
    """What a state consists of; made by `capture`, used once: either staged or let share another's memory.

    Attributes:
        nbytes: the host memory that staging needs.
    """

    __slots__ = ("_lifted", "_sizes", "_skeleton", "_starts", "_storages", "nbytes")

    def __init__(self, skeleton: bytes, lifted: Lifted) -> None:
        start = 0
        starts: list[int] = []
        for nbytes in lifted.sizes:
            starts.append(start)
            start += aligned(nbytes)
        for position, array in lifted.arrays:
            entry = lifted.entries[position]
            assert isinstance(entry, ArrayEntry)
            lifted.entries[position] = entry._replace(region=start)
            starts.append(start)
            start += aligned(array.nbytes)
        self._skeleton = skeleton
        self._lifted: Lifted | None = lifted
        self._storages = Storages(lifted.sizes, lifted.locations, starts)
        self._sizes = sizes_of(lifted)
        self._starts = starts
        self.nbytes = start + len(skeleton)

    @property
    def storages(self) -> Storages:
        """The state's storages, once each."""
        return self._storages

    def stage(self, buffer: HostBuffer) -> Snapshot:
        """Copy the bulk data into *buffer*; when this returns, the state may be changed.

        Args:
            buffer: at least `nbytes` of leased memory.

        Returns:
            The snapshot, which refers to nothing of the state.

        Raises:
            ValueError: the buffer is too small.
            RuntimeError: the capture was staged before.
        """
        lifted = self._unused()
        if buffer.nbytes < self.nbytes:
            raise ValueError(f"a buffer of {buffer.nbytes} bytes cannot hold {self.nbytes}")
        if lifted.remotes:
            remotes = [(self._storages[index].start, tensor) for index, tensor in lifted.remotes]
            bring(remotes, buffer.as_tensor(), fresh=buffer.is_fresh)
        copy_storages(lifted.storages, lifted.sizes, buffer)
        for position, array in lifted.arrays:
            entry = lifted.entries[position]
            assert isinstance(entry, ArrayEntry)
            _copy_array(array, entry, buffer)
        return self._finish(lifted, buffer)

    def resembles(self, snapshot: Snapshot) -> bool:
        """Tell, in microseconds, whether `equals` is worth asking; *snapshot* may have been closed."""
        if _LEAST_SHARE * len(self._skeleton) > self.nbytes:
            return False
        return resembles(self._unused(), self._sizes, snapshot.outline)

    def equals(self, buffer: HostBuffer) -> bool:
        """Tell whether *buffer*, of a snapshot that this `resembles`, holds the very bytes of the state."""
        return are_same(self._unused(), self._sizes, buffer)

    def share(self, buffer: HostBuffer) -> Snapshot:
        """Do what `stage` does where the state `equals` what *buffer* holds, without copying anything."""
        return self._finish(self._unused(), buffer)

    def _unused(self) -> Lifted:
        if self._lifted is None:
            raise RuntimeError("a capture can be staged once")
        return self._lifted

    def _finish(self, lifted: Lifted, buffer: HostBuffer) -> Snapshot:
        self._lifted = None
        return Snapshot(
            skeleton=self._skeleton,
            entries=lifted.entries,
            storages=self._storages,
            buffer=buffer,
            nbytes=self.nbytes,
            outline=outline(self._sizes, self._starts, buffer),
        )


def _copy_array(array: Any, entry: ArrayEntry, buffer: HostBuffer) -> None:
    if array.nbytes:
        import numpy

        # As bytes: copied as what it is, an array leaves out those that belong to no field (S1).
        raw = numpy.dtype((numpy.void, array.dtype.itemsize))
        target = numpy.ndarray(array.shape, raw, buffer.memory, entry.region, order=entry.order)
        numpy.copyto(target, array.view(raw))


def _walk(state: Any, *, shared: Iterable[Any] = ()) -> Capture:
    sink = io.BytesIO()
    pickler = LiftingPickler(sink, shared)
    pickler.dump(state)
    return Capture(sink.getvalue(), pickler.lifted)


def _probe(value: Any) -> Exception | None:
    try:
        LiftingPickler(io.BytesIO(), ()).dump(value)
    except Exception as error:  # whatever a __reduce__ raises
        return error
    return None


def _refusal(offence: Offence) -> UnpicklableStateError:
    if isinstance(offence.error, RecursionError):
        reason = "it is nested too deeply for pickle; raise sys.setrecursionlimit or flatten it"
    else:
        reason = str(offence.error) or type(offence.error).__name__
    kind = f"{type(offence.value).__module__}.{type(offence.value).__qualname__}"
    return UnpicklableStateError(f"cannot save {offence.where} ({kind}): {reason}", where=offence.where)
