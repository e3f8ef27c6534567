"""From directories that real processes have written to one file, on real servers, in bounded memory, and killed."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import async_ckpt
from async_ckpt import CheckpointService
from stress.servers.process import Server
from tests.integration.sharded.launching import all_well, play
from tests.integration.sharded.load_scenes import much
from tests.integration.sharded.states import differences
from tests.servers import fresh_bucket
from tests.support import python

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning"),
]

MIB = 1 << 20
SMALL_PARTS = {"part_size": "64KiB"}


def by_torch(directory: Path) -> Any:
    """Return what torch makes of it, and takes the whole of it into memory for."""
    file = directory.with_suffix(".theirs")
    dcp_to_torch_save(directory, file)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("by", ["torch", "threads", "files", "fsspec", "ours"])
def test_of_four_ranks_by_any_writer(tmp_path: Path, by: str) -> None:
    """Lines and planes of ranks, columns, uneven and empty parts: it is what torch makes, bit for bit."""
    all_well(play("load_scenes.write", 4, tmp_path, url=str(tmp_path / "it"), by=by))
    async_ckpt.consolidate(tmp_path / "it", tmp_path / "it.pt")
    with CheckpointService(**SMALL_PARTS) as service:
        service.consolidate(tmp_path / "it", tmp_path / "parts.pt")
    for name in ("it.pt", "parts.pt"):
        found = torch.load(tmp_path / name, weights_only=True, mmap=True)
        assert differences(by_torch(tmp_path / "it"), found) == []


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_of_fewer_ranks(tmp_path: Path, world_size: int) -> None:
    """The same."""
    all_well(play("load_scenes.write", world_size, tmp_path, url=str(tmp_path / "it"), by="ours"))
    async_ckpt.consolidate(tmp_path / "it", tmp_path / "it.pt")
    assert differences(by_torch(tmp_path / "it"), torch.load(tmp_path / "it.pt")) == []


def test_a_model_and_its_optimizer(tmp_path: Path) -> None:
    """FSDP2 with AdamW on a plane of four ranks: a process without ranks gets the weights by their names."""
    (saved, *_) = all_well(
        play("load_scenes.train", 4, tmp_path, url=str(tmp_path / "it"), steps=2, by="ours")
    )
    async_ckpt.consolidate(tmp_path / "it", tmp_path / "it.pt")
    found = torch.load(tmp_path / "it.pt", weights_only=True)
    assert differences(by_torch(tmp_path / "it"), found) == []
    assert {f".model.{name}" for name in found["model"]} == {
        name for name in saved if name.startswith(".model.")
    }


@pytest.mark.parametrize("name", ["seaweedfs", "fake_gcs", "azurite", "sftp"])
def test_between_a_disk_and_a_server(request: pytest.FixtureRequest, tmp_path: Path, name: str) -> None:
    """From a local directory to the server, from there back, from place to place, and once more over what is there."""
    server: Server = request.getfixturevalue(name)
    host = "" if name != "sftp" else server.url.rpartition("/")[2] + "/"
    url = f"{server.protocol}://{host}{fresh_bucket(server)}/run"
    options = dict(server.storage_options)
    state = {
        "large": torch.arange(300_000, dtype=torch.float32).view(100, 3000),
        "small": [torch.full((number,), float(number)) for number in range(50)],
        "epoch": 3,
    }
    with CheckpointService() as service:
        service.save_sharded(state, tmp_path / "it").wait(60)
    with CheckpointService(storage_options=options) as service:
        service.save_sharded(state, f"{url}/it").wait(60)
        service.consolidate(f"{url}/it", f"{url}/it.pt")
        service.consolidate(f"{url}/it", f"{url}/it.pt")
    async_ckpt.consolidate(tmp_path / "it", f"{url}/there.pt", file_storage_options=options)
    async_ckpt.consolidate(
        f"{url}/it", tmp_path / "back.pt", storage_options=options, file_storage_options={}
    )
    assert differences(state, torch.load(tmp_path / "back.pt", weights_only=True)) == []
    for file in ("it.pt", "there.pt"):
        assert differences(state, async_ckpt.load(f"{url}/{file}", storage_options=options)) == []


def test_to_a_bucket_in_several_parts(seaweedfs: Server, tmp_path: Path) -> None:
    """Of 40 MiB, whose tensors lie across the parts, each byte arrives."""
    options, url = dict(seaweedfs.storage_options), f"s3://{fresh_bucket(seaweedfs)}/it.pt"
    state = {f"w{number}": torch.arange(1_100_000) + number for number in range(5)}
    with CheckpointService() as service:
        service.save_sharded(state, tmp_path / "it").wait(60)
    async_ckpt.consolidate(tmp_path / "it", url, file_storage_options=options)
    assert differences(state, async_ckpt.load(url, storage_options=options)) == []


CONSOLIDATE = """
    import json
    import sys
    import torch
    import async_ckpt

    def status(name):
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

    directory, file, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    # Afterwards, everything is imported.
    async_ckpt.consolidate(f"{directory}-small", f"{file}-small", file_storage_options=options)
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # the high-water mark begins anew
    async_ckpt.consolidate(directory, file, file_storage_options=options)
    print(status("VmHWM") - before)
