"""Ranks killed at any moment while one directory is overwritten again and again: it always loads, and is whole."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.integration.sharded.launching import all_well, play

pytestmark = pytest.mark.integration

WORLD_SIZE = 3
KILLS = int(os.environ.get("ASYNC_CKPT_SHARDED_KILLS", "5"))
"""How many; hundreds at night."""


@pytest.mark.timeout(60 + 60 * KILLS)
def test_kills_at_random(tmp_path: Path) -> None:
    """After each kill the newest checkpoint is whole, and no older than the newest that any rank knew as durable.

    The next start removes what those who were killed have left.
    """
    chance = random.Random(os.environ.get("ASYNC_CKPT_SEED", "17"))
    (tmp_path / "run").mkdir()
    url = str(tmp_path / "run/last")
    begun = 0
    for _ in range(KILLS + 1):
        victim, seconds = chance.randrange(WORLD_SIZE), chance.random() * 0.3
        ranks = play(
            "until_killed", WORLD_SIZE, tmp_path, url=url, victim=victim, seconds=seconds, begun=begun
        )
        assert ranks[victim].was_killed, ranks[victim].output
        all_well([rank for number, rank in enumerate(ranks) if number != victim])
        if begun:
            found = {(tmp_path / f"found-{rank}").read_text() for rank in range(WORLD_SIZE)}
            number, _, wrong = found.pop().partition(" ")
            assert not found, "the ranks have loaded different checkpoints"
            assert wrong == "[]"
            assert int(number) >= begun
        notes = [tmp_path / f"durable-{rank}" for rank in range(WORLD_SIZE)]
        begun = max(int(note.read_text()) if note.exists() else 0 for note in notes)
    for rank in all_well(play("what_is_there", WORLD_SIZE, tmp_path, url=url, seeds=[])):
        assert rank["next"] == []
        assert len(rank["files"]) == WORLD_SIZE + 1, rank["files"]
