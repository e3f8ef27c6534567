"""``async_ckpt.dcp`` in place of ``torch.distributed.checkpoint``, by real processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from stress.servers.process import Server
from tests.integration.sharded.launching import all_well, play
from tests.servers import fresh_bucket

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_torch_loads_what_save_has_saved(tmp_path: Path, world_size: int) -> None:
    """``dcp.save`` returns when torch's reader finds every value; on the first rank with the metadata."""
    ranks = all_well(play("dcp_scenes.save_for_torch", world_size, tmp_path, url=str(tmp_path / "it")))
    assert [told["differences"] for told in ranks] == [[]] * world_size
    assert [told["returned"] for told in ranks] == [True] + [None] * (world_size - 1)


def test_overlapping_saves_hold_their_own_step(tmp_path: Path) -> None:
    """``dcp.async_save`` returns once the weights may change: each directory has its own step (S1)."""
    for rank, told in enumerate(all_well(play("dcp_scenes.overlap", 3, tmp_path, saves=8))):
        assert told == {"found": [True] * 8, "returned": [rank == 0] * 8}


@pytest.mark.parametrize("look", ["result", "exception", "awaited"])
def test_a_failure_comes_out_of_the_future(tmp_path: Path, look: str) -> None:
    """Every rank's future has the same error, whichever way it is asked; no later call raises it again (E1, E4)."""
    ranks = all_well(play("dcp_scenes.a_failure", 3, tmp_path, url=str(tmp_path / "it"), look=look))
    assert len({told["first"] for told in ranks}) == 1
    assert "rank 0: saves to 'it'" in ranks[0]["first"]  # and which of the others, as it comes first
    assert [told["next"] for told in ranks] == [told["then"] for told in ranks] == [True, False, False]


def test_a_failure_that_nobody_asks_for(tmp_path: Path) -> None:
    """The next call raises it, once, on every rank (E1)."""
    ranks = all_well(play("dcp_scenes.a_failure", 2, tmp_path, url=str(tmp_path / "it"), look="no"))
    assert [told["next"] for told in ranks] == ["raised"] * 2
    assert [told["then"] for told in ranks] == [True, False]


def test_groups(tmp_path: Path) -> None:
    """Each process group makes checkpoints of its own, at the same time; ``no_dist`` leaves the others out."""
    for rank, told in enumerate(all_well(play("dcp_scenes.groups", 4, tmp_path))):
        assert told["firsts"] == [rank % 2 == 0, rank == 0, True]
        assert told["pair"], told["alone"]
        assert told["all"] == []
        assert "not one of its ranks" in told["refused"]


def test_a_callback_that_blocks(tmp_path: Path) -> None:
    """What a future's callback does holds no save up, and no other rank takes this one for ended (E5)."""
    ranks = all_well(play("dcp_scenes.slow_callback", 2, tmp_path, url=str(tmp_path / "it")))
    assert ranks == [[True]] * 2


def test_another_process_group(tmp_path: Path) -> None:
    """Where the program leaves its process group and founds another one, saving goes on in that."""
    ranks = all_well(play("dcp_scenes.again", 2, tmp_path, url=str(tmp_path / "it")))
    assert ranks == [[]] * 2


@pytest.mark.parametrize("world_size", [2, 4])
def test_whoever_saves_whoever_loads(tmp_path: Path, world_size: int) -> None:
    """We, torch, and torch with our ``StorageWriter``, ``StorageReader``, ``Stager`` agree on every directory (S3)."""
    url = str(tmp_path / "run")
    for told in all_well(play("dcp_scenes.round_trips", world_size, tmp_path, url=url, options={})):
        assert told == {"ours": [], "theirs by ours": [], "staged": [], "theirs": []}


def test_on_an_object_store(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """The same on a real S3 server."""
    server: Server = request.getfixturevalue("seaweedfs")
    url, options = f"{server.protocol}://{fresh_bucket(server)}/run", dict(server.storage_options)
    for told in all_well(play("dcp_scenes.round_trips", 2, tmp_path, url=url, options=options)):
        assert told == {"ours": [], "theirs by ours": [], "staged": []}


def test_storage_refuses_one_rank_under_torch(tmp_path: Path) -> None:
    """Every rank hears from torch which rank failed; the earlier checkpoint loads, and the next save works (D5)."""
    for told in all_well(play("dcp_scenes.failing_under_torch", 3, tmp_path, url=str(tmp_path / "it"))):
        assert told == {"told": "1", "there": [], "next": []}
