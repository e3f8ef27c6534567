"""A file takes another's place on a file system of which only fsspec's interface is known.

Guarantees: ``Move.go`` returns once the new file, whole, has the name. It may be called again after an
error, and looks first whether the move took effect after all (E3). Where the file system will not replace
a file, the earlier one is kept aside until the new one is in, and put back if it does not get in (D2); a
process that dies right between the two leaves the earlier one, whole, as ``NAME.previous-…``.

Blocks: call it in a worker.
"""

from __future__ import annotations

import errno
import logging
import secrets
from typing import Any

import fsspec.spec

from async_ckpt.errors import StoreError
from async_ckpt.retry import is_transient
from async_ckpt.stores.fsspec_calls import info_of, remove_file

__all__ = ["Move"]

_log = logging.getLogger("async_ckpt.stores.generic")


class Move:
    """The move of one complete temporary file to its final name.

    Args:
        file_system: an fsspec file system.
        source: the temporary file.
        target: the final name.
        nbytes: the length that the file must have.
    """

    def __init__(self, file_system: Any, source: str, target: str, nbytes: int) -> None:
        self._fs = file_system
        self._source = source
        self._target = target
        self._nbytes = nbytes
        self._earlier: dict[str, Any] | None = None
        self._tried = False

    @property
    def begun(self) -> bool:
        """Whether the file may be under its final name already."""
        return self._tried

    def go(self) -> None:
        """Move, or raise with the earlier file still in place."""
        if self._tried and self._has_landed():
            return
        if not self._tried:
            self._check_length(self._source)
            self._earlier = info_of(self._fs, self._target)
            self._tried = True
        try:
            self._rename(self._source, self._target)
        except Exception as error:
            if self._has_landed():
                return
            if is_transient(error) or isinstance(error, PermissionError) or not self._earlier_is_in_place():
                raise
            _log.debug("%s cannot be replaced directly: %s", self._target, error)
        else:
            if self._has_landed():
                return
            if not self._earlier_is_in_place():  # some say nothing when they refuse
                raise OSError(errno.EIO, "the file system moved the file, but it is not there")
        self._move_with_earlier_aside()

    def _move_with_earlier_aside(self) -> None:
        aside = f"{self._target}.previous-{secrets.token_hex(4)}"
        self._rename(self._target, aside)
        try:
            self._rename(self._source, self._target)
            self._check_length(self._target)
        except BaseException as error:
            self._put_back(aside, error)
            raise
        try:
            remove_file(self._fs, aside)
        except Exception as error:
            _log.warning("cannot remove %s, which the new file has replaced: %s", aside, error)

    def _put_back(self, aside: str, error: BaseException) -> None:
        try:
            if info_of(self._fs, self._target) is not None:
                remove_file(self._fs, self._target)
            self._rename(aside, self._target)
        except Exception as second:
            raise StoreError(
                f"cannot commit {self._target!r}: {error}; nor could the earlier file be put back ({second}): "
                f"it is whole, at {aside!r}",
                location=self._target,
                stage="commit",
            ) from error

    def _rename(self, source: str, target: str) -> None:
        if type(self._fs).mv is fsspec.spec.AbstractFileSystem.mv:
            # The same two steps as there, but it takes "[" and "*" in names for patterns.
            self._fs.cp_file(source, target)
            remove_file(self._fs, source)
        else:
            self._fs.mv(source, target)

    def _has_landed(self) -> bool:
        """Tell whether the new file has the name. The earlier one is often just as long."""
        now = info_of(self._fs, self._target)
        if now is None or now.get("size", self._nbytes) != self._nbytes:
            return False
        return now != self._earlier or info_of(self._fs, self._source) is None

    def _earlier_is_in_place(self) -> bool:
        now = info_of(self._fs, self._target)
        return now is not None and now == self._earlier and info_of(self._fs, self._source) is not None

    def _check_length(self, path: str) -> None:
        info = info_of(self._fs, path)
        if info is None:
            raise OSError(errno.EIO, f"{path!r} is not there after it was written")
        if (size := info.get("size")) not in (None, self._nbytes):
            raise OSError(errno.EIO, f"{path!r} has {size} bytes after {self._nbytes} were written")
