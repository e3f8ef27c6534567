"""Holds back removals of files that a logger may still read, or that a link still leads to.

``ModelCheckpoint`` removes the previous checkpoint before it links to the new one, and it notifies its loggers of each
file before the file is removed or replaced.

Guarantees: before a save replaces a file, loggers have been notified of that file. A removal that is held back is
requested of the plugin in the end, and before the next save of the same path (O1). The plugin's own promise for
removals (D3) is kept: they only come later.

What does not belong here: making links, notifying loggers.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial
from typing import Any

from async_ckpt.lightning.overrides import Overrides
from async_ckpt.lightning.plugin import AsyncCheckpointIO
from async_ckpt.stores import is_given
from async_ckpt.stores.redaction import redacted_url

__all__ = ["Removals"]

logger = logging.getLogger(__name__)


class Removals:
    """The removals of one plugin during a fit.

    Attributes:
        wait_for_links: whether a removal may have to wait for a link.
    """

    def __init__(
        self,
        plugin: AsyncCheckpointIO,
        overrides: Overrides,
        *,
        is_awaited: Callable[[str], bool],
        before_replacing: Callable[[str], None] = lambda path: None,
    ) -> None:
        self.wait_for_links = False
        self._plugin = plugin
        self._is_awaited = is_awaited
        self._before_replacing = before_replacing
        self._held: dict[str, tuple[str, Callable[[], None]]] = {}
        self._remove = plugin.remove_checkpoint
        overrides.replace(plugin, "remove_checkpoint", self._remove_later)
        for name in ("save_checkpoint", "save_sharded"):
            overrides.replace(plugin, name, partial(self._remove_and_save, getattr(plugin, name)))

    def release(self, *, everything: bool = False) -> None:
        """Request the removals that need not wait any longer: all of them, even if requesting one raises an error."""
        first: Exception | None = None
        for key, (path, remove) in list(self._held.items()):
            if everything or not self._is_awaited(path):
                self._held.pop(key)
                try:
                    remove()
                except Exception as error:
                    if first is None:
                        first = error
                    else:  # only one can be raised (E1)
                        logger.exception("the removal of %r could not be requested", redacted_url(str(path)))
        if first is not None:
            try:
                raise first
            finally:
                del first  # otherwise it would keep its own frames alive

    def holds(self, key: str) -> bool:
        """Return whether the removal of the location with *key* is held back."""
        return key in self._held

    def release_path(self, path: Any) -> None:
        """Request the removal of *path* now, if it is held back: the path is about to be used again."""
        if self._held:
            _, remove = self._held.pop(self._plugin.key_of(path), (None, None))
            if remove is not None:
                remove()

    def _remove_later(self, *args: Any, **kwargs: Any) -> None:
        path = next(iter((*args, *kwargs.values())))
        path = os.fspath(path) if isinstance(path, os.PathLike) else path
        if self._leads_nowhere(path):
            return
        if self.wait_for_links or self._is_awaited(path):
            self._held[self._plugin.key_of(path)] = path, partial(self._remove, *args, **kwargs)
        else:
            self._remove(*args, **kwargs)

    def _leads_nowhere(self, path: Any) -> bool:
        """Return whether *path* is a link to a file that is removed, or will be; Lightning leaves such links."""
        foreseen = self._plugin.will_exist(path, leaves=self.holds)
        if foreseen is not None or not isinstance(path, str):  # such as a remote UPath
            return foreseen is False
        return os.path.islink(path) and not os.path.exists(path)

    def before_replacing(self, path: str, replace: Callable[[], None]) -> None:
        """Call *replace* once loggers have been notified of the present file at *path*, even if one of them fails."""
        failure: Exception | None = None
        try:
            self._before_replacing(path)
        except Exception as error:
            failure = error
        replace()
        if failure is not None:
            try:
                raise failure
            finally:
                del failure  # otherwise it would keep its own frames alive

    def _remove_and_save(self, save: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        paths = [each for each in (*args, *kwargs.values()) if is_given(each)]

        def remove_and_save() -> None:
            for path in paths:
                self.release_path(path)
            save(*args, **kwargs)

        self.before_replacing(str(paths[0]) if paths else "", remove_and_save)
