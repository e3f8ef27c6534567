"""Small files beside ``.metadata``: of one checkpoint with it, whatever comes in between."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from async_ckpt import CheckpointService, ShardedSaveError, StoreError, UnpicklableStateError
from async_ckpt.stores import locate, open_store
from async_ckpt.stores.base import Location, Source, Store, Upload, Workers
from tests.integration.sharded.torch_names import ALONE

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

Look = Callable[[str, Location], None]


class Seen:
    """A store that calls *look* before each object is begun or deleted."""

    def __init__(self, inner: Store, look: Look) -> None:
        self._inner = inner
        self._look = look

    async def begin(self, location: Location, nbytes: int) -> Upload:
        self._look("begin", location)
        return await self._inner.begin(location, nbytes)

    async def delete(self, location: Location) -> None:
        self._look("delete", location)
        await self._inner.delete(location)

    async def source(self, location: Location) -> Source:
        self._look("source", location)
        return await self._inner.source(location)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def _service(look: Look = lambda operation, location: None) -> CheckpointService:
    def make(location: Location, workers: Workers) -> Store:
        return Seen(open_store(location, workers=workers), look)  # type: ignore[return-value]  # it is one

    return CheckpointService(store_factory=make)


def _save(service: CheckpointService, folder: Path, number: int) -> None:
    state = {"weight": torch.full((4,), float(number))}
    extras = {"meta.pt": {"of": number}}
    service.submit_sharded(state, locate(str(folder)), extras=extras)[0].wait()


def _file(folder: Path) -> Any:
    """Return what is in the file."""
    return torch.load(folder / "meta.pt", weights_only=True)


def _item(folder: Path) -> tuple[float, Any]:
    """Return what torch finds in the checkpoint: of the state, and of the extra."""
    state: dict[str, Any] = {"weight": torch.zeros(4), "meta.pt": None}
    dcp.load(state, checkpoint_id=folder, **ALONE)
    return state["weight"][0].item(), state["meta.pt"]


def test_file_and_item_are_of_one_checkpoint(tmp_path: Path) -> None:
    """The file has the value that was given, and the checkpoint has it, too, for those who load it by DCP (D6)."""
    with _service() as service:
        for number in (1, 2):
            _save(service, tmp_path / "it", number)
            assert _file(tmp_path / "it") == {"of": number}
            assert _item(tmp_path / "it") == (number, {"of": number})


def test_nobody_finds_a_file_beside_another_checkpoint(tmp_path: Path) -> None:
    """At no moment of a save over another one does ``.metadata`` have the other one's file beside it (D6)."""
    folder, moments = tmp_path / "it", []

    def look(operation: str, location: Location) -> None:
        file = folder / "meta.pt"
        if (folder / ".metadata").exists():
            moments.append((operation, location.path.rpartition("/")[2], file.exists()))
            if file.exists():
                assert _item(folder)[1] == _file(folder)
            assert _item(folder)[1]["of"] in (1, 2)  # whole, all the time (D5)

    with _service(look) as service:
        _save(service, folder, 1)
        moments.clear()
        _save(service, folder, 2)
    assert [each for each in moments if each[0] != "source" and ".distcp" not in each[1]] == [
        ("delete", "meta.pt", True),
        ("begin", ".metadata", False),
        ("begin", "meta.pt", False),
    ]


def test_file_that_cannot_be_written_fails_no_save(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The checkpoint exists by then, and has the value: the save is durable, and a line of the log says what lacks."""

    def look(operation: str, location: Location) -> None:
        if (operation, location.path.rpartition("/")[2]) == ("begin", "meta.pt"):
            raise StoreError("the disk is full")

    with _service(look) as service:
        _save(service, tmp_path / "it", 1)
    assert _item(tmp_path / "it") == (1, {"of": 1})
    (message,) = (record.message for record in caplog.records if record.levelname == "ERROR")
    assert "complete, but its file meta.pt could not be written" in message


@pytest.mark.parametrize("deed_is_done", [True, False])
def test_answer_to_the_commit_is_lost(tmp_path: Path, deed_is_done: bool) -> None:
    """Where ``.metadata`` is there and nobody was told, the file is written all the same; else neither is there."""

    class Lost:
        """An upload whose commit tells of a failure."""

        def __init__(self, inner: Upload) -> None:
            self._inner = inner

        async def commit(self, receipts: Any) -> None:
            if deed_is_done:
                await self._inner.commit(receipts)
            raise StoreError("no answer")

        async def abort(self) -> None:
            if not deed_is_done:
                await self._inner.abort()

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

    class Losing(Seen):
        async def begin(self, location: Location, nbytes: int) -> Upload:
            upload = await super().begin(location, nbytes)
            return Lost(upload) if location.path.endswith(".metadata") else upload  # type: ignore[return-value]

    def make(location: Location, workers: Workers) -> Store:
        return Losing(open_store(location, workers=workers), lambda *_: None)  # type: ignore[return-value]  # as above

    with CheckpointService(store_factory=make) as service:
        if deed_is_done:
            _save(service, tmp_path / "it", 1)
            assert _file(tmp_path / "it") == {"of": 1}
        else:
            with pytest.raises(ShardedSaveError, match="no answer"):
                _save(service, tmp_path / "it", 1)
            assert list((tmp_path / "it").iterdir()) == []


@pytest.mark.parametrize(
    ("operation", "name"), [("delete", "meta.pt"), ("begin", ".metadata"), ("begin", "__0_0")]
)
def test_failed_save_over_another_leaves_that_whole(tmp_path: Path, operation: str, name: str) -> None:
    """Its ``.metadata`` is not replaced, so its file is there again when the save has ended, bit for bit (D5, D6)."""
    folder, is_broken = tmp_path / "it", False

    def look(done: str, location: Location) -> None:
        if is_broken and done == operation and location.path.rpartition("/")[2].startswith(name):
            raise StoreError("no")

    with _service(look) as service:
        _save(service, folder, 1)
        before = {file.name: file.read_bytes() for file in folder.iterdir()}
        is_broken = True
        with pytest.raises(ShardedSaveError, match="no"):
            _save(service, folder, 2)
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
        is_broken = False
        _save(service, folder, 3)
    assert _file(folder) == {"of": 3}
    assert _item(folder) == (3, {"of": 3})


def test_file_that_cannot_be_read_is_replaced_all_the_same(tmp_path: Path) -> None:
    """Where a checkpoint's file cannot be kept for the case of a failure, that is no failure."""

    def look(operation: str, location: Location) -> None:
        if (operation, location.path.rpartition("/")[2]) == ("source", "meta.pt"):
            raise StoreError("no")

    with _service(look) as service:
        for number in (1, 2):
            _save(service, tmp_path / "it", number)
    assert _file(tmp_path / "it") == {"of": 2}


def test_value_that_cannot_be_pickled_fails_the_save(tmp_path: Path) -> None:
    """It is named, and nothing is accepted; the next save works."""
    with _service() as service:
        with pytest.raises(UnpicklableStateError, match=r"cannot save meta\.pt"):
            service.submit_sharded({}, locate(str(tmp_path / "it")), extras={"meta.pt": lambda: None})
        _save(service, tmp_path / "it", 2)
    assert _item(tmp_path / "it") == (2, {"of": 2})
