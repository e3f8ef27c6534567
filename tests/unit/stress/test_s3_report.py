"""The report of the S3 benchmark: what it makes of samples."""

from __future__ import annotations

from typing import Any

from stress.bench.s3_report import LIGHTNING, OBSTORE, OURS, PARTIAL, PUT_FILE, report

MIB = 1 << 20
NBYTES = 1024 * MIB


def sample(**values: Any) -> dict[str, Any]:
    """Return a sample in which everything is 1 but *values*."""
    names = ["stall_seconds", "seconds", "cpu_seconds", "cpu_seconds_after_stall", "server_cpu_seconds"]
    zeros = {"extra_bytes": 0, "library_bytes": 0, "nbytes": NBYTES, "late_seconds": None}
    return {**dict.fromkeys(names, 1.0), **zeros, **values}


def row(text: str, start: str) -> list[str]:
    """Return the cells of the only row that starts with *start*."""
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_cost_of_an_upload() -> None:
    """Ours is held, without its snapshot, against the whole of the others', round by round."""
    samples = {
        OURS: [
            sample(cpu_seconds_after_stall=value, extra_bytes=NBYTES + 2 * MIB) for value in (0.4, 0.5, 0.7)
        ],
        PUT_FILE: [sample(cpu_seconds=value) for value in (2.4, 2.5, 2.8)],
        OBSTORE: [sample(cpu_seconds=0.25)] * 3,
    }
    text = report({"cost": samples}, nbytes=NBYTES)
    assert row(text, "CPU a GiB")[1:] == ["≤ 0.6 s", "0.50", "0.40 - 0.70", "met"]
    assert row(text, "CPU of s3fs")[1:] == ["≥ 5 ×", "5.00", "4.00 - 6.00", "met"]
    assert row(text, "CPU, of obstore")[1:] == ["≤ 1.5 ×", "2.00", "1.60 - 2.80", "MISSED"]
    assert row(text, "extra memory beyond")[1:] == ["≤ 64 MiB", "2.00", "2.00 - 2.00", "met"]


def test_cost_is_told_by_the_gibibyte() -> None:
    """A state of half the size that costs as much costs twice as much a GiB."""
    samples = {name: [sample(cpu_seconds_after_stall=0.4)] for name in (OURS, PUT_FILE, OBSTORE)}
    text = report({"cost": samples}, nbytes=NBYTES // 2)
    assert row(text, OURS)[1:3] == ["2.00", "0.80"]
    assert row(text, "CPU a GiB")[2] == "0.80"


def test_a_network_that_carries_less_than_its_rate() -> None:
    """Throughput is held against the rate or, where bare sockets reach less, against theirs."""
    quick, slow = (
        sample(bytes_a_second=380e6, bare_bytes_a_second=bare, late_seconds=[0.001, 0.02, 0.1])
        for bare in (395e6, 500e6)
    )
    text = report({"network": {"4": [quick], "8": [slow]}}, nbytes=NBYTES)
    assert row(text, "4 × 100 MB/s")[2:] == ["0.96", "0.96 - 0.96", "met"]
    assert row(text, "8 × 100 MB/s")[2:] == ["0.76", "0.76 - 0.76", "MISSED"]
    assert row(text, "8  ")[1:] == ["380", "0.47", "500", "1, 20, 100"]
    assert row(text, "loop late")[2:] == ["20.00", "20.00 - 20.00", "met"]


def test_servers_and_loads() -> None:
    """Lightning's time is told in ours, memory without the state, what is moved in hundredths of the file."""
    durable = {"A": {OURS: [sample(seconds=2.0)], LIGHTNING: [sample(seconds=5.0)]}}
    loads = {
        OURS: [sample(extra_bytes=NBYTES + 30 * MIB)],
        LIGHTNING: [sample(seconds=3.0)],
        PARTIAL: [sample(nbytes=NBYTES // 20, moved_bytes=0.055 * NBYTES)],
    }
    text = report({"durable": durable, "load": loads}, nbytes=NBYTES)
    assert row(text, "durable in A")[2] == "2.50"
    assert row(text, "load: Lightning")[2] == "3.00"
    assert row(text, "load: memory")[2] == "30.00"
    assert row(text, "bytes moved")[2:] == ["5.50", "5.50 - 5.50", "met"]
