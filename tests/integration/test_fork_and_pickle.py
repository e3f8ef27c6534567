"""Services that are copied, pickled, or found again in a forked child (L1)."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest

from async_ckpt import AsyncCheckpointIO, CheckpointService, RetryPolicy
from tests.support import PATIENCE_SECONDS, Harness, gated, number_at, number_of, python, state


def through_pickle(value: object) -> object:
    """Return a copy that went through bytes."""
    return pickle.loads(pickle.dumps(value))


COPIES = pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, through_pickle])


@COPIES
def test_a_service_in_use_can_be_copied(copied: object, tmp_path: Path) -> None:
    """A copy has the options and none of the runtime: it works, and what is under way stays the original's (L1)."""
    service = CheckpointService(queue_depth=3, memory_limit="64MiB", retry=RetryPolicy(attempts=2))
    with service:
        service.save(state(1), tmp_path / "a.ckpt")
        twin = copied(service)  # type: ignore[operator]
        assert twin.options == service.options
        assert twin.pending == ()
        with twin:
            twin.save(state(2), tmp_path / "b.ckpt")
    assert (number_at(tmp_path / "a.ckpt"), number_at(tmp_path / "b.ckpt")) == (1, 2)


def test_a_closed_service_comes_back_open(tmp_path: Path) -> None:
    """A copy of a closed service can be used (L1)."""
    with CheckpointService() as service:
        service.save(state(1), tmp_path / "a.ckpt")
    with copy.deepcopy(service) as twin:
        assert number_of(twin.load(tmp_path / "a.ckpt")) == 1


def test_a_failure_is_not_copied() -> None:
    """A failure that nobody was told of is told once, by the original (E1)."""
    gate, hold = gated()
    with Harness(hold, memory=True) as harness:
        handle = harness.service.save(state(1), "memory://a")
        twin = copy.copy(harness.service)
        gate.open()
        twin.wait()
        handle.wait(PATIENCE_SECONDS)
    twin.close()


@COPIES
def test_a_plugin_in_use_can_be_copied(copied: object, tmp_path: Path) -> None:
    """The Lightning plugin can be copied and pickled with saves under way, as strategies that spawn do (L1)."""
    plugin = AsyncCheckpointIO(queue_depth=3)
    plugin.save_checkpoint(state(1), tmp_path / "a.ckpt")
    twin = copied(plugin)  # type: ignore[operator]
    twin.save_checkpoint(state(2), tmp_path / "b.ckpt")
    twin.teardown()
    plugin.teardown()
    assert (number_at(tmp_path / "a.ckpt"), number_at(tmp_path / "b.ckpt")) == (1, 2)


@pytest.mark.integration
def test_a_forked_child_starts_afresh(tmp_path: Path) -> None:
    """In a child forked during a save the service works anew, and what is under way stays the parent's (L1)."""
    done = python(
        """
        import os, sys
        import torch
        from async_ckpt import load
        from tests.support import Harness, gated, number_of, reached, state

        torch.set_num_threads(1)  # OpenMP does not survive a fork
        path = sys.argv[1]
        gate, hold = gated("commit")
        with Harness(hold) as harness:
            handle = harness.service.save(state(1), f"{path}/parent.ckpt")
            reached(gate)
            child = os.fork()
            if child == 0:
                gate.open()  # in this process; the parent's stays shut
                assert harness.service.pending == ()
                try:
                    handle.wait(1)
                except RuntimeError as error:
                    print("refused:", "another process" in str(error), flush=True)
                harness.service.save(state(2), f"{path}/child.ckpt").wait(20)
                print("child:", number_of(harness.service.load(f"{path}/child.ckpt")), flush=True)
                harness.service.close()
                sys.exit(0)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            assert not handle.done()
            gate.open()
            handle.wait(20)
            print("parent:", number_of(load(f"{path}/parent.ckpt")), status)
        """,
        tmp_path,
        env={"PYTHONWARNINGS": "ignore::DeprecationWarning"},  # of forking with threads, from 3.12 on
    )
    assert done.stdout.split("\n")[:3] == ["refused: True", "child: 2.0", "parent: 1.0 0"], done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["child.ckpt", "parent.ckpt"]


