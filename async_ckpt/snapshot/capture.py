"""The walk over a state: pickle itself, with the bulk data extracted out.

Guarantees: an object that pickle or torch refuses is an error here, on the caller's thread, and the error names its
path in the state; each storage is extracted once, so ties and views stay tied; no bulk data is copied before
`Capture.stage`, and after it nothing here refers to the state. If the format of this torch is not known, torch itself
writes the file, at once and in memory.

What does not belong here: memory (`host_pool`), rebuilding (`rebuild`), torch's format (`torch_format`, `filling`).
"""

from __future__ import annotations

import copyreg
import io
import logging
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch

from async_ckpt.errors import StateChangedError, UnpicklableStateError
from async_ckpt.snapshot.arrays import ArrayBytes
from async_ckpt.snapshot.columns import Entries
from async_ckpt.snapshot.contents import Content, Objects, Records, Unfilled, Whole
from async_ckpt.snapshot.copying import copy_sources
from async_ckpt.snapshot.diagnosis import Unpicklable, find_unpicklable
from async_ckpt.snapshot.digests import digests_of
from async_ckpt.snapshot.entries import ArrayEntry
from async_ckpt.snapshot.extraction import Extracted
from async_ckpt.snapshot.filling import Skeleton
from async_ckpt.snapshot.host_pool import HostBuffer, aligned
from async_ckpt.snapshot.lazy import DeferredCopy, Switch, choose
from async_ckpt.snapshot.pickler import FilePickler, ObjectPickler
from async_ckpt.snapshot.sharing import are_same, outline, resembles, sizes_of
from async_ckpt.snapshot.snapshot import Snapshot, Storages
from async_ckpt.snapshot.sources import bytes_of, without_modes
from async_ckpt.snapshot.torch_format import TorchFormat, alignment, known_format, open_writer, torch_records
from async_ckpt.snapshot.xla import fetch_values

__all__ = ["Capture", "capture", "capture_objects"]

logger = logging.getLogger("async_ckpt.snapshot")

_LEAST_SHARE = 20  # in the skeleton's own size: where memory is shared nobody counts the skeleton (B1)


def capture(state: Any) -> Capture:
    """Capture *state* for a file, without copying its bulk data.

    Args:
        state: anything that ``torch.save`` takes.

    Returns:
        The capture, to be staged before *state* changes.

    Raises:
        UnpicklableStateError: pickle or torch refuses something in *state*.
    """
    known = known_format()
    try:
        return _as_torch_says(state) if known is None else _walk(state, known)
    except Exception as error:  # whatever a __reduce__ in the state raises
        unpicklable = find_unpicklable(state, error, _probe_file)[0]
    raise _refusal(unpicklable) from unpicklable.error


def capture_objects(state: Any, *, share_unpicklable: bool = False) -> Capture:
    """Capture *state* for a writer that is given its objects, without copying its bulk data.

    Args:
        state: anything that ``torch.save`` takes.
        share_unpicklable: pass objects that pickle refuses by reference instead of raising, for a writer that may not
            pickle at all.

    Returns:
        The capture, to be staged before *state* changes.

    Raises:
        UnpicklableStateError: pickle or torch refuses something in *state*.
    """
    try:
        return _walk_objects(state)
    except Exception as error:  # whatever a __reduce__ in the state raises
        failure = error
    offences = find_unpicklable(state, failure, _probe_objects)
    if not share_unpicklable:
        raise _refusal(offences[0]) from offences[0].error
    for into_objects in (True, False):
        if not into_objects:
            offences = find_unpicklable(state, failure, _probe_objects, into_objects=False)
        try:
            made = _walk_objects(state, shared=[unpicklable.value for unpicklable in offences])
        except Exception as error:  # what was found does not exist twice: try the objects around it
            failure = error
        else:
            names = ", ".join(unpicklable.where for unpicklable in offences)
            logger.info(
                "not picklable, so passed to the base CheckpointIO by reference, without a copy: %s", names
            )
            return made
    raise _refusal(offences[0]) from offences[0].error


