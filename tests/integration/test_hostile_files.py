"""Files made to do harm: they load as with torch.load, or not, in no more memory than it takes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.support import python

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(
        not Path("/proc/self/clear_refs").exists(),
        reason="only Linux tells the peak memory of a part of a program",
    ),
]

MUTATED = 300 if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else 60

#: What a file of 1.2 MB may take beyond what it takes torch.load.
MORE_BYTES = 64 << 20

CHILD = """
    import hashlib, io, json, resource, sys, warnings
    import torch
    from async_ckpt import CheckpointService
    from tests.hostile import hostile_files

    path, how, mutated = sys.argv[1], sys.argv[2], int(sys.argv[3])
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))  # what would take more ends before the machine does
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)

    def digest(state):
        try:
            torch.save(state, file := io.BytesIO())
        except RecursionError:
            return "deep"
        except Exception as error:
            return f"loaded, not to be saved: {error}"
        return hashlib.sha256(file.getvalue()).hexdigest()

    def status(name):
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

    def outcome(name, load):
        before = status("VmRSS")
        with open("/proc/self/clear_refs", "w") as reset:
            reset.write("5")  # the high-water mark begins anew
        found = result(name, load)
        return found, status("VmHWM") - before

    def result(name, load):
        try:
            state = load(path)
        except MemoryError:
            return "memory"
        except Exception as error:
            return "memory" if "allocate" in str(error) else "refused"
        return "loaded" if "numel" in name else digest(state)

    def all_parts(path):
        try:
            return service.load(path, keys="*")
        except KeyError as error:
            if "neither a mapping nor a list" in str(error):
                return service.load(path)
            raise

    with CheckpointService(flush_timeout=60) as service:
        loads = {
            "torch": [lambda path: torch.load(path, weights_only=True)],
            "ours": [service.load, all_parts],
        }[how]
        found = {}
        for name, data in hostile_files(mutated):
            with open(path, "wb") as file:
                file.write(data)
            if not found:
                outcome(name, loads[0])  # whatever is imported on the way
            found[name] = [outcome(name, load) for load in loads]
    print(json.dumps(found))
"""


def outcomes(folder: Path, how: str) -> dict[str, list[tuple[str, int]]]:
    """Load every file in a process of its own: what comes of each, and the memory that it took meanwhile."""
    environment = {"MALLOC_ARENA_MAX": "1", "PYTHONHASHSEED": "0"}
    done = python(CHILD, folder / how, how, MUTATED, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[tuple[str, int]]] = json.loads(done.stdout)
    return found


@pytest.mark.timeout(300)
def test_hostile_files(tmp_path: Path) -> None:
    """Whatever a pickle or the archive around it says, it loads as with torch.load; saying so takes no memory."""
    expected = {name: only for name, (only,) in outcomes(tmp_path, "torch").items()}
    found = outcomes(tmp_path, "ours")
    assert found.keys() == expected.keys()
    ends = [end for end, _ in expected.values()]
    assert {"refused", "deep"} < set(ends)
    assert sum(end != "refused" for end in ends) > 40
    ours = {name: [end for end, _ in each] for name, each in found.items()}
    assert {name: (end, *ours[name]) for name, (end, _) in expected.items() if set(ours[name]) != {end}} == {}
    peaks = {name: max(peak for _, peak in each) for name, each in found.items()}
    more = {
        name: (peak >> 20, peaks[name] >> 20)
        for name, (_, peak) in expected.items()
        if peaks[name] > peak + MORE_BYTES
    }
    assert more == {}
