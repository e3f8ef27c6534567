"""Reads a sharded checkpoint, or a plain file, into a state that is sharded in any way, in place.

Guarantees: no rank waits for another, and no rank fetches rows that it does not need. torch's own planner decides what
goes where. Beside the state, a load takes up to 64 MiB and the memory of the checkpoint's description. No code that a
checkpoint names is run unless the caller asks for it.

What does not belong here: finding the checkpoint, and waiting for its turn (`load`, service).
"""

from __future__ import annotations

import io
import logging
import os
import pickle
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from functools import partial
from itertools import islice
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlanner, ReadItem
from torch.distributed.checkpoint.stateful import Stateful

from async_ckpt.errors import CorruptCheckpointError
from async_ckpt.sharded.reading.extents import Extent
from async_ckpt.sharded.reading.fetching import Fetcher, Segment, plan_requests
from async_ckpt.sharded.reading.filling import Wanted
from async_ckpt.sharded.reading.items import Damaged, corrupt_item, load_value
from async_ckpt.system.garbage import collector_held_back

__all__ = ["Origin", "fill", "read_items"]

_log = logging.getLogger("async_ckpt.sharded")

_MOST_LISTED = 10
_MOST_HEADERS = 16
_ATTEMPTS = 3


class Origin(Protocol):
    """A checkpoint, or a file, that a state is read from."""

    @property
    def metadata(self) -> Metadata:
        """What it contains, as DCP describes it."""

    def extent(self, item: ReadItem) -> Extent:
        """Return where the tensor is that *item* is a part of."""

    def value(self, item: ReadItem) -> Segment | bytes:
        """Return the place of a pickled value that is not a tensor, or the pickle itself."""


def fill(
    state: Any,
    origin: Origin,
    fetcher: Fetcher,
    *,
    url: str,
    strict: bool,
    weights_only: bool,
    planner: LoadPlanner | None,
) -> None:
    """Fill *state* from *origin*; the other arguments are those of ``CheckpointService.load_sharded``."""
    target = {
        key: state[key].state_dict() if isinstance(state[key], Stateful) else state[key]
        for key in sorted(state, key=str)
    }
    _Filling(origin, fetcher, url, weights_only, _set_up(planner, target, origin.metadata, strict)).run()
    for key, loaded in target.items():
        if isinstance(state.get(key), Stateful):
            state[key].load_state_dict(loaded)
        else:
            state[key] = loaded


def read_items(
    items: Sequence[ReadItem],
    origin: Origin,
    fetcher: Fetcher,
    *,
    url: str,
    weights_only: bool,
    planner: LoadPlanner,
) -> None:
    """Read *items* into the memory that *planner* provides; the planner has been set up."""
    _Filling(origin, fetcher, url, weights_only, planner).read(items)


def _set_up(
    planner: LoadPlanner | None, target: dict[str, Any], metadata: Metadata, strict: bool
) -> LoadPlanner:
    planner = planner or DefaultLoadPlanner(allow_partial_load=not strict)
    planner.set_up_planner(target, metadata, _rank() == 0)
    return planner


def _rank() -> int:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", "0")) if os.environ.get("RANK", "0").isdigit() else 0


