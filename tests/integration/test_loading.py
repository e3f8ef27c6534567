"""Loading, whole and in part: what comes back is what torch.load returns, and no more moves than must."""

from __future__ import annotations

import http.server
import io
import os
import pickle
import re
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import async_ckpt
from async_ckpt import CheckpointService
from async_ckpt.errors import ServiceClosedError, StoreError
from async_ckpt.testing import Fault, FaultyStore, Gate
from tests.archives import edited, written
from tests.loads import FAR, NEAR, PADDING, Counting, load
from tests.support import PATIENCE_SECONDS
from tests.unit.format.test_fidelity import STATES

NEVER_LIVE = {"an object that cannot be rebuilt here", "a freed storage"}  # torch.load itself raises


@pytest.fixture
def service() -> Iterator[Callable[..., CheckpointService]]:
    """Make a service over a store; it is closed at the end."""
    made: list[CheckpointService] = []

    def make(store: Any, **options: Any) -> CheckpointService:
        made.append(CheckpointService(store_factory=lambda *_: store, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.mark.parametrize("name", sorted(set(STATES) - NEVER_LIVE))
def test_whatever_torch_loads(name: str, service: Callable[..., CheckpointService]) -> None:
    """Whatever a state consists of, what is loaded saves to the same bytes as what torch.load returns."""
    data = written({"padding": PADDING, "state": STATES[name]()})
    expected = torch.load(io.BytesIO(data), weights_only=False)
    for url in (FAR, NEAR):
        loaded = service(Counting(data)).load(url, weights_only=False)
        assert written(loaded) == written(expected)


@pytest.mark.parametrize("name", sorted(set(STATES) - NEVER_LIVE))
def test_whatever_part_of_it(name: str, service: Callable[..., CheckpointService]) -> None:
    """A part of any state saves to the same bytes as that part of what torch.load returns."""
    data = written({"state": STATES[name](), "padding": PADDING})
    expected = torch.load(io.BytesIO(data), weights_only=False)
    del expected["padding"]
    loaded = service(Counting(data)).load(FAR, weights_only=False, keys="state")
    assert written(loaded) == written(expected)


@pytest.mark.parametrize("weights_only", [True, None, False])
def test_weights_only_is_torch_loads(weights_only: bool | None) -> None:
    """What torch.load refuses is refused with its own error, in whole and in part; what it takes is taken."""
    data = written({"padding": PADDING, "odd": STATES["dataclasses"]()})
    for keys in (None, "padding"):
        if weights_only is False:
            torch.testing.assert_close(load(data, weights_only=False, keys=keys)["padding"], PADDING)
        else:
            with pytest.raises(pickle.UnpicklingError, match="weights_only"):
                load(data, weights_only=weights_only, keys=keys)


@pytest.mark.parametrize(
    "map_location",
    [None, "cpu", "meta", torch.device("meta"), {"cpu": "meta"}, lambda s, _: s, lambda *_: None],
    ids=repr,
)
def test_map_location_is_torch_loads(map_location: Any) -> None:
    """Every form of map_location puts tensors where torch.load puts them, in whole and in part."""
    data = written(PADDING)
    expected = torch.load(io.BytesIO(data), map_location=map_location)
    for loaded in (load(data, map_location=map_location), load(data, map_location=map_location, keys="*")):
        assert loaded["a"].device == expected["a"].device
        if loaded["a"].device.type == "cpu":
            torch.testing.assert_close(loaded, expected)


def test_a_device_with_memory_of_its_own() -> None:
    """A tensor that goes to where its storage is copied to has the values of the file."""

    def move(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage | None:
        return storage.clone() if location == "async_ckpt-test" else None

    torch.serialization.register_package(99, lambda _: None, move)
    data = written(PADDING)
    for keys in (None, "*"):
        torch.testing.assert_close(load(data, map_location="async_ckpt-test", keys=keys), PADDING)


def test_files_of_other_kinds() -> None:
    """Files without checksums, of the old format, and of another pickle protocol load as well, in part too."""
    options = torch.serialization
    computed = options.get_crc32_options() if hasattr(options, "get_crc32_options") else None
    files = [
        written(PADDING, _use_new_zipfile_serialization=False),
        written(PADDING, pickle_protocol=5),
        written(PADDING, pickle_protocol=4, _use_new_zipfile_serialization=False),
    ]
    if computed is not None:
        options.set_crc32_options(False)
        try:
            files.append(written(PADDING))
        finally:
            options.set_crc32_options(computed)
    for data in files:
        weights_only = data is files[0] or data is files[-1]
        torch.testing.assert_close(load(data, weights_only=weights_only), PADDING)
        part = load(data, weights_only=weights_only, keys="b.3")
        torch.testing.assert_close(part, {"b": [PADDING["b"][3]]})


@pytest.mark.parametrize("alignment", [64, 4096])
def test_whole_files_move_once(alignment: int) -> None:
    """However torch was told to align storages, and if an archiver has laid them out anew, a file is read once."""
    data = written(_model(40), alignment=alignment)
    for each in (data, edited(data, lambda _, content: content)):
        store = Counting(each)
        with CheckpointService(store_factory=lambda *_, store=store: store) as service:
            torch.testing.assert_close(service.load(FAR), torch.load(io.BytesIO(each)))
        assert store.moved <= 1.05 * len(each)


@pytest.mark.parametrize("default", [None, "NATIVE", "LITTLE", "BIG"])
def test_the_order_of_bytes_is_torch_loads(default: str | None) -> None:
    """A file that names an order, and one that does not, load as torch.load's default for that has it."""
    options = torch.serialization
    data = written(PADDING)
    unnamed = data.replace(b"/byteorder", b"/otherendi")
    files = [data, unnamed, edited(data, lambda name, content: b"big" if name == "byteorder" else content)]
    before = options.get_default_load_endianness()
    options.set_default_load_endianness(None if default is None else options.LoadEndianness[default])
    try:
        for each in files:
            expected = torch.load(io.BytesIO(each))
            torch.testing.assert_close(load(each), expected)
            torch.testing.assert_close(load(each, keys="a"), {"a": expected["a"]})
    finally:
        options.set_default_load_endianness(before)


def test_fake_tensors() -> None:
    """Where torch.load makes fake tensors, so does a load, in whole and in part."""
    data = written(PADDING)
    with FakeTensorMode():
        expected = torch.load(io.BytesIO(data), weights_only=True)["a"]
        for keys in (None, "a"):
            loaded = load(data, keys=keys)["a"]
            assert (type(loaded), loaded.shape) == (type(expected), expected.shape)


def test_torchscript_is_refused_as_torch_load_refuses_it() -> None:
    """An archive of TorchScript raises what torch.load raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = io.BytesIO()
        torch.jit.save(torch.jit.script(torch.nn.Linear(300, 300)), file)
        for keys in (None, "*"):
            with pytest.raises(RuntimeError, match="TorchScript"):
                load(file.getvalue(), keys=keys)


# -- parts


def _model(count: int, nbytes: int = 100_000) -> dict[str, Any]:
    return {
        "state_dict": {f"layer{number}.weight": torch.randn(nbytes // 4) for number in range(count)},
        "optimizer_states": [{"state": {number: {"m": torch.randn(nbytes // 4)} for number in range(count)}}],
        "epoch": 3,
    }


@pytest.mark.parametrize("nbytes", [20_000, 1_000_000])
def test_a_part_moves_little(nbytes: int) -> None:
    """Loading a twentieth of a file moves at most six hundredths of it."""
    state = _model(10 * 2_000_000 // nbytes, nbytes)
    data = written(state)
    names = list(state["state_dict"])
    for chosen in (names[:: len(names) // (len(names) // 10)], names[: len(names) // 10]):
        store = Counting(data)
        with CheckpointService(store_factory=lambda *_, store=store: store) as service:
            part = service.load(FAR, keys=[f"state_dict.{name}" for name in chosen])
        torch.testing.assert_close(part, {"state_dict": {name: state["state_dict"][name] for name in chosen}})
        assert store.moved <= 0.06 * len(data)


def test_ties_and_views_in_a_part() -> None:
    """What shares memory with what was left out is whole, and what shares memory within the part still does."""
    base = torch.randn(200_000)
    state = {"base": base, "view": base[10:20], "again": base, "padding": PADDING}
    data = written(state)
    part = load(data, keys=["view", "again"])
    torch.testing.assert_close(part, {"view": base[10:20], "again": base})
    assert part["view"].untyped_storage().data_ptr() == part["again"].untyped_storage().data_ptr()
    torch.testing.assert_close(load(data, keys="view"), {"view": base[10:20]})


def test_a_part_without_tensors() -> None:
    """What holds no tensor needs no more than the pickle."""
    data = written(_model(40))
    store = Counting(data)
    with CheckpointService(store_factory=lambda *_: store) as service:
        assert service.load(FAR, keys="epoch") == {"epoch": 3}
    assert store.moved < 100_000


def test_a_pattern_that_matches_nothing() -> None:
    """It is a KeyError that names the nearest, and nothing but the pickle has moved."""
    data = written(_model(40))
    store = Counting(data)
    with CheckpointService(store_factory=lambda *_: store) as service:
        with pytest.raises(KeyError, match=r"state_dict\.layer7\.weight"):
            service.load(FAR, keys="state_dict.layer7.wieght")
    assert store.moved < 100_000


# -- what goes wrong


def test_a_file_that_is_replaced_meanwhile(service: Callable[..., CheckpointService]) -> None:
    """A load that is told of a replacement begins again, once, and returns what is there then."""
    old, new = (written(_model(20)) for _ in range(2))
    replaced = StoreError("it was replaced")
    for calls in ([2], range(2, 99)):
        store = FaultyStore(
            Counting(old, new), [Fault(operation="read", calls=calls, error=lambda: replaced)]
        )
        loading = service(store)
        if len(calls) == 1:
            expected = torch.load(io.BytesIO(new))
            torch.testing.assert_close(loading.load(FAR), expected)
        else:
            with pytest.raises(StoreError, match="it was replaced"):
                loading.load(FAR)
        assert store.calls["source"] == 2


def test_a_store_that_does_not_answer_is_asked_once(service: Callable[..., CheckpointService]) -> None:
    """What the store has tried again already is not begun again."""
    store = FaultyStore(
        Counting(written(_model(20))), [Fault(operation="read", calls=[2], error=ConnectionResetError)]
    )
    with pytest.raises(ConnectionResetError):
        service(store).load(FAR)
    assert store.calls["source"] == 1


def test_a_service_that_is_closed_meanwhile(service: Callable[..., CheckpointService]) -> None:
    """Closing does not wait for a load; the load says that the service was closed."""
    gate = Gate()
    store = FaultyStore(
        Counting(written(_model(20))), [Fault(operation="read", calls=range(2, 99), gate=gate)]
    )
    loading = service(store)
    errors: list[BaseException] = []

    def load() -> None:
        try:
            loading.load(FAR)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=load)
    thread.start()
    assert gate.reached.wait(PATIENCE_SECONDS)
    loading.close()
    thread.join(PATIENCE_SECONDS)
    assert [type(error) for error in errors] == [ServiceClosedError]


@pytest.mark.parametrize("closes", [True, False], ids=["that closes", "that interrupts"])
def test_a_signal_while_loading(closes: bool, service: Callable[..., CheckpointService]) -> None:
    """A signal handler may close the service beneath a load, or interrupt it: nothing waits for ever (L1)."""
    gate = Gate()
    store = FaultyStore(
        Counting(written(_model(20))), [Fault(operation="read", calls=range(2, 99), gate=gate)]
    )
    loading = service(store)

    def handle(*_: object) -> None:
        if not closes:
            raise KeyboardInterrupt
        loading.close()

    def interrupt() -> None:
        if gate.reached.wait(PATIENCE_SECONDS):
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, handle)
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(ServiceClosedError if closes else KeyboardInterrupt):
            loading.load(FAR)
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)


def test_overwriting_is_refused(tmp_path: Path) -> None:
    """With overwrite=False a save to a name that is taken fails, and what is there loads as before."""
    with CheckpointService(overwrite=False) as service:
        service.save({"n": 1}, tmp_path / "x").wait()
        second = service.save({"n": 2}, tmp_path / "x")
        with pytest.raises(async_ckpt.errors.CheckpointExistsError, match="overwrite=False"):
            second.wait()
        assert service.load(tmp_path / "x") == {"n": 1}
        (tmp_path / "x").unlink()
        service.save({"n": 3}, tmp_path / "x").wait()
    assert async_ckpt.load(tmp_path / "x") == {"n": 3}


# -- servers


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Serves one file, by ranges if it says so."""

    data = b""
    ranges = True

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if self.ranges else None
        data = self.data[int(asked[1]) : int(asked[2]) + 1] if asked else self.data
        if self.path != "/x.ckpt":
            self.send_error(404)
            return
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        return


@pytest.mark.integration
@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "whole files"])
def test_http(ranges: bool) -> None:
    """A checkpoint loads from an HTTP server, whether it knows ranges or not."""
    pytest.importorskip("aiohttp")
    state = _model(10)
    handler = type("Handler", (_Handler,), {"data": written(state), "ranges": ranges})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}/x.ckpt"
            torch.testing.assert_close(async_ckpt.load(url), state)
            torch.testing.assert_close(async_ckpt.load(url, keys="epoch"), {"epoch": 3})
            with pytest.raises(FileNotFoundError):
                async_ckpt.load(url.replace("x.ckpt", "y.ckpt"))
        finally:
            server.shutdown()
            thread.join()
