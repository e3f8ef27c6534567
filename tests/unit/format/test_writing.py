"""The quick way to lay a file out, against torch's own; and when it is not taken."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from async_ckpt.format import Layout, lay_out
from async_ckpt.format.writing.recorder import Reference, record_writing
from async_ckpt.format.writing.torch_writer import skip_writing
from async_ckpt.snapshot import HostBuffer, Snapshot, Storages, contents

Take = Callable[[Any], Snapshot]
Saved = Callable[[Any], bytes]
Whole = Callable[[Layout], bytes]

pytestmark = pytest.mark.skipif(
    not hasattr(torch._C.PyTorchFileWriter, "write_record_metadata"), reason="torch before 2.6 skips nothing"
)
alignments = pytest.importorskip("torch.utils.serialization").config


def _state() -> list[Any]:
    weight = torch.nn.Parameter(torch.randn(700))
    return [
        weight,
        weight.data[3:],
        {"ties": weight},
        torch.arange(9),
        torch.empty(0),
        torch.randn(2000).half(),
    ]


def _untouched(*sizes: int) -> Snapshot:
    """Return a snapshot of storages whose memory does not exist."""
    return Snapshot(
        content=contents.Records(
            [("data.pkl", b"pickle"), *((f"data/{key}", key) for key in range(len(sizes)))], 64
        ),
        storages=Storages(sizes, ["cpu"] * len(sizes), [sum(sizes[:index]) for index in range(len(sizes))]),
        buffer=HostBuffer(sum(sizes)),
        nbytes=sum(sizes),
    )


def _described(snapshot: Snapshot, segments: Any) -> list[Any]:
    """Return the segments of a file, with its checksums in them."""
    layout = Layout(snapshot, segments)
    layout._checksums = dict.fromkeys(range(len(layout._records.names)), 171)
    layout._seal(0, layout.nbytes)
    return [each if isinstance(each, Reference) else bytes(each) for each in segments]


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param([5 << 30, 7, 5000], id="a record beyond 4 GiB"),
        pytest.param([3 << 30, 3 << 30, 7, 5000, 0], id="records that begin beyond 4 GiB"),
        pytest.param([(4 << 30) - 1, 2000, (1 << 32) - 700], id="just below 4 GiB"),
        pytest.param([0xFFFFFFFF, 0xFFFFFFFE, 1025, 1024], id="the largest that 32 bits hold"),
        pytest.param([index % 1500 for index in range(3000)], id="thousands"),
    ],
)
def test_both_ways_lead_to_one_file(sizes: list[int]) -> None:
    """Where torch skips bytes and where it is given stand-ins for them, it writes the same around them."""
    snapshot = _untouched(*sizes)
    records = snapshot.records()
    quick = skip_writing(snapshot, records)
    assert quick is not None
    assert [len(each) for each in quick if isinstance(each, Reference)] == [
        size for size in sizes if size > 1024
    ]
    assert _described(snapshot, quick) == _described(snapshot, record_writing(snapshot, records))
    snapshot.close()


@pytest.mark.parametrize("boundary", [1, 64, 4096, 1 << 16])
def test_storages_lie_where_torch_is_told_to_align_them(
    boundary: int, take: Take, saved: Saved, whole: Whole
) -> None:
    """The file is torch.save's with any alignment of storages, that it was told at the save."""
    with alignments.patch("save.storage_alignment", boundary):
        state = _state()
        expected = saved(state)
        snapshot = take(state)
        assert isinstance(snapshot._content, contents.Unfilled)
    assert whole(lay_out(snapshot)) == expected  # whatever torch is told since


def test_devices_are_named_as_torch_names_them(
    take: Take, saved: Saved, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name of a device is written each time that torch makes it anew, and once where it is a constant."""
    for tag in (lambda storage: f"cuda:{storage.nbytes() % 2}", lambda storage: "mps"):
        monkeypatch.setattr(torch.serialization, "_package_registry", [(0, tag, None)])
        state = _state()
        expected = saved(state)
        assert whole(lay_out(take(state))) == expected


def _adds_a_record(save: Any, state: Any, archive: Any, *others: Any) -> None:
    save(state, archive, *others)
    archive.write_record("last", "text", 4)


def _pickles_otherwise(save: Any, state: Any, archive: Any, module: Any, _: int, *others: Any) -> None:
    save(state, archive, module, 4, *others)


def _wants_its_own_writer(save: Any, state: Any, archive: Any, *others: Any) -> None:
    if not isinstance(archive, torch._C.PyTorchFileWriter):
        raise TypeError("no writer of torch's")
    save(state, archive, *others)


@pytest.mark.parametrize("otherwise", [_adds_a_record, _pickles_otherwise, _wants_its_own_writer])
def test_a_torch_that_writes_otherwise_writes_itself(
    otherwise: Any, take: Take, saved: Saved, whole: Whole, caplog: pytest.LogCaptureFixture
) -> None:
    """What a torch to come adds or changes is in the file, as it was at the save: torch says it then, or writes all."""
    state = [torch.randn(700), torch.arange(9), {"a": torch.nn.Parameter(torch.ones(3))}]
    save = torch.serialization._save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.serialization, "_save", lambda *given: otherwise(save, *given))
        expected = saved(state)
        with caplog.at_level(logging.WARNING, "async_ckpt"):
            snapshot = take(state)
    for tensor in (state[0], state[1]):
        tensor.zero_()
    wants_all = otherwise is _wants_its_own_writer
    assert isinstance(snapshot._content, contents.Whole if wants_all else contents.Records)
    assert [record.message for record in caplog.records] == [
        f"the format of torch {torch.__version__} is not known: torch wrote the whole file in memory"
    ] * wants_all
    assert whole(lay_out(snapshot)) == expected


class _Skipper:
    """torch's writer, but for its skipping a byte more."""

    def __init__(self, file: Any, *options: Any) -> None:
        self._file = file
        self._writer = _WRITER(file, *options)

    def write_record_metadata(self, name: str, nbytes: int) -> None:
        """Skip one byte too many."""
        self._file.seek(nbytes + 1, io.SEEK_CUR)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)


_WRITER: Any = torch._C.PyTorchFileWriter


def test_a_torch_that_skips_otherwise_is_given_stand_ins(
    take: Take, saved: Saved, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where torch does not skip exactly the bytes of each storage, nothing is guessed."""
    state = [torch.randn(700), torch.arange(9)]
    expected = saved(state)
    snapshot = take(state)
    monkeypatch.setattr(torch._C, "PyTorchFileWriter", _Skipper)
    assert skip_writing(snapshot, snapshot.records()) is None
    assert whole(lay_out(snapshot)) == expected
