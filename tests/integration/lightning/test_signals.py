"""Real signals to real trainings: requeued jobs, SIGTERM and Ctrl-C, each once and twice."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from async_ckpt import AsyncCheckpointIO
from async_ckpt.errors import AbandonedError
from tests.integration.lightning.both_ways import ONE_TREE
from tests.support import start_python

pytestmark = [pytest.mark.integration, pytest.mark.timeout(200)]

SCRIPT = Path(__file__).parent / "scripts" / "sig_training.py"
PATIENCE_SECONDS = 90.0
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NAME": "train",
    "SLURM_NTASKS": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NODELIST": "localhost",
}
#: Keeps what it finds when it is called: then the job may be killed at any moment.
SCONTROL = """#!/bin/sh
echo "$@" >> "$FOLDER/scontrol.log"
cp "$FOLDER/hpc_ckpt_1.ckpt" "$FOLDER/seen.tmp" && mv "$FOLDER/seen.tmp" "$FOLDER/seen.ckpt"
"""


class Nursery:
    """A process that has imported a Lightning once, and forks the trainings."""

    def __init__(self, tree_name: str) -> None:
        self._asking, theirs = socket.socketpair()
        self._asking.settimeout(PATIENCE_SECONDS)
        with theirs:
            number = theirs.fileno()
            self._process = start_python(SCRIPT, tree_name, number, pass_fds=[number], env=_FIRST_RANK)

    def fork(self, stdin: int, stdout: int, **request: Any) -> int:
        """Have a training started with these as its standard input and output; return its process's number."""
        return self._ask(request, stdin, stdout)

    def exit_code(self, pid: int) -> int:
        """Wait for the end of a training."""
        return self._ask({"ended": pid})

    def close(self) -> None:
        """End it; its trainings have ended."""
        self._asking.close()
        self._process.communicate(timeout=PATIENCE_SECONDS)

    def _ask(self, request: dict[str, Any], *files: int) -> int:
        socket.send_fds(self._asking, [json.dumps(request).encode()], files)
        answer = self._asking.recv(100)
        return int(answer) if answer else pytest.fail(f"it has died: {self._process.communicate()}")


class Training:
    """A training in another process.

    Attributes:
        output: what it has said so far, its standard error included.
    """

    def __init__(self, nursery: Nursery, folder: Path, scenario: str, **environment: str) -> None:
        self.output = ""
        self._nursery = nursery
        self._exit_code: int | None = None
        (stdin, write), (read, stdout) = os.pipe(), os.pipe()
        self._stdin, self._stdout = os.fdopen(write, "w"), os.fdopen(read)
        try:
            self._pid = nursery.fork(
                stdin, stdout, folder=str(folder), scenario=scenario, environment=environment
            )
        finally:
            os.close(stdin)
            os.close(stdout)
        self._watchdog = threading.Timer(PATIENCE_SECONDS, os.kill, (self._pid, signal.SIGKILL))
        self._watchdog.start()

    def until(self, text: str) -> None:
        """Read on until a line has *text* in it."""
        for line in self._stdout:
            self.output += line
            if text in line:
                return
        pytest.fail(f"it never said {text!r}: {self.output}")

    def send(self, signum: signal.Signals) -> None:
        """Send a signal to it."""
        os.kill(self._pid, signum)

    def open_gate(self) -> None:
        """Let the save that is held go on."""
        self._stdin.write("open\n")
        self._stdin.flush()

    def end(self) -> int:
        """Read on until its end; return its exit code."""
        self.output += self._stdout.read()
        self._watchdog.cancel()
        self._watchdog.join()
        if self._exit_code is None:
            self._exit_code = self._nursery.exit_code(self._pid)
        return self._exit_code

    def close(self) -> None:
        """End it, if it has not ended."""
        try:
            if self._exit_code is None:
                self.send(signal.SIGKILL)
                self.end()
        finally:
            self._stdin.close()
            self._stdout.close()


_FIRST_RANK = {"RANK": "0", "LOCAL_RANK": "0"}


@pytest.fixture(scope="module")
def nurseries() -> Iterator[dict[str, Nursery]]:
    """Those that there are, by the Trainer's package."""
    started: dict[str, Nursery] = {}
    yield started
    for nursery in started.values():
        nursery.close()


