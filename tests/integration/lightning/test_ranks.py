"""What every rank of a ``ddp`` training sees and leaves, compared with synchronous saves, on storage that is slow.

Real: two processes of Lightning's, a process group with gloo, files on disk. ``scripts/ranks.py`` is what each runs;
here it is started once for each rank, so that each one's end can be seen.
"""

from __future__ import annotations

import json
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support import start_python

# Each start of the script imports Lightning twice.
pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(220)]

SCRIPT = Path(__file__).parent / "scripts" / "ranks.py"
RUN_SECONDS = 180.0
RANKS = (0, 1)
# With one distribution; the last run leaves the group of no use.
WITH_ONE = [
    *("resume:ours", "resume:theirs", "midway:ours", "late:ours", "warned:ours"),
    *("fails_at_end:ours", "fails_at_end:theirs", "is_lost:ours"),
]
WITH_OTHER = [
    *(
        "resume:ours",
        "resume:theirs",
        "direct:ours",
        "reported:ours",
        "broken:ours",
        "fails_everywhere:ours",
        "fabric:ours",
    ),
]
BOTH = ["epoch=0-step=4.ckpt", "last.ckpt"]


@dataclass(frozen=True)
class Ran:
    """What the ranks of one start of the script have written down, and how each has ended."""

    records: dict[tuple[str, int], dict[str, Any]]
    exit_codes: list[int]

    def of(self, run: str) -> list[dict[str, Any]]:
        """Return the records of a run, of each rank."""
        return [self.records[run, rank] for rank in RANKS]


def run_ranks(tree: str, folder: Path, runs: list[str], environment: dict[str, str]) -> Ran:
    """Start a script for each rank, and wait for all."""
    processes = [
        start_python(SCRIPT, tree, folder, *runs, env={**environment, "LOCAL_RANK": str(rank)})
        for rank in RANKS
    ]
    try:
        errors = [process.communicate(timeout=RUN_SECONDS)[1] for process in processes]
    except subprocess.TimeoutExpired:
        pytest.fail("a rank hangs")
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    records = {}
    for rank in RANKS:
        written = folder / f"rank-{rank}.jsonl"
        for line in written.read_text().splitlines() if written.exists() else ():
            record = json.loads(line)
            records[record["run"], rank] = record
    killed = [run for run in runs if "is_killed" in run]
    assert len(records) == len(runs) * len(RANKS) - len(killed), errors
    return Ran(records, [process.returncode for process in processes])


# Both distributions have the same strategies, and starting new interpreters takes long: most runs with one of them.


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, process_group: dict[str, str]) -> Ran:
    """All runs with one distribution."""
    return run_ranks("pytorch_lightning", tmp_path_factory.mktemp("one"), WITH_ONE, process_group)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, process_group: dict[str, str]) -> Ran:
    """All runs with the other one."""
    return run_ranks("lightning.pytorch", tmp_path_factory.mktemp("other"), WITH_OTHER, process_group)


@pytest.mark.parametrize("name", ["one", "other"])
def test_all_ranks_go_on_from_the_same_checkpoint(name: str, request: pytest.FixtureRequest) -> None:
    """``fit(ckpt_path="last")``, ``load_from_checkpoint(best)`` and ``test(ckpt_path="last")``, called as soon as
    ``fit`` returns, start, load and test the same on every rank: what they do after synchronous saves.
    """
    ran: Ran = request.getfixturevalue(name)
    theirs = [{**record, "run": "resume:ours"} for record in ran.of("resume:theirs")]
    assert ran.of("resume:ours") == theirs
    assert [record["second"]["began_at"] for record in theirs] == [4, 4]
    assert [record["first"]["files_at_end"] for record in theirs] == [BOTH, BOTH]


def test_saves_by_hand_are_there_for_every_rank(other: Ran) -> None:
    """After ``trainer.save_checkpoint``, each rank reads what was saved from the file itself, also a replaced one."""
    assert [record["loaded"] for record in other.of("direct:ours")] == [[1.0, 2.0], [1.0, 2.0]]


def test_saves_by_hand_in_training_are_there_for_every_rank(other: Ran) -> None:
    """After ``trainer.save_checkpoint`` inside ``fit``, each rank reads the file, while ``ModelCheckpoint``'s own saves
    are pending; a folder that was used and removed does not come back.
    """
    for record in other.of("reported:ours"):
        assert record["reports"] == [1, 2, 3, 4]
        assert record["files"] == BOTH


