"""The promises of the documentation on each object store: a real server behind, faults in front."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

import anyio
import pytest
import torch

from async_ckpt import CheckpointService, State, load
from async_ckpt.errors import (
    AbandonedError,
    CancelledSaveError,
    CheckpointExistsError,
    RemovalDroppedError,
    StoreError,
)
from async_ckpt.stores import locate, open_store
from async_ckpt.testing import Fault, ThreadWorkers
from stress.servers.process import Server
from tests.servers import fresh_bucket
from tests.support import PATIENCE_SECONDS, Harness, complaints, gated, number_of, python, reached, state

pytestmark = pytest.mark.integration

LARGE_BYTES = 12 << 20
"""Of a state that takes several parts: S3's must have five MiB."""


@dataclass(frozen=True)
class Place:
    """A fresh bucket on a real server."""

    server: Server
    bucket: str

    def url(self, name: str) -> str:
        return f"{self.server.protocol}://{self.bucket}/run/{name}"

    def harness(self, *faults: Fault, **options: Any) -> Harness:
        """Return a service on the real store, with faults."""
        return Harness(*faults, real=True, storage_options=self.server.storage_options, **options)

    def number(self, name: str) -> float | None:
        """Return the number of the checkpoint of that name; None if there is none."""
        try:
            return number_of(load(self.url(name), storage_options=self.server.storage_options))
        except FileNotFoundError:
            return None

    def bytes_of(self, name: str) -> bytes:
        """Return what the object holds."""

        async def read() -> bytes:
            with closing(ThreadWorkers()) as workers:
                where = locate(self.url(name), storage_options=self.server.storage_options)
                store = open_store(where, workers=workers, storage_options=self.server.storage_options)
                source = await store.source(where)
                data = bytearray(source.nbytes)
                await source.read_into(0, memoryview(data))
                await source.aclose()
                await store.aclose()
                return bytes(data)

        return anyio.run(read)


@pytest.fixture(params=["seaweedfs", "fake_gcs", "azurite"])
def place(request: pytest.FixtureRequest) -> Place:
    """A place on each of the servers."""
    server: Server = request.getfixturevalue(request.param)
    return Place(server, fresh_bucket(server))


@pytest.fixture
def places(seaweedfs: Server, fake_gcs: Server, azurite: Server) -> list[Place]:
    """A place on all of them, for what is done in another process."""
    return [Place(server, fresh_bucket(server)) for server in (seaweedfs, fake_gcs, azurite)]


def permanent(operation: Any, *calls: int) -> Fault:
    """Return the fault of a store that refuses for good."""
    return Fault(operation=operation, calls=calls, error=lambda: StoreError("refused"))


def test_order_of_one_location(place: Place) -> None:
    """Save, remove, save and load of one location take effect in the order of the program (O1, O2)."""
    gate, hold = gated(calls=[1])
    with place.harness(hold, queue_depth=9, max_concurrent_saves=4) as harness:
        for number in (1, 2):
            harness.service.save(state(number), place.url("a.ckpt"))
        harness.service.remove(place.url("a.ckpt"))
        harness.service.save(state(3), place.url("a.ckpt"))
        other = harness.service.save(state(9), place.url("b.ckpt"))
        other.wait(PATIENCE_SECONDS)
        assert number_of(harness.service.load(place.url("b.ckpt"))) == 9
        gate.open()
        assert number_of(harness.service.load(place.url("a.ckpt"))) == 3
        harness.service.remove(place.url("a.ckpt"))
    assert (place.number("a.ckpt"), place.number("b.ckpt")) == (None, 9)


def test_removal_cancels_a_queued_save(place: Place) -> None:
    """Remove of a queued save's location ends that save; the object of before is deleted (O3)."""
    gate, hold = gated(calls=[2])
    with place.harness(hold, queue_depth=9) as harness:
        harness.service.save(state(1), place.url("b.ckpt")).wait(PATIENCE_SECONDS)
        harness.service.save(state(2), place.url("a.ckpt"))
        queued = harness.service.save(state(3), place.url("b.ckpt"))
        harness.service.remove(place.url("b.ckpt"))
        gate.open()
        with pytest.raises(CancelledSaveError):
            queued.wait(PATIENCE_SECONDS)
    assert (place.number("a.ckpt"), place.number("b.ckpt")) == (2, None)


