"""The one loop thread of the process, shared by every service, and what happens when the process ends.

Guarantees:

* One dispatcher for all services, so that order per location holds across them (O1). It is touched on the
  loop thread only; other threads send calls and wait for a future of their own, never for a shared lock, so
  a signal handler may call a service that it interrupted (L1).
* The thread lives while it has a tenant. The last one that leaves joins it, or where nobody can wait, lets it end by
  itself (B2). What storage holds up is left behind after a deadline, ends when it can, and holds up neither the
  interpreter's exit nor the next service.
* A forked child starts without it; what the parent has under way stays the parent's.
* When the interpreter exits, every open service is drained first, within its own deadline (D4), and what a
  service that is gone had nobody to tell of is told (E1).

What does not belong here: anything about checkpoints.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import multiprocessing
import os
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
    "Tenant",
    "acquire",
    "current",
    "held_by",
    "leave",
    "release",
    "report_at_exit",
]

logger = logging.getLogger(__name__)

STOP_SECONDS = 10.0
"""How long what is on the loop may take to end when nobody holds it any more, before it is left behind."""

P = ParamSpec("P")
T = TypeVar("T")


_PAUSE_SECONDS = 0.01


class Drainable(Protocol):
    """What has work under way."""

    def drain_at_exit(self) -> bool:
        """End everything within a deadline; return whether all errors had been collected. Must not raise."""


class Reportable(Protocol):
    """What nobody may have been told of."""

    def __bool__(self) -> bool:
        """Whether there is anything."""

    def print_at_exit(self) -> bool:
        """Print it; return whether the program has failed by it. Must not raise."""


class Tenant:
    """One who keeps the runtime running.

    It knows its owner weakly, so that the runtime keeps alive no service that the program has dropped, nor what
    that service's observer refers to; strongly once it is to `keep` who has been dropped.

    Args:
        owner: what is to be drained when the interpreter exits.
    """

    def __init__(self, owner: Drainable) -> None:
        self._owner = weakref.ref(owner)
        self._kept: Drainable | None = None

    @property
    def owner(self) -> Drainable | None:
        """The owner, if it lives."""
        return self._owner() if self._kept is None else self._kept

    def keep(self, owner: Drainable) -> None:
        """Keep *owner* alive until it has left, although the program has dropped it."""
        self._kept = owner

    def let_go(self) -> None:
        """End what `keep` began."""
        self._kept = None


class Runtime:
    """The loop thread and what runs on it. Made by ``acquire`` alone."""

    dispatcher: Dispatcher

    def __init__(self) -> None:
        self.tenants: set[Tenant] = set()
        self.stop_seconds = STOP_SECONDS  # for its end; less where somebody has left something behind
        self._inbox = Inbox()
        self._stop_requested = asyncio.Event()
        self._ready: Outcome[None] = Outcome()
        self._over: Outcome[None] = Outcome()
        self._thread = threading.Thread(target=self._main, name="async_ckpt-loop", daemon=True)

    def start(self) -> None:
        """Start the loop thread; leave none behind where that fails or is interrupted."""
        # Here, and not on the loop thread: a child that is forked as that imports it could never import it.
        import_module("anyio._backends._asyncio")
        try:
            threads.start(self._thread)
            self._ready.result()
        except BaseException:
            self.stop()
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
        async with anyio.create_task_group() as tasks:
            self._tasks = tasks
            self.dispatcher = Dispatcher(tasks)
            with self._inbox.open():
                self._ready.set_result(None)
                await self._stop_requested.wait()

    def post(self, function: Callable[P, object], /, *args: P.args, **kwargs: P.kwargs) -> None:
        """Have *function* called on the loop thread, soon and in order; return at once."""

        def call() -> None:
            try:
                function(*args, **kwargs)
            except Exception:
                with suppress(Exception):  # what a log handler of the program's raises must not end the loop
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
        """Raise RuntimeError on the loop thread, where waiting for the loop would last for ever."""
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
        """Let the loop thread end once everything on it has."""
        with suppress(ServiceClosedError):  # it is ending
            self._inbox.send(self._stop_requested.set)

    def stop(self, seconds: float = STOP_SECONDS) -> None:
        """Have the loop thread end, and wait for that, for *seconds* at the most. Again, if it was interrupted."""
        self.end()
        if self._thread.ident is None:  # it was interrupted as it started, and will read that
            return
        try:
            self._over.result(seconds)
        except TimeoutError:
            logger.info("what storage holds up is left behind, and ends when it can")
        else:
            self._thread.join()


_here = threading.local()
_lock = threading.RLock()
_current: Runtime | None = None
_exit_hooked = False
_exiting = False
_inherited: list[tuple[Runtime, list[Drainable | None]]] = []
"""What a parent had under way; never collected here, see `_forget_in_child`."""
_unreported: list[Reportable] = []


def current() -> Runtime | None:
    """Return this process's runtime, if one is running."""
    return _current


