"""The network of the benchmarks: a process that carries and counts."""

from __future__ import annotations

import pytest

from stress import sink
from stress.bench.network import bytes_a_second, network

pytestmark = pytest.mark.integration

MIB = 1 << 20


def test_it_carries_and_counts() -> None:
    """What sockets send through it arrives, is counted, and is no faster than the rate."""
    with sink.start() as server, network(server.url, latency_seconds=0.001, rate=20 * MIB) as line:
        reached = bytes_a_second(line.url, 2, nbytes=4 * MIB)
        counts = line.counts()
        assert sink.totals(server.url).body_bytes == 8 * MIB
    assert counts["connections"] == 2
    assert counts["bytes_up"] > 8 * MIB
    assert reached < 2 * 1.5 * 20 * MIB  # a line may catch up what its timers lag behind
