"""Services that whole programs drop without closing them: their ends, and what a thousand of them leave (D4, B2)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import complaints, number_at, python

pytestmark = pytest.mark.integration


def test_the_exit_waits_for_what_was_dropped(tmp_path: Path) -> None:
    """Saves that are pending when their service is dropped are durable when the program has ended (D4)."""
    done = python(
        """
        import sys
        from async_ckpt import CheckpointService
        from tests.support import state

        for number in range(5):
            CheckpointService().save(state(number, nbytes=4 << 20), f"{sys.argv[1]}/{number}.ckpt")
        """,
        tmp_path,
        env={"PYTHONWARNINGS": "always::ResourceWarning"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("ResourceWarning: unclosed") == 5
    assert [number_at(tmp_path / f"{number}.ckpt") for number in range(5)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("pending", [True, False])
def test_a_failure_of_what_was_dropped(pending: bool) -> None:
    """A failure of a dropped service is printed at exit, pending or past, and the exit code tells (E1)."""
    done = python(
        f"""
        import threading
        from async_ckpt import StoreError
        from async_ckpt.testing import Fault
        from tests.support import Harness, gated, reached, state

        gate, hold = gated("begin")
        fails = Fault(operation="commit", error=lambda: StoreError("no more room"))
        Harness(hold, fails, memory=True).service.save(state(1), "memory://a")
        reached(gate)
        import gc
        gc.collect()
        loop = [each for each in threading.enumerate() if each.name == "async_ckpt-loop"][0]
        if {pending}:
            threading.Timer(0.1, gate.open).start()
        else:
            gate.open()
            loop.join()
        """,
    )
    assert done.returncode == 1
    assert done.stderr.count("no more room") == 1, done.stderr


def test_a_thousand_dropped_services(tmp_path: Path) -> None:
    """A program that drops a thousand services, in cycles or not, keeps no thread of them and none of their memory."""
    done = python(
        """
        import gc, os, resource, sys, threading
        import torch
        from async_ckpt import CheckpointService
        from tests.support import Harness, state

        def resident():
            with open("/proc/self/statm") as file:
                return int(file.read().split()[1]) * resource.getpagesize()

        state = {"weights": torch.ones(1 << 18)}  # 1 MiB
        def use(number):
            if number % 2:
                service = CheckpointService(durability="process")
                service.save(state, f"{sys.argv[1]}/{number % 10}.ckpt").wait()
            else:
                Harness().service.save(state, f"{sys.argv[1]}/{number % 10}.ckpt").wait()  # refers to its service

        def end():
            gc.collect()
            for thread in threading.enumerate():
                if thread.name.startswith("async_ckpt"):
                    thread.join()

        for number in range(100):
            use(number)
        end()
        before = resident()
        for number in range(1000):
            use(number)
        end()
        print(threading.active_count(), (resident() - before) >> 20)
        """,
        tmp_path,
        timeout=100,
    )
    threads, grown_mib = map(int, done.stdout.split())
    assert (threads, complaints(done)) == (1, "")
    assert grown_mib < 100  # a tenth of the snapshots


def test_a_service_that_lives_to_the_end_is_not_told_of(tmp_path: Path) -> None:
    """The exit itself closes a service that the program still holds, or has in a cycle: that is no warning."""
    done = python(
        """
        import sys
        from async_ckpt import CheckpointService
        from tests.support import Harness, state

        service = CheckpointService()
        service.save(state(1), f"{sys.argv[1]}/a.ckpt")
        harness = Harness()
        harness.service.save(state(1), f"{sys.argv[1]}/b.ckpt")
        """,
        tmp_path,
        env={"PYTHONWARNINGS": "always::ResourceWarning"},
    )
    assert (done.returncode, complaints(done)) == (0, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.ckpt", "b.ckpt"]


def test_dropped_in_a_forked_child(tmp_path: Path) -> None:
    """A child that drops its parent's service says nothing, and disturbs nothing; one of its own is its own affair."""
    done = python(
        """
        import gc, os, sys
        from async_ckpt import CheckpointService
        from tests.support import Harness, gated, reached, state

        gate, hold = gated("commit")
        services = [Harness(hold).service]
        handle = services[0].save(state(1), f"{sys.argv[1]}/a.ckpt")
        reached(gate)
        for drops_own in (False, True):
            child = os.fork()
            if child == 0:
                services.clear()
                gc.collect()
                if drops_own:
                    CheckpointService().save(state(2), f"{sys.argv[1]}/b.ckpt")
                sys.exit(0)
            assert os.waitpid(child, 0)[1] == 0
        gate.open()
        handle.wait(20)
        services[0].close()
        """,
        tmp_path,
        env={"PYTHONWARNINGS": "always::ResourceWarning,ignore::DeprecationWarning"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("ResourceWarning: unclosed") == 1
    assert (number_at(tmp_path / "a.ckpt"), number_at(tmp_path / "b.ckpt")) == (1, 2)
