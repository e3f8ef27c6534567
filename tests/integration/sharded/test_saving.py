"""Sharded saves by real processes: what torch's own DCP finds in the directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.sharded.launching import all_well, play
from tests.integration.sharded.torch_names import needs_fsdp2

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_torch_loads_every_kind_of_state(tmp_path: Path, world_size: int) -> None:
    """Each tensor and value is what it was at the call, bit for bit, however it was sharded (S1, S3)."""
    for told in all_well(play("every_kind_of_state", world_size, tmp_path, url=str(tmp_path / "it"))):
        assert told == []


@needs_fsdp2
def test_overlapping_saves_hold_their_own_step(tmp_path: Path) -> None:
    """Eight saves, two at a time, and weights that change right after each call: each directory has its own (S1)."""
    for told in all_well(play("overlapping_saves", 3, tmp_path, saves=8)):
        assert told == [True] * 8


def test_the_store_knows_how_many_write(tmp_path: Path) -> None:
    """Each file is begun with the number of ranks, by which a store shares what it may ask of the storage."""
    for told in all_well(play("seen_by_the_store", 3, tmp_path, url=str(tmp_path / "it"))):
        assert told == [3]
