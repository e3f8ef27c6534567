"""Replaces a file by another on any file system, through fsspec's interface.

Guarantees: when ``Move.go`` returns, the new file, whole, has the name. It may be called again after an error, on
another connection, and first checks whether the move took effect after all (E3). If the file system cannot replace a
file, the earlier one is renamed until the new one is in place, and renamed back if that fails (D2), by ``tidy`` at the
latest; if the process or the server dies between the two steps, the earlier file remains, whole, as
``NAME.previous-…``.

Blocks: call it in a worker.
"""

from __future__ import annotations

import errno
import logging
import secrets
from typing import Any

import fsspec.spec

from async_ckpt.retry import is_transient
from async_ckpt.stores.fsspec_calls import info_of, remove_file, version_in
from async_ckpt.stores.redaction import redacted_text

__all__ = ["Move"]

_log = logging.getLogger("async_ckpt.stores.generic")


class Move:
    """The move of a complete temporary file to its final name.

    Args:
        source: the temporary file.
        target: the final name.
        nbytes: the expected length of the file.
    """

    def __init__(self, source: str, target: str, nbytes: int) -> None:
        self._fs: Any = None
        self._source = source
        self._target = target
        self._nbytes = nbytes
        self._earlier: list[Any] | None = None  # its version
        self._tried = False
        self._landed = False
        self._aside = f"{target}.previous-{secrets.token_hex(4)}"
        self._moves_aside = False

    @property
    def begun(self) -> bool:
        """Whether the file may have its final name already."""
        return self._tried

    @property
    def left_aside(self) -> str:
        """A note on the earlier file for the error message if ``tidy`` failed; empty if it was never touched."""
        if not self._moves_aside:
            return ""
        if self._landed:
            return f"{self._aside!r}, which the new file has replaced, may still be there"
        return f"the earlier file is whole, either under its own name or at {self._aside!r}"

    def go(self, file_system: Any) -> None:
        """Move on *file_system*. After the last call, whether it raised or not, call ``tidy``."""
        self._fs = file_system
        self._try()
        self._landed = True

    def tidy(self, file_system: Any) -> None:
        """Remove the earlier file if the new one is in place; otherwise rename it back."""
        self._fs = file_system
        if self._moves_aside and info_of(file_system, self._aside) is not None:
            now = info_of(file_system, self._target)
            if self._landed or self._is_earlier(now):  # a copy of it aside need not be whole
                remove_file(file_system, self._aside)
            else:
                if now is not None:
                    remove_file(file_system, self._target)
                self._rename(self._aside, self._target)
        self._moves_aside = False

    def _try(self) -> None:
        if self._tried and self._has_landed():
            return
        if not self._tried:
            self._check_length(self._source)
            earlier = info_of(self._fs, self._target)
            self._earlier = None if earlier is None else version_in(earlier)
            self._tried = True
        try:
            self._rename(self._source, self._target)
        except Exception as error:
            if self._has_landed():
                return
            if is_transient(error) or isinstance(error, PermissionError) or not self._earlier_is_in_place():
                raise
            _log.debug("%s", redacted_text(f"{self._target} cannot be replaced directly: {error}"))
        else:
            if self._has_landed(told=True):
                return
            if not self._earlier_is_in_place():  # some file systems refuse silently
                raise OSError(errno.EIO, "the file system moved the file, but it does not exist there")
        self._move_with_earlier_aside()

    def _move_with_earlier_aside(self) -> None:
        if self._moves_aside and self._copies and info_of(self._fs, self._aside) is not None:
            remove_file(self._fs, self._aside)  # of an attempt that was cut: it need not be whole
        self._moves_aside = True
        self._rename(self._target, self._aside)
        self._rename(self._source, self._target)
        self._check_length(self._target)

    def _rename(self, source: str, target: str) -> None:
        if self._copies:
            # fsspec's ``mv`` does the same two steps, but takes "[" and "*" in names for patterns.
            self._fs.cp_file(source, target)
            remove_file(self._fs, source)
        else:
            self._fs.mv(source, target)

    @property
    def _copies(self) -> bool:
        """Whether a move is a copy and a removal."""
        return bool(type(self._fs).mv is fsspec.spec.AbstractFileSystem.mv)

    def _has_landed(self, *, told: bool = False) -> bool:
        """Return whether the new file has the name; the earlier file often has the same length.

        A changed file at the target is proof only after a copy, or if the file system *told* that it moved the file, as
        it may leave the source; after a rename, the source is gone (D1).
        """
        now = info_of(self._fs, self._target)
        if now is None or now.get("size", self._nbytes) != self._nbytes:
            return False
        if (told or self._copies) and not self._is_earlier(now):
            return True
        return info_of(self._fs, self._source) is None

    def _earlier_is_in_place(self) -> bool:
        now = info_of(self._fs, self._target)
        return self._is_earlier(now) and info_of(self._fs, self._source) is not None

    def _is_earlier(self, now: dict[str, Any] | None) -> bool:
        return now is not None and version_in(now) == self._earlier

    def _check_length(self, path: str) -> None:
        info = info_of(self._fs, path)
        if info is None:
            raise OSError(errno.EIO, f"{path!r} does not exist after it was written")
        if (size := info.get("size")) not in (None, self._nbytes):
            raise OSError(errno.EIO, f"{path!r} has {size} bytes after {self._nbytes} were written")
