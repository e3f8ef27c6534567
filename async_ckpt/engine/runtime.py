"""The loop thread, which all services of the process share, and what happens when the process exits.

Guarantees:

* There is one dispatcher for all services, so the order per location holds across them (O1). Only the loop thread
  touches it. Other threads send calls and wait for a future of their own, never for a shared lock, so a signal handler
  may call a service that it interrupted (L1).
* The thread runs while it has users. The last user joins it, or lets it end by itself where it must not wait (B2). Work
  that hangs in storage is left behind after a deadline; it delays neither the interpreter's exit nor the next service.
* A forked child starts without it; requests of the parent stay with the parent.
* When the interpreter exits, every open service is drained first, within its own deadline (D4), and unreported failures
  of services that no longer exist are printed (E1).

What does not belong here: anything about checkpoints.
"""

from __future__ import annotations

import asyncio
import atexit
import errno
import logging
import multiprocessing
import os
import socket
import sys
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from importlib import import_module
from typing import Any, ParamSpec, Protocol, TypeVar

import anyio

from async_ckpt.engine.dispatch import Dispatcher
from async_ckpt.engine.inbox import Inbox
from async_ckpt.errors import ServiceClosedError
from async_ckpt.handle import Outcome
from async_ckpt.system import threads
from async_ckpt.system.forking import finish_imports

__all__ = [
    "STOP_SECONDS",
    "Drainable",
    "Reportable",
    "Runtime",
    "RuntimeUser",
    "acquire",
    "current",
    "held_by",
    "leave",
    "release",
    "report_at_exit",
]

logger = logging.getLogger(__name__)

STOP_SECONDS = 10.0
"""How long the tasks on the loop may take to end after its last user has released it, before they are left behind."""

P = ParamSpec("P")
T = TypeVar("T")


_PAUSE_SECONDS = 0.01


class Drainable(Protocol):
    """An object that has work in progress."""

    def drain_at_exit(self) -> bool:
        """End everything within a deadline; return whether all errors had been collected. Must not raise."""


class Reportable(Protocol):
    """Failures that may not have been reported."""

    def __bool__(self) -> bool:
        """Whether there is anything."""

    def print_at_exit(self) -> bool:
        """Print them; return whether they make the program fail. Must not raise."""


class RuntimeUser:
    """A user of the runtime, which runs as long as it has one.

    The reference to the owner is weak, so that the runtime does not keep alive a service that the program has dropped,
    or objects of its observer. `keep` makes it strong.

    Args:
        owner: drained when the interpreter exits.
    """

    def __init__(self, owner: Drainable) -> None:
        self._owner = weakref.ref(owner)
        self._kept: Drainable | None = None

    @property
    def owner(self) -> Drainable | None:
        """The owner, if it still exists."""
        return self._owner() if self._kept is None else self._kept

    def keep(self, owner: Drainable) -> None:
        """Keep *owner* alive until it has released the runtime, although the program has dropped it."""
        self._kept = owner

    def let_go(self) -> None:
        """Undo `keep`."""
        self._kept = None


