"""The walk over a state: pickle itself, with the bulk data lifted out.

Guarantees: what pickle or torch refuses is refused here, on the caller's thread, and the error says
where in the state it is; storages are met once each, so ties and views stay tied; nothing is copied
before `Capture.stage`, and after it nothing here refers to the state. Where this torch is not known, torch itself
writes what is written, here and now.

What does not belong here: memory (`host_pool`), rebuilding (`rebuild`), what torch writes (`conventions`, `filling`).
"""

from __future__ import annotations

import copyreg
import io
import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch

from async_ckpt.errors import StateChangedError, UnpicklableStateError
from async_ckpt.snapshot.arrays import ArrayBytes
from async_ckpt.snapshot.contents import Content, Objects, Records, Unfilled, Whole
from async_ckpt.snapshot.conventions import Convention, alignment, ask, convention, open_writer
from async_ckpt.snapshot.diagnosis import Offence, find_offences
from async_ckpt.snapshot.entries import ArrayEntry
from async_ckpt.snapshot.filling import Skeleton
from async_ckpt.snapshot.host_pool import HostBuffer, aligned, bytes_of, copy_storages, without_modes
from async_ckpt.snapshot.lifting import Lifted
from async_ckpt.snapshot.pickler import FilePickler, ObjectPickler
from async_ckpt.snapshot.sharing import are_same, outline, resembles, sizes_of
from async_ckpt.snapshot.snapshot import Snapshot, Storages
from async_ckpt.snapshot.xla import bring

__all__ = ["Capture", "capture", "capture_objects"]

logger = logging.getLogger("async_ckpt.snapshot")

_LEAST_SHARE = 20  # in the skeleton's own size: where memory is shared nobody counts the skeleton (B1)


def capture(state: Any) -> Capture:
    """Take stock of *state* for a file, without copying its bulk data.

    Args:
        state: anything that ``torch.save`` takes.

    Returns:
        The capture, to be staged before *state* changes.

    Raises:
        UnpicklableStateError: pickle or torch refuses something in *state*.
    """
    known = convention()
    try:
        return _as_torch_says(state) if known is None else _walk(state, known)
    except Exception as error:  # whatever a __reduce__ in the state raises
        offence = find_offences(state, error, _probe_file)[0]
    raise _refusal(offence) from offence.error


def capture_objects(state: Any, *, share_unpicklable: bool = False) -> Capture:
    """Take stock of *state* for a writer that is given its objects, without copying its bulk data.

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
        return _walk_objects(state)
    except Exception as error:  # whatever a __reduce__ in the state raises
        failure = error
    offences = find_offences(state, failure, _probe_objects)
    if not share_unpicklable:
        raise _refusal(offences[0]) from offences[0].error
    for into_objects in (True, False):
        if not into_objects:
            offences = find_offences(state, failure, _probe_objects, into_objects=False)
        try:
            made = _walk_objects(state, shared=[offence.value for offence in offences])
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

    __slots__ = ("_content", "_lifted", "_overhead", "_sizes", "_starts", "_storages", "nbytes")

    def __init__(self, content: Content, lifted: Lifted, overhead: int) -> None:
        start = 0
        starts: list[int] = []
        for nbytes in lifted.sizes:
            starts.append(start)
            start += aligned(nbytes)
        for position, data in lifted.arrays:
            lifted.entries[position] = ArrayEntry(start, data.nbytes)
            starts.append(start)
            start += aligned(data.nbytes)
        self._content = content
        self._overhead = overhead
        self._lifted: Lifted | None = lifted
        self._storages = Storages(lifted.sizes, lifted.locations, starts)
        self._sizes = sizes_of(lifted)
        self._starts = starts
        self.nbytes = start + overhead

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
            StateChangedError: memory of the state has been freed or resized since it was captured.
            RuntimeError: the capture was staged before.
        """
        lifted = self._unused()
        if buffer.nbytes < self.nbytes:
            raise ValueError(f"a buffer of {buffer.nbytes} bytes cannot hold {self.nbytes}")
        _check_sizes(lifted)
        if lifted.remotes:
            remotes = [(self._storages[index].start, tensor) for index, tensor in lifted.remotes]
            with without_modes():
                bring(remotes, buffer.as_tensor(), fresh=buffer.is_fresh)
        copy_storages(lifted.storages, lifted.sizes, buffer)
        for position, data in lifted.arrays:
            entry = lifted.entries[position]
            assert isinstance(entry, ArrayEntry)
            _copy_array(data, entry.region, buffer)
        return self._finish(lifted, buffer)

    def resembles(self, snapshot: Snapshot) -> bool:
        """Tell, in microseconds, whether `equals` is worth asking; *snapshot* may have been closed."""
        if _LEAST_SHARE * self._overhead > self.nbytes:
            return False
        return resembles(self._unused(), self._sizes, snapshot.outline)

    def equals(self, buffer: HostBuffer) -> bool:
        """Return whether *buffer*, of a snapshot that this `resembles`, holds the very bytes of the state."""
        return are_same(self._unused(), self._sizes, buffer)

    def share(self, buffer: HostBuffer) -> Snapshot:
        """Like `stage`, without copying anything, for a state that `equals` what *buffer* holds."""
        return self._finish(self._unused(), buffer)

    def _unused(self) -> Lifted:
        if self._lifted is None:
            raise RuntimeError("a capture can be staged once")
        return self._lifted

    def _finish(self, lifted: Lifted, buffer: HostBuffer) -> Snapshot:
        self._lifted = None
        return Snapshot(
            content=self._content,
            storages=self._storages,
            buffer=buffer,
            nbytes=self.nbytes,
            outline=outline(self._sizes, self._starts, buffer),
        )


