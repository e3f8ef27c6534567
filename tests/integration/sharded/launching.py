"""Real processes that make sharded checkpoints together, and what they tell of it.

They are forked from one that has imported everything and done nothing: that takes seconds, a fork milliseconds.
"""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.integration.sharded.torch_names import IS_TORCH_24

PATIENCE_SECONDS = 120.0
_SCENES = "tests.integration.sharded.scenes"

_context = multiprocessing.get_context("forkserver")
_preloaded = [_SCENES, *(f"{__package__}.{name}" for name in ("dcp_scenes", "load_scenes"))]


def preload(module: str) -> None:
    """Have a module of scenes, in this folder, imported before processes are forked; called as tests are imported."""
    _preloaded.append(f"{__package__}.{module}")
    _context.set_forkserver_preload(_preloaded)


_context.set_forkserver_preload(_preloaded)


@dataclass(slots=True, kw_only=True)
class Rank:
    """What became of one process.

    Attributes:
        code: its exit code.
        told: what its scene returned; ``None`` where it never came to that.
        output: what it printed.
    """

    code: int | None
    told: Any = None
    output: str = field(default="", repr=False)

    @property
    def was_killed(self) -> bool:
        """Whether SIGKILL ended it."""
        return self.code == -signal.SIGKILL


def play(
    scene: str, world_size: int, folder: Path, *, env: dict[str, str] | None = None, **arguments: Any
) -> list[Rank]:
    """Run a function of `scenes` in as many processes as there are ranks, and wait for all of them.

    Args:
        scene: its name; that of another module of this folder, and a dot, may come before it.
        world_size: how many.
        folder: for what they write.
        env: variables beside our own.
        **arguments: of the scene.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Here, as a launcher has it, so that it does not end with the first rank.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        **(env or {}),
    }
    processes = []
    for rank in range(world_size):
        given = {**common, "RANK": str(rank)}
        process = _context.Process(target=_act, args=(scene, folder, given, arguments), daemon=True)
        process.start()
        processes.append(process)
    try:
        until = time.monotonic() + PATIENCE_SECONDS
        for process in processes:
            process.join(max(0.0, until - time.monotonic()))
            if process.is_alive() and process.pid is not None:  # it hangs: have it say where
                os.kill(process.pid, signal.SIGUSR1)
                process.join(5)
        return [_became(process.exitcode, folder, scene, rank) for rank, process in enumerate(processes)]
    finally:
        for process in processes:
            process.kill()
            process.join()


def all_well(ranks: Sequence[Rank]) -> list[Any]:
    """Return what the ranks told; each must have come to its end."""
    for number, rank in enumerate(ranks):
        assert rank.code == 0, f"rank {number} ended with {rank.code}:\n{rank.output[-8000:]}"
    return [rank.told for rank in ranks]


def _became(code: int | None, folder: Path, scene: str, rank: int) -> Rank:
    told, output = folder / f"told-{scene}-{rank}.json", folder / f"output-{scene}-{rank}"
    became = Rank(
        code=code,
        told=json.loads(told.read_text()) if told.exists() else None,
        output=output.read_text(errors="replace") if output.exists() else "",
    )
    told.unlink(missing_ok=True)
    return became


def _act(scene: str, folder: Path, env: dict[str, str], arguments: dict[str, Any]) -> None:
    """Be one rank."""
    os.environ.update(env)
    rank = env["RANK"]
    output = os.open(folder / f"output-{scene}-{rank}", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(output, sys.stdout.fileno())
    os.dup2(output, sys.stderr.fileno())
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    dist.init_process_group("gloo", timeout=timedelta(seconds=float(env.get("GROUP_SECONDS", "60"))))
    module, _, name = scene.rpartition(".")
    scenes = import_module(f"{__package__}.{module}" if module else _SCENES)
    told = getattr(scenes, name)(folder, **arguments)
    (folder / f"told-{scene}-{rank}.json").write_text(json.dumps(told))
    if not IS_TORCH_24:  # where gloo does not end while another rank is there
        dist.destroy_process_group()