class Capture:
    """The parts of a state; made by `capture`, used once: it is either staged or shares another snapshot's memory.

    Attributes:
        nbytes: the host bytes that staging needs.
    """

    __slots__ = ("_content", "_extracted", "_overhead", "_sizes", "_starts", "_storages", "_user", "nbytes")

    def __init__(self, content: Content, extracted: Extracted, overhead: int) -> None:
        start = 0
        starts: list[int] = []
        for nbytes in extracted.sources.sizes:
            starts.append(start)
            start += aligned(nbytes)
        for position, data in extracted.arrays:
            extracted.others[position] = ArrayEntry(start, data.nbytes)
            starts.append(start)
            start += aligned(data.nbytes)
        self._user: object = None  # of the other snapshot's copy, where this shares it
        self._content = content
        self._overhead = overhead
        self._extracted: Extracted | None = extracted
        self._storages = Storages(extracted.sources.sizes, extracted.locations, starts)
        self._sizes = sizes_of(extracted)
        self._starts = starts
        self.nbytes = start + overhead

    @property
    def storages(self) -> Storages:
        """The state's storages, once each."""
        return self._storages

    def stage(self, buffer: HostBuffer, *, lazy: Switch | None = None, verify: bool = False) -> Snapshot:
        """Copy the bulk data into *buffer*; afterwards the state may be changed.

        Args:
            buffer: at least `nbytes` of leased memory.
            lazy: if it is on, what only steps of optimizers change is copied later, before they do.
            verify: compare, when the snapshot is complete, the bytes with those that are there now.

        Returns:
            The snapshot, which holds no reference to the state.

        Raises:
            ValueError: the buffer is too small.
            StateChangedError: memory of the state was freed or resized since the capture.
            RuntimeError: the capture was used before.
        """
        extracted = self._unused()
        if buffer.nbytes < self.nbytes:
            raise ValueError(f"a buffer of {buffer.nbytes} bytes cannot hold {self.nbytes}")
        _check_sizes(extracted)
        if extracted.remotes:
            remotes = [(self._storages[index].start, tensor) for index, tensor in extracted.remotes]
            with without_modes():
                fetch_values(remotes, buffer.as_tensor(), fresh=buffer.is_fresh)
        digests = digests_of(extracted, self._sizes) if verify else []
        later = self._defer(extracted, buffer, lazy)
        try:
            copy_sources(extracted.sources, self._starts, buffer, later)
            for position, data in extracted.arrays:
                entry = extracted.others[position]
                assert isinstance(entry, ArrayEntry)
                _copy_array(data, entry.region, buffer)
            return self._finish(extracted, buffer, digests, later)
        except BaseException:
            if buffer.later is not None:
                buffer.later.leave(None)
            raise

    def _defer(self, extracted: Extracted, buffer: HostBuffer, lazy: Switch | None) -> Collection[int]:
        """Return the numbers of the storages that are copied later."""
        if lazy is None or not lazy.is_on:
            return ()
        chosen = choose(extracted, self._starts)
        if not chosen:
            return ()
        buffer.later = later = DeferredCopy(chosen, buffer, lazy)
        later.stand()
        return {item.number for items in chosen.values() for item in items}

    def resembles(self, snapshot: Snapshot) -> bool:
        """Return, within microseconds, whether `equals` is worth calling; *snapshot* may be closed."""
        if _LEAST_SHARE * self._overhead > self.nbytes:
            return False
        return resembles(self._unused(), self._sizes, snapshot.outline)

    def equals(self, buffer: HostBuffer) -> bool:
        """Return whether *buffer*, of a snapshot that this `resembles`, holds exactly the bytes of the state."""
        extracted, later = self._unused(), buffer.later
        if later is None:
            return are_same(extracted, self._sizes, buffer)
        self._user = user = later.join()  # the other save may end before we share its copy
        known = later.unchanged(extracted.sources.owners)
        is_same = later.is_readable(known) and are_same(extracted, self._sizes, buffer, known)
        if not is_same:
            later.leave(user)
        return is_same

    def share(self, buffer: HostBuffer, *, verify: bool = False) -> Snapshot:
        """Like `stage`, but without a copy, for a state that `equals` the content of *buffer*."""
        extracted = self._unused()
        digests = digests_of(extracted, self._sizes) if verify else []
        # What the other snapshot has not copied yet is unchanged.
        later = range(len(extracted.sources.sizes)) if buffer.later is not None else ()
        snapshot = self._finish(extracted, buffer, digests, later)
        if buffer.later is not None:
            buffer.later.leave(self._user)
        return snapshot

    def _unused(self) -> Extracted:
        if self._extracted is None:
            raise RuntimeError("a capture can be used only once")
        return self._extracted

    def _finish(
        self,
        extracted: Extracted,
        buffer: HostBuffer,
        digests: list[int | None],
        later: Collection[int],
    ) -> Snapshot:
        self._extracted = None
        return Snapshot(
            content=self._content,
            storages=self._storages,
            buffer=buffer,
            nbytes=self.nbytes,
            outline=outline(extracted, self._sizes, self._starts, buffer, later),
            digests=digests,
        )


