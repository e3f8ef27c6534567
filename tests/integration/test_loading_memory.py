"""Loading takes little memory beside the state."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.support import python

PEAK = """
    import os, sys
    import torch
    from async_ckpt import CheckpointService

    def status(name):
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

    class Source:
        max_concurrent_reads = None
        def __init__(self, path):
            self.fd, self.nbytes = os.open(path, os.O_RDONLY), os.path.getsize(path)
        async def read_into(self, start, *targets):
            assert os.preadv(self.fd, targets, start) == sum(target.nbytes for target in targets)
        async def aclose(self):
            os.close(self.fd)

    class Store:
        async def source(self, location):
            return Source(location.path)
        async def aclose(self):
            return

    path, small, count, is_near = sys.argv[1:]
    options = {} if is_near == "True" else {"store_factory": lambda *_: Store(), "max_concurrent_parts": 8}
    url = "" if is_near == "True" else "memory://"
    with CheckpointService(**options) as service:
        service.load(url + small)  # whatever is imported on the way
        before = status("VmRSS")
        with open("/proc/self/clear_refs", "w") as reset:
            reset.write("5")  # the high-water mark begins anew
        state = torch.load(path) if is_near == "torch" else service.load(url + path)
        assert len(state) == int(count)
        print(status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.parametrize("is_near", [True, False], ids=["local", "remote"])
@pytest.mark.parametrize("count", [4, 4000])
def test_peak_memory(count: int, is_near: bool, tmp_path: Path) -> None:
    """A load of tensors takes no more memory than the state and 64 MiB."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux tells the peak memory of a part of a program")
    nbytes = 256 << 20
    state = {str(number): torch.zeros(nbytes // count, dtype=torch.uint8) for number in range(count)}
    torch.save(state, tmp_path / "x")
    torch.save({"a": torch.zeros(1 << 20)}, tmp_path / "small")
    del state
    done = python(PEAK, tmp_path / "x", tmp_path / "small", count, is_near)
    (tmp_path / "x").unlink()
    assert done.returncode == 0, done.stderr
    assert nbytes * 0.9 < int(done.stdout) <= nbytes + (64 << 20)


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.parametrize("is_near", [True, False], ids=["local", "remote"])
def test_peak_memory_of_a_long_pickle(is_near: bool, tmp_path: Path) -> None:
    """A load takes no more memory than torch.load and 64 MiB, however long the pickle is."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux tells the peak memory of a part of a program")
    torch.save({"a": os.urandom(100 << 20), "b": torch.zeros(1 << 20)}, tmp_path / "x")
    torch.save({"a": torch.zeros(1 << 20)}, tmp_path / "small")
    torchs, ours = (python(PEAK, tmp_path / "x", tmp_path / "small", 2, how) for how in ("torch", is_near))
    (tmp_path / "x").unlink()
    assert (torchs.returncode, ours.returncode) == (0, 0), torchs.stderr + ours.stderr
    assert int(ours.stdout) <= int(torchs.stdout) + (64 << 20)
