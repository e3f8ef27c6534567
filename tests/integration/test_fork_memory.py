"""Processes that are forked, as data loaders' workers are, keep no second copy of a snapshot, and touch none (L1)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support import python

pytestmark = [pytest.mark.integration, pytest.mark.skipif(sys.platform != "linux", reason="of Linux alone")]

QUIET = {"PYTHONWARNINGS": "ignore::DeprecationWarning"}  # of forking with threads, from 3.12 on


def test_children_keep_no_copy_of_a_snapshot(tmp_path: Path) -> None:
    """A child keeps nothing of the parent's snapshots, though the parent writes to that memory again."""
    done = python(
        """
        import os, sys
        import torch
        from async_ckpt import CheckpointService

        def private_bytes(pid):
            with open(f"/proc/{pid}/smaps_rollup") as lines:
                return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Private_"))

        state = {str(n): torch.ones(4 << 20) for n in range(4)}  # 64 MiB
        service = CheckpointService(memory_limit="80MiB", durability="process")
        service.save(state, sys.argv[1]).wait(60)
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(writing)
            os.read(reading, 1)  # until the parent has closed it
            os._exit(0)
        before = private_bytes(pid)
        state["0"][0] = 2.0
        service.save(state, sys.argv[1]).wait(60)
        print(private_bytes(pid) - before)
        os.close(writing)
        os.waitpid(pid, 0)
        """,
        tmp_path / "a.ckpt",
        env=QUIET,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 16 << 20


def test_a_child_may_touch_and_drop_what_it_inherits() -> None:
    """In a child the memory of a snapshot is there and zero; used, dropped, collected or left, it does no harm (L1)."""
    done = python(
        """
        import gc, os, sys
        import torch
        from async_ckpt import CheckpointService
        from async_ckpt.snapshot import HostBuffer, capture
        from tests.support import MemoryStore

        torch.set_num_threads(1)  # OpenMP does not survive a fork
        state = {"a": torch.ones(1 << 20), "b": torch.ones(3)}
        service = CheckpointService(store_factory=lambda *_: MemoryStore())
        service.save(state, "memory://a").wait(60)
        captured = capture(state)
        buffer = HostBuffer(captured.nbytes)
        snapshot = captured.stage(buffer)
        for does in ("reads", "writes", "drops", "saves", "ends"):
            pid = os.fork()
            if pid == 0:
                if does == "reads":
                    assert not any(snapshot.view(0)[:100]) and int(buffer.as_tensor().sum()) == 0
                if does == "writes":
                    buffer.as_tensor().fill_(7)
                if does == "drops":
                    snapshot.close()
                    buffer.close()
                    del snapshot, buffer, captured, service
                if does == "saves":
                    for number in range(3):
                        state["b"][0] = number
                        service.save(state, "memory://b").wait(60)
                    service.close()
                if does != "ends":
                    others = [bytearray(1 << 20) for _ in range(20)]
                    gc.collect()
                    assert not any(map(any, others))
                sys.exit(0)
            print(does, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
        assert bytes(snapshot.view(0)) == state["a"].numpy().tobytes()
        """,
        env=QUIET,
    )
    assert done.stdout.split() == [*("reads", "0", "writes", "0", "drops", "0", "saves", "0", "ends", "0")], (
        done.stdout + done.stderr
    )


def test_page_locked_memory() -> None:
    """What CUDA has page-locked, and would keep from children, is there and zero too; a child does not unlock it."""
    done = python(
        """
        import gc, mmap, os, sys
        import torch
        from async_ckpt.snapshot import HostBuffer

        class Runtime:
            def cudaHostRegister(self, address, nbytes, flags):
                buffer.memory.madvise(mmap.MADV_DONTFORK)
                return 0

            def cudaHostUnregister(self, address):
                os.write(1, b"unlocked ")

        torch.cuda.cudart = Runtime
        buffer = HostBuffer(8 << 20)
        assert buffer.pin()
        buffer.as_tensor().fill_(7)
        pid = os.fork()
        if pid == 0:
            assert not any(buffer.memory[:100])
            buffer.close()
            del buffer
            gc.collect()
            sys.exit(0)
        print("ended", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
        buffer.close()
        """,
        env=QUIET,
    )
    assert done.stdout.split() == ["ended", "0", "unlocked"], done.stdout + done.stderr


def test_a_base_may_have_children_write(tmp_path: Path) -> None:
    """A base CheckpointIO that forks processes to write writes what it was given, in used memory too (S1)."""
    done = python(
        """
        import os, sys
        import torch
        from async_ckpt import AsyncCheckpointIO
        from lightning.fabric.plugins import TorchCheckpointIO

        class Forking(TorchCheckpointIO):
            def save_checkpoint(self, checkpoint, path, storage_options=None):
                pid = os.fork()
                if pid == 0:
                    torch.save(checkpoint, path)
                    os._exit(0)
                assert os.waitpid(pid, 0)[1] == 0

        torch.set_num_threads(1)  # OpenMP does not survive a fork
        plugin = AsyncCheckpointIO(Forking())
        for number in range(3):
            plugin.save_checkpoint({"w": torch.full((100_000,), 1.0 + number)}, sys.argv[1])
            plugin.wait()
            print(float(torch.load(sys.argv[1])["w"].mean()))
        plugin.teardown()
        """,
        tmp_path / "a.ckpt",
        env=QUIET,
    )
    assert done.stdout.split() == ["1.0", "2.0", "3.0"], done.stdout + done.stderr