@pytest.mark.integration
def test_a_forked_child_with_its_parents_id(tmp_path: Path) -> None:
    """A child that has its parent's process id, as in a container of its own, starts afresh like any other (L1)."""
    done = python(
        """
        import os, sys
        import torch
        from async_ckpt import AsyncCheckpointIO
        from async_ckpt.timeline import Timeline
        from tests.support import Harness, gated, number_at, reached, state
        from pathlib import Path

        torch.set_num_threads(1)
        os.getpid = lambda: 1  # as both are told that are the first of their container
        path = sys.argv[1]
        gate, hold = gated("commit")
        plugin = AsyncCheckpointIO(observer=Timeline(f"{path}/timeline.json"))
        with Harness(hold) as harness, plugin:
            handle = harness.service.save(state(1), f"{path}/parent.ckpt")
            plugin.save_checkpoint(state(3), f"{path}/plugin.ckpt")
            reached(gate)
            child = os.fork()
            if child == 0:
                gate.open()
                assert plugin.meter.pending == []
                try:
                    handle.wait(1)
                except RuntimeError as error:
                    print("refused:", "another process" in str(error), flush=True)
                harness.service.save(state(2), f"{path}/child.ckpt").wait(20)
                harness.service.close()
                os._exit(0)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            gate.open()
        print(*(number_at(Path(path, f"{name}.ckpt")) for name in ("parent", "child", "plugin")))
        """,
        tmp_path,
        env={"PYTHONWARNINGS": "ignore::DeprecationWarning"},
    )
    assert done.stdout.split("\n") == ["refused: True", "0", "1.0 2.0 3.0", ""], done.stderr


