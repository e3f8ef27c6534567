"""``AsyncCheckpointIO``: the plugin that makes a Trainer's or a Fabric's checkpoints asynchronous.

Guarantees: ``save_checkpoint`` returns once the state may be mutated; loads and removals wait for the pending saves of
their location (O1, O2); ``teardown`` waits for everything, raises each failure once (E1), tears the base down, and
leaves the plugin ready for the next run (L1). No collective operation is called here.

What does not belong here: anything that also concerns loops without Lightning (service).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, suppress
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

from async_ckpt.events import Observer
from async_ckpt.lightning.bases import (
    argument,
    argument_slot,
    check_base,
    delegating_writer,
    location_of_path,
    refuse_ignored_options,
    with_absolute_path,
)
from async_ckpt.lightning.checked_base import CheckedBase, refuse_unknown_location
from async_ckpt.lightning.first_save import notify_companion
from async_ckpt.lightning.registration import default_weights_only, register
from async_ckpt.lightning.session import Session
from async_ckpt.lightning.shared_failures import KnownFailures
from async_ckpt.options import DirectSaves, check_direct_saves
from async_ckpt.service import CheckpointService
from async_ckpt.stores import Given, is_local, locate
from async_ckpt.stores.addresses import read_address
from async_ckpt.stores.base import Location
from async_ckpt.stores.removed_directories import with_directory_seen
from async_ckpt.telemetry.meter import Meter

__all__ = ["AsyncCheckpointIO"]


if TYPE_CHECKING:  # the Trainers of both Lightnings take it, whose classes have nothing in common
    from typing import Any as CheckpointIO
else:
    CheckpointIO = object


class AsyncCheckpointIO(CheckpointIO):  # type: ignore[misc]  # see above
    """Makes Lightning's checkpoints asynchronous: ``Trainer(plugins=[AsyncCheckpointIO()])``.

    Works with the Trainer and the Fabric of both distributions, ``lightning`` and ``pytorch_lightning``. Without a
    base, it writes ordinary checkpoints itself, to local disk or any URL that fsspec knows. With a base CheckpointIO,
    it calls that in the background, with the snapshot in place of the state.

    Args:
        checkpoint_io: the base CheckpointIO, or another wrapper; ``None`` uses our own streaming writer.
        direct_saves: when a direct save returns during ``fit``, that is, any save but those of Lightning's own
            ``ModelCheckpoint``, such as ``trainer.save_checkpoint(path)`` in a callback: ``"durable"`` when the file
            may be used, ``"async"`` as soon as the state may be mutated.
        **options: as for ``CheckpointService``: ``queue_depth``, ``memory_limit``, ``overflow``, …

    Attributes:
        is_sharded: whether the strategy saves directories, by ``save_sharded`` on every rank.

    Raises:
        OptionError: an option is not valid, or not with this base; or the base is no CheckpointIO, or is asynchronous
            itself.
        ImportError: no Lightning is installed.
    """

    def __init__(
        self, checkpoint_io: Any = None, *, direct_saves: DirectSaves = "durable", **options: Any
    ) -> None:
        self._direct_saves = check_direct_saves(direct_saves)
        self._options = options
        self._take_base(checkpoint_io)
        self._reset()

    def _take_base(self, base: Any) -> None:
        check_base(base)
        if base is not None:
            refuse_ignored_options(base, self._options)
        self._base = base
        self._watch = CheckedBase(base)

    def _reset(self) -> None:
        self.is_sharded = False
        self._session = Session(self._options)
        self._is_accompanied = False
        register(type(self))

    # -- Lightning's interface

    @property
    def checkpoint_io(self) -> Any:
        """The base CheckpointIO, or ``None`` if our own writer is used."""
        return self._base

    @checkpoint_io.setter
    def checkpoint_io(self, checkpoint_io: Any) -> None:
        """Accept the base that a strategy sets, which it does at every access.

        It is only used where a base is missing: as ours, if the strategy needs its own kind of base, or as that of the
        innermost wrapper. Our own writer replaces the ordinary ``TorchCheckpointIO``, as both write the same files.
        """
        location = self._empty_place()
        if location is not self and location is not None:
            location.checkpoint_io = checkpoint_io
        elif location is self and type(checkpoint_io).__name__ != "TorchCheckpointIO":
            self._take_base(checkpoint_io)

    @property
    def _base_checkpoint_io_configured(self) -> bool:
        """Asked by Lightning's wrappers: whether every wrapper below has its base."""
        return self._empty_place() is None

    def _empty_place(self) -> Any:
        """Return the wrapper without a base, from this plugin inwards; ``None`` if all have one."""
        location: Any = self
        while hasattr(type(location), "checkpoint_io"):
            if location.checkpoint_io is None:
                return location
            location = location.checkpoint_io
        return None

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Take a snapshot, and write it in the background; the arguments are those of the base's ``save_checkpoint``.

        Raises:
            UnpicklableStateError: the state cannot be pickled.
            BackPressureError: there is no room, and ``overflow="raise"``.
            TypeError: ``storage_options`` was given without a base; pass it to the plugin instead.
            Exception: an *earlier* save failed; this one is accepted all the same. If this save is synchronous, it may
                have failed itself.
        """
        if not self._is_accompanied:
            notify_companion()
        if self._base is None:
            self._save(*args, **kwargs)
            return
        save, watch = self._base.save_checkpoint, self._watch
        slot = argument_slot(save, 0, "checkpoint", args, kwargs)
        path, args, kwargs = with_absolute_path(save, 1, args, kwargs)
        location = self._locate(path)
        if is_local(location):
            location = with_directory_seen(location)
        overwrite = self._session.service.options.overwrite
        if not overwrite:
            refuse_unknown_location(location)

        def save_snapshot(snapshot: Any) -> None:
            if isinstance(slot, int):
                write = partial(save, *args[:slot], snapshot, *args[slot + 1 :], **kwargs)
            else:
                write = partial(save, *args, **{**kwargs, slot: snapshot})
            watch.save(location, write, overwrite=overwrite)

        self._session.save(
            argument(slot, args, kwargs), location, delegating_writer(location, save=save_snapshot)
        )

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint after waiting for pending saves of its path; the arguments are those of the base's method.

        Without a base: ``load_checkpoint(path, map_location=…, weights_only=…)``; by default, tensors are put on the
        CPU, and ``weights_only`` is the installed Lightning's default.
        """
        if self._base is None:
            return self._load(*args, **kwargs)
        load = self._base.load_checkpoint
        path, args, kwargs = with_absolute_path(load, 0, args, kwargs)
        location = self._locate(path)
        with self._session.loading(location) as service, service.turn(location):
            return load(*args, **kwargs)

    def remove_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Delete a checkpoint once every save accepted before is durable (D3).

        Without a base, a directory, as other strategies write, is deleted before this returns.
        """
        if not self._is_accompanied:
            notify_companion()
        if self._base is None:
            self._remove(*args, **kwargs)
            return
        remove = self._base.remove_checkpoint
        path, args, kwargs = with_absolute_path(remove, 0, args, kwargs)
        location = self._locate(path)
        delete = partial(self._watch.remove, location, partial(remove, *args, **kwargs))
        self._session.remove(location, delegating_writer(location, delete=delete))

    def save_sharded(
        self, state: Mapping[str, Any], path: Given, *, extras: Mapping[str, Any], known: KnownFailures | None
    ) -> None:
        """Write this rank's part of a state to a directory, together with all other ranks.

        Args:
            state: as for ``CheckpointService.save_sharded``.
            path: the same on every rank; a file or a link that is there is deleted.
            extras: values that get files of their own in the directory, by name; on the first rank only.
            known: the `known_failures` of the first rank before this save.

        Raises:
            Exception: an *earlier* save failed; all ranks raise it. If this save is synchronous, it may have failed
                itself; all ranks raise that, too. A failure of this rank alone is raised by all ranks at a later call.
        """
        text = read_address(path).text  # if it refuses the path, it does so on every rank
        locate = partial(self.locate_directory, path)
        self._session.save_sharded(state, text, locate, extras, known=known)

    def save_once(self, state: Any, path: Given, *, is_first: bool, known: KnownFailures | None) -> None:
        """Write a file on the first rank, with the failures and waits of `save_sharded`; called by every rank.

        Args:
            state: the state of all ranks; only the first rank's is used.
            path: the same on every rank.
            is_first: whether this is the first rank.
            known: as for `save_sharded`.
        """
        text = read_address(path).text  # if it refuses the path, it does so on every rank
        self._session.save_once(state, text, partial(self._locate, path), is_first=is_first, known=known)

    @property
    def known_failures(self) -> KnownFailures | None:
        """The failures that the next save would raise."""
        return self._session.known_failures()

    def loading(self, path: Given) -> AbstractContextManager[CheckpointService]:
        """Return a context with the service, to load a sharded checkpoint from *path*."""
        return self._session.loading(self.locate_directory(path))

    def teardown(self) -> None:
        """Wait for everything, raise unreported failures, and tear the base down; the plugin may be used again.

        Raises:
            Exception: as for ``CheckpointService.close``.
        """
        try:
            self._session.end()
        finally:
            if self._session.has_ended and self._base is not None:
                self._base.teardown()

    # -- ours

    @property
    def service(self) -> CheckpointService:
        """The service behind the plugin; a new one after each teardown."""
        return self._session.service

    def wait(self, timeout: float | None = None) -> None:
        """Block until everything accepted so far has ended; see ``CheckpointService.wait``."""
        self._session.wait(timeout)

    def see_ended(self, urls: Collection[str]) -> None:
        """Wait until the pending saves of *urls*, as events name them, have ended, successfully or not."""
        self._session.see_ended(urls)

    def settle(self) -> None:
        """Wait for everything and raise failures; if an error is in flight, log them and add them to its notes (E2).

        Saves that have not ended within ``flush_timeout`` go on.
        """
        self._session.settle()

    async def flush(self, timeout: float | None = None) -> None:
        """Like ``wait``, awaited; see ``CheckpointService.flush``."""
        await self.service.flush(timeout)

    @property
    def meter(self) -> Meter:
        """The progress of the plugin's saves, and which have ended."""
        return self._session.meter

    @property
    def is_used(self) -> bool:
        """Whether there is anything for ``teardown`` to do."""
        return self._session.is_used

    @property
    def synchronous(self) -> bool:
        """Whether every save returns only once it is durable; the companion callback sets it outside of ``fit``."""
        return self._session.synchronous

    @synchronous.setter
    def synchronous(self, synchronous: bool) -> None:
        self._session.synchronous = synchronous

    @property
    def direct_saves(self) -> DirectSaves:
        """When direct saves return during a fit: ``"durable"`` or ``"async"``."""
        return self._direct_saves

    @property
    def is_direct(self) -> Callable[[], bool]:
        """Returns whether the current save is direct; the companion callback sets it during ``fit``."""
        return self._session.is_direct

    @is_direct.setter
    def is_direct(self, is_direct: Callable[[], bool]) -> None:
        self._session.is_direct = is_direct

    def accompany(self) -> None:
        """Make saves synchronous from now on, except during a fit, which the companion callback coordinates."""
        if not self._is_accompanied:
            self._is_accompanied = True
            self.synchronous = True

    def observe(self, observer: Observer) -> None:
        """Pass every event to *observer* from now on, like the option ``observer``; calling it again does nothing."""
        self._session.observe(observer)

    def disregard(self, observer: Observer) -> None:
        """Pass no more events to *observer*."""
        self._session.disregard(observer)

    def will_exist(self, path: Given, *, leaves: Callable[[str], bool] = lambda key: False) -> bool | None:
        """Return whether *path* will exist once all requests have ended; ``None`` if no pending request affects it.

        Args:
            path: a checkpoint, or a link to one.
            leaves: returns whether a key, from ``key_of``, counts as being removed though the removal is not requested
                yet.
        """
        return self._session.will_exist(self._locate(path), leaves)

    def address_of(self, url: str) -> str:
        """Return the full address for *url* of an event, with the passwords and signatures that events omit."""
        return self._session.address_of(url)

    def key_of(self, path: Given) -> str:
        """Return a key that is the same for every spelling of *path*."""
        return self._locate(path).key

    def link(self, path: Given, target: Given, *, waits: bool = False) -> None:
        """Make *path*, on a local disk, a link to *target* once *target* is durable; until then it does not change.

        Args:
            path: the link.
            target: the file that the link leads to.
            waits: whether to return only once the link is made.
        """
        self._session.link(self._locate(path), self._locate(target), waits=waits)

    def __enter__(self) -> AsyncCheckpointIO:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.teardown()

    def __getattr__(self, name: str) -> Any:
        """Forward unknown attributes to the base."""
        base = self.__dict__.get("_base")
        if base is None or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(base, name)

    def __getstate__(self) -> Mapping[str, Any]:
        return {"base": self._base, "options": self._options, "direct_saves": self._direct_saves}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self._options = state["options"]
        self._direct_saves = state["direct_saves"]
        self._take_base(state["base"])
        self._reset()

    def _save(self, checkpoint: Any, path: Given, storage_options: Any = None) -> None:
        if storage_options is not None:
            raise TypeError("give storage_options to the plugin: AsyncCheckpointIO(storage_options={…})")
        location = self._locate(path)
        # As after a synchronous save, the directory exists: code may put something beside the checkpoint.
        if is_local(location) and not location.foreign_link and not location.in_directory:
            with suppress(OSError):  # the save itself reports it better
                os.makedirs(os.path.dirname(location.path), exist_ok=True)
        self._session.save(checkpoint, location, None)

    def _load(self, path: Given, map_location: Any = "cpu", **options: Any) -> Any:
        options.setdefault("weights_only", default_weights_only())
        location = self._locate(path)
        with self._session.loading(location) as service:
            try:
                return service.load(path, map_location=map_location, **options)
            except FileNotFoundError as error:  # with the words of Lightning's own error
                raise FileNotFoundError(f"Checkpoint file not found: {location.url}") from error

    def _remove(self, path: Given) -> None:
        self._session.remove(self._locate(path), None, is_sharded=self.is_sharded)

    def locate_directory(self, path: Given) -> Location:
        """Return the location of a sharded checkpoint at *path*; a base is not asked."""
        return locate(path, storage_options=self._options.get("storage_options"), follow=False)

    def _locate(self, path: Given) -> Location:
        """Return the location of the name itself: if it is a link, Lightning replaces it by a file."""
        if self._base is not None:
            self._watch.refuse_mangled(path)
            return location_of_path(path)
        return locate(path, storage_options=self._options.get("storage_options"), follow=False)
