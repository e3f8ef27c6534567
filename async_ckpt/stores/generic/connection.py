"""The file system of a generic store, and its connection, which servers may close.

Guarantees:

* Calls on a file system that is not asynchronous run one at a time: fsspec promises no more.
* A file system that we made is replaced for the next call once its connection is closed or out of step: servers close
  connections that are idle for minutes, and checkpoints are further apart (E3). Handles of the old one are useless
  then.
* After ``close``, none is made, and none stays (B2).

What does not belong here: which calls may be repeated.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from async_ckpt.errors import StoreError, TransientStoreError
from async_ckpt.retry import is_transient
from async_ckpt.stores.fsspec_calls import end_connection, has_ended, marks_lost

__all__ = ["Connection"]

P = ParamSpec("P")
T = TypeVar("T")


class Connection:
    """One file system at a time; its methods block.

    Args:
        file_system: an fsspec file system, or None.
        connect: makes the file system, if none was given, when a call needs it.
    """

    def __init__(self, file_system: Any | None, connect: Callable[[], Any] | None) -> None:
        self._file_system = file_system
        self._connect = connect
        self._turn = threading.Lock()
        self._is_closed = False

    @property
    def file_system(self) -> Any:
        """The present file system; use it within a call, as the next call may have another one."""
        assert self._file_system is not None
        return self._file_system

    def call(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Connect if necessary, and call *function*.

        Raises:
            TransientStoreError: the connection was lost during the call.
        """
        with self._turn:
            self._be_connected()
            # An asynchronous file system runs every call on its own loop; any other may not be thread-safe, or share
            # one connection.
            if not self.file_system.async_impl:
                return self._watch(function, *args, **kwargs)
        return function(*args, **kwargs)

    def let_go(self, file_system: Any, function: Callable[[], object]) -> None:
        """Call *function*, which frees a handle of *file_system*, without connecting anew."""
        with self._turn:
            if file_system is self._file_system:
                self._watch(function)
            else:
                function()  # its error says nothing about the present connection

    def close(self) -> Any | None:
        """Make no more file systems; return the one that we made, if any, so that its connection can be closed."""
        self._is_closed = True
        return None if self._connect is None else self._file_system

    @property
    def _may_be_lost(self) -> bool:
        made = self._connect is not None and self._file_system is not None
        return made and not self.file_system.async_impl

    def _be_connected(self) -> None:
        if self._connect is None:
            return
        if self._may_be_lost and has_ended(self._file_system):
            self._drop()
        if self._file_system is None and not self._is_closed:
            self._file_system = self._connect()
        if self._is_closed:
            self._drop()  # what was connected meanwhile
            raise StoreError("the store has been closed")

    def _watch(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            if not self._may_be_lost or not (marks_lost(error) or has_ended(self._file_system)):
                raise
            self._drop()
            if is_transient(error):
                raise
            raise _lost(error) from error

    def _drop(self) -> None:
        file_system, self._file_system = self._file_system, None
        end_connection(file_system)


def _lost(error: Exception) -> TransientStoreError:
    where = {name: getattr(error, name, "") for name in ("location", "stage")}
    return TransientStoreError(f"{str(error) or type(error).__name__} (the connection was lost)", **where)
