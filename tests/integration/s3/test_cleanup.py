"""What a save that ends before its time leaves on a real S3 server: nothing, or what the next one sweeps."""

from __future__ import annotations

import asyncio
import json
import random
import re
import signal
import subprocess
from collections.abc import Callable, Mapping

import anyio
import anyio.lowlevel
import pytest

from async_ckpt import CheckpointService
from async_ckpt.events import Event, Swept
from async_ckpt.stores.disk import Disk
from async_ckpt.stores.leftovers import temporary_name
from async_ckpt.stores.s3.journal import Journal
from async_ckpt.testing import BytesContent
from stress.httpfaults import response
from tests.integration.s3.place import LARGE, OLD, QUICK, SMALL, Place, Times, running, save, send
from tests.support import PATIENCE_SECONDS, python, start_python

pytestmark = pytest.mark.integration


@pytest.mark.slow
def test_two_hundred_cancellations(place: Place) -> None:
    """A save that is cancelled at any moment leaves no upload, and either the old object or, whole, the new."""
    place.put(OLD)
    new = SMALL * 5 + b"tail"  # two parts
    chance = random.Random(11)
    store = place.store()

    async def cancelled_after(steps: int) -> None:
        saved = anyio.Event()

        async def save_new() -> None:
            await save(store, place.locate(), new)
            saved.set()

        async with anyio.create_task_group() as group:
            group.start_soon(save_new)
            for _ in range(steps):
                if saved.is_set():
                    return
                await anyio.lowlevel.checkpoint()
            group.cancel_scope.cancel()

    async def run() -> None:
        await save(store, place.locate("other.ckpt"), SMALL)  # connects
        for _ in range(200):
            await cancelled_after(chance.randrange(1, 1 << chance.randrange(1, 15)))
            source = await store.source(place.locate())
            assert source.nbytes in (len(OLD), len(new))
            if source.nbytes == len(new):
                await save(store, place.locate(), OLD)

    running(store, run)
    assert place.read() in (OLD, new)
    place.assert_nothing_left()


@pytest.mark.parametrize("kind", ["List", "ListUploads", "Create", "UploadPart", "Complete", "Put"])
def test_cancelled_while_a_request_is_under_way(place: Place, kind: str) -> None:
    """Whichever request is under way when a save is cancelled, no upload is left, and no part of an object."""
    place.put(OLD)
    cancel: list[Callable[[], object]] = []

    def answer(it: str, headers: Mapping[str, str]) -> None:
        if it == kind and cancel:
            cancel.pop()()

    store = place.store(place.proxy(answer))

    async def run() -> None:
        loop = asyncio.get_running_loop()
        with anyio.CancelScope() as scope:
            cancel.append(lambda: loop.call_soon_threadsafe(scope.cancel))
            await save(store, place.locate(), SMALL if kind == "Put" else LARGE)
        assert scope.cancelled_caught

    running(store, run)
    assert place.read() in (OLD, SMALL, LARGE)
    place.assert_nothing_left()


KILLED = """
    import os, signal, sys
    import torch
    from async_ckpt import CheckpointService
    from async_ckpt.events import PartWritten

    def observer(event):
        if isinstance(event, PartWritten):
            os.kill(os.getpid(), signal.SIGKILL)

    with CheckpointService(part_size="5MiB", observer=observer) as service:
        service.save(torch.zeros(3_000_000), sys.argv[1])
"""