class _Filling:
    """One attempt."""

    def __init__(
        self, origin: Origin, fetcher: Fetcher, url: str, weights_only: bool, planner: LoadPlanner
    ) -> None:
        self._origin = origin
        self._fetcher = fetcher
        self._url = url
        self._weights_only = weights_only
        self._planner = planner
        self._is_late = not _has_memory(planner)

    def run(self) -> None:
        """Read everything."""
        self.read(self._plan())

    def read(self, items: Sequence[ReadItem]) -> None:
        """Read *items*."""
        segments, wanted = self._segments(items)
        self._find_headers(wanted)
        for _ in range(_ATTEMPTS):
            for each in wanted:
                segments += each.segments()
            wanted = self._fetch(segments)
            if not wanted:
                return
            _log.info(
                "reading %d items of %s again, because their bytes are not where they were expected",
                len(wanted),
                self._url,
            )
            segments = []
        raise self._corrupt(wanted[0].name, "its bytes are not where its header says")

    # -- what to read

    @collector_held_back()
    def _plan(self) -> Sequence[ReadItem]:
        planner = self._planner
        self._refuse_other_sizes()
        try:
            local = planner.create_local_plan()
        except RuntimeError as error:
            self._refuse_missing(error)
            raise
        # For this rank alone, as torch does without collectives.
        return planner.finish_plan(planner.create_global_plan([local])[0]).items

    def _refuse_missing(self, cause: RuntimeError) -> None:
        flat = getattr(self._planner, "state_dict", None)
        known = self._origin.metadata.state_dict_metadata
        missing = [name for name in flat or () if name not in known]
        if not missing or not isinstance(self._planner, DefaultLoadPlanner):
            return
        similar = get_close_matches(missing[0], list(islice(known, 20_000)), n=3, cutoff=0.0)
        advice = "strict=False leaves these values as they are"
        raise KeyError(
            f"{self._url!r} has no {_listed(missing)}; the most similar names to the first are "
            f"{', '.join(map(repr, similar))}. {advice}."
        ) from cause

    def _refuse_other_sizes(self) -> None:
        flat = getattr(self._planner, "state_dict", None)
        wrong = []
        for name, value in (flat or {}).items():
            there = self._origin.metadata.state_dict_metadata.get(name)
            if (
                isinstance(there, TensorStorageMetadata)
                and isinstance(value, torch.Tensor)
                and value.size() != there.size
            ):
                wrong.append(f"{name}: {tuple(there.size)}, but {tuple(value.size())} in the state")
        if wrong:
            raise ValueError(
                f"cannot load {self._url!r}: sizes differ: {_listed(wrong, quoted=False)}. "
                "Build the model that was saved."
            )

    @collector_held_back()
    def _segments(self, items: Sequence[ReadItem]) -> tuple[list[Segment], list[Wanted]]:
        """Return the segments of values, and the wanted parts of tensors."""
        values = [self._value(item) for item in items if item.type is LoadItemType.BYTE_IO]
        wanted = [
            self._wanted(item)
            for item in items
            if item.type is LoadItemType.TENSOR and torch.Size(item.lengths).numel()
        ]
        return [each for each in values if each is not None], wanted

    def _wanted(self, item: ReadItem) -> Wanted:
        planner = self._planner
        extent = self._origin.extent(item)
        return Wanted(
            name=item.storage_index.fqn,
            extent=extent,
            is_unusual=extent.is_scattered,
            offsets=tuple(item.storage_offsets),
            lengths=tuple(item.lengths),
            resolve=partial(planner.resolve_tensor, item),
            commit=partial(planner.commit_tensor, item),
            is_late=self._is_late,
        )

    def _value(self, item: ReadItem) -> Segment | None:
        """Return the segment to fetch for a value; None if the value is there already."""
        found = self._origin.value(item)
        if isinstance(found, bytes):
            self._planner.load_bytes(item, io.BytesIO(found))
            return None
        found.owner = item
        return found

    # -- reading

    def _find_headers(self, wanted: Iterable[Wanted]) -> None:
        """Fetch the header of one tensor of each kind, and expect that the others' headers have the same length."""
        by_kind: dict[object, list[Wanted]] = {}
        for each in wanted:
            if not each.is_read_whole and each.extent.data < 0:
                by_kind.setdefault(each.header_kind, []).append(each)
        kinds = sorted(by_kind.values(), key=len, reverse=True)
        heads = [each[0].header_segment() for each in kinds[:_MOST_HEADERS]]
        found: dict[int, int] = {}
        for request in self._fetcher.fetch(plan_requests(heads, at_a_time=self._fetcher.at_a_time)):
            for segment in request.segments:
                if (head_nbytes := segment.owner.read_header(segment)) is not None:
                    found[id(segment.owner)] = head_nbytes
        usual = next(iter(found.values()), 0)
        for same_kind in kinds:
            for each in same_kind:
                each.expect_header(found.get(id(same_kind[0]), usual))

    def _fetch(self, segments: Sequence[Segment]) -> list[Wanted]:
        """Fetch *segments* and use them; return the tensors that must be read again."""
        again = []
        requests = plan_requests(segments, at_a_time=self._fetcher.at_a_time, first=_rank())
        for request in self._fetcher.fetch(requests):
            for segment in request.segments:
                owner = segment.owner
                if not isinstance(owner, Wanted):
                    self._load_value(owner, segment)
                    continue
                try:
                    if owner.receive(segment) and not owner.finish():
                        again.append(owner)
                except Damaged as error:
                    raise self._corrupt(owner.name, f"{error} (in {segment.path!r})") from error
        return again

    def _load_value(self, item: ReadItem, segment: Segment) -> None:
        assert segment.memory is not None
        name, data = item.storage_index.fqn, bytes(segment.memory)
        if self._weights_only:
            try:
                # If torch's restricted unpickler accepts a value, the planner's unrestricted one loads the same safely.
                load_value(data)
            except pickle.UnpicklingError as error:
                raise pickle.UnpicklingError(
                    f"the value {name!r} of {self._url!r} cannot be loaded with weights_only=True: {error}"
                ) from error
            except Damaged as error:
                raise self._corrupt(name, f"{error} (in {segment.path!r})") from error
        self._planner.load_bytes(item, io.BytesIO(data))

    def _corrupt(self, name: str, reason: str) -> CorruptCheckpointError:
        return corrupt_item(self._url, name, reason)


def _has_memory(planner: LoadPlanner) -> bool:
    """Return whether the planner returns the state's own tensors, at any time."""
    kind = type(planner)
    usual = ("resolve_tensor", "lookup_tensor", "transform_tensor", "commit_tensor")
    return isinstance(planner, DefaultLoadPlanner) and all(
        getattr(kind, name) is getattr(DefaultLoadPlanner, name) for name in usual
    )


def _listed(names: Sequence[str], *, quoted: bool = True) -> str:
    text = ", ".join(repr(name) if quoted else name for name in names[:_MOST_LISTED])
    return text + (f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else "")
