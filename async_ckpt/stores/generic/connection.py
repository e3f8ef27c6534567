"""The file system of a generic store, and the connection inside it, which servers end.

Guarantees:

* One call at a time runs on a file system that is not made for several: fsspec promises no more.
* A file system that we have made is made anew, for the next call, once its connection has ended or lost step: servers
  end what is idle for minutes, and checkpoints are further apart (E3). Handles of the one before are of no use then.
* After ``close`` none is made, and none stays (B2).

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
        connect: makes the file system, where none was given, when a call needs one.
    """

    def __init__(self, file_system: Any | None, connect: Callable[[], Any] | None) -> None:
        self._file_system = file_system
        self._connect = connect
        self._turn = threading.Lock()
        self._is_closed = False

    @property
    def file_system(self) -> Any:
        """The file system of now; ask for it inside of a call, as the next may have another."""
        assert self._file_system is not None
        return self._file_system

    def call(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call *function* in its turn, connected.

        Raises:
            TransientStoreError: the connection was lost meanwhile.
        """
        with self._turn:
            self._be_connected()
            # An asynchronous file system brings every call to its own loop; any other may share one
            # connection, or none of its state safely, between threads.
            if not self.file_system.async_impl:
                return self._watch(function, *args, **kwargs)
        return function(*args, **kwargs)

    def let_go(self, file_system: Any, function: Callable[[], object]) -> None:
        """Call *function*, which frees a handle of *file_system*, in its turn; for that, nothing is connected anew."""
        with self._turn:
            if file_system is self._file_system:
                self._watch(function)
            else:
                function()  # what it raises says nothing of the connection of now

    def close(self) -> Any | None:
        """Let none be made any more; return the file system that we have made, for its connection to be ended."""
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