def _check_sizes(extracted: Extracted) -> None:
    """Check that memory is still there: while the save waited for room, another thread may have freed it.

    Raises:
        StateChangedError: memory has been freed or resized.
    """
    if not (extracted.sources.are_there() and all(data.is_still(data.array) for _, data in extracted.arrays)):
        raise _changed()


def _changed() -> StateChangedError:
    return StateChangedError(
        "memory of the state was freed or resized while it was being saved; nothing was saved. "
        "Change the state in other threads only when save has returned"
    )


def _copy_array(data: ArrayBytes, region: int, buffer: HostBuffer) -> None:
    import numpy

    # As bytes: a copy by dtype would leave out bytes that belong to no field (S1).
    raw = numpy.dtype((numpy.void, data.dtype.itemsize))
    try:
        source = data.array.view(raw)  # numpy resizes no array of which there are views
    except (TypeError, ValueError) as error:  # another thread has given it another dtype
        raise _changed() from error
    if not data.is_still(source):
        raise _changed()
    target = numpy.ndarray(data.shape, raw, buffer.memory, region, order="F" if data.is_fortran else "C")
    numpy.copyto(target, source)


def _walk(state: Any, known: TorchFormat) -> Capture:
    file = io.BytesIO()
    pickler = FilePickler(file, known.global_names, known.reductions)
    asked = _registered()
    extracted = pickler.extract(state)
    if (
        known_format() is not known or _registered() != asked
    ):  # something in the state has changed how it is written
        return _as_torch_says(state)
    skeleton = Skeleton(
        file.getvalue(),
        Entries(extracted.others, extracted.tensors),
        extracted.sources.sizes,
        extracted.locations,
        known.reductions,
        known.global_names,
    )
    return Capture(Unfilled(skeleton, known), extracted, len(skeleton.pickle))


def _registered() -> list[bool]:
    """Return whether other code has registered reducers for tensors or parameters."""
    return [kind in copyreg.dispatch_table for kind in (torch.Tensor, torch.nn.Parameter)]


def _as_torch_says(state: Any) -> Capture:
    """Capture *state* by means of torch itself, which writes the whole file if need be."""
    extracted = Extracted()
    try:
        records = [(name, _content(value, extracted)) for name, value in torch_records(state)]
        if open_writer(io.BytesIO(), alignment()) is not None:
            overhead = sum(len(value) for _, value in records if not isinstance(value, int))
            return Capture(Records(records, alignment()), extracted, overhead)
    except Exception:  # the state's, which torch will raise again; or torch wants an archive of its own
        logger.debug("torch %s cannot be asked what it writes", torch.__version__, exc_info=True)
    file = io.BytesIO()
    torch.save(state, file)
    logger.warning(
        "the format of torch %s is not known: torch wrote the whole file in memory", torch.__version__
    )
    return Capture(Whole(file.getvalue()), Extracted(), file.tell())


def _content(value: Any, extracted: Extracted) -> bytes | str | int:
    if not isinstance(value, torch.UntypedStorage):
        return value  # type: ignore[no-any-return]
    extracted.locations.append("cpu")
    return extracted.sources.add(value, bytes_of(value))


def _walk_objects(state: Any, *, shared: Iterable[Any] = ()) -> Capture:
    file = io.BytesIO()
    pickler = ObjectPickler(file, shared)
    extracted = pickler.extract(state)
    skeleton = file.getvalue()
    return Capture(Objects(skeleton, Entries(extracted.others, extracted.tensors)), extracted, len(skeleton))


def _probe_objects(value: Any) -> Exception | None:
    return _failure(ObjectPickler(io.BytesIO()).extract, value)


def _probe_file(value: Any) -> Exception | None:
    known = known_format()
    return _failure(
        torch_records
        if known is None
        else FilePickler(io.BytesIO(), known.global_names, known.reductions).extract,
        value,
    )


def _failure(dump: Callable[[Any], object], value: Any) -> Exception | None:
    try:
        dump(value)
    except Exception as error:  # whatever a __reduce__ raises
        return error
    return None


def _refusal(unpicklable: Unpicklable) -> UnpicklableStateError:
    if isinstance(unpicklable.error, RecursionError):
        reason = "it is nested too deeply for pickle; raise sys.setrecursionlimit or flatten it"
    else:
        reason = str(unpicklable.error) or type(unpicklable.error).__name__
    kind = f"{type(unpicklable.value).__module__}.{type(unpicklable.value).__qualname__}"
    return UnpicklableStateError(
        f"cannot save {unpicklable.where} ({kind}): {reason}", where=unpicklable.where
    )