def test_load_on_another_rank_waits_for_the_save(one: Ran) -> None:
    """A load through the strategy in the middle of training waits on every rank until the pending save is durable."""
    assert [record["loaded"] for record in one.of("midway:ours")] == [[4], [4]]


def test_failure_of_the_last_save_reaches_every_rank(other: Ran) -> None:
    """Where the last save fails, each rank's ``fit`` raises once what it failed with; then they train again (E1).

    On rank 0 it is the storage's own error; on the others an OSError, too, so that the ranks go the same way.
    """
    first, second = other.of("broken:ours")
    assert (first["error"], first["text"]) == ("StoreError", "the disk is full")
    assert second["error"] == "RankError"
    assert second["text"] == "rank 0, which writes the checkpoints, failed: StoreError: the disk is full"
    for record in (first, second):
        assert record["is_os_error"]
        assert record["left"] == BOTH[:1]
        assert record["again"]["error"] is None
        assert record["files"] == [*BOTH[:1], "epoch=1-step=8.ckpt", "last.ckpt"]


def test_failure_that_is_only_warned_of_ends_no_rank(one: Ran) -> None:
    """With ``on_error="warn"``, ``fit`` returns on every rank."""
    assert [record["error"] for record in one.of("warned:ours")] == [None, None]


def test_wait_that_ends_too_early_ends_on_every_rank(one: Ran) -> None:
    """Where rank 0 has waited for ``flush_timeout``, every rank is told, and none waits for longer."""
    first, second = one.of("late:ours")
    assert first["error"] == "FlushTimeoutError"
    assert "FlushTimeoutError: still pending" in second["text"]
    assert max(first["seconds"], second["seconds"]) < 20


def test_error_of_the_users_on_one_rank_is_that_ranks(one: Ran) -> None:
    """An error in ``on_train_end`` on one rank is raised there; the other returns, as after synchronous saves, soon."""
    for ours, theirs in zip(one.of("fails_at_end:ours"), one.of("fails_at_end:theirs"), strict=True):
        assert [each["text"] for each in ours["errors"]] == [each["text"] for each in theirs["errors"]]
        assert ours["files"] == theirs["files"]
        assert all(each["seconds"] < 20 for each in ours["errors"])


def test_no_rank_ends_with_an_error_while_another_saves(other: Ran) -> None:
    """An error in training on every rank is raised when what rank 0 has pending is durable, on every rank.

    A launcher that sees a rank end with an error kills the others, and what they have pending with them.
    """
    for rank, record in enumerate(other.of("fails_everywhere:ours")):
        assert record["text"] == f"rank {rank}"
        assert record["files"] == BOTH


def test_rank_that_fails_alone_loses_nothing_and_waits_for_no_rank(one: Ran) -> None:
    """An error in training on rank 1 alone is raised there when rank 0's save is durable, though rank 0 waits for rank
    1 in a collective operation; that one ends when rank 1 has.
    """
    first, second = one.of("is_lost:ours")
    assert second["text"] == "rank 1"
    assert second["files"] == BOTH
    assert "Connection closed by peer" in first["text"]
    assert first["seconds"] < 60


def test_fabric_loads_on_every_rank_what_one_has_just_saved(other: Ran) -> None:
    """Fabric: ``load`` right after ``save`` returns on each rank what was saved, or raises once that this failed;
    ``plugin.wait()`` on each rank waits for what rank 0 has pending.
    """
    first, second = other.of("fabric:ours")
    for record in (first, second):
        assert record["loaded"] == [1, 2, 2]
        assert record["waited"] == ["other.ckpt", "step.ckpt"]
    assert (first["error"], second["error"]) == ("StoreError", "RankError")
    assert second["text"].endswith("step.ckpt' failed: StoreError: the disk is full")


def test_every_rank_ends_well(one: Ran, other: Ran) -> None:
    """No process hangs or ends with an error, whatever happened in it."""
    assert one.exit_codes == other.exit_codes == [0, 0]


def test_death_of_the_rank_that_writes_is_told_to_the_others(
    tmp_path: Path, process_group: dict[str, str]
) -> None:
    """Rank 0 is killed as it writes the last checkpoint: another rank raises an error that says so, and soon."""
    ran = run_ranks("pytorch_lightning", tmp_path, ["first_is_killed:ours"], process_group)
    assert ran.exit_codes == [-signal.SIGKILL, 0]
    record = ran.records["first_is_killed:ours", 1]
    assert record["error"] == "RankError"
    assert "another rank, which has checkpoints to wait for, does not answer" in record["text"]
    assert record["seconds"] < 30
    for file in tmp_path.rglob(".async_ckpt*"):  # the next save there would have swept it
        file.unlink()