@pytest.fixture
def start(tree: Any, tmp_path: Path, nurseries: dict[str, Nursery]) -> Iterator[Callable[..., Training]]:
    """Return a function that starts a training in the test's folder."""
    name = tree.pl.__name__
    nursery = nurseries.get(name) or nurseries.setdefault(name, Nursery(name))
    started: list[Training] = []

    def start(scenario: str, **environment: str) -> Training:
        started.append(Training(nursery, tmp_path, scenario, **environment))
        return started[-1]

    yield start
    for training in started:
        training.close()


@pytest.fixture
def slurm(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a job of SLURM, whose ``scontrol`` copies the checkpoint that it finds."""
    tools = tmp_path_factory.mktemp("tools")
    (tools / "scontrol").write_text(SCONTROL)
    (tools / "scontrol").chmod(0o755)
    return {**SLURM, "FOLDER": str(tmp_path), "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}


def _step_of(file: Path) -> int:
    return int(torch.load(file, weights_only=True)["global_step"])


def _files(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# -- SLURM


def test_requeue_in_the_middle_of_a_save(start: Any, slurm: dict[str, str], tmp_path: Path) -> None:
    """SIGUSR1 while a save is pending: ``hpc_ckpt`` is durable before the job is requeued, and found on resuming."""
    training = start("held", **slurm)
    training.until("held")
    training.send(signal.SIGUSR1)
    training.until("waiting for 1 checkpoint")
    assert not (tmp_path / "scontrol.log").exists()
    training.open_gate()
    assert training.end() == 0, training.output
    assert (tmp_path / "scontrol.log").read_text() == "requeue 4711\n"
    step = _step_of(tmp_path / "seen.ckpt")
    assert step >= 2
    assert _files(tmp_path) == ["hpc_ckpt_1.ckpt", "scontrol.log", "seen.ckpt", "step-1.ckpt", "step-2.ckpt"]
    assert "SIGTERM restored: True" in training.output

    again = start("resume", **slurm)
    assert again.end() == 0, again.output
    assert f"began at {step}\n" in again.output


@ONE_TREE
def test_requeue_while_a_save_is_being_accepted(start: Any, slurm: dict[str, str], tmp_path: Path) -> None:
    """SIGUSR1 inside of ``save_checkpoint``: its handler saves, too; then the interrupted save ends well (L1)."""
    training = start("inside", **slurm)
    assert training.end() == 0, training.output
    assert (tmp_path / "scontrol.log").read_text() == "requeue 4711\n"
    assert _step_of(tmp_path / "seen.ckpt") == 2
    assert torch.load(tmp_path / "step-2.ckpt", weights_only=False)["interrupting"] == 1 + 2j


@ONE_TREE
def test_an_earlier_failure_does_not_keep_a_job_from_being_requeued(
    start: Any, slurm: dict[str, str], tmp_path: Path
) -> None:
    """SIGUSR1 after a save has failed unnoticed: the job is requeued all the same, and ``fit`` raises later."""
    training = start("failing", **slurm)
    training.until("failed")
    training.send(signal.SIGUSR1)
    assert training.end() == 1
    assert _step_of(tmp_path / "seen.ckpt") >= 2
    assert training.output.count("fit raised OSError: [Errno 28] the disk is full, says the test") == 1
    assert "SIGTERM restored: True" in training.output


# -- SIGTERM


def test_sigterm_waits_for_pending_saves(start: Any, tmp_path: Path) -> None:
    """SIGTERM: Lightning ends at the next batch; the pending save becomes durable first, with a line that says so."""
    training = start("held")
    training.until("held")
    training.send(signal.SIGTERM)
    training.until("waiting for 1 checkpoint")
    assert "Ctrl-C" not in training.output
    training.open_gate()
    assert training.end() == 0
    assert "fit raised SIGTERMException" in training.output
    assert "SIGTERM restored: True" in training.output
    assert _files(tmp_path) == ["step-1.ckpt", "step-2.ckpt"]
    assert _step_of(tmp_path / "step-2.ckpt") == 2


@ONE_TREE
def test_sigterm_after_a_failed_save(start: Any, tmp_path: Path) -> None:
    """SIGTERM after a save has failed: Lightning's own exception ends ``fit``, ours is a note on it and logged (E2)."""
    training = start("failing")
    training.until("failed")
    training.send(signal.SIGTERM)
    training.end()
    assert "fit raised SIGTERMException" in training.output
    if not hasattr(BaseException, "add_note"):
        assert "notes: []" in training.output
    else:
        assert (
            "the disk is full, says the test" in training.output.partition("; notes: ")[2].partition("\n")[0]
        )
    assert f"async_ckpt: failed: '{tmp_path / 'step-2.ckpt'}' while SIGTERMException" in training.output
    assert "SIGTERM restored: True" in training.output
    assert _files(tmp_path) == ["step-1.ckpt"]


# -- Ctrl-C


@ONE_TREE
def test_ctrl_c_once(start: Any, tmp_path: Path) -> None:
    """Ctrl-C: Lightning ends the program with 1, as it does with synchronous checkpoints, once the save is durable."""
    training = start("held")
    training.until("held")
    training.send(signal.SIGINT)
    training.until("waiting for 1 checkpoint")
    training.open_gate()
    assert training.end() == 1
    assert "fit raised SystemExit: 1; notes: []" in training.output
    assert "SIGTERM restored: True" in training.output
    assert "Traceback" not in training.output
    assert _step_of(tmp_path / "step-2.ckpt") == 2


def test_ctrl_c_twice(start: Any, tmp_path: Path) -> None:
    """Ctrl-C once more gives up what is pending, by name; the earlier checkpoint is whole, and alone (D2)."""
    training = start("held")
    training.until("held")
    training.send(signal.SIGINT)
    training.until("; Ctrl-C gives up")
    training.send(signal.SIGINT)
    training.until(f"interrupted: these checkpoints are given up: '{tmp_path / 'step-2.ckpt'}'")
    training.until("SIGTERM restored: True")
    assert "fit raised SystemExit: 1" in training.output
    training.open_gate()  # for who waits there: the save has gone
    assert training.end() == 1
    assert _files(tmp_path) == ["step-1.ckpt"]
    assert _step_of(tmp_path / "step-1.ckpt") == 1


@ONE_TREE
def test_ctrl_c_during_the_last_wait(start: Any, tmp_path: Path) -> None:
    """Ctrl-C while ``fit`` waits at its end: Lightning shuts down, and waits on; the save is durable when it exits."""
    training = start("ending")
    training.until("waiting for 1 checkpoint")
    training.send(signal.SIGINT)
    training.until("; Ctrl-C gives up")
    assert training.output.splitlines()[-1].startswith(
        "waiting for 1 checkpoint"
    )  # not first at the process's exit
    training.open_gate()
    assert training.end() == 1
    assert "fit raised SystemExit: 1" in training.output
    assert "SIGTERM restored: True" in training.output
    assert _files(tmp_path) == ["step-1.ckpt", "step-2.ckpt"]


# -- time


def test_flush_timeout_passes(tree: Any, tmp_path: Path, faults: Any, names: Any) -> None:
    """When ``flush_timeout`` has passed at the end of ``fit``, it raises, once; no temporary file is left (D2, D4)."""
    faults.hold()
    plugin = AsyncCheckpointIO(store_factory=faults.make, flush_timeout=1.0)
    trainer = tree.trainer(tmp_path, plugins=[plugin], callbacks=[tree.checkpoints(tmp_path / "ckpt")])
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(AbandonedError, match=r"epoch=0-step=4\.ckpt"):
        trainer.fit(tree.model())
    assert signal.getsignal(signal.SIGTERM) is handler
    assert names(tmp_path / "ckpt") == []
    plugin.teardown()


def test_flush_timeout_passes_after_an_error(tree: Any, tmp_path: Path, faults: Any, names: Any) -> None:
    """The same where training broke: its error is raised, with a note of what was given up (E2)."""
    faults.hold()

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 4:
            raise ZeroDivisionError("training broke")
        return self.layer(batch[0]).pow(2).mean()

    plugin = AsyncCheckpointIO(store_factory=faults.make, flush_timeout=1.0)
    trainer = tree.trainer(
        tmp_path, max_epochs=2, plugins=[plugin], callbacks=[tree.checkpoints(tmp_path / "ckpt")]
    )
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError) as caught:
        trainer.fit(tree.model(training_step=training_step))
    assert any("AbandonedError" in note for note in getattr(caught.value, "__notes__", ["AbandonedError"]))
    assert signal.getsignal(signal.SIGTERM) is handler
    assert names(tmp_path / "ckpt") == []
