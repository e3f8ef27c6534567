"""What a timeline keeps, and when and how it is written."""

from __future__ import annotations

import copy
import json
import os
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest

from async_ckpt.events import Accepted, Durable, Failed, PartWritten
from async_ckpt.timeline import Timeline
from tests.support import Harness, complaints, gated, python, reached, state


def _trace(path: Path) -> dict[str, Any]:
    trace: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return trace


def _names(path: Path, kind: str = "X") -> list[str]:
    return [record["name"] for record in _trace(path)["traceEvents"] if record["ph"] == kind]


def test_a_run_of_a_service_is_recorded(tmp_path: Path) -> None:
    """A save, one that fails, and a removal leave stalls, rows, instants and counters in a file of JSON."""
    path = tmp_path / "deep" / "trace.json"
    gate, held = gated("commit", calls=(1,))
    timeline = Timeline(path)
    with Harness(held, memory=True, observer=timeline, on_error="warn") as harness:
        harness.service.save(state(1), "memory/a.ckpt")
        reached(gate)
        timeline.write()
        assert "a.ckpt (pending)" in _names(path)
        gate.open()
        harness.service.wait()
        harness.service.remove("memory/a.ckpt").wait()
    timeline.write()
    assert _names(path) == [
        "save a.ckpt",
        "admission",
        "copying",
        "a.ckpt",
        "staging",
        "queued",
        "writing",
        "committing",
    ]
    assert _names(path, "i") == ["durable", "a.ckpt removed"]
    stall, save = (r for r in _trace(path)["traceEvents"] if r["name"] in ("save a.ckpt", "a.ckpt"))
    assert stall["dur"] >= save["args"]["stall_seconds"] * 1e6 - 2  # both ends are whole microseconds
    assert set(_names(path, "C")) == {"saves pending", "bytes in flight"}


def test_own_slices_are_recorded(tmp_path: Path) -> None:
    """A training step stands on the track that it names."""
    with Timeline(tmp_path / "trace.json") as timeline:
        timeline.slice("steps", "step 3", 10.0, 10.5)
    records = _trace(tmp_path / "trace.json")["traceEvents"]
    [step] = [record for record in records if record["ph"] == "X"]
    assert (step["name"], step["ts"], step["dur"]) == ("step 3", 10_000_000, 500_000)
    assert "steps" in [record["args"].get("name") for record in records if record["name"] == "thread_name"]


def test_nothing_recorded_is_nothing_written(tmp_path: Path) -> None:
    """A rank that saves nothing leaves the file to the one that does; nothing new leaves it as it is."""
    path = tmp_path / "trace.json"
    with Timeline(path):
        pass
    assert not path.exists()
    with Timeline(path) as timeline:
        timeline.slice("steps", "step", 1.0, 2.0)
    path.write_text("another's")
    timeline.write()
    assert path.read_text() == "another's"


def test_memory_is_bounded_and_the_newest_is_kept(tmp_path: Path) -> None:
    """Past the bound the oldest events go, steps push out no saves, and the file says that it may not be all."""
    with Timeline(tmp_path / "trace.json", max_events=5) as timeline:
        for number in range(4):
            timeline(Accepted(request_id=number, url=f"{number}.ckpt", nbytes=1))
            timeline(Durable(request_id=number, url=f"{number}.ckpt", nbytes=1, seconds=1.0))
        for number in range(100):
            timeline.slice("steps", f"step {number}", number, number + 1)
    names = _names(tmp_path / "trace.json")
    assert [name for name in names if name.endswith(".ckpt")] == ["2.ckpt", "3.ckpt"]
    assert [name for name in names if name.startswith("step ")] == [f"step {n}" for n in range(95, 100)]
    assert "newest 5" in _trace(tmp_path / "trace.json")["otherData"]["kept"]


class _Large:
    """Stands for what the frames of a failed training hold."""


def test_an_error_is_kept_in_words(tmp_path: Path) -> None:
    """The timeline does not keep the memory of those alive through whom an error went."""
    timeline = Timeline(tmp_path / "trace.json")

    def fail() -> weakref.ref[_Large]:
        large = _Large()
        try:
            raise OSError("disk full", large)
        except OSError as error:
            timeline(Accepted(request_id=1, url="a", nbytes=1))
            timeline(Failed(request_id=1, url="a", error=error))
        return weakref.ref(large)

    assert fail()() is None
    timeline.write()
    text = (tmp_path / "trace.json").read_text()
    assert "OSError" in text
    assert "disk full" in text


def test_the_file_is_replaced_whole(tmp_path: Path) -> None:
    """A writing that fails leaves what was there and no other file, raises, and can be repeated."""
    path = tmp_path / "trace.json"
    path.mkdir()
    timeline = Timeline(path)
    timeline.slice("steps", "step", 1.0, 2.0)
    with pytest.raises(IsADirectoryError):
        timeline.write()
    assert os.listdir(tmp_path) == ["trace.json"]
    path.rmdir()
    timeline.write()
    assert _names(path) == ["step"]
    assert os.listdir(tmp_path) == ["trace.json"]