def acquire(tenant: Tenant) -> Runtime:
    """Return the process's runtime, started if need be, and keep it running for *tenant*.

    Raises:
        ServiceClosedError: the interpreter is ending, and nobody would wait for what *tenant* starts (D4).
        RuntimeError: called on a loop thread, as by an observer.
    """
    global _current
    _refuse_loop_threads()  # first: nobody would give back what is taken for a call that is refused
    with _lock:
        _hook_exit()
        if _current is None:
            _begin(tenant)
        assert _current is not None
        _current.tenants.add(tenant)
        return _current


def _begin(tenant: Tenant) -> None:
    """Start the process's runtime; leave no other behind, interrupted or not."""
    global _current
    runtime = Runtime()
    runtime.tenants.add(tenant)  # first: nobody else would stop it
    try:
        runtime.start()
        if _current is None:
            _current = runtime
    finally:
        if _current is not runtime:  # interrupted, or a signal handler came between and made its own
            runtime.stop()


def _refuse_loop_threads() -> None:
    if getattr(_here, "is_loop", False):
        raise RuntimeError("an observer or a callback must not call the service that calls it, nor another")


def held_by(tenant: Tenant) -> Runtime | None:
    """Return what ``acquire`` has returned, or was about to return when it was interrupted."""
    runtime = _current
    return runtime if runtime is not None and tenant in runtime.tenants else None


def release(runtime: Runtime, tenant: Tenant, *, seconds: float = STOP_SECONDS) -> None:
    """Give *runtime* back; the last one stops it. Does nothing if the tenant does not hold it.

    Args:
        runtime: what ``acquire`` returned.
        tenant: what ``acquire`` was called with.
        seconds: how long to wait for its end, where this is the last one or a later one is; the next one gets a
            fresh runtime.
    """
    global _current
    with _lock:
        if tenant not in runtime.tenants:
            return
        runtime.stop_seconds = min(runtime.stop_seconds, seconds)
        if _current is runtime and len(runtime.tenants) == 1:
            _current = None
        if len(runtime.tenants) > 1:  # maybe only just now, by a signal handler (L1)
            _current = _current or runtime
            runtime.tenants.discard(tenant)
            return
    runtime.stop(runtime.stop_seconds)
    runtime.tenants.clear()  # last, so that who was interrupted can do it again


async def leave(runtime: Runtime, tenant: Tenant) -> None:
    """Like `release`, on the loop thread, which cannot join itself: it ends when it has nothing to do."""
    global _current
    # Whoever has the lock may be waiting for this very thread (L1).
    while not _lock.acquire(blocking=False):  # noqa: ASYNC110  # a lock of threads tells no loop
        await anyio.sleep(_PAUSE_SECONDS)
    try:
        if tenant not in runtime.tenants:
            return
        runtime.tenants.discard(tenant)
        if runtime.tenants:
            return
        if _current is runtime:
            _current = None
    finally:
        _lock.release()
    runtime.end()


def report_at_exit(untold: Reportable) -> None:
    """Have what is still in *untold* then printed when the interpreter exits (E1)."""
    _unreported[:] = [each for each in (*_unreported, untold) if each]


def _forget_in_child() -> None:
    """The parent's threads do not exist in a forked child (L1).

    Its connections do. Were their owners collected here, they would be taken out of the epoll that the parent's loop
    still waits with, and the parent would not hear of answers any more.
    """
    global _lock, _current
    _lock = threading.RLock()
    if _current is not None:
        # And its tenants, with their stores.
        _inherited.append((_current, [tenant.owner for tenant in _current.tenants]))
    _unreported.clear()
    _current = None
    _here.is_loop = False  # whoever forked is the child's only thread


os.register_at_fork(before=finish_imports, after_in_child=_forget_in_child)


def _hook_exit() -> None:
    """Drain before the interpreter joins threads and refuses new ones: atexit itself would be too late."""
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
    runtime = _current
    clean = True
    for tenant in list(runtime.tenants) if runtime is not None else ():
        owner = tenant.owner
        if owner is not None:  # else it has left just now
            clean = owner.drain_at_exit() and clean
    for untold in list(_unreported):
        clean = not untold.print_at_exit() and clean
    if runtime is not None and not runtime.tenants:
        runtime.stop(runtime.stop_seconds)  # again: an interruption may have kept it from its tenant
    if clean:
        return
    if multiprocessing.parent_process() is not None:
        _exit_with_failure()  # such a process runs no exit handlers
    atexit.register(_exit_with_failure)  # registered last, so it runs first


def _exit_with_failure() -> None:
    """Tell by the exit code that a checkpoint was lost (E1).

    Python offers no way to change its exit code from an exit handler, so the handlers that are left are
    run here, and then the process is ended.
    """
    atexit.unregister(_exit_with_failure)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # there is none, or nobody reads it
            stream.flush()
    os._exit(1)