def test_durable_is_there(places: list[Place]) -> None:
    """Once a handle is durable, another process finds the whole checkpoint (D1)."""
    with ExitStack() as stack:
        for place in places:
            harness = stack.enter_context(place.harness(part_size="5MiB"))
            harness.service.save(state(5, nbytes=LARGE_BYTES), place.url("a.ckpt")).wait(PATIENCE_SECONDS)
        done = python(
            """
            import ast, sys
            from async_ckpt import load
            for url, options in ast.literal_eval(sys.argv[1]):
                print(float(load(url, storage_options=options)["weights"].mean()))
            """,
            [(place.url("a.ckpt"), dict(place.server.storage_options)) for place in places],
        )
    assert done.stdout.split() == ["5.0"] * len(places), done.stderr


@pytest.mark.parametrize("operation", ["put", "commit"])
def test_a_failed_save_changes_nothing(place: Place, operation: str) -> None:
    """A save that fails leaves the checkpoint of before, and a removal after it deletes nothing (D2, D3)."""
    with place.harness(permanent(operation, 4), part_size="5MiB", max_concurrent_parts=1) as harness:
        for name in ("old.ckpt", "a.ckpt", "third.ckpt"):
            harness.service.save(state(1), place.url(name)).wait(PATIENCE_SECONDS)
        failed = harness.service.save(state(2), place.url("a.ckpt"))
        removal = harness.service.remove(place.url("old.ckpt"))
        with pytest.raises(StoreError, match="refused"):
            failed.wait(PATIENCE_SECONDS)
        with pytest.raises(RemovalDroppedError):
            removal.wait(PATIENCE_SECONDS)
    assert (place.number("old.ckpt"), place.number("a.ckpt")) == (1, 1)


def test_exit_without_close(places: list[Place]) -> None:
    """A script that ends without closing its services has its checkpoints written (D4)."""
    done = python(
        """
        import ast, sys, torch
        from async_ckpt import CheckpointService
        for url, options in ast.literal_eval(sys.argv[1]):
            service = CheckpointService(storage_options=options)
            service.save({"number": 7, "weights": torch.full((1000,), 7.0)}, url)
        """,
        [(place.url("a.ckpt"), dict(place.server.storage_options)) for place in places],
    )
    assert (done.returncode, complaints(done)) == (0, "")
    assert [place.number("a.ckpt") for place in places] == [7] * len(places)


def test_deadline_of_close(place: Place) -> None:
    """What is not done when close gives up is abandoned, the old checkpoint stays, and nothing is left (D4, D2)."""
    gate, hold = gated("put", calls=[2])
    harness = place.harness(hold, abandon_grace_seconds=PATIENCE_SECONDS)
    harness.service.save(state(1), place.url("a.ckpt")).wait(PATIENCE_SECONDS)
    stuck = harness.service.save(state(2, nbytes=LARGE_BYTES), place.url("a.ckpt"))
    reached(gate)
    with pytest.raises(AbandonedError):
        harness.service.close(0.01)
    assert stuck.state is State.FAILED
    assert place.number("a.ckpt") == 1


def test_a_failure_is_told_once_and_harms_no_other(place: Place) -> None:
    """The next call tells of a failure, once; what it was called for is accepted all the same (E1, E2)."""
    with place.harness(permanent("begin", 1), queue_depth=9) as harness:
        harness.service.save(state(1), place.url("a.ckpt"))
        with pytest.raises(StoreError, match="refused"):
            harness.service.wait(PATIENCE_SECONDS)
        harness.service.save(state(2), place.url("a.ckpt"))
        harness.service.wait(PATIENCE_SECONDS)
    assert place.number("a.ckpt") == 2


