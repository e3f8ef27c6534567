"""No secret of a URL or of storage_options comes out, wherever a save, a removal or a load fails.

All that comes out is looked through: logs at DEBUG, standard error, warnings, events, the timeline's file, errors with
their chains, and what handles, reports and options look like. So a new message cannot leak unseen.
"""

from __future__ import annotations

import logging
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from async_ckpt import AsyncCheckpointError, AsyncCheckpointIO, CheckpointService, OptionError, RetryPolicy
from async_ckpt.events import Event
from async_ckpt.timeline import Timeline
from tests.support import python

SECRET = "s3cr3t"  # in every secret below, and in nothing else
PASSWORD = f"{SECRET}-password"
STATE = {"step": 1}
STAGES = (
    "make", "info", "open", "write", "close", "cp_file", "mv", "rm_file", "makedirs", "ls", "cat_file", "discard",
)  # fmt: skip


class Telltale(MemoryFileSystem):  # type: ignore[misc]
    """A file system whose errors, at a stage of one's choice, tell all that it knows; renames as SFTP's does."""

    protocol = "telltale"
    cachable = False
    failing: tuple[str, ...] = ()
    kind: type[Exception] = OSError

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__()
        self.store: dict[str, Any] = {}
        self.pseudo_dirs = [""]
        self.known = options
        self._fail("make", "")

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return MemoryFileSystem._strip_protocol(
            str(path).rpartition("@")[2].replace("telltale://", "memory://")
        )

    @staticmethod
    def _get_kwargs_from_urls(path: str) -> dict[str, Any]:
        return {"url": path}

    def _fail(self, stage: str, path: str) -> None:
        if stage in self.failing:
            try:
                raise KeyError(f"{self.known}")
            except KeyError as error:
                raise self.kind(f"{stage} of {path} failed, I know {self.known}") from error

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        self._fail("open", path)
        file = super()._open(path, mode, **options)
        if mode == "wb":
            for name in ("write", "close", "discard"):
                setattr(file, name, self._failing(name, getattr(file, name)))
        return file

    def _failing(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self._fail(stage, "it")
            return function(*args, **options)

        return call

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name in ("info", "cp_file", "mv", "rm_file", "makedirs", "ls", "cat_file"):
            return super().__getattribute__("_failing")(name, found)
        return found


class Outlet:
    """Everything that comes out of one test."""

    def __init__(
        self, folder: Path, log: pytest.LogCaptureFixture, output: pytest.CaptureFixture[str]
    ) -> None:
        self.timeline = Timeline(folder / "trace.json")
        self.texts: list[str] = []
        self._path = folder / "trace.json"
        self._log = log
        self._output = output
        log.set_level(logging.DEBUG, logger="async_ckpt")

    def __call__(self, event: Event) -> None:
        self.timeline(event)
        self.show(event)
        if (error := getattr(event, "error", None)) is not None:
            self.show(error)

    def show(self, thing: object) -> None:
        """Take in what *thing* looks like."""
        self.texts += [repr(thing), str(thing)]
        if isinstance(thing, BaseException):
            self.texts += traceback.format_exception(thing)
            self.texts += (
                [repr(vars(thing)), repr(thing.args)] if isinstance(thing, AsyncCheckpointError) else []
            )

    def attempt(self, function: Callable[[], Any]) -> None:
        """Call *function*, and take in what it returns, or raises, and warns of."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                self.show(function())
            except Exception as error:
                self.show(error)
        self.texts += [str(each.message) for each in caught]

    def all(self) -> list[str]:
        """Return every line that has come out."""
        self.timeline.write()
        captured = self._output.readouterr()
        logged = [record for record in self._log.records if record.name.startswith("async_ckpt")]
        formatter = logging.Formatter()
        texts = [*self.texts, captured.out, captured.err, *map(formatter.format, logged)]
        if self._path.exists():
            texts.append(self._path.read_text())
        return [line for text in texts for line in text.splitlines()]


@pytest.fixture
def outlet(tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> Outlet:
    """What everything that comes out goes into."""
    return Outlet(tmp_path, caplog, capsys)


@pytest.fixture
def telltale() -> Iterator[type[Telltale]]:
    """A kind of file system that fsspec knows for the time of one test."""
    kind = type("Telltale", (Telltale,), {})
    fsspec.register_implementation("telltale", kind, clobber=True)
    yield kind
    del _registry["telltale"]


def _use(outlet: Outlet, url: Any, options: dict[str, Any] | None, **more: Any) -> None:
    """Save, remove and load at *url*, ask for everything that can be asked for, and leave failures to be told of."""
    retry = RetryPolicy(attempts=2, initial_seconds=0.0)
    service = CheckpointService(storage_options=options, observer=outlet, retry=retry, **more)
    outlet.show(service.options)
    try:
        for request in (lambda: service.save(STATE, url), lambda: service.remove(url)):
            outlet.attempt(
                lambda request=request: outlet.show(handle := request()) or outlet.attempt(handle.wait)
            )
            outlet.attempt(request)
            outlet.attempt(service.wait)
        outlet.attempt(lambda: service.load(url))
        outlet.attempt(lambda: service.save(STATE, url))
        outlet.show(service.pending)
    finally:
        outlet.attempt(service.close)


def _assert_nothing_leaked(outlet: Outlet, *, mentions: str) -> None:
    lines = outlet.all()
    assert not [line for line in lines if SECRET in line.lower()]
    assert any(mentions in line for line in lines), "what was looked through does not name the place"


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", [OSError, ConnectionResetError, FileNotFoundError, NotImplementedError])
def test_a_talkative_file_system_is_not_repeated(
    telltale: type[Telltale], outlet: Outlet, stage: str, kind: type[Exception]
) -> None:
    """Whatever a file system tells of its login in an error, at any stage, is hidden in all that comes out."""
    telltale.failing, telltale.kind = (stage,), kind
    options = {"token": f"{SECRET}-token", "client_kwargs": {"secret_key": f"{SECRET}/key+"}}
    _use(outlet, f"telltale://ann:{PASSWORD}@host/run/x.ckpt?sig={SECRET}", options)
    _assert_nothing_leaked(outlet, mentions="telltale://ann:***@host/run/x.ckpt?sig=***")


@pytest.mark.filterwarnings("ignore:UPath 'telltale' filesystem not explicitly implemented")
@pytest.mark.parametrize("stage", ["make", "open", "write", "mv", ""])
def test_options_of_a_upath_are_not_told(telltale: type[Telltale], outlet: Outlet, stage: str) -> None:
    """What a UPath brings with it is hidden as the service's own options are."""
    upath = pytest.importorskip("upath").UPath
    telltale.failing = (stage,)
    place = upath("telltale://host/run/x.ckpt", token=f"{SECRET}-token", client_kwargs={"secret_key": SECRET})
    _use(outlet, place, None)
    outlet.attempt(lambda: AsyncCheckpointIO(observer=outlet).load_checkpoint(place))
    _assert_nothing_leaked(outlet, mentions="telltale://")


def test_what_cannot_be_cleaned_up_is_told_without_secrets(telltale: type[Telltale], outlet: Outlet) -> None:
    """A failing clean-up is logged beside the failure that it follows."""
    telltale.failing = ("write", "rm_file", "discard", "ls")
    _use(outlet, f"telltale://ann:{PASSWORD}@host/run/x.ckpt", None, overwrite=False)
    _assert_nothing_leaked(outlet, mentions="cleaning up after a save to telltale://ann:***@host")


@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_a_success_tells_no_secret_either(telltale: type[Telltale], outlet: Outlet, on_error: str) -> None:
    """Events, reports and the timeline of what went well name the place without its password."""
    _use(outlet, f"telltale://ann:{PASSWORD}@host/run/x.ckpt", {"password": PASSWORD}, on_error=on_error)
    _assert_nothing_leaked(outlet, mentions="telltale://ann:***@host/run/x.ckpt")


_NOBODY = "127.0.0.1:9"  # where nobody listens
_REMOTE: dict[str, tuple[str, dict[str, Any]]] = {
    "sftp": (f"sftp://ann:{PASSWORD}@{_NOBODY}/run/x.ckpt", {"passphrase": f"{SECRET}-phrase"}),
    "ftp": (f"ftp://ann:{PASSWORD}@{_NOBODY}/run/x.ckpt", {}),
    "webdav": ("webdav://run/x.ckpt", {"base_url": f"http://ann:{PASSWORD}@{_NOBODY}", "auth": ("ann", PASSWORD)}),
    "http": (f"http://ann:{PASSWORD}@{_NOBODY}/x.ckpt?X-Amz-Signature={SECRET}", {}),
    "s3": (
        "s3://bucket/run/x.ckpt",
        {"key": f"{SECRET}-key", "secret": f"{SECRET}/+", "endpoint_url": f"http://ann:{PASSWORD}@{_NOBODY}"},
    ),
    "s3 token": ("s3://bucket/x.ckpt", {"token": f"{SECRET}", "endpoint_url": f"http://{_NOBODY}?sig={SECRET}"}),
    "gs": ("gs://bucket/run/x.ckpt", {"token": f"ya29.{SECRET}", "endpoint_url": f"http://{_NOBODY}"}),
    "gs dict": ("gs://bucket/run/x.ckpt", {"token": {"type": "authorized_user", "refresh_token": f"1//{SECRET}"}}),
    "abfs": (f"abfs://box@account.dfs.core.windows.net/x.ckpt?sig={SECRET}", {"account_key": f"{SECRET}=="}),
    "abfs string": (
        "abfs://box/x.ckpt",
        {"connection_string": f"AccountName=a;AccountKey={SECRET};BlobEndpoint=http://{_NOBODY}/a"},
    ),
    "abfs broken string": ("abfs://box/x.ckpt", {"connection_string": f"AccountName;AccountKey={SECRET}"}),
    "abfs sas": ("abfs://box/x.ckpt", {"account_name": "a", "sas_token": f"?sv=2024&sig={SECRET}"}),
    "unknown": (f"nosuch://ann:{PASSWORD}@host/x.ckpt", {}),
    "chained": (f"simplecache::sftp://ann:{PASSWORD}@host/x.ckpt", {}),
    "unquoted": (f"sftp://ann:{SECRET}/{SECRET}@host/x.ckpt", {}),
    "quoted": (f"sftp://ann:{quote(SECRET + '/@:', safe='')}@{_NOBODY}/x.ckpt", {}),
    "pathlib": (f"sftp:/ann:{PASSWORD}@host/x.ckpt", {}),
    "pathlib, absolute": (f"/data/sftp:/ann:{PASSWORD}@host/x.ckpt", {}),
    "no name": (f"s3://ann:{PASSWORD}@", {}),
    "null": (f"sftp://ann:{PASSWORD}@host/x\0.ckpt", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", _REMOTE)
def test_no_library_of_a_storage_has_secrets_told(outlet: Outlet, name: str, tmp_path: Path) -> None:
    """Where nothing answers, or a login or a URL is no good, all that is told names the place without its secrets."""
    url, options = _REMOTE[name]
    _use(outlet, url, options)
    _assert_nothing_leaked(outlet, mentions=url.removeprefix("/data/").partition(":")[0])


@pytest.mark.parametrize("name", ["storage_options", "observer", "retry"])
def test_a_refused_option_is_not_repeated(outlet: Outlet, name: str) -> None:
    """Where an option is of a wrong kind, the error tells the kind."""
    with pytest.raises(OptionError, match=f"{name}=<str>") as told:
        CheckpointService(**{name: f'{{"password": "{PASSWORD}"}}'})
    outlet.show(told.value)
    _assert_nothing_leaked(outlet, mentions=name)


def test_a_handle_keeps_what_was_written_and_shows_less(telltale: type[Telltale]) -> None:
    """``handle.url`` can be loaded from; a handle and a report that are printed tell no password."""
    url = f"telltale://ann:{PASSWORD}@host/run/x.ckpt"
    with CheckpointService() as service:
        handle = service.save(STATE, url)
        report = handle.wait()
        assert handle.url == url
        assert PASSWORD not in repr(handle)
        assert report.url == "telltale://ann:***@host/run/x.ckpt"


@pytest.mark.parametrize("stage", ["make", "open", "mv", ""])
def test_the_plugin_tells_no_secret(telltale: type[Telltale], outlet: Outlet, stage: str) -> None:
    """Neither does what stands between Lightning and the service."""
    url = f"telltale://ann:{PASSWORD}@host/run/x.ckpt"
    telltale.failing = (stage,)
    plugin = AsyncCheckpointIO(observer=outlet, storage_options={"token": f"{SECRET}-token"})
    outlet.attempt(lambda: plugin.load_checkpoint(url))
    outlet.attempt(lambda: plugin.save_checkpoint(STATE, url))
    outlet.attempt(lambda: plugin.remove_checkpoint(url))
    outlet.attempt(plugin.teardown)
    outlet.attempt(lambda: AsyncCheckpointIO(url))
    _assert_nothing_leaked(outlet, mentions="telltale://ann:***@host/run/x.ckpt")


def test_the_interpreters_end_tells_no_secret(tmp_path: Path) -> None:
    """What nobody has collected is printed at exit, with its chain, and without the password."""
    done = python(
        f"""
        import logging
        from async_ckpt import CheckpointService, RetryPolicy
        logging.basicConfig(level=logging.DEBUG)
        service = CheckpointService(retry=RetryPolicy(attempts=1))
        service.save({{"a": 1}}, "ftp://ann:" + "{PASSWORD}" + "@{_NOBODY}/x.ckpt")
        """
    )
    told = done.stdout + done.stderr
    assert "ftp://ann:***@127.0.0.1:9/x.ckpt" in told
    assert SECRET not in told
