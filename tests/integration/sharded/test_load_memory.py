"""The host memory of a sharded load beside the state, measured from outside (B2)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import python

pytestmark = pytest.mark.integration

MIB = 1 << 20
#: What is on its way, and the interpreter's own, pages of the allocator among it.
MOST_BYTES = 64 * MIB + 32 * MIB

LOAD = """
    import sys
    import warnings
    import torch
    import torch.distributed.checkpoint as dcp
    import async_ckpt

    def status(name):
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

    path, how = sys.argv[1:]
    warnings.simplefilter("ignore")

    def make(number):
        return {f"w{n}": torch.full((4096, 2048), float(number + n)) for n in range(8)}

    saved = make(1)
    if how.endswith("plain"):
        torch.save(saved, path)
    else:
        dcp.save(saved, checkpoint_id=path)
    del saved
    state = make(0)
    if how.startswith("turned"):
        state = {name: value.view(2048, 4096).t() for name, value in state.items()}
    async_ckpt.load_sharded({"w0": state["w0"]}, path)  # everything is imported
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # the high-water mark begins anew
    async_ckpt.load_sharded(state, path)
    print(status("VmHWM") - before)
    assert all(torch.equal(value, make(1)[name]) for name, value in state.items())
"""


@pytest.mark.parametrize("how", ["straight", "turned", "straight plain", "turned plain"])
def test_a_load_takes_little_beside_the_state(tmp_path: Path, how: str) -> None:
    """256 MiB that go straight into the state, or have to be turned on the way, take less than 64 MiB more."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux tells the peak memory of a part of a program")
    done = python(LOAD, tmp_path / "it", how, timeout=300)
    for file in tmp_path.rglob("*.distcp"):
        file.unlink()  # else pytest keeps gigabytes for a while
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= MOST_BYTES
