"""Two saves of the same bytes to S3: the second file's bulk is copied there, and does not cross the network again."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from async_ckpt import CheckpointService, State
from stress.httpfaults import SLOW_DOWN, response
from stress.proxy import FaultProxy
from stress.servers import s3
from stress.servers.process import Server
from tests.servers import fresh_bucket
from tests.support import PATIENCE_SECONDS

pytestmark = pytest.mark.integration

MIB = 1 << 20
BULK_BYTES = 24 * MIB

Answer = Callable[[str, Mapping[str, str]], bytes | None]


@dataclass
class Wire:
    """What goes to the server.

    Attributes:
        sent: bytes of parts that were sent, by name of the file.
        ask: asks the server itself.
        copied: parts that the server was asked to copy, by name of the file.
        go_on: set once the first upload may go on.
    """

    service: CheckpointService
    url: str
    ask: Callable[..., bytes]
    sent: dict[str, int] = field(default_factory=dict)
    copied: dict[str, int] = field(default_factory=dict)
    go_on: threading.Event = field(default_factory=threading.Event)

    def read(self, name: str) -> bytes:
        """Return the file, past the wire."""
        return self.ask("GET", f"run/{name}.ckpt")

    def save_both(self, bulk: dict[str, torch.Tensor]) -> list[bytes]:
        """Save twice in one step; return what synchronous saves would have written."""
        expected = []
        for name, path in (("top", ""), ("last", "s3://somewhere/top.ckpt")):
            state = {"callbacks": {"last_model_path": path}, "state_dict": dict(bulk)}
            torch.save(state, file := io.BytesIO())
            expected.append(file.getvalue())
            self.service.save(state, f"{self.url}/{name}.ckpt")
        self.go_on.set()
        return expected


@contextmanager
def wire(
    server: Server,
    answer: Answer = lambda kind, headers: None,
    lose: Callable[[str], bool] = lambda target: False,
) -> Iterator[Wire]:
    """Yield a service with a bucket of its own and a wire on which all is counted, held before its first upload."""
    bucket = fresh_bucket(server)

    def seen(method: str, target: str, headers: Mapping[str, str]) -> bytes | None:
        name = target.partition("?")[0].rpartition("/")[2].removesuffix(".ckpt")
        if method == "POST" and "uploads" in target:
            assert made.go_on.wait(PATIENCE_SECONDS)
        if method == "PUT" and "partNumber" in target:
            is_copy = "x-amz-copy-source" in headers
            found = answer("copy" if is_copy else "part", headers)
            if found is not None:
                return found
            if is_copy:
                made.copied[name] = made.copied.get(name, 0) + 1
            else:
                made.sent[name] = made.sent.get(name, 0) + int(headers.get("content-length", 0))
        return None

    def ask(method: str, target: str, body: bytes = b"") -> bytes:
        return s3.call(server.url, method, f"{bucket}/{target}", body)

    with FaultProxy(server.url, answer=seen, lose_answer=lambda _, target: lose(target)) as proxy:
        options = {**server.storage_options, "endpoint_url": proxy.url}
        with CheckpointService(storage_options=options, part_size=5 * MIB, flush_timeout=60) as service:
            made = Wire(service=service, url=f"s3://{bucket}/run", ask=ask)
            yield made


def weights() -> dict[str, torch.Tensor]:
    """Return what two files have in common."""
    generator = torch.Generator().manual_seed(0)
    bulk = {f"w{n}": torch.randn(BULK_BYTES // 4 // 8, generator=generator) for n in range(8)}
    return bulk | {f"s{n}": torch.tensor(float(n)) for n in range(20)}


def test_the_bulk_is_sent_once(seaweedfs: Server) -> None:
    """Of the second file only a beginning, as long as S3 wants a part to be, and its end are sent; both are right."""
    with wire(seaweedfs) as place:
        expected = place.save_both(weights())
        place.service.wait(60)
        assert [place.read("top"), place.read("last")] == expected
        assert place.sent["top"] >= BULK_BYTES
        assert place.sent["last"] < 6 * MIB
        assert place.copied == {"last": 3}
        assert b"<UploadId>" not in place.ask("GET", "?uploads=")


@pytest.mark.parametrize("status", [501, 403, 412, 200])
def test_what_the_server_does_not_copy_is_sent(seaweedfs: Server, status: int) -> None:
    """Where the server cannot copy, may not, or does not tell the checksum of the copy, the part is sent as usual."""

    def refuse(kind: str, headers: Mapping[str, str]) -> bytes | None:
        if kind != "copy":
            return None
        code = {501: "NotImplemented", 403: "AccessDenied", 412: "PreconditionFailed"}.get(status)
        body = (
            f"<Error><Code>{code}</Code></Error>"
            if code
            else "<CopyPartResult><ETag>a</ETag></CopyPartResult>"
        )
        return response(status, f"<?xml version='1.0' encoding='UTF-8'?>{body}".encode())

    with wire(seaweedfs, refuse) as place:
        expected = place.save_both(weights())
        place.service.wait(60)
        assert [place.read("top"), place.read("last")] == expected
        assert place.copied == {}
        assert place.sent["last"] >= BULK_BYTES


@pytest.mark.parametrize("method", ["DELETE", "PUT"])
def test_a_first_file_that_is_gone_is_not_used(seaweedfs: Server, method: str) -> None:
    """A second file whose first was deleted, or replaced by another object, before it could be copied is sent whole."""
    changed = threading.Event()

    def change(kind: str, headers: Mapping[str, str]) -> bytes | None:
        if kind == "copy" and not changed.is_set():
            changed.set()
            place.ask(method, "run/top.ckpt", b"other" * (BULK_BYTES // 4) if method == "PUT" else b"")
        return None

    with wire(seaweedfs, change) as place:
        expected = place.save_both(weights())
        place.service.wait(60)
        assert changed.is_set()
        assert place.read("last") == expected[1]


def test_a_failing_copy_is_repeated(seaweedfs: Server) -> None:
    """A copy that the server puts off is asked for again, and nothing is sent for it (E3)."""
    refused = threading.Event()

    def slow_down(kind: str, headers: Mapping[str, str]) -> bytes | None:
        if kind != "copy" or refused.is_set():
            return None
        refused.set()
        return SLOW_DOWN

    with wire(seaweedfs, slow_down) as place:
        expected = place.save_both(weights())
        place.service.wait(60)
        assert refused.is_set()
        assert place.read("last") == expected[1]
        assert place.copied == {"last": 3}
        assert place.sent["last"] < 6 * MIB


def test_a_lost_answer_to_a_copy(seaweedfs: Server) -> None:
    """A copy whose answer was lost is asked for again, as copying twice changes nothing (E3)."""
    lost = threading.Event()

    def lose(target: str) -> bool:
        if lost.is_set() or not ("last.ckpt" in target and "partNumber=2" in target):
            return False
        lost.set()
        return True

    with wire(seaweedfs, lose=lose) as place:
        expected = place.save_both(weights())
        place.service.wait(60)
        assert lost.is_set()
        assert place.read("last") == expected[1]
        assert place.sent["last"] < 6 * MIB


def test_changed_weights_are_not_copied(seaweedfs: Server) -> None:
    """After a step of training nothing of the earlier file is used."""
    with wire(seaweedfs) as place:
        bulk: dict[str, Any] = weights()
        place.service.save(dict(bulk), f"{place.url}/top.ckpt")
        bulk["w0"] += 1
        handle = place.service.save(dict(bulk), f"{place.url}/last.ckpt")
        place.go_on.set()
        assert handle.wait(60).state is State.DURABLE
        assert place.copied == {}
