"""Sharded loads by real processes: any directory of DCP's, into any other number of ranks, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import async_ckpt
from stress.servers.process import Server
from tests.integration.sharded.launching import all_well, play
from tests.integration.sharded.load_scenes import large, sharded_whole
from tests.integration.sharded.states import differences
from tests.integration.sharded.torch_names import needs_fsdp2
from tests.servers import fresh_bucket

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("by", ["torch", "threads", "files", "fsspec", "ours"])
def test_every_kind_of_state_by_any_writer(tmp_path: Path, by: str) -> None:
    """What four ranks have written, in any way, one to four ranks load; torch's own loads say the same (S3)."""
    url = str(tmp_path / "it")
    all_well(play("load_scenes.write", 4, tmp_path, url=url, by=by))
    for world_size in (4, 2, 3, 1):
        for told in all_well(play("load_scenes.read", world_size, tmp_path, url=url)):
            assert told == []


def test_tensors_as_fsdp1_has_them(tmp_path: Path) -> None:
    """``ShardedTensor`` goes from us to torch, from torch to us, and from both to one file, bit for bit."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for told in all_well(
        play("load_scenes.sharded_tensors", 3, tmp_path, ours=str(ours), theirs=str(theirs))
    ):
        assert told == [[], [], [], []]
    for directory in (ours, theirs):
        async_ckpt.consolidate(directory, tmp_path / "one.pt")
        found = torch.load(tmp_path / "one.pt", weights_only=True)
        expected = {name: sharded_whole(name) for name in ("blocks", "striped", "one rank's")}
        assert differences({"model": expected, "step": 1}, found) == []


@pytest.mark.parametrize("by", ["torch", "ours"])
@needs_fsdp2
def test_a_model_goes_from_four_ranks_to_two_three_and_one(tmp_path: Path, by: str) -> None:
    """FSDP2 with AdamW, on a plane of ranks and on lines, goes on where it was, with the same weights and moments."""
    url = str(tmp_path / "it")
    (saved, *others) = all_well(play("load_scenes.train", 4, tmp_path, url=url, steps=3, by=by))
    assert others == [saved] * 3
    for world_size in (2, 3, 1, 4):
        for found, steps in all_well(play("load_scenes.resume", world_size, tmp_path, url=url, steps=2)):
            assert found == saved
            assert steps == 5


def test_objects_with_a_state_of_their_own(tmp_path: Path) -> None:
    """They are asked for it, it is filled, and they are given it back, once."""
    for told in all_well(play("load_scenes.stateful", 2, tmp_path, url=str(tmp_path / "it"))):
        assert told == [True, 7, 1]


def test_rows_of_others_are_not_fetched(tmp_path: Path) -> None:
    """Of tensors that two ranks wrote, four fetch no byte twice; a rank begins with another file than its neighbour."""
    url, rows = str(tmp_path / "it"), 400
    all_well(play("load_scenes.write_large", 2, tmp_path, url=url, rows=rows))
    told = all_well(play("load_scenes.count", 4, tmp_path, url=url, rows=rows))
    assert all(each["right"] for each in told)
    metadata = 4 * (tmp_path / "it" / ".metadata").stat().st_size
    assert sum(each["nbytes"] for each in told) <= metadata + 1.02 * 5 * rows * 4000
    assert [sorted(each["ranges"]) for each in told] == [
        [".metadata", "__0_0.distcp"],
        [".metadata", "__0_0.distcp"],
        [".metadata", "__1_0.distcp"],
        [".metadata", "__1_0.distcp"],
    ]


@needs_fsdp2
def test_a_plain_file_into_sharded_states(tmp_path: Path) -> None:
    """What one process has saved as a file, two ranks and four, on a plane, load bit for bit, and go on from it."""
    url = str(tmp_path / "last.ckpt")
    (saved, _) = all_well(play("load_scenes.train", 2, tmp_path, url=url, steps=3, by="plain"))
    for world_size in (4, 3):
        for found, steps in all_well(play("load_scenes.resume", world_size, tmp_path, url=url, steps=1)):
            assert found == saved
            assert steps == 4


def test_of_a_plain_file_each_rank_fetches_its_rows(tmp_path: Path) -> None:
    """Four ranks together fetch no more than 1.1 times the file; ranks that need columns fetch their rows."""
    url, rows = str(tmp_path / "last.ckpt"), 2000
    torch.save({"model": large(rows)}, url)
    length = (tmp_path / "last.ckpt").stat().st_size
    told = all_well(play("load_scenes.count", 4, tmp_path, url=url, rows=rows, plain=True))
    assert all(each["right"] for each in told)
    assert sum(each["nbytes"] for each in told) <= 1.1 * length
    told = all_well(play("load_scenes.count", 2, tmp_path, url=url, rows=rows, plain=True, dimension=1))
    assert all(each["right"] for each in told)
    assert sum(each["nbytes"] for each in told) <= 2.1 * length


@pytest.mark.parametrize("kind", ["seaweedfs", "fake_gcs", "azurite"])
def test_from_buckets(request: pytest.FixtureRequest, tmp_path: Path, kind: str) -> None:
    """The same from real object stores: a sharded checkpoint, and a plain file."""
    server: Server = request.getfixturevalue(kind)
    url, options = f"{server.protocol}://{fresh_bucket(server)}/run", dict(server.storage_options)
    for told in all_well(play("load_scenes.to_and_from_bucket", 2, tmp_path, url=url, options=options)):
        assert told == []