def test_a_killed_process(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL in the midst of an upload leaves the old object, and the next save aborts the dead one's upload."""
    place.put(OLD)
    monkeypatch.setenv("XDG_STATE_HOME", str(place.folder))
    for name, value in place.server.environment.items():
        monkeypatch.setenv(name, value)
    url = f"s3://{place.bucket}/run/x.ckpt"
    assert python(KILLED, url).returncode == -signal.SIGKILL
    assert place.read() == OLD
    (orphan,) = place.open_uploads()
    place.ask("POST", "run/x.ckpt?uploads=")
    (other,) = {*place.open_uploads()} - {orphan}
    events: list[Event] = []
    with CheckpointService(observer=events.append) as service:
        service.save({"x": 1}, f"s3://{place.bucket}/elsewhere.ckpt").wait(PATIENCE_SECONDS)
    (swept,) = [event for event in events if isinstance(event, Swept)]
    assert orphan in swept.names[0]
    assert place.open_uploads() == [other]
    assert not list((place.folder / "async_ckpt" / "uploads").iterdir())


SURVIVED = """
    import os, signal, sys, threading
    import torch
    from async_ckpt import CheckpointService
    from async_ckpt.events import PartWritten

    written, never = threading.Event(), threading.Event()

    def observer(event):
        if isinstance(event, PartWritten):
            written.set()
            never.wait()

    CheckpointService(part_size="5MiB", observer=observer).save(torch.zeros(3_000_000), sys.argv[1])
    written.wait()
    if os.fork() == 0:
        os.read(0, 1)  # until the test has looked
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("local", [True, False])
def test_a_child_that_survives(place: Place, monkeypatch: pytest.MonkeyPatch, local: bool) -> None:
    """What a killed process left is swept while a child that it had forked, as data loaders do, lives on (D2)."""
    monkeypatch.setenv("XDG_STATE_HOME", str(place.folder))
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")  # of forking with threads, from 3.12 on
    for name, value in place.server.environment.items():
        monkeypatch.setenv(name, value)
    folder = str(place.folder) if local else f"s3://{place.bucket}/run"
    process = start_python(SURVIVED, f"{folder}/x.ckpt", stdin=subprocess.PIPE)
    try:
        assert process.wait(PATIENCE_SECONDS) == -signal.SIGKILL
        events: list[Event] = []
        with CheckpointService(observer=events.append) as service:
            service.save({"x": 1}, f"{folder}/y.ckpt").wait(PATIENCE_SECONDS)
        (swept,) = [event for event in events if isinstance(event, Swept)]
        assert len(swept.names) == 1
        assert place.open_uploads() == []
    finally:
        process.communicate("\n")


def test_a_job_that_starts_as_another_begins(place: Place) -> None:
    """A store that sweeps in the moment in which another has its journal, and no lock yet, never aborts its uploads."""
    folder = place.folder / "journal"

    class Overtaken(Disk):
        def lock(self, fd: int) -> None:
            """Let another look, and take what it finds for settled."""
            for path, entries in Journal(folder).abandoned():
                Journal(folder).settle(path, entries)
            super().lock(fd) if overtaken() else self.overtake(fd)

        def overtake(self, fd: int) -> None:
            """Be too late: a sweeper has the lock."""
            (path,) = folder.iterdir()
            with Journal(folder)._taken(path):
                super().lock(fd)

    once = Times(1)

    def overtaken() -> bool:
        return not once()

    live = place.store(journal=Journal(folder, Overtaken()))

    async def run() -> None:
        upload = await live.begin(place.locate(), len(LARGE))
        starting = place.store()
        await save(starting, place.locate("other.ckpt"), LARGE)
        await starting.aclose()
        await upload.commit(await send(upload, BytesContent(LARGE)))

    running(live, run)
    assert place.read() == LARGE
    place.assert_nothing_left()


def test_bad_journals(place: Place) -> None:
    """Whatever a journal says, or is, a save is made, and what other journals say is done (D2)."""
    folder = place.folder / "journal"
    folder.mkdir()
    place.ask("POST", "run/x.ckpt?uploads=")
    (orphan,) = place.open_uploads()

    def line(**values: object) -> str:
        entry = {
            "endpoint": place.server.url,
            "bucket": place.bucket,
            "key": "run/x.ckpt",
            "upload_id": orphan,
        }
        return "\n" + json.dumps({"event": "open", **entry, **values})

    odd = [
        line(key=""),
        line(key="/", upload_id="?"),
        line(key="\n", upload_id=" "),
        line(key=["x"]),
        line(upload_id="no-such-upload"),
        line(event={}),
        "\n[[",
        line()[:-5],
    ]
    (folder / temporary_name()).write_text("".join(odd))
    (folder / temporary_name()).mkdir()
    (folder / temporary_name()).write_text(line())
    store = place.store()
    running(store, lambda: save(store, place.locate("other.ckpt"), LARGE))
    assert place.read("other.ckpt") == LARGE
    assert place.open_uploads() == []
    for path in place.journals():
        assert path.is_dir(), path.read_text()
        path.rmdir()


def test_uploads_of_the_distant_past(place: Place) -> None:
    """A save aborts uploads of its own key that are more than a week old; others stay."""
    for name in ("x.ckpt", "other.ckpt"):
        place.ask("POST", f"run/{name}?uploads=")
    uploads = place.ask("GET", "?prefix=run%2F&uploads=")

    def save_when_begun(day: bytes) -> None:
        listed = re.sub(b"<Initiated>.*?<", b"<Initiated>%s<" % day, uploads)
        proxy = place.proxy(lambda kind, _: response(200, listed) if kind == "ListUploads" else None)
        store = place.store(proxy)
        running(store, lambda: save(store, place.locate(), LARGE))
        assert place.read() == LARGE

    save_when_begun(b"2999-01-01T00:00:00.000Z")
    assert len(place.open_uploads()) == 2
    save_when_begun(b"2020-01-01T00:00:00.000Z")
    assert re.findall("other.ckpt", place.ask("GET", "?uploads=").decode())
    assert len(place.open_uploads()) == 1


def test_a_part_that_lands_after_the_abort(place: Place) -> None:
    """An abort is repeated until S3 does not know the upload any more."""
    first = Times(1)
    store = place.store(place.proxy(lambda kind, _: response(204) if kind == "Abort" and first() else None))

    async def run() -> None:
        upload = await store.begin(place.locate(), len(LARGE))
        await upload.abort()

    running(store, run)
    assert place.requests["Abort"] == 2
    place.assert_nothing_left()


def test_an_abort_that_fails(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """An upload that cannot be aborted is left to the sweep of the next process, and the log tells."""
    failing = True

    def answer(kind: str, headers: Mapping[str, str]) -> bytes | None:
        return response(500) if kind == "Abort" and failing else None

    proxy = place.proxy(answer)
    store = place.store(proxy)

    async def begin() -> None:
        upload = await store.begin(place.locate(), len(LARGE))
        await upload.abort()

    running(store, begin)
    assert "could not be aborted" in caplog.text
    assert len(place.open_uploads()) == 1
    failing = False
    later = place.store(proxy)
    running(later, lambda: save(later, place.locate("elsewhere.ckpt"), SMALL))
    place.assert_nothing_left()


def test_an_abort_that_failed_is_made_up_for(place: Place) -> None:
    """What could not be aborted while S3 was away is aborted by the next save of the same process (D2)."""
    failing = True
    store = place.store(place.proxy(lambda kind, _: response(500) if kind == "Abort" and failing else None))

    async def run() -> None:
        nonlocal failing
        for name in ("x.ckpt", "y.ckpt"):
            upload = await store.begin(place.locate(name), len(LARGE))
            await upload.abort()
        assert len(place.open_uploads()) == 2
        failing = False
        await save(store, place.locate("elsewhere.ckpt"), SMALL)
        place.assert_nothing_left()

    running(store, run)
    assert (
        place.requests["Abort"] == 2 * QUICK.attempts + 1 + 2
    )  # one by the second save, while S3 was still away


def test_a_lost_answer_to_the_beginning(place: Place) -> None:
    """An upload whose id was never learnt stays to the sweep by age; the save itself is durable."""
    first = Times(1)
    store = place.store(place.proxy(lose=lambda kind: kind == "Create" and first()))
    running(store, lambda: save(store, place.locate(), LARGE))
    assert place.read() == LARGE
    assert len(place.open_uploads()) == 1