def test_an_error_in_flight_is_not_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """At the end of a block, a file that cannot be written is logged if another error is on its way (E2)."""
    path = tmp_path / "file" / "trace.json"
    path.parent.touch()
    timeline = Timeline(path)
    timeline.slice("steps", "step", 1.0, 2.0)
    with pytest.raises(KeyError), timeline:
        raise KeyError
    assert str(path) in caplog.text
    with pytest.raises(OSError), timeline:
        pass
    path.parent.unlink()
    timeline.write()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_a_copy_begins_empty(tmp_path: Path, clone: Any) -> None:
    """So it goes through pickle, as a spawned trainer sends it, whatever it has recorded."""
    timeline = Timeline(tmp_path / "trace.json", max_events=7)
    timeline(PartWritten(request_id=1, url="a", index=0, nbytes=1))
    copied = clone(timeline)
    copied.write()
    assert not (tmp_path / "trace.json").exists()
    copied.slice("steps", "its own", 1.0, 2.0)
    copied.write()
    assert _names(tmp_path / "trace.json") == ["its own"]
    timeline.write()


@pytest.mark.integration
def test_the_interpreters_exit_writes_what_it_drained(tmp_path: Path) -> None:
    """A program that closes nothing has all its saves in the file, durable."""
    done = python(
        """
        import sys, torch
        from async_ckpt import CheckpointService
        from async_ckpt.timeline import Timeline
        service = CheckpointService(observer=Timeline(sys.argv[1] + "/trace.json"))
        for number in range(3):
            service.save({"weights": torch.zeros(100_000)}, f"{sys.argv[1]}/{number}.ckpt")
        """,
        tmp_path,
    )
    assert (done.returncode, complaints(done)) == (0, "")
    assert _names(tmp_path / "trace.json", "i") == ["durable"] * 3


@pytest.mark.integration
def test_a_forked_child_leaves_its_parents_record_to_it(tmp_path: Path) -> None:
    """A child that exits writes nothing of what its parent has recorded; what it records itself, it writes."""
    done = python(
        """
        import os, sys
        from async_ckpt.timeline import Timeline
        timeline = Timeline(sys.argv[1])
        timeline.slice("steps", "parent's", 1.0, 2.0)
        if os.fork() == 0:
            sys.exit()
        os.wait()
        assert not os.path.exists(sys.argv[1])
        if os.fork() == 0:
            timeline.slice("steps", "child's", 1.0, 2.0)
            sys.exit()
        os.wait()
        text = open(sys.argv[1]).read()
        assert "child's" in text and "parent's" not in text
        """,
        tmp_path / "trace.json",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert _names(tmp_path / "trace.json") == ["parent's"]


@pytest.mark.integration
def test_the_package_does_not_load_it() -> None:
    """``import async_ckpt`` costs nothing for it."""
    done = python(
        "import sys, async_ckpt; print({'async_ckpt.timeline', 'async_ckpt.telemetry.trace'} & set(sys.modules))"
    )
    assert done.stdout == "set()\n"


@pytest.mark.parametrize("earlier", [None, 0o600, 0o640])
def test_the_file_is_nobody_elses_before_it_is_whole(tmp_path: Path, earlier: int | None) -> None:
    """A new file gets the mode that ``open`` gives, a replaced one keeps its own."""
    path = tmp_path / "trace.json"
    if earlier is not None:
        path.touch()
        path.chmod(earlier)
    before = os.umask(0o022)
    try:
        with Timeline(path) as timeline:
            timeline.slice("steps", "step", 1.0, 2.0)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == (0o644 if earlier is None else earlier)
    assert os.listdir(tmp_path) == ["trace.json"]


def test_a_planted_link_leads_nowhere(tmp_path: Path) -> None:
    """Links in the place of the file, and of every name that it can have had on the way, are not written through."""
    victim, path = tmp_path / "victim", tmp_path / "trace.json"
    victim.write_text("precious")
    path.symlink_to(victim)
    (tmp_path / f".trace.json.{os.getpid()}.tmp").symlink_to(victim)
    with Timeline(path) as timeline:
        timeline.slice("steps", "step", 1.0, 2.0)
    assert victim.read_text() == "precious"
    assert not path.is_symlink()


def test_a_very_long_name_is_written(tmp_path: Path) -> None:
    """The names on the way are no longer than the file's own may be."""
    path = tmp_path / ("x" * 255)
    with Timeline(path) as timeline:
        timeline.slice("steps", "step", 1.0, 2.0)
    assert path.exists()
