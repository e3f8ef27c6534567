"""Trainings that signals come to, for test_signals.py: ``sig_training.py TREE SOCKET``.

It imports Lightning, which takes seconds, and then forks a training whenever one is asked for. That is an ordinary
process: it runs this script to its end, and the interpreter's exit comes after that.

A training saves at steps 1 and 2, and goes on until a signal ends it or the job has been requeued. Its output is one
stream, of lines that the test waits for; a line on its standard input opens the gate at which the second save is held.

Scenarios: ``held``; ``ending``, which ends by itself while that save is held; ``failing``, whose second save fails;
``inside``, where SIGUSR1 comes while ``save_checkpoint`` takes the second snapshot; ``resume``, which saves nothing.
"""

from __future__ import annotations

import errno
import faulthandler
import importlib
import json
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import torch

from async_ckpt import AsyncCheckpointIO
from async_ckpt.events import Event, Failed
from tests.integration.lightning.conftest import TREES, Faults, Tree

PATIENCE_SECONDS = 60.0

torch.set_num_threads(1)  # OpenMP does not survive a fork
tree = Tree(*(importlib.import_module(name) for name in TREES[sys.argv[1]]))


def fork_when_asked(asking: socket.socket) -> tuple[Path, str]:
    """Fork a training for each request for one, and tell how those end that are asked for; return in a training.

    Args:
        asking: where ``test_signals.Nursery`` is.
    """
    while True:
        message, files, *_ = socket.recv_fds(asking, 1 << 16, 2)
        if not message:
            sys.exit()
        request = json.loads(message)
        if "ended" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["ended"], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                break
        for file in files:
            os.close(file)
        asking.sendall(b"%d\n" % answer)
    asking.close()
    for file, standards in zip(files, ([0], [1, 2]), strict=True):
        for standard in standards:
            os.dup2(file, standard)
        os.close(file)
    faulthandler.dump_traceback_later(80, exit=True)  # before the test loses patience
    os.environ.update(request["environment"])
    return Path(request["folder"]), request["scenario"]


folder, scenario = fork_when_asked(socket.socket(fileno=int(sys.argv[2])))
failed = threading.Event()


def say(word: str) -> None:
    """Tell the test."""
    sys.stdout.write(f"{word}\n")
    sys.stdout.flush()


def observe(event: Event) -> None:
    """Learn of a failure when it happens."""
    if isinstance(event, Failed):
        failed.set()


class Interrupting:
    """Sends SIGUSR1 to its process when it is pickled for the first time."""

    armed = True

    def __reduce__(self) -> Any:
        if Interrupting.armed:
            Interrupting.armed = False
            say("inside")
            signal.raise_signal(signal.SIGUSR1)
        return complex, (1, 2)


class Saves(tree.pl.Callback):  # type: ignore[misc, name-defined]  # a base that is found at run time
    """Saves, and ends the training where nobody else will."""

    def on_train_start(self, trainer: Any, module: Any) -> None:
        say(f"began at {trainer.global_step}")
        if scenario == "resume":
            trainer.should_stop = True

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        step = trainer.global_step
        if step in (1, 2) and scenario != "resume":
            trainer.save_checkpoint(folder / f"step-{step}.ckpt")
        if step == 1:
            trainer.strategy.checkpoint_io.wait()
        if step == 2 and scenario in ("held", "ending"):
            assert gate.reached.wait(PATIENCE_SECONDS)
            say("held")
        if step == 2 and scenario == "failing":
            assert failed.wait(PATIENCE_SECONDS)
            say("failed")
        if (step == 4 and scenario == "ending") or (folder / "seen.ckpt").exists():
            trainer.should_stop = True

    def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: Any) -> None:
        if scenario == "inside" and trainer.global_step == 2:
            checkpoint["interrupting"] = Interrupting()


def fit() -> None:
    """Train; say how that ended and whether SIGTERM does again what it did before."""
    options: dict[str, Any] = {"observer": observe, "flush_timeout": 60.0, "direct_saves": "async"}
    plugins: list[Any] = [AsyncCheckpointIO(store_factory=faults.make, **options)]
    if "SLURM_JOB_ID" in os.environ:
        environments = importlib.import_module(f"{tree.fabric.__name__}.plugins.environments")
        plugins.append(environments.SLURMEnvironment(auto_requeue=True))
    trainer = tree.trainer(folder, max_epochs=-1, plugins=plugins, callbacks=[Saves()])
    before = signal.getsignal(signal.SIGTERM)
    try:
        trainer.fit(tree.model())
        say("fit returned")
    except BaseException as error:
        say(f"fit raised {type(error).__name__}: {error}; notes: {getattr(error, '__notes__', [])}")
        raise
    finally:
        say(f"SIGTERM restored: {signal.getsignal(signal.SIGTERM) is before}")


def open_when_told() -> None:
    """Open the gate at a line of standard input, or at its end."""
    os.read(sys.stdin.fileno(), 1000)  # not readline, whose lock the older Lightnings' exit() would wait for
    gate.open()


faults = Faults()
if scenario in ("held", "ending"):
    gate = faults.hold(2)
    opener = threading.Thread(target=open_when_told)
    opener.start()
if scenario == "failing":
    faults.fail(2, error=lambda: OSError(errno.ENOSPC, "the disk is full, says the test"))
fit()
