"""The two writers of checkpoints, behind one protocol, so that the dispatcher need not distinguish them.

* ``StreamingWriter`` lays the file out, streams its parts to a store and commits.
* ``DelegatingWriter`` gives the snapshot, as an ordinary state, to any base CheckpointIO in a worker.

Both run on the loop thread and return only when the checkpoint is durable (D1). They do not use the queue.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from time import time_ns
from typing import Any, Protocol, cast

import anyio
from anyio.lowlevel import checkpoint_if_cancelled

from async_ckpt.errors import StoreError
from async_ckpt.events import Begun, Committing, Event, LaidOut, PartWritten, Swept
from async_ckpt.format.writing.kept import Kept
from async_ckpt.format.writing.layout import Layout, lay_out
from async_ckpt.format.writing.overlap import Overlap, find_overlap, plan_copies
from async_ckpt.format.writing.parts import plan_parts
from async_ckpt.options import Durability, ServiceOptions
from async_ckpt.retry import Retrying, RetryPolicy, call_with_retry
from async_ckpt.snapshot import Capture, HostPool, Snapshot, capture, capture_objects
from async_ckpt.stores import is_local
from async_ckpt.stores.base import (
    Content,
    Copying,
    Location,
    Part,
    Receipt,
    Store,
    Upload,
    Workers,
    aborted_on_error,
)
from async_ckpt.stores.local.link import Links
from async_ckpt.stores.local.store import sync_path

__all__ = ["DelegatingWriter", "Emit", "Linker", "StreamingWriter", "Writer"]

logger = logging.getLogger(__name__)


class Emit(Protocol):
    """Sends an event of one save to the observer."""

    def __call__(self, event: type[Event], **values: Any) -> None:
        """Send an *event*, made with *values*."""


class Writer(Protocol):
    """Writes snapshots as durable checkpoints, and deletes checkpoints.

    Attributes:
        only_reads: the snapshot's memory is neither changed nor kept, so that another save may share it.
    """

    only_reads: bool

    def capture(self, state: Any, *, share_unpicklable: bool) -> Capture:
        """Capture *state*, on the caller's thread."""

    @property
    def group(self) -> str | None:
        """Saves and removals of the same group run one at a time; with ``None``, there is no such limit."""

    async def write(self, snapshot: Snapshot, location: Location, emit: Emit) -> int:
        """Write *snapshot* to *location*, durably; return the length of the file, 0 if unknown."""

    async def delete(self, location: Location) -> None:
        """Delete the checkpoint at *location*; do nothing if there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Written:
    """A committed file, from which a later save of the same memory may copy."""

    store: Store
    layout: Layout
    stored: object


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """The parts of a file; *copies*: offsets, in the file *stored*, of parts that can be copied from it, by index."""

    parts: tuple[Part, ...]
    copies: dict[int, int] = field(default_factory=dict)
    stored: object = None


class StreamingWriter:
    """Our own writer: layout, parts, commit.

    Args:
        store: where to.
        workers: for what blocks.
        options: of the service.
        pool: keeps the layout of a file for the next one.
    """

    group = None
    only_reads = True

    def __init__(
        self, store: Store, workers: Workers, options: ServiceOptions, *, pool: HostPool | None = None
    ) -> None:
        self._store = store
        self._workers = workers
        self._pool = pool
        self._part_size = options.part_size_bytes
        self._max_concurrent_parts = options.max_concurrent_parts
        # Retries in one layer only: two would multiply.
        once = RetryPolicy(attempts=1)
        self._retry_part, self._retry_file = (
            (options.retry, once) if store.repeats_parts else (once, options.retry)
        )

    def capture(self, state: Any, *, share_unpicklable: bool) -> Capture:
        """Capture *state* for a file."""
        return capture(state)

    async def write(self, snapshot: Snapshot, location: Location, emit: Emit) -> int:
        """Stream *snapshot* to the store; a failure at any point leaves nothing behind (D2)."""
        kept = None if self._pool is None else cast("Kept | None", self._pool.kept)
        layout = await self._workers.run(lay_out, snapshot, kept)
        if self._pool is not None and layout.kept is not None and layout.kept is not kept:
            self._pool.keep(layout.kept, layout.kept.nbytes)
        layout.kept = None  # the pool alone decides how long it is kept
        snapshot.check()
        upload = await self._stream(layout, location, emit, snapshot.written)
        stored = getattr(upload, "stored", None)
        if stored is not None:
            snapshot.written = _Written(store=self._store, layout=layout, stored=stored)
        return layout.nbytes

    async def stream(self, content: Content, location: Location, emit: Emit) -> None:
        """Like `write`, for bytes from anywhere."""
        await self._stream(content, location, emit, None)

    async def _stream(self, content: Content, location: Location, emit: Emit, written: object) -> Upload:
        upload, receipts = await call_with_retry(
            self._retry_file, self._send, content, location, emit, written
        )
        async with aborted_on_error(upload):
            emit(Committing)
            await upload.commit(receipts)
        return upload

    async def delete(self, location: Location) -> None:
        """Delete what is at *location*."""
        await self._store.delete(location)

    async def _send(
        self, content: Content, location: Location, emit: Emit, written: object
    ) -> tuple[Upload, list[Receipt]]:
        """Send the whole file, without the commit."""
        upload = await self._store.begin(location, content.nbytes)
        async with aborted_on_error(upload):
            if upload.swept:
                emit(Swept, names=upload.swept)
            plan = await self._plan(upload, content, written)
            emit(LaidOut, nbytes=content.nbytes, parts=len(plan.parts))
            emit(Begun)
            return upload, await self._put_all(upload, plan, content, emit)

    async def _plan(self, upload: Upload, content: Content, written: object) -> _Plan:
        """Cut the file into parts; if the store can copy, those that the file *written* contains need not be sent."""
        part_size = upload.part_size or self._part_size
        known = isinstance(written, _Written) and written.store is self._store
        if known and isinstance(content, Layout) and hasattr(upload, "copy"):
            assert isinstance(written, _Written)
            overlap = await self._workers.run(_overlap, content, written.layout)
            if overlap is not None and content.nbytes > part_size:
                least = cast(Copying, upload).least_part_bytes
                parts, copies = plan_copies(content.nbytes, overlap, part_size=part_size, least=least)
                if copies and len(parts) <= cast(Copying, upload).max_parts:
                    return _Plan(parts=parts, copies=copies, stored=written.stored)
        return _Plan(parts=plan_parts(content.nbytes, part_size))

    async def _put(self, upload: Upload, plan: _Plan, part: Part, content: Content) -> Receipt:
        """Let the store copy a part from the other file; send it if that is impossible or the file is gone."""
        if part.index in plan.copies:
            try:
                copy, start = cast(Copying, upload).copy, plan.copies[part.index]
                return await call_with_retry(self._retry_part, copy, part, content, plan.stored, start)
            except StoreError as error:
                logger.info("sending what could not be copied: %s", error)
                plan.copies.clear()  # nor can the others
        progress = getattr(upload, "progress", int)  # see `Continuing`: progress resets the attempts
        return await Retrying(self._retry_part).advance(progress, upload.put, part, content)

    async def _put_all(self, upload: Upload, plan: _Plan, content: Content, emit: Emit) -> list[Receipt]:
        """Put all parts, a bounded number at a time; the first error cancels the others and is raised unchanged."""
        receipts: list[Receipt] = []
        errors: list[BaseException] = []
        remaining: Iterator[Part] = iter(plan.parts)

        async def send() -> None:
            for part in remaining:
                try:
                    await checkpoint_if_cancelled()  # what runs in a worker lets no cancellation in
                    receipts.append(await self._put(upload, plan, part, content))
                except anyio.get_cancelled_exc_class():
                    raise
                except BaseException as error:  # a SystemExit would end the loop
                    errors.append(error)
                    senders.cancel_scope.cancel()
                    return
                emit(PartWritten, index=part.index, nbytes=part.nbytes)

        async with anyio.create_task_group() as senders:
            at_a_time = self._max_concurrent_parts + upload.is_paced
            for _ in range(min(len(plan.parts), at_a_time, upload.max_concurrent_parts or len(plan.parts))):
                senders.start_soon(send)
        if errors:
            raise errors[0]
        return sorted(receipts, key=lambda receipt: receipt.index)


class DelegatingWriter:
    """Calls any base CheckpointIO in a worker, with the snapshot as its state.

    Its errors are raised unchanged. If it writes to a local disk, the file is synced afterwards (D1). Whether its files
    are ever partly visible depends on the base.
    """

    only_reads = False  # the base may change its state

    def __init__(
        self,
        *,
        save: Callable[[Any], object],
        delete: Callable[[], object],
        group: str,
        workers: Workers,
        durability: Durability,
    ) -> None:
        self.group = group
        self._save = save
        self._delete = delete
        self._workers = workers
        self._durability = durability

    def capture(self, state: Any, *, share_unpicklable: bool) -> Capture:
        """Capture the objects of *state*."""
        return capture_objects(state, share_unpicklable=share_unpicklable)

    async def write(self, snapshot: Snapshot, location: Location, emit: Emit) -> int:
        """Save the snapshot with the base."""
        await self._workers.run(self._write, snapshot, location)
        return 0

    async def delete(self, location: Location) -> None:
        """Delete the checkpoint with the base."""
        await self._workers.run(self._delete)

    def _write(self, snapshot: Snapshot, location: Location) -> None:
        state = snapshot.state()
        snapshot.check()
        self._save(state)
        del state
        if self._durability == "fsync" and is_local(location):
            sync_path(location.path)


class Linker:
    """Creates a link to a checkpoint on a local disk."""

    group = None

    def __init__(self, target: Location, links: Links, workers: Workers) -> None:
        self._target = target
        self._links = links
        self._workers = workers
        self._asked_ns = time_ns()

    async def link(self, location: Location) -> None:
        """Make *location* a link to the checkpoint, durably."""
        await self._workers.run(self._links.make, location, self._target, asked_ns=self._asked_ns)


def _overlap(layout: Layout, other: Layout) -> Overlap | None:
    return find_overlap(layout.pieces(), other.pieces())
