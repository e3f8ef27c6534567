"""``AsyncCheckpointIO``: the plugin that makes a Trainer's or a Fabric's checkpoints asynchronous.

Guarantees: ``save_checkpoint`` returns once the state may be mutated; a checkpoint that is loaded or removed
has been waited for (O1, O2); ``teardown`` ends everything, raises what failed once (E1), tears the base down,
and leaves the plugin ready for the next run (L1). No collective operation is called here.

What does not belong here: anything that also concerns a loop without Lightning; that is the service's.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from async_ckpt.errors import UnknownProtocolError
from async_ckpt.lightning.listings import ListingsForgetter
from async_ckpt.lightning.registration import register
from async_ckpt.service import CheckpointService
from async_ckpt.stores import is_local, locate
from async_ckpt.stores.base import Location
from async_ckpt.writers import DelegatingWriter

__all__ = ["AsyncCheckpointIO"]


class AsyncCheckpointIO:
    """Makes checkpoints of Lightning asynchronous: ``Trainer(plugins=[AsyncCheckpointIO()])``.

    Both Trainers and both Fabrics take it (``lightning`` and ``pytorch_lightning``). Without a base it writes
    itself: ordinary checkpoints, to local disk or any URL that fsspec knows. With one it makes that base
    non-blocking, whatever it does; the base is given the snapshot in place of the state.

    Args:
        checkpoint_io: the base CheckpointIO, or another wrapper; ``None`` streams with our own writer.
        **options: as for ``CheckpointService``: ``queue_depth``, ``memory_limit``, ``overflow``, …

    Raises:
        OptionError: an option cannot work.
        ImportError: no Lightning is installed.
    """

    def __init__(self, checkpoint_io: Any = None, **options: Any) -> None:
        self._base = checkpoint_io
        self._options = options
        self._service: CheckpointService | None = None
        CheckpointService(**options)  # what cannot work is refused here, not at the first save
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
            self._base = checkpoint_io

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
            Exception: an *earlier* save failed; this one is accepted all the same.
        """
        if self._base is None:
            self._save(*args, **kwargs)
            return
        save = self._base.save_checkpoint
        slot = _slot(save, 0, "checkpoint", args, kwargs)
        place = _place(_argument(_slot(save, 1, "path", args, kwargs), args, kwargs))

        def save_snapshot(snapshot: Any) -> None:
            if isinstance(slot, int):
                save(*args[:slot], snapshot, *args[slot + 1 :], **kwargs)
            else:
                save(*args, **{**kwargs, slot: snapshot})

        writer = self._delegate(place, save=save_snapshot)
        self.service.submit(_argument(slot, args, kwargs), place, writer, share_unpicklable=True)

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint, after the pending saves of that path; the arguments are those of the base's method.

        Without a base: ``load_checkpoint(path, map_location=…, weights_only=None)``, tensors on the CPU and
        ``weights_only`` as ``torch.load`` has it by default.
        """
        if self._base is None:
            return self._load(*args, **kwargs)
        load = self._base.load_checkpoint
        with self.service.turn(_place(_argument(_slot(load, 0, "path", args, kwargs), args, kwargs))):
            return load(*args, **kwargs)

    def remove_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Have a checkpoint deleted, once every save accepted before is durable (D3)."""
        if self._base is None:
            self.service.remove(*args, **kwargs)
            return
        remove = self._base.remove_checkpoint
        place = _place(_argument(_slot(remove, 0, "path", args, kwargs), args, kwargs), follow=False)
        self.service.submit_removal(place, self._delegate(place, delete=partial(remove, *args, **kwargs)))

    def teardown(self) -> None:
        """End everything, raise what failed and nobody was told, and tear the base down; the plugin may be used again.

        Raises:
            Exception: as ``CheckpointService.close``.
        """
        service, self._service = self._service, None
        try:
            if service is not None:
                service.close()
        finally:
            if self._base is not None:
                self._base.teardown()

    # -- ours

    @property
    def service(self) -> CheckpointService:
        """The service behind the plugin; a new one after each teardown."""
        if self._service is None:
            # ModelCheckpoint asks fsspec what is there, and fsspec remembers.
            observer = ListingsForgetter(self._options.get("observer"))
            self._service = CheckpointService(**{**self._options, "observer": observer})
            self._service.failures.keep_ambient_error()  # Lightning saves while it handles training's error, too
        return self._service

    def wait(self, timeout: float | None = None) -> None:
        """Block until everything accepted so far has ended; see ``CheckpointService.wait``."""
        self.service.wait(timeout)

    async def flush(self, timeout: float | None = None) -> None:
        """Do what ``wait`` does, awaited; see ``CheckpointService.flush``."""
        await self.service.flush(timeout)

    def __getattr__(self, name: str) -> Any:
        """Forward what we do not know to the base."""
        base = self.__dict__.get("_base")
        if base is None or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(base, name)

    def __getstate__(self) -> Mapping[str, Any]:
        return {"base": self._base, "options": self._options}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self._base = state["base"]
        self._options = state["options"]
        self._service = None
        register(type(self))

    def _save(self, checkpoint: Any, path: str | os.PathLike[str], storage_options: Any = None) -> None:
        if storage_options is not None:
            raise TypeError("give storage_options to the plugin: AsyncCheckpointIO(storage_options={…})")
        place = locate(path)
        if is_local(
            place
        ):  # as after a synchronous save; ModelCheckpoint(save_last="link") links into it at once
            with suppress(OSError):  # the save itself says it better
                os.makedirs(os.path.dirname(place.path), exist_ok=True)
        self.service.save(checkpoint, path)

    def _load(
        self, path: str | os.PathLike[str], map_location: Any = "cpu", weights_only: bool | None = None
    ) -> Any:
        return self.service.load(path, map_location=map_location, weights_only=weights_only)

    def _delegate(self, location: Location, *, save: Any = None, delete: Any = None) -> DelegatingWriter:
        return DelegatingWriter(
            save=save,
            delete=delete,
            group=location.group,
            workers=self.service.workers(),
            durability=self.service.options.durability,
        )


def _slot(
    method: Any, position: int, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> int | str:
    """Tell where a call carries an argument: at which place, or under which name, which may be the base's own."""
    if position < len(args):
        return position
    if name in kwargs:
        return name
    own_name = list(inspect.signature(method).parameters)[position]
    if own_name not in kwargs:
        raise TypeError(f"{method.__qualname__}() needs the argument {own_name!r}")
    return own_name


def _argument(slot: int | str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return args[slot] if isinstance(slot, int) else kwargs[slot]


def _place(path: Any, *, follow: bool = True) -> Location:
    """Return the location of *path*, or one of its own kind where only the base knows what it means."""
    try:
        return locate(path, follow=follow)
    except (UnknownProtocolError, TypeError):
        return Location(url=str(path), path=str(path), key=f"base:{path}", group="base")
