"""Detours in a remote path: the file is saved, loaded and removed at the place they come to, on real servers (O1)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from async_ckpt import CheckpointService
from async_ckpt.engine.queue import Kind
from async_ckpt.testing import Fault, Gate
from stress.servers.folders import FolderServer
from tests.support import (
    PATIENCE_SECONDS,
    Harness,
    number_at,
    number_of,
    reached,
    state,
    wait_until_one_waits,
)

DETOURS = ("//a", "/./b", "/real/../c", "/.//real/.././d")


@pytest.fixture(params=["ftp", "sftp", "webdav"])
def server(request: pytest.FixtureRequest) -> FolderServer:
    """A real server of a folder, with directories in it."""
    found: FolderServer = request.getfixturevalue(request.param)
    (found.folder / "detours" / "real").mkdir(parents=True, exist_ok=True)
    return found


def root_of(server: FolderServer) -> str:
    """Return the URL of the directory."""
    return f"{server.protocol}://{'' if server.protocol == 'webdav' else '/'}detours"


@pytest.mark.integration
def test_detours_in_a_path(server: FolderServer) -> None:
    """With and without ``//``, ``/./`` and ``/../`` in it, a path is one place for every operation."""
    root = root_of(server)
    for number, detour in enumerate(DETOURS):
        plain = f"/{detour[-1]}"
        file = server.folder / "detours" / detour[-1]
        with CheckpointService(storage_options=server.storage_options) as service:
            service.save(state(number), root + detour).wait(PATIENCE_SECONDS)
            assert number_at(file) == number
            assert [number_of(service.load(root + each)) for each in (detour, plain)] == [number, number]
            service.remove(root + detour).wait(PATIENCE_SECONDS)
            assert not file.exists()


@pytest.mark.integration
def test_a_load_waits_for_a_save_under_another_spelling(server: FolderServer) -> None:
    """A load finds what is being saved at its place, however each of the two is spelled (O2)."""
    root, gate = root_of(server), Gate()
    fault = Fault(operation="commit", calls=[1], gate=gate)
    options = server.storage_options
    with Harness(fault, real=True, storage_options=options) as harness, ThreadPoolExecutor(1) as thread:
        harness.service.save(state(7), f"{root}//waited")
        reached(gate)
        loading = thread.submit(harness.service.load, f"{root}/./real/../waited")
        wait_until_one_waits(harness.service, Kind.LOAD)
        gate.open()
        assert number_of(loading.result(PATIENCE_SECONDS)) == 7
        harness.service.remove(f"{root}/waited").wait(PATIENCE_SECONDS)


@pytest.mark.integration
def test_a_upath(server: FolderServer) -> None:
    """A UPath is saved to, loaded from and removed with the login that it brings; the service need know none."""
    upath = pytest.importorskip("upath").UPath
    text = f"{root_of(server)}/real/upath.ckpt"
    place, file = upath(text, **server.storage_options), server.folder / "detours" / "real" / "upath.ckpt"
    with CheckpointService() as service:
        service.save(state(5), place).wait(PATIENCE_SECONDS)
        assert number_at(file) == 5
        assert number_of(service.load(place)) == 5
        service.remove(place).wait(PATIENCE_SECONDS)
        assert not file.exists()
    with CheckpointService(storage_options=server.storage_options) as service:
        service.save(state(6), text)
        assert number_of(service.load(place)) == 6, "one place, however it is given"
        service.remove(place).wait(PATIENCE_SECONDS)
