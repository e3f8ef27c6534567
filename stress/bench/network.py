"""The fault proxy as a process of its own, so that its CPU time is not a client's, and how much it can carry.

Guarantees: it has ended when the block is left, or when whoever started it has ended. What a bad network does to
bytes is ``stress.proxied``'s.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from time import perf_counter
from urllib.parse import urlsplit

from stress.bench.harness import MIB, cpu_seconds
from stress.proxy import HOST, FaultProxy, Faults

__all__ = ["Network", "bytes_a_second", "network"]

_CALL_SECONDS = 60.0


class Network:
    """A network on the way to a server; `url` is its near end."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        assert process.stdout is not None
        self.url = process.stdout.readline().strip()
        if not self.url:
            raise RuntimeError("the network did not start; what it said is above")

    def counts(self) -> dict[str, float]:
        """Return ``connections``, ``bytes_up``, ``bytes_down`` and ``cpu_seconds`` so far."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(file=self._process.stdin, flush=True)
        counts: dict[str, float] = json.loads(self._process.stdout.readline())
        return counts


@contextmanager
def network(target: str, *, latency_seconds: float = 0.0, rate: float | None = None) -> Iterator[Network]:
    """Run a network in front of *target* for the time of a block.

    Args:
        target: the server's URL.
        latency_seconds: how much later everything arrives, each way.
        rate: bytes a second that a connection carries, each way.
    """
    command = [sys.executable, "-m", "stress.bench.network", target, str(latency_seconds), str(rate or 0)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Network(process)
        finally:
            process.kill()


def bytes_a_second(url: str, connections: int, *, nbytes: int = 128 * MIB) -> float:
    """Return what sockets alone bring through *url* to a sink, *nbytes* over each of some connections."""
    start = perf_counter()
    with ThreadPoolExecutor(connections) as pool:
        list(pool.map(_push, [url] * connections, [nbytes] * connections))
    return connections * nbytes / (perf_counter() - start)


def _push(url: str, nbytes: int) -> None:
    parts = urlsplit(url)
    block = memoryview(bytes(MIB))
    with closing(
        socket.create_connection((parts.hostname or HOST, parts.port or 80), timeout=_CALL_SECONDS)
    ) as connection:
        connection.sendall(b"PUT /bucket/raw HTTP/1.1\r\nHost: sink\r\nContent-Length: %d\r\n\r\n" % nbytes)
        for _ in range(nbytes // MIB):
            connection.sendall(block)
        if not connection.recv(1024).startswith(b"HTTP/1.1 200"):
            raise OSError("the sink did not take it")


def main(arguments: Sequence[str]) -> None:
    """Print the URL, and the counts at each line that comes in; end when no more can come."""
    target, latency_seconds, rate = arguments
    faults = Faults(latency_seconds=float(latency_seconds), rate=float(rate) or None)
    with FaultProxy(target, faults=faults) as proxy:
        print(proxy.url, flush=True)
        for _ in sys.stdin:
            counts = {
                "connections": proxy.connections,
                "bytes_up": proxy.bytes_up,
                "bytes_down": proxy.bytes_down,
                "cpu_seconds": cpu_seconds(),
            }
            print(json.dumps(counts), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
