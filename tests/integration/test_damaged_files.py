"""Loading what is no checkpoint, or not a whole one: it is said to be so, and nothing wrong comes back."""

from __future__ import annotations

import io
import struct
import warnings
import zipfile
from typing import Any

import pytest
import torch

from async_ckpt.errors import CorruptCheckpointError
from async_ckpt.format.reading.direct import expected_start
from tests.archives import entries_of, set_in_directory, with_pickle, written
from tests.loads import FAR, NEAR, PADDING, load


@pytest.mark.parametrize("new", [True, False], ids=["archive", "old format"])
def test_a_file_that_is_cut_short(new: bool) -> None:
    """A file that ends too early is said to be corrupt, wherever it ends."""
    data = written(PADDING, _use_new_zipfile_serialization=new)
    for nbytes in (0, 1, 100, 5_000, len(data) // 2, len(data) - 70_000, len(data) - 100, len(data) - 1):
        with pytest.raises(CorruptCheckpointError, match=r"memory://x\.ckpt.*ends too early") as caught:
            load(data[:nbytes])
        assert caught.value.__cause__ is not None


@pytest.mark.parametrize("name", ["data.pkl", "data/0", "data/7", "data/20"])
def test_a_bit_that_flipped(name: str) -> None:
    """One wrong bit in what is loaded is found, and the record named, from any kind of store, in whole and in part."""
    data = bytearray(written(PADDING))
    entry = entries_of(bytes(data))[name]
    data[expected_start(entry, 64) + entry.nbytes - 1] ^= 0x80
    for url in (FAR, NEAR):
        for keys in (None, "*"):
            with pytest.raises(CorruptCheckpointError, match=rf"{url}.*archive/{name}"):
                load(bytes(data), url, keys=keys)


@pytest.mark.parametrize("name", ["version", "data.pkl", "data/0", "data/7"])
def test_an_archive_that_is_damaged(name: str) -> None:
    """A header that is damaged, beside a record or in the directory, is said to be so, in whole and in part."""
    data = written(PADDING)
    files = [set_in_directory(data, name, header=place) for place in (5, len(data) - 5)]
    if header := entries_of(data)[name].header:  # what the file itself begins with, torch tells it by
        files.append(data[:header] + b"JUNK" + data[header + 4 :])
    for each in files:
        for keys in (None, "*"):
            with pytest.raises(CorruptCheckpointError, match=r"memory://x\.ckpt.*damaged"):
                load(each, keys=keys)


def test_records_at_one_place() -> None:
    """Where two records are said to begin at one place, a load has both bytes right or tells that they are not."""
    data = written(PADDING)
    first = entries_of(data)["data/1"]
    same = set_in_directory(data, "data/2", header=first.header, checksum=first.checksum)
    for keys in (None, "b"):
        torch.testing.assert_close(load(same, keys=keys)["b"], torch.load(io.BytesIO(same))["b"])
        with pytest.raises(CorruptCheckpointError, match="checksum"):
            load(set_in_directory(data, "data/2", header=first.header), keys=keys)


def test_a_name_twice() -> None:
    """Of two records of one name, a load takes the one that torch.load takes."""
    file = io.BytesIO(written(PADDING))
    with warnings.catch_warnings(), zipfile.ZipFile(file, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("archive/data/0", bytes(PADDING["a"].nbytes))
    expected = torch.load(io.BytesIO(file.getvalue()))
    torch.testing.assert_close(load(file.getvalue()), expected)
    torch.testing.assert_close(load(file.getvalue(), keys="a")["a"], expected["a"])


@pytest.mark.parametrize("numel", [149_999, 150_001, 1 << 30])
def test_a_pickle_with_wrong_lengths(numel: int) -> None:
    """A pickle that claims more or fewer numbers than its record has raises torch's own error, if torch has one."""
    lie, truth = (b"J" + struct.pack("<i", number) for number in (numel, 150_000))
    data = with_pickle(written(PADDING), lambda pickled: pickled.replace(truth, lie, 1))
    outcomes: list[Any] = []
    for read in (torch.load, lambda file, **options: load(file.getvalue(), **options)):
        try:
            outcomes.append(read(io.BytesIO(data), weights_only=True)["a"].untyped_storage().nbytes())
        except Exception as error:
            outcomes.append(type(error))
    assert outcomes[0] == outcomes[1]


def test_what_is_no_checkpoint() -> None:
    """Some other file raises torch's own error, with the name of the file in its notes."""
    other = io.BytesIO()
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("word/document.xml", "text" * 1000)
    for data in (b"some text, and more of it\n" * 100, b"hello", bytes(1000), other.getvalue()):
        with pytest.raises(Exception) as theirs:
            torch.load(io.BytesIO(data), weights_only=True)
        with pytest.raises(theirs.type) as ours:
            load(data)
        assert FAR in str(getattr(ours.value, "__notes__", FAR))