"""


def peak_of_a_gibibyte(tmp_path: Path, dimension: int, url: str, options: dict[str, Any]) -> int:
    """Return what it takes in memory, beside what the process had, to make one file of what four ranks hold."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux tells the peak memory of a part of a program")
    for name, rows in (("it-small", 16), ("it", 16384)):
        scene = {"url": str(tmp_path / name), "rows": rows, "dimension": dimension}
        all_well(play("load_scenes.write_much", 4, tmp_path, **scene))
    try:
        done = python(CONSOLIDATE, tmp_path / "it", url, json.dumps(options), timeout=250)
    finally:
        for file in tmp_path.rglob("*.distcp"):
            file.unlink()  # else pytest keeps gigabytes for a while
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("dimension", [0, 1], ids=["rows", "columns"])
def test_a_gibibyte_in_little_memory(tmp_path: Path, dimension: int) -> None:
    """Of tensors of which four ranks hold rows, or columns: far less than 256 MiB (B2)."""
    file = tmp_path / "it.pt"
    try:
        assert peak_of_a_gibibyte(tmp_path, dimension, str(file), {}) <= 128 * MIB
        found = torch.load(file, mmap=True)
        assert sum(value.nbytes for value in found.values()) == 1024 * MIB
        for name, value in much(16384).items():
            assert torch.equal(found[name], value)
    finally:
        file.unlink(missing_ok=True)


@pytest.mark.timeout(300)
def test_a_gibibyte_into_a_bucket(seaweedfs: Server, tmp_path: Path) -> None:
    """Of which ranks hold columns, while several parts are under way: no more than 256 MiB (B2)."""
    url, options = f"s3://{fresh_bucket(seaweedfs)}/it.pt", dict(seaweedfs.storage_options)
    assert peak_of_a_gibibyte(tmp_path, 1, url, options) <= 256 * MIB
    with CheckpointService(storage_options=options) as service:
        service.remove(url).wait(60)


KILLED = """
    import sys
    from async_ckpt import CheckpointService
    from async_ckpt.stores import open_store
    from async_ckpt.testing import Fault, FaultyStore, crash

    directory, file, operation, call = sys.argv[1:]
    stores = []

    def make(location, workers):
        store = open_store(location, workers=workers, part_size=64 << 10)
        fault = Fault(operation=operation, calls=[int(call)], error=crash, after=operation == "begin")
        stores.append(FaultyStore(store, [fault]) if stores else store)  # the first is that of the directory
        return stores[-1]

    with CheckpointService(store_factory=make, part_size="64KiB") as service:
        service.consolidate(directory, file)
"""


@pytest.mark.parametrize(("operation", "call"), [("begin", 1), ("put", 1), ("put", 9), ("commit", 1)])
def test_a_process_that_is_killed(tmp_path: Path, operation: str, call: int) -> None:
    """The earlier file is as it was; what was left behind goes with the next one (D2)."""
    state = {f"w{number}": torch.full((50_000,), float(number)) for number in range(5)}
    with CheckpointService() as service:
        service.save_sharded(state, tmp_path / "run" / "it").wait(60)
    file = tmp_path / "run" / "it.pt"
    file.write_bytes(b"earlier")
    done = python(KILLED, tmp_path / "run" / "it", file, operation, call)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert file.read_bytes() == b"earlier"
    assert len(list(file.parent.iterdir())) == 3, "it was to leave something"
    async_ckpt.consolidate(tmp_path / "run" / "it", file)
    assert differences(state, torch.load(file)) == []
    assert {path.name for path in file.parent.iterdir()} == {"it", "it.pt"}
