"""The host memory of a burst of saves, measured from outside (B1)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import python

pytestmark = pytest.mark.integration

MIB = 1 << 20
#: What a burst may need beyond memory_limit, whatever the size of the state: threads' stacks, torch's and the
#: interpreter's own, the skeletons and layouts of a few saves, pages of the allocator.
OVERHEAD_BYTES = 64 * MIB

BURST = """
    import sys
    import torch
    from async_ckpt import CheckpointService

    def status(name):
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

    path, nbytes, limit = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    state = {f"w{n}": torch.full((nbytes // 64 // 4,), float(n)) for n in range(64)}
    with CheckpointService(queue_depth=6, memory_limit=limit, durability="process") as service:
        service.save({"warm": torch.zeros(1000)}, f"{path}/warm.ckpt").wait()
        before = status("VmRSS")
        with open("/proc/self/clear_refs", "w") as reset:
            reset.write("5")  # the high-water mark begins anew
        for number in range(6):
            state["w0"].fill_(-number)  # else one snapshot would serve all
            service.save(state, f"{path}/{number % 2}.ckpt")
        service.wait()
        print(status("VmHWM") - before)
    assert torch.load(f"{path}/0.ckpt", mmap=True)["w7"][0] == 7
"""


def peak(tmp_path: Path, state_bytes: int, limit_bytes: int) -> int:
    """Return the peak memory of a burst of six saves beyond what the process held before."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux tells the peak memory of a part of a program")
    done = python(BURST, tmp_path, state_bytes, limit_bytes, timeout=100)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_a_burst_stays_under_the_limit(tmp_path: Path) -> None:
    """Six saves of 128 MiB in a burst, with room for one and a half, never take more than that plus overhead (B1)."""
    assert peak(tmp_path, 128 * MIB, 192 * MIB) <= 192 * MIB + OVERHEAD_BYTES


def test_a_burst_fills_the_limit_and_no_more(tmp_path: Path) -> None:
    """With room for three and a half, several snapshots are held at a time, and no more than the limit (B1)."""
    used = peak(tmp_path, 64 * MIB, 224 * MIB)
    assert 64 * MIB < used <= 224 * MIB + OVERHEAD_BYTES


@pytest.mark.slow
def test_a_full_size_burst_stays_under_the_limit(tmp_path: Path) -> None:
    """Six saves of 1 GiB with memory_limit="1.5GiB" stay within it and the same overhead (B1)."""
    assert peak(tmp_path, 1024 * MIB, 1536 * MIB) <= 1536 * MIB + OVERHEAD_BYTES