@pytest.mark.integration
def test_a_forked_child_that_saves_nothing_ends_well(tmp_path: Path) -> None:
    """A child that inherits a service in use and ends, closing it or not, disturbs nothing (L1, D4)."""
    done = python(
        """
        import os, sys
        from tests.support import Harness, gated, reached, state

        path = sys.argv[1]
        gate, hold = gated("commit")
        with Harness(hold) as harness:
            harness.service.save(state(1), f"{path}/a.ckpt")
            reached(gate)
            for closes in (True, False):
                child = os.fork()
                if child == 0:
                    if closes:
                        harness.service.close()
                    sys.exit(0)
                assert os.waitpid(child, 0)[1] == 0
            assert len(harness.service.pending) == 1
        """,
        tmp_path,
        env={"PYTHONWARNINGS": "ignore::DeprecationWarning"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert number_at(tmp_path / "a.ckpt") == 1


@pytest.mark.integration
def test_a_forked_child_collects_nothing_of_the_parents() -> None:
    """A store that a child inherits is never collected there, whether the child uses its service or lets go of it (L1).

    Collected, the store's connections would be taken out of the epoll that the parent's loop waits with.
    """
    done = python(
        """
        import gc, os, sys
        from async_ckpt import CheckpointService
        from tests.support import MemoryStore, state

        class Connected(MemoryStore):
            def __init__(self, location, workers):
                super().__init__()
                self.pid = os.getpid()
                self.itself = self  # as what has connections has: left to the garbage collector

            def __del__(self):
                if self.pid != os.getpid():
                    os.write(1, b"collected ")

        service = CheckpointService(store_factory=Connected)
        service.save(state(1), "memory://a").wait(20)
        for does in ("uses", "drops", "ends"):
            pid = os.fork()
            if pid == 0:
                if does == "uses":
                    service.save(state(2), "memory://b").wait(20)
                    service.close()
                if does != "ends":
                    del service
                    gc.collect()
                os.write(1, f"{does} ".encode())
                sys.exit(0)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            service.save(state(3), "memory://a").wait(20)
            os.write(1, f"{status} ".encode())
        """,
        env={"PYTHONWARNINGS": "ignore::DeprecationWarning"},
    )
    assert done.stdout == "uses 0 drops 0 ends 0 ", done.stdout + done.stderr


@pytest.mark.integration
def test_a_failure_is_told_by_the_parent() -> None:
    """A failure that nobody was told of when a child is forked is told in the parent, not in the child as well (E1)."""
    done = python(
        """
        import os, sys, threading
        from async_ckpt import StoreError
        from async_ckpt.testing import Fault
        from tests.support import Harness, state

        failing = Fault(operation="commit", calls=[1], error=lambda: StoreError("no more room"))
        service = Harness(failing, memory=True).service
        failed = threading.Event()
        service.save(state(1), "memory://a").add_done_callback(lambda _: failed.set())
        assert failed.wait(20)
        for call in (service.wait, service.close, lambda: service.remove("memory://a")):
            child = os.fork()
            if child == 0:
                call()
                sys.exit(0)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        try:
            service.wait()
        except StoreError:
            print("told")
        """,
        env={"PYTHONWARNINGS": "ignore::DeprecationWarning"},
    )
    assert done.stdout.split() == ["0", "0", "0", "told"], done.stderr


@pytest.mark.integration
def test_a_stuck_thread_is_the_parents() -> None:
    """A child forked after a thread was left behind in storage ends by itself, with its own exit code (L1)."""
    done = python(
        """
        import os, sys, threading
        from async_ckpt import AbandonedError, CheckpointService
        from tests.support import MemoryStore, state

        class Stuck(MemoryStore):
            def __init__(self, location, workers):
                super().__init__()
                self.workers = workers

            async def begin(self, location, nbytes):
                await self.workers.run(self.stick)

            def stick(self):
                is_stuck.set()
                threading.Event().wait()

        is_stuck = threading.Event()
        service = CheckpointService(store_factory=Stuck, abandon_grace_seconds=0.1)
        service.save(state(1), "memory://a")
        assert is_stuck.wait(20)
        try:
            service.close(0.1)
        except AbandonedError:
            print("abandoned", flush=True)
        child = os.fork()
        if child == 0:
            sys.exit(7)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        """,
        env={"PYTHONWARNINGS": "ignore::DeprecationWarning"},
    )
    assert done.stdout.split() == ["abandoned", "7"], done.stderr


@pytest.mark.integration
@pytest.mark.parametrize("imports", ["in a worker", "on the loop"])
def test_a_child_forked_during_the_first_save_can_save(tmp_path: Path, imports: str) -> None:
    """A child that is forked while the first save imports its file system has all of it, and saves (L1)."""
    (tmp_path / "slow_backend.py").write_text("import time\ntime.sleep(0.5)\nimport slow_part\n")
    (tmp_path / "slow_part.py").write_text("import time\ntime.sleep(0.2)\n")
    done = python(
        f"""
        import importlib, os, signal, sys, threading
        sys.path.insert(0, {str(tmp_path)!r})
        from async_ckpt import CheckpointService
        from tests.support import MemoryStore, state

        class Slow(MemoryStore):
            def __init__(self, location, workers):
                super().__init__()
                self.workers = workers

            def connect(self):
                began.set()
                importlib.import_module("slow_backend").slow_part.time

            async def begin(self, location, nbytes):
                if {imports == "in a worker"}:
                    await self.workers.run(self.connect)
                else:
                    self.connect()
                return await super().begin(location, nbytes)

        began = threading.Event()
        service = CheckpointService(store_factory=Slow)
        handle = service.save(state(1), "memory://a")
        assert began.wait(20)
        children = []
        for _ in range(3):
            pid = os.fork()
            if pid == 0:
                signal.alarm(20)
                with service:
                    service.save(state(2), "memory://b").wait(15)
                os._exit(0)
            children.append(pid)
        handle.wait(20)
        print([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children])
        """,
        env={"PYTHONWARNINGS": "ignore::DeprecationWarning"},
    )
    assert done.stdout == "[0, 0, 0]\n", done.stderr


@pytest.mark.integration
def test_children_forked_at_any_moment_of_the_first_save_can_save(tmp_path: Path) -> None:
    """Whenever within the first save a child is forked, it saves, too: what our threads need is there before (L1)."""
    done = python(
        """
        import os, signal, sys, time
        from async_ckpt import CheckpointService
        from tests.support import state

        service = CheckpointService()
        children = []
        handle = service.save(state(1), f"{sys.argv[1]}/parent")
        for number in range(12):
            pid = os.fork()
            if pid == 0:
                signal.alarm(20)
                with service:
                    service.save(state(2), f"{sys.argv[1]}/{number}").wait(15)
                os._exit(0)
            children.append(pid)
            time.sleep(0.003)
        handle.wait(20)
        print({os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children})
        """,
        tmp_path,
        env={"PYTHONWARNINGS": "ignore::DeprecationWarning"},
    )
    assert done.stdout == "{0}\n", done.stderr
