"""``AsyncCheckpointIO``: the plugin that makes a Trainer's or a Fabric's checkpoints asynchronous.

Guarantees: ``save_checkpoint`` returns once the state may be mutated; a checkpoint that is loaded or removed
has been waited for (O1, O2); ``teardown`` ends everything, raises what failed once (E1), tears the base down,
and leaves the plugin ready for the next run (L1). No collective operation is called here.

What does not belong here: anything that also concerns a loop without Lightning; that is the service's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

from async_ckpt.events import Observer
from async_ckpt.lightning.bases import (
    argument,
    delegating,
    pin_path,
    place_of,
    refuse_unfit,
    refuse_void,
    slot_of,
)
from async_ckpt.lightning.first_save import let_companion_know
from async_ckpt.lightning.registration import default_weights_only, register
from async_ckpt.lightning.session import Session
from async_ckpt.lightning.watch import Watch, refuse_unknown_place
from async_ckpt.options import DirectSaves, check_direct_saves
from async_ckpt.service import CheckpointService
from async_ckpt.stores import Given, is_local, locate
from async_ckpt.stores.base import Location
from async_ckpt.stores.vanished import seen
from async_ckpt.telemetry.meter import Meter

__all__ = ["AsyncCheckpointIO"]


if TYPE_CHECKING:  # the Trainers of both Lightnings take it, whose classes have nothing in common
    from typing import Any as CheckpointIO
else:
    CheckpointIO = object


class AsyncCheckpointIO(CheckpointIO):  # type: ignore[misc]  # see above
    """Makes checkpoints of Lightning asynchronous: ``Trainer(plugins=[AsyncCheckpointIO()])``.

    Both Trainers and both Fabrics take it (``lightning`` and ``pytorch_lightning``). Without a base it writes
    itself: ordinary checkpoints, to local disk or any URL that fsspec knows. With one it makes that base
    non-blocking, whatever it does; the base is given the snapshot in place of the state.

    Args:
        checkpoint_io: the base CheckpointIO, or another wrapper; ``None`` streams with our own writer.
        direct_saves: when, during ``fit``, a save returns that is not Lightning's own ``ModelCheckpoint``'s, such as
            ``trainer.save_checkpoint(path)`` in a callback: ``"durable"`` when the file may be used, ``"async"`` as
            soon as the state may be mutated.
        **options: as for ``CheckpointService``: ``queue_depth``, ``memory_limit``, ``overflow``, …

    Raises:
        OptionError: an option cannot work, or not with that base, which is no CheckpointIO or asynchronous itself.
        ImportError: no Lightning is installed.
    """

    def __init__(
        self, checkpoint_io: Any = None, *, direct_saves: DirectSaves = "durable", **options: Any
    ) -> None:
        self._direct_saves = check_direct_saves(direct_saves)
        self._options = options
        self._take_base(checkpoint_io)
        self._begin_afresh()

    def _take_base(self, base: Any) -> None:
        refuse_unfit(base)
        if base is not None:
            refuse_void(base, self._options)
        self._base = base
        self._watch = Watch(base)

    def _begin_afresh(self) -> None:
        self._session = Session(self._options)
        self._is_accompanied = False
        register(type(self))

    # -- Lightning's interface

    @property
    def checkpoint_io(self) -> Any:
        """The base CheckpointIO, or ``None`` where our own writer is used."""
        return self._base

    @checkpoint_io.setter
    def checkpoint_io(self, checkpoint_io: Any) -> None:
        """Take the base that a strategy offers, which it does again at every access.

        It fills an empty place only: ours where the strategy needs a base of its own kind, or that of the
        innermost wrapper below. The ordinary one writes what our own writer writes, so we do not need that.
        """
        place = self._empty_place()
        if place is not self and place is not None:
            place.checkpoint_io = checkpoint_io
        elif place is self and type(checkpoint_io).__name__ != "TorchCheckpointIO":
            self._take_base(checkpoint_io)

    @property
    def _base_checkpoint_io_configured(self) -> bool:
        """What a wrapper of Lightning's asks of the one it wraps: whether no base has to be handed down."""
        return self._empty_place() is None

    def _empty_place(self) -> Any:
        """Return the wrapper, from ourselves on inwards, that has no base yet; ``None`` if all have."""
        place: Any = self
        while hasattr(type(place), "checkpoint_io"):
            if place.checkpoint_io is None:
                return place
            place = place.checkpoint_io
        return None

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Take a snapshot and have it written; the arguments are those of the base's ``save_checkpoint``.

        Raises:
            UnpicklableStateError: our own writer cannot write the state.
            BackPressureError: there is no room and ``overflow="raise"``.
            TypeError: ``storage_options`` without a base; they are an option of the plugin.
            Exception: an *earlier* save failed; this one is accepted all the same. Where it is not asynchronous,
                this one may have failed, too.
        """
        if not self._is_accompanied:
            let_companion_know()
        if self._base is None:
            self._save(*args, **kwargs)
            return
        save, watch = self._base.save_checkpoint, self._watch
        slot = slot_of(save, 0, "checkpoint", args, kwargs)
        path, args, kwargs = pin_path(save, 1, args, kwargs)
        place = self._locate(path)
        if is_local(place):
            place = seen(place)
        overwrite = self._session.service.options.overwrite
        if not overwrite:
            refuse_unknown_place(place)

        def save_snapshot(snapshot: Any) -> None:
            if isinstance(slot, int):
                write = partial(save, *args[:slot], snapshot, *args[slot + 1 :], **kwargs)
            else:
                write = partial(save, *args, **{**kwargs, slot: snapshot})
            watch.save(place, write, overwrite=overwrite)

        self._session.save(argument(slot, args, kwargs), place, delegating(place, save=save_snapshot))

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint, after the pending saves of that path; the arguments are those of the base's method.

        Without a base: ``load_checkpoint(path, map_location=…, weights_only=…)``, tensors on the CPU and
        ``weights_only`` as the Lightning in use has it by default.
        """
        if self._base is None:
            return self._load(*args, **kwargs)
        load = self._base.load_checkpoint
        path, args, kwargs = pin_path(load, 0, args, kwargs)
        place = self._locate(path)
        with self._session.loading(place) as service, service.turn(place):
            return load(*args, **kwargs)

    def remove_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Have a checkpoint deleted, once every save accepted before is durable (D3).

        Without a base, a directory, which another strategy has written, has gone when this returns.
        """
        if not self._is_accompanied:
            let_companion_know()
        if self._base is None:
            self._remove(*args, **kwargs)
            return
        remove = self._base.remove_checkpoint
        path, args, kwargs = pin_path(remove, 0, args, kwargs)
        place = self._locate(path)
        delete = partial(self._watch.remove, place, partial(remove, *args, **kwargs))
        self._session.remove(place, delegating(place, delete=delete))

    def teardown(self) -> None:
        """End everything, raise what failed and nobody was told, and tear the base down; the plugin may be used again.

        Raises:
            Exception: as ``CheckpointService.close``.
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
        """Wait until the saves have ended, well or not, that are pending for *urls*, as events name them."""
        self._session.see_ended(urls)

    def settle(self) -> None:
        """Wait for everything; raise what failed, or where an error is in flight, log it and add it to its notes (E2).

        What does not end within ``flush_timeout`` goes on.
        """
        self._session.settle()

    async def flush(self, timeout: float | None = None) -> None:
        """Like ``wait``, awaited; see ``CheckpointService.flush``."""
        await self.service.flush(timeout)

    @property
    def meter(self) -> Meter:
        """How far the plugin's saves are, and which have ended."""
        return self._session.meter

    @property
    def is_used(self) -> bool:
        """Whether there is something for ``teardown`` to end."""
        return self._session.is_used

    @property
    def synchronous(self) -> bool:
        """Whether a save returns only once it is durable; the companion callback sets it outside of ``fit``."""
        return self._session.synchronous

    @synchronous.setter
    def synchronous(self, synchronous: bool) -> None:
        self._session.synchronous = synchronous

    @property
    def direct_saves(self) -> DirectSaves:
        """What becomes of the saves of a fit that are not Lightning's own."""
        return self._direct_saves

    @property
    def is_direct(self) -> Callable[[], bool]:
        """Tells of the save that is asked for now whether it waits; the companion callback sets it during ``fit``."""
        return self._session.is_direct

    @is_direct.setter
    def is_direct(self, is_direct: Callable[[], bool]) -> None:
        self._session.is_direct = is_direct

    def accompany(self) -> None:
        """Have saves be synchronous from now on, but for those of a fit: there is a companion, which sees to those."""
        if not self._is_accompanied:
            self._is_accompanied = True
            self.synchronous = True

    def observe(self, observer: Observer) -> None:
        """Tell *observer* of every event from now on, as the option ``observer`` does; again does nothing."""
        self._session.observe(observer)

    def disregard(self, observer: Observer) -> None:
        """Tell *observer* no more."""
        self._session.disregard(observer)

    def will_exist(self, path: Given, *, leaves: Callable[[str], bool] = lambda key: False) -> bool | None:
        """Return whether *path* will be there once what is pending has ended; ``None`` where nothing of it is pending.

        Args:
            path: of a checkpoint, or of a link to one.
            leaves: tells of a ``key_of`` whether its removal, though not asked for yet, is to be counted as pending.
        """
        return self._session.will_exist(self._locate(path), leaves)

    def address_of(self, url: str) -> str:
        """Return *url*, which an event has named, with the passwords and signatures that events leave out."""
        return self._session.address_of(url)

    def key_of(self, path: Given) -> str:
        """Return what is the same for every spelling of *path*."""
        return self._locate(path).key

    def link(self, path: Given, target: Given, *, waits: bool = False) -> None:
        """Have *path*, on a local disk, lead to *target* once that is durable; until then it stays as it is.

        Args:
            path: of the link.
            target: what it is to lead to.
            waits: whether to return only once it does.
        """
        self._session.link(self._locate(path), self._locate(target), waits=waits)

    def __enter__(self) -> AsyncCheckpointIO:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.teardown()

    def __getattr__(self, name: str) -> Any:
        """Forward what we do not know to the base."""
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
        self._begin_afresh()

    def _save(self, checkpoint: Any, path: Given, storage_options: Any = None) -> None:
        if storage_options is not None:
            raise TypeError("give storage_options to the plugin: AsyncCheckpointIO(storage_options={…})")
        place = self._locate(path)
        # As after a synchronous save: who puts something beside it finds the directory.
        if is_local(place) and not place.foreign_link and not place.in_directory:
            with suppress(OSError):  # the save itself says it better
                os.makedirs(os.path.dirname(place.path), exist_ok=True)
        self._session.save(checkpoint, place, None)

    def _load(self, path: Given, map_location: Any = "cpu", **options: Any) -> Any:
        options.setdefault("weights_only", default_weights_only())
        place = self._locate(path)
        with self._session.loading(place) as service:
            try:
                return service.load(path, map_location=map_location, **options)
            except FileNotFoundError as error:  # in Lightning's words
                raise FileNotFoundError(f"Checkpoint file not found: {place.url}") from error

    def _remove(self, path: Given) -> None:
        self._session.remove(self._locate(path), None)

    def _locate(self, path: Given) -> Location:
        """Return the place of the name itself: where that is a link, Lightning replaces it by a file."""
        if self._base is not None:
            self._watch.refuse_mangled(path)
            return place_of(path)
        return locate(path, storage_options=self._options.get("storage_options"), follow=False)
