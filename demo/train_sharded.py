"""Train a sharded transformer on real digits, on two processes, lose one of them in mid-save, and get the run back.

Five short acts, each of which proves something or makes the script exit with 1:

1. train on two processes without an interruption, for comparison
2. the same training, of which one process is killed in the middle of a sharded save: the other learns of it
3. what is in the bucket: only complete checkpoints count
4. resume on three processes from the newest complete one, train to the end, and compare with act 1
5. open what was written with ``torch.distributed.checkpoint`` itself

``python -m demo.train_sharded --help`` lists the options. No GPU, a minute on two cores. Everything goes to a bucket
on a real S3 server, started on this machine, or with ``--store local`` (or ``gcs``, ``azure``) elsewhere. Without
``tox -e demo-sharded``, which installs all it needs, install the package ``scikit-learn``.

What each process does is in ``shards.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from statistics import median
from time import perf_counter
from typing import Any

import torch.distributed as dist
from fsspec.core import url_to_fs
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from async_ckpt import latest
from demo.places import STORES, place
from demo.printing import Proofs, say, title
from demo.shards import SAVED_EVERY, SILENCE_SECONDS
from stress.servers.install import ServersMissing

_STEPS = 30
_KILLED_AT = 20


def play(root: str) -> list[str]:
    """Play the acts in *root*; return the claims that did not hold."""
    proofs = Proofs()
    first, second = f"{root}/first", f"{root}/second"
    title("1. Train on two processes")
    ended = _run(2, first, _STEPS)
    proofs.show("both came to the end", [each.code for each in ended] == [0, 0])
    if proofs.failed:
        return proofs.failed
    reference = ended[0].told["weights"]
    stalls = [stall for each in ended for stall in each.told["stalls"]]
    say(f"loss {ended[0].told['loss']:.3f}; a save held training up for {median(stalls) * 1e3:.0f} ms")
    _lose_one(proofs, second)
    if proofs.failed:
        return proofs.failed
    _look_around(proofs, second)
    title("4. Resume on three processes")
    ended = _run(3, second, _STEPS)
    proofs.show("all three came to the end", [each.code for each in ended] == [0, 0, 0])
    if proofs.failed:
        return proofs.failed
    begun = {each.told["from"] for each in ended}
    proofs.show(f"they went on from step {_KILLED_AT - SAVED_EVERY}", begun == {_KILLED_AT - SAVED_EVERY})
    pairs = zip(ended[0].told["weights"], reference, strict=True)
    worst = max(abs(ours - theirs) / max(abs(theirs), 1e-30) for ours, theirs in pairs)
    proofs.show(f"the weights are those of the uninterrupted run (within {worst:.0e})", worst < 1e-9)
    _open_with_torch(proofs, f"{second}/step-{_STEPS}")
    return proofs.failed


class _Ended:
    """How one process ended, and what it told."""

    def __init__(self, code: int, output: str) -> None:
        self.code = code
        lines = [line for line in output.splitlines() if line.startswith("{")]
        self.told: dict[str, Any] = json.loads(lines[-1]) if lines else {}


def _run(world_size: int, folder: str, steps: int, killed_at: int = 0) -> list[_Ended]:
    # Here, as a launcher such as torchrun has it: it outlives each of the processes.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    command = [
        sys.executable,
        "-m",
        "demo.shards",
        folder,
        str(steps),
        *([str(killed_at)] if killed_at else []),
    ]
    group = {
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "PYTHONWARNINGS": "ignore",
    }
    processes = [
        subprocess.Popen(
            command, env={**os.environ, **group, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(world_size)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    return [_Ended(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def _lose_one(proofs: Proofs, folder: str) -> None:
    title("2. Kill one of two processes in the middle of a save")
    survivor, victim = _run(2, folder, _STEPS, killed_at=_KILLED_AT)
    proofs.show("one was ended by SIGKILL", victim.code == -signal.SIGKILL)
    say("the training of the other ended by torch's own error: a collective operation lost its peer")
    failures = survivor.told.get("failed", {})
    proofs.show("it has learned that the save is lost, and whose fault it was", list(failures) == ["1"])
    if failures:
        say(f"rank 1: {failures['1']}")
        bound, waited = SILENCE_SECONDS + 1, survivor.told["waited"]
        proofs.show(
            f"it did not wait for ever: {waited:.1f} s, where {SILENCE_SECONDS:g} s is the bound",
            waited < bound,
        )


def _look_around(proofs: Proofs, folder: str) -> None:
    title("3. Look around")
    file_system, path = url_to_fs(folder)
    file_system.invalidate_cache()
    names = sorted(each.rstrip("/").rpartition("/")[2] for each in file_system.ls(path, detail=False))
    say(f"in the folder: {', '.join(names)}")
    newest = latest(folder)
    say(f"async_ckpt.latest says {newest}")
    expected = f"{folder}/step-{_KILLED_AT - SAVED_EVERY}"
    proofs.show("the newest complete checkpoint is the one before", newest == expected)


def _open_with_torch(proofs: Proofs, folder: str) -> None:
    title("5. Open the checkpoint with torch.distributed.checkpoint")
    state: dict[str, Any] = {}
    _load_state_dict(
        state, storage_reader=FsspecReader(folder), planner=_EmptyStateDictLoadPlanner(), no_dist=True
    )
    say(f"torch finds {', '.join(state)}, with {len(state['model'])} weights")
    proofs.show(f"it is that of step {state['step']}", state["step"] == _STEPS)


def main() -> int:
    """Play the acts; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", choices=STORES, default="s3", help="what to save to (default s3)")
    chosen = parser.parse_args()
    begin = perf_counter()
    try:
        with place(chosen.store, None, keep=False) as where:
            print(f"Checkpoints go to {where.root}")
            failed = play(where.root)
    except ServersMissing as missing:
        print(f"{missing}\n`tox -e demo-sharded` installs it.", file=sys.stderr)
        return 2
    outcome = f"{len(failed)} claims FAILED" if failed else "Everything was proven"
    print(f"\n{outcome}, in {perf_counter() - begin:.0f} s.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
