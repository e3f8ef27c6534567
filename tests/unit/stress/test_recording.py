"""Recordings of benchmarks: what they keep, and what they refuse to mix."""

from __future__ import annotations

import getpass
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from stress.bench.recording import SAMPLES, read, record


def test_rounds_add_up(tmp_path: Path) -> None:
    """A second run adds its rounds after those of the first, for every contestant in every part."""
    path = tmp_path / "recording.json"
    record(path, {"large": {"a": [{"x": 1.0}], "b": [{"x": 2.0}]}}, parameters={"mib": 4})
    added = record(
        path, {"large": {"a": [{"x": 3.0}]}, "small": {"a": [{"y": [1, 2]}]}}, parameters={"mib": 4}
    )
    assert added == {
        "large": {"a": [{"x": 1.0}, {"x": 3.0}], "b": [{"x": 2.0}]},
        "small": {"a": [{"y": [1, 2]}]},
    }
    assert read(path)["samples"] == added


def test_what_was_measured_otherwise_is_refused(tmp_path: Path) -> None:
    """Rounds of another size, or of another machine, are not taken for more of the same."""
    path = tmp_path / "recording.json"
    record(path, {"a": [{"x": 1.0}]}, parameters={"mib": 4})
    kept = path.read_bytes()
    with pytest.raises(ValueError, match="remove it to begin anew"):
        record(path, {"a": [{"x": 1.0}]}, parameters={"mib": 8})
    assert path.read_bytes() == kept
    recording = read(path)
    recording["machine"]["cpus"] += 1
    path.write_text(json.dumps(recording))
    with pytest.raises(ValueError, match="remove it to begin anew"):
        record(path, {"a": [{"x": 1.0}]}, parameters={"mib": 4})


def test_a_sample_is_a_line(tmp_path: Path) -> None:
    """Each sample has a line of its own, in six digits, so that a diff shows what came along."""
    path = tmp_path / "recording.json"
    record(path, {"a": [{"x": 1 / 3}, {"x": 2.0}]}, parameters={})
    lines = [line.strip(" ,") for line in path.read_text().splitlines()]
    assert '{"x": 0.333333}' in lines
    assert '{"x": 2.0}' in lines


def test_facts_name_no_machine_and_no_place(tmp_path: Path) -> None:
    """A recording says what kind of machine and disk it is of, and not whose."""
    path = tmp_path / "recording.json"
    record(path, {"a": [{"x": 1.0}]}, parameters={}, where=tmp_path)
    text = path.read_text()
    assert {"cpus", "memory_gib", "gpu", "disk", "python", "torch"} <= set(read(path)["machine"])
    assert str(tmp_path) not in text
    assert socket.gethostname() not in text
    assert f"/{getpass.getuser()}" not in text


@pytest.mark.parametrize("path", sorted(SAMPLES.glob("*.json")), ids=lambda path: path.stem)
def test_what_is_committed_holds_whole_rounds(path: Path) -> None:
    """In every part of a committed recording, each contestant has as many samples as the others, three or more."""

    def check(part: dict[str, Any]) -> None:
        counts = {len(samples) for samples in part.values() if isinstance(samples, list)}
        assert len(counts) <= 1
        assert all(count >= 3 for count in counts)
        for inner in part.values():
            if isinstance(inner, dict):
                check(inner)

    check(read(path)["samples"])