def test_transient_trouble_is_repeated(place: Place) -> None:
    """A part that is lost on the way is sent again, and the checkpoint is whole (E3)."""
    lost = Fault(operation="put", calls=[1, 3], error=ConnectionResetError)
    with place.harness(lost, part_size="5MiB") as harness:
        harness.service.save(state(4, nbytes=LARGE_BYTES), place.url("a.ckpt")).wait(PATIENCE_SECONDS)
    assert place.number("a.ckpt") == 4


def test_same_bytes_as_torch_save(place: Place) -> None:
    """What is written is what torch.save wrote at the moment of the call, whatever happens to the state later (S1)."""
    gate, hold = gated(calls=[1])
    model = torch.nn.Sequential(torch.nn.Linear(700, 700), torch.nn.Linear(700, 3000))
    tied = {"model": model.state_dict(), "again": model[1].weight, "view": model[1].weight[5:], "step": 3}
    expected = io.BytesIO()
    torch.save(tied, expected)
    with place.harness(hold, part_size="5MiB") as harness:
        harness.service.save(tied, place.url("run.ckpt"))
        with torch.no_grad():
            model[1].weight.zero_()
        gate.open()
    loaded = load(place.url("run.ckpt"), storage_options=place.server.storage_options)
    assert loaded["again"].untyped_storage()._cdata == loaded["view"].untyped_storage()._cdata
    assert _records(place.bytes_of("run.ckpt")) == _records(expected.getvalue())


def _records(data: bytes) -> list[tuple[str, int]]:
    """Return names, less the archive's own, and checksums of all records; the serialization id aside."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        found = [(info.filename.partition("/")[2], info.CRC) for info in archive.infolist()]
    return [each for each in found if "serialization_id" not in each[0]]


def test_overwrite_false(place: Place) -> None:
    """With overwrite=False a second save of a location fails, and the first stays (D2)."""
    options = {"storage_options": place.server.storage_options, "overwrite": False}
    with CheckpointService(**options) as service:
        service.save(state(1), place.url("a.ckpt")).wait(PATIENCE_SECONDS)
        with pytest.raises(CheckpointExistsError, match=r"a\.ckpt"):
            service.save(state(2), place.url("a.ckpt")).wait(PATIENCE_SECONDS)
    assert place.number("a.ckpt") == 1


def test_a_service_is_pickled_without_its_connections(place: Place) -> None:
    """A pickled service works elsewhere, with connections of its own, and both close without a trace (L1, B2)."""
    with CheckpointService(storage_options=place.server.storage_options) as service:
        service.save(state(1), place.url("a.ckpt")).wait(PATIENCE_SECONDS)
        with pickle.loads(pickle.dumps(service)) as copy:
            copy.save(state(2), place.url("a.ckpt")).wait(PATIENCE_SECONDS)
        assert number_of(service.load(place.url("a.ckpt"))) == 2
        service.save(state(3), place.url("a.ckpt")).wait(PATIENCE_SECONDS)
    assert place.number("a.ckpt") == 3


@pytest.mark.parametrize("wrong", ["bucket", "credentials"])
def test_what_cannot_work_fails_at_once(place: Place, wrong: str) -> None:
    """A wrong bucket or wrong credentials fail without a retry, and the message names the place (E3)."""
    options = dict(place.server.storage_options)
    url = place.url("a.ckpt")
    if wrong == "bucket":
        url = f"{place.server.protocol}://no-such-bucket-1/a.ckpt"
    elif place.server.protocol == "gs":
        pytest.skip("fake-gcs-server takes any credentials")
    else:
        options |= _WRONG[place.server.protocol](options)
    with CheckpointService(storage_options=options) as service:
        with pytest.raises(StoreError) as caught:
            service.save(state(1), url).wait(PATIENCE_SECONDS)
        assert url in str(caught.value)


_WRONG: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "s3": lambda options: {"secret": "wrong"},
    "abfs": lambda options: {"connection_string": _other_key(options["connection_string"])},
    "az": lambda options: {"connection_string": _other_key(options["connection_string"])},
}


def _other_key(connection_string: str) -> str:
    fields = [field.partition("=") for field in connection_string.split(";") if field]
    return ";".join(f"{name}={'AAAA' if name == 'AccountKey' else value}" for name, _, value in fields)
