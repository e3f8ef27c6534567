"""A training that signals come to, for test_signals.py: ``sig_training.py TREE FOLDER SCENARIO``.

It saves at steps 1 and 2, and goes on until a signal ends it or the job has been requeued. Its output is one stream,
of lines that the parent waits for; a line on its standard input opens the gate at which the second save is held.

Scenarios: ``held``; ``ending``, which ends by itself while that save is held; ``failing``, whose second save fails;
``inside``, where SIGUSR1 comes while ``save_checkpoint`` takes the second snapshot; ``resume``, which saves nothing.
"""

from __future__ import annotations

import errno
import faulthandler
import importlib
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

os.dup2(1, 2)
faulthandler.dump_traceback_later(80, exit=True)  # before its parent loses patience

from async_ckpt import AsyncCheckpointIO  # noqa: E402  # what is imported may write to standard error, too
from async_ckpt.events import Event, Failed  # noqa: E402  # the same
from tests.integration.lightning.conftest import TREES, Faults, Tree  # noqa: E402  # the same

PATIENCE_SECONDS = 60.0

tree_name, folder, scenario = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
tree = Tree(*(importlib.import_module(name) for name in TREES[tree_name]))
failed = threading.Event()


def say(word: str) -> None:
    """Tell the parent."""
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
    plugins: list[Any] = [AsyncCheckpointIO(store_factory=faults.make, observer=observe, flush_timeout=60.0)]
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