class Runtime:
    """The loop thread and what runs on it. Only ``acquire`` makes one."""

    dispatcher: Dispatcher

    def __init__(self) -> None:
        self.users: set[RuntimeUser] = set()
        self.stop_seconds = STOP_SECONDS  # shorter if a user has left something behind
        self._inbox = Inbox()
        self._stop_requested = asyncio.Event()
        self._ready: Outcome[None] = Outcome()
        self._over: Outcome[None] = Outcome()
        self._thread = threading.Thread(target=self._main, name="async_ckpt-loop", daemon=True)

    def start(self) -> None:
        """Start the loop thread; leave none behind if that fails or is interrupted."""
        try:
            # Not on the loop thread: a child that is forked during this import could never import the module.
            import_module("anyio._backends._asyncio")
            threads.start(self._thread)
            self._ready.result()
        except BaseException as error:
            self.stop()
            if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
                raise _without_descriptors(error) from error
            raise

    def _main(self) -> None:
        _here.is_loop = True
        try:
            anyio.run(self._run)
        except BaseException as error:
            if self._ready.done():
                logger.critical("the loop thread has ended; please report it", exc_info=error)
            else:
                self._ready.set_exception(error)
        finally:
            self._over.set_result(None)

    async def _run(self) -> None:
        sockets = socket.socketpair()  # not in the task group, which would wrap an error in a group
        async with anyio.create_task_group() as tasks:
            self._tasks = tasks
            self.dispatcher = Dispatcher(tasks)
            with self._inbox.open(*sockets):
                self._ready.set_result(None)
                await self._stop_requested.wait()

    def post(self, function: Callable[P, object], /, *args: P.args, **kwargs: P.kwargs) -> None:
        """Have *function* called on the loop thread, soon and in order; return at once."""

        def call() -> None:
            try:
                function(*args, **kwargs)
            except Exception:
                with suppress(Exception):  # an exception of the program's log handler must not end the loop
                    logger.exception("internal error in %r; please report it", function)

        self._inbox.send(call)

    def call(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Have *function* called on the loop thread and wait for what it returns or raises.

        Raises:
            RuntimeError: called on the loop thread itself, as by an observer.
        """
        self.refuse_loop_thread()
        answer: Outcome[T] = Outcome()

        def call() -> None:
            try:
                answer.set_result(function(*args, **kwargs))
            except BaseException as error:
                answer.set_exception(error)

        self._inbox.send(call)
        return answer.result()

    def spawn(self, function: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run the coroutine *function*, which raises nothing, on the loop thread, soon; return at once.

        Raises:
            ServiceClosedError: the loop has ended.
        """

        def start() -> None:
            self._tasks.start_soon(function)

        self._inbox.send(start)

    def refuse_loop_thread(self) -> None:
        """Raise RuntimeError on the loop thread, where waiting for the loop would never end."""
        _refuse_loop_threads()

    def call_async(
        self, function: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> Outcome[T]:
        """Run the coroutine *function* on the loop thread; return the outcome of what it returns or raises."""
        answer: Outcome[T] = Outcome()

        async def run() -> None:
            try:
                answer.set_result(await function(*args, **kwargs))
            except BaseException as error:
                answer.set_exception(error)
                if not isinstance(error, Exception):
                    raise

        self.spawn(run)
        return answer

    def end(self) -> None:
        """Let the loop thread end once all its tasks have."""
        with suppress(ServiceClosedError):  # it is ending
            self._inbox.send(self._stop_requested.set)

    def stop(self, seconds: float = STOP_SECONDS) -> None:
        """End the loop thread, and wait for that for up to *seconds*; call it again if it was interrupted."""
        self.end()
        if self._thread.ident is None:  # starting it was interrupted; it will end at once
            return
        try:
            self._over.result(seconds)
        except TimeoutError:
            logger.info(
                "a request that hangs in storage is left behind; its thread ends when storage answers"
            )
        else:
            self._thread.join()


_here = threading.local()
_lock = threading.RLock()
_active: dict[None, Runtime] = {}
"""This process's runtime, if one is running. A dict, because no signal handler interrupts its ``setdefault`` (L1)."""
_exit_hooked = False
_exiting = False
_inherited: list[tuple[Runtime, list[Drainable | None]]] = []
"""Runtimes of the parent process; never garbage collected here, see `_forget_in_child`."""
_unreported: list[Reportable] = []


def current() -> Runtime | None:
    """Return this process's runtime, if one is running."""
    return _active.get(None)


def acquire(user: RuntimeUser) -> Runtime:
    """Return the process's runtime, started if need be, and keep it running for *user*.

    Raises:
        ServiceClosedError: the interpreter is ending, and nobody would wait for what *user* starts (D4).
        RuntimeError: called on a loop thread, as by an observer.
    """
    _refuse_loop_threads()  # first: a refused call must acquire nothing
    with _lock:
        _hook_exit()
        runtime = _active.get(None) or _begin(user)
        runtime.users.add(user)
        return runtime


def _begin(user: RuntimeUser) -> Runtime:
    """Start and return the process's runtime; leave no second one behind, even if interrupted."""
    runtime = Runtime()
    runtime.users.add(user)  # first: nothing else would stop it
    try:
        runtime.start()
        return _active.setdefault(None, runtime)  # in one step, see there
    finally:
        if _active.get(None) is not runtime:  # interrupted, or a signal handler made another one meanwhile
            runtime.stop()


def _without_descriptors(error: OSError) -> OSError:
    message = (
        f"nothing can be saved, because the event loop cannot be started: {error.strerror}. Raise the limit on open "
        "files (ulimit -n), or close files that are not needed"
    )
    return OSError(error.errno, message)


def _refuse_loop_threads() -> None:
    if getattr(_here, "is_loop", False):
        raise RuntimeError("an observer or a callback must not call the service that calls it, nor another")


def held_by(user: RuntimeUser) -> Runtime | None:
    """Return what ``acquire`` has returned, or was about to return when it was interrupted."""
    runtime = _active.get(None)
    return runtime if runtime is not None and user in runtime.users else None


def release(runtime: Runtime, user: RuntimeUser, *, seconds: float = STOP_SECONDS) -> None:
    """Give *runtime* back; its last user stops it. Does nothing if *user* does not hold it.

    Args:
        runtime: what ``acquire`` returned.
        user: what ``acquire`` was called with.
        seconds: how long the last user waits for the end of the runtime.
    """
    with _lock:
        if user not in runtime.users:
            return
        runtime.stop_seconds = min(runtime.stop_seconds, seconds)
        if _active.get(None) is runtime and len(runtime.users) == 1:
            del _active[None]
        if len(runtime.users) > 1:  # maybe only just now, by a signal handler (L1)
            _active.setdefault(None, runtime)
            runtime.users.discard(user)
            return
    runtime.stop(runtime.stop_seconds)
    runtime.users.clear()  # last, so that an interrupted call can be repeated


async def leave(runtime: Runtime, user: RuntimeUser) -> None:
    """Like `release`, on the loop thread, which cannot join itself: it ends when it has no more tasks."""
    # The thread that holds the lock may be waiting for this one (L1).
    while not _lock.acquire(blocking=False):  # noqa: ASYNC110  # a thread's lock cannot be awaited
        await anyio.sleep(_PAUSE_SECONDS)
    try:
        if user not in runtime.users:
            return
        runtime.users.discard(user)
        if runtime.users:
            return
        if _active.get(None) is runtime:
            del _active[None]
    finally:
        _lock.release()
    runtime.end()


def report_at_exit(unreported: Reportable) -> None:
    """Print the failures that are still unreported when the interpreter exits (E1)."""
    _unreported[:] = [each for each in (*_unreported, unreported) if each]


def _forget_in_child() -> None:
    """Reset the module in a forked child, where the parent's threads do not exist (L1).

    Its connections do exist. If their owners were garbage collected here, they would be removed from the epoll object
    that the parent's loop still uses, and the parent would miss answers.
    """
    global _lock
    _lock = threading.RLock()
    runtime = _active.pop(None, None)
    if runtime is not None:
        # And its users, with their stores.
        _inherited.append((runtime, [user.owner for user in runtime.users]))
    _unreported.clear()
    _here.is_loop = False  # whoever forked is the child's only thread


os.register_at_fork(before=finish_imports, after_in_child=_forget_in_child)


def _hook_exit() -> None:
    """Register the drain at exit, before the interpreter joins threads and refuses new ones: atexit is too late."""
    global _exit_hooked
    ending = ServiceClosedError("the interpreter is ending; save and load before it does")
    if _exiting:
        raise ending
    if not _exit_hooked:
        try:
            threading._register_atexit(_drain_at_exit)  # type: ignore[attr-defined]  # private
        except RuntimeError:  # too late
            raise ending from None
        _exit_hooked = True


def _drain_at_exit() -> None:
    global _exiting
    _exiting = True
    runtime = _active.get(None)
    clean = True
    for user in list(runtime.users) if runtime is not None else ():
        owner = user.owner
        if owner is not None:  # otherwise it has just left
            clean = owner.drain_at_exit() and clean
    for unreported in list(_unreported):
        clean = not unreported.print_at_exit() and clean
    if runtime is not None and not runtime.users:
        runtime.stop(runtime.stop_seconds)  # again: its last user may have been interrupted
    if clean:
        return
    if multiprocessing.parent_process() is not None:
        _exit_with_failure()  # such a process runs no exit handlers
    atexit.register(_exit_with_failure)  # registered last, so it runs first


def _exit_with_failure() -> None:
    """Exit with an error code, because a checkpoint was lost (E1).

    An exit handler cannot change Python's exit code, so the remaining handlers are run here, and then the process is
    ended.
    """
    atexit.unregister(_exit_with_failure)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # there is none, or nobody reads it
            stream.flush()
    os._exit(1)