def _check_sizes(lifted: Lifted) -> None:
    """Refuse to copy what is not there any more: another thread had all the time of a wait for room.

    Raises:
        StateChangedError: memory has been freed or resized.
    """
    are_there = list(map(torch.UntypedStorage.nbytes, lifted.owners)) == (lifted.owner_sizes or lifted.sizes)
    if not (are_there and all(data.is_still(data.array) for _, data in lifted.arrays)):
        raise _changed()


def _changed() -> StateChangedError:
    return StateChangedError(
        "memory of the state was freed or resized while it was being saved; nothing was saved. "
        "Change the state in other threads only when save has returned"
    )


def _copy_array(data: ArrayBytes, region: int, buffer: HostBuffer) -> None:
    import numpy

    # As bytes: copied as what it is, an array leaves out those that belong to no field (S1).
    raw = numpy.dtype((numpy.void, data.dtype.itemsize))
    try:
        source = data.array.view(raw)  # numpy resizes no array of which there are views
    except (TypeError, ValueError) as error:  # another thread has given it another dtype
        raise _changed() from error
    if not data.is_still(source):
        raise _changed()
    target = numpy.ndarray(data.shape, raw, buffer.memory, region, order="F" if data.is_fortran else "C")
    numpy.copyto(target, source)


def _walk(state: Any, known: Convention) -> Capture:
    file = io.BytesIO()
    pickler = FilePickler(file, known.words, known.reductions)
    asked = _registered()
    pickler.dump(state)
    if (
        convention() is not known or _registered() != asked
    ):  # something in the state has changed how it is written
        return _as_torch_says(state)
    lifted = pickler.lifted
    skeleton = Skeleton(
        file.getvalue(), lifted.entries, lifted.sizes, lifted.locations, known.reductions, known.words
    )
    return Capture(Unfilled(skeleton, known), lifted, len(skeleton.pickle))


def _registered() -> list[bool]:
    """Return whether somebody else says how tensors and parameters are pickled."""
    return [kind in copyreg.dispatch_table for kind in (torch.Tensor, torch.nn.Parameter)]


def _as_torch_says(state: Any) -> Capture:
    """Have torch pickle *state*, and write it, if need be."""
    lifted = Lifted()
    try:
        records = [(name, _content(value, lifted)) for name, value in ask(state)]
        if open_writer(io.BytesIO(), alignment()) is not None:
            overhead = sum(len(value) for _, value in records if not isinstance(value, int))
            return Capture(Records(records, alignment()), lifted, overhead)
    except Exception:  # the state's, which torch will raise again; or torch wants an archive of its own
        logger.debug("torch %s cannot be asked what it writes", torch.__version__, exc_info=True)
    file = io.BytesIO()
    torch.save(state, file)
    logger.warning("torch %s is not known here: it has made the whole file in memory", torch.__version__)
    return Capture(Whole(file.getvalue()), Lifted(), file.tell())


def _content(value: Any, lifted: Lifted) -> bytes | str | int:
    if not isinstance(value, torch.UntypedStorage):
        return value  # type: ignore[no-any-return]
    lifted.owners.append(value)
    lifted.storages.append(bytes_of(value))
    lifted.sizes.append(value.nbytes())
    lifted.locations.append("cpu")
    return len(lifted.sizes) - 1


def _walk_objects(state: Any, *, shared: Iterable[Any] = ()) -> Capture:
    file = io.BytesIO()
    pickler = ObjectPickler(file, shared)
    pickler.dump(state)
    skeleton = file.getvalue()
    return Capture(Objects(skeleton, pickler.lifted.entries), pickler.lifted, len(skeleton))


def _probe_objects(value: Any) -> Exception | None:
    return _failure(ObjectPickler(io.BytesIO()).dump, value)


def _probe_file(value: Any) -> Exception | None:
    known = convention()
    return _failure(
        ask if known is None else FilePickler(io.BytesIO(), known.words, known.reductions).dump, value
    )


def _failure(dump: Callable[[Any], object], value: Any) -> Exception | None:
    try:
        dump(value)
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
