"""What is given for a place: URLs that lost a slash, in whatever way, and paths of universal_pathlib."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from async_ckpt import AsyncCheckpointIO, CheckpointService, OptionError, UnknownProtocolError, load
from async_ckpt.stores import locate
from tests.support import python

PROTOCOLS = sorted(fsspec.available_protocols())


@dataclass
class UPath:
    """What universal_pathlib's has, where that is not installed."""

    text: str
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    protocol: str = ""

    def __post_init__(self) -> None:
        self.protocol = self.protocol or self.text.partition("://")[0]

    @property
    def path(self) -> str:
        return self.text.partition("://")[2]

    def __str__(self) -> str:
        return self.text


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return Path(os.getcwd())


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_protocol_of_fsspec(protocol: str, here: Path) -> None:
    """A URL that went through pathlib, also made absolute, is refused by every call, with the URL that was meant."""
    meant = f"{protocol}://host/run/a.ckpt"
    works = {"file": "/host/run/a.ckpt", "local": "/host/run/a.ckpt", "dbfs": "dbfs:///host/run/a.ckpt"}
    mangled: list[Any] = [Path(meant), Path(meant).absolute(), os.path.normpath(meant), Path(meant.upper())]
    mangled += [PurePosixPath(meant), PureWindowsPath(meant), f"{here}\\{PureWindowsPath(meant)}"]
    with CheckpointService() as service:
        for place in mangled:
            for call in (lambda p: service.save(1, p), service.load, service.remove, load):
                with pytest.raises(OptionError, match="lost a slash") as told:
                    call(place)
                expected = works.get(protocol, meant)
                expected = (
                    expected if place is not mangled[3] else expected.replace("host/run/a.ckpt", "HOST")
                )
                assert expected in str(told.value)
    assert not os.listdir(here)


def test_one_that_is_registered_later(here: Path) -> None:
    """So is one of a file system that the program has made known to fsspec."""
    fsspec.register_implementation("fresh", type("Fresh", (MemoryFileSystem,), {"protocol": "fresh"}))
    try:
        with pytest.raises(OptionError, match=r"'fresh://b/a\.ckpt'"):
            locate(Path("fresh://b/a.ckpt"))
    finally:
        del _registry["fresh"]
    assert locate(Path("fresh://b/a.ckpt")).path == f"{here}/fresh:/b/a.ckpt"


@pytest.mark.parametrize(
    ("given", "works"),
    [
        (Path("simplecache::s3://b/a.ckpt"), "'s3://b/a.ckpt'"),
        ("filecache::hdfs:/nn/a.ckpt", "'hdfs://nn/a.ckpt'"),
        ("blockcache::simplecache::s3://b/a.ckpt", "'s3://b/a.ckpt'"),
        (Path("simplecache::s3://b/a.ckpt").absolute(), "'s3://b/a.ckpt'"),
        ("zip://a.ckpt::s3://b/x.zip", "'s3://b/x.zip'"),
        (Path("zip://a.ckpt::/data/x.zip"), "'/data/x.zip'"),
    ],
)
def test_chains(given: str | Path, works: str) -> None:
    """A chain, whole or mangled, is refused with the place that it leads to."""
    with pytest.raises(OptionError) as told:
        locate(given)
    assert works in str(told.value)


def test_a_directory_of_such_a_name(here: Path) -> None:
    """A local directory that is called as a protocol can be had in the ways that the message names."""
    ways: list[str] = []
    for place in (
        "hdfs:/x/a.ckpt",
        f"{here}/hdfs:/x/a.ckpt",
        "sub/hdfs:/a.ckpt",
        "../hdfs:/a.ckpt",
        "~/hdfs:/a",
    ):
        with pytest.raises(OptionError, match="is meant") as told:
            locate(place)
        ways.append(str(told.value).rpartition("write ")[2].strip("'"))
    home = os.path.realpath(os.path.expanduser("~"))
    assert [locate(way).path for way in ways] == [
        f"{here}/hdfs:/x/a.ckpt",
        f"{here}/hdfs:/x/a.ckpt",
        f"{here}/sub/hdfs:/a.ckpt",
        f"{here.parent}/hdfs:/a.ckpt",
        f"{home}/hdfs:/a",
    ]
    with CheckpointService() as service:
        service.save({"a": 1}, ways[0]).wait(60)
        assert service.load(ways[1]) == {"a": 1}


def test_a_directory_that_is_there_is_believed_elsewhere_only(here: Path) -> None:
    """In the working directory the same mistake may have left it; in another somebody has wanted it."""
    for directory in (here, here / "mirror"):
        (directory / "s3:").mkdir(parents=True)
    assert locate(here / "mirror" / "s3:" / "b" / "a.ckpt").path == f"{here}/mirror/s3:/b/a.ckpt"
    for place in ("s3:/b/a.ckpt", here / "s3:" / "b" / "a.ckpt", here / "cache" / "s3:" / "b" / "a.ckpt"):
        with pytest.raises(OptionError, match=r"'s3://b/a\.ckpt'"):
            locate(place)


@pytest.mark.parametrize(
    "name", ["c:/a.ckpt", "epoch:1/a.ckpt", "run::1/a.ckpt", "lr:/x", "a/b:/c", "s3/a", ":/a"]
)
def test_other_names_with_a_colon(name: str, here: Path) -> None:
    """What no file system is called by is a name like any other."""
    assert locate(name).path == f"{here}/{name}"


def test_no_file_system_is_imported_for_it() -> None:
    """Refusing costs no import of a file system."""
    done = python(
        """
        import sys
        from pathlib import Path, PurePosixPath, PureWindowsPath
        from async_ckpt import OptionError
        from async_ckpt.stores import locate
        for protocol in ("s3", "gs", "abfs", "sftp", "webhdfs", "simplecache::s3"):
            try:
                locate(Path(protocol + "://host/a"))
            except OptionError:
                print("refused", end=" ")
        print([name for name in sys.modules if name in ("s3fs", "gcsfs", "adlfs", "paramiko", "requests", "aiohttp")])
        """
    )
    assert done.stdout.strip() == "refused " * 6 + "[]", done.stderr


@pytest.mark.parametrize(
    "url", ["sftp://u:hunter2@h/x", "file://u:hunter2@h/x", "simplecache::sftp://u:hunter2@h/x"]
)
@pytest.mark.parametrize("kind", [PurePosixPath, PureWindowsPath, lambda url: f"/there/{PurePosixPath(url)}"])
def test_no_password_is_told(url: str, kind: Any) -> None:
    """What is refused is told without the password in it, and so is the URL that works."""
    with pytest.raises(OptionError) as told:
        locate(kind(url))
    assert "hunter2" not in str(told.value)


def test_capitals() -> None:
    """A protocol in capitals, which fsspec does not know, is refused with the one that it does."""
    with pytest.raises(UnknownProtocolError, match="write s3://"):
        locate("S3://bucket/a.ckpt")


@pytest.mark.parametrize("base", [False, True])
def test_the_plugin(base: bool, here: Path) -> None:
    """The plugin refuses them too, on every way, and so it does in front of Lightning's own base."""
    io = pytest.importorskip("lightning.pytorch.plugins.io")
    with AsyncCheckpointIO(io.TorchCheckpointIO() if base else None) as plugin:
        for call in (
            lambda p: plugin.save_checkpoint({}, p),
            plugin.load_checkpoint,
            plugin.remove_checkpoint,
        ):
            with pytest.raises(OptionError, match=r"'hdfs://nn/a\.ckpt'"):
                call(Path("hdfs://nn/a.ckpt"))
    assert not os.listdir(here)


def test_a_base_of_its_own_kind_gets_what_was_given(here: Path) -> None:
    """Another base may know how to mend them: it gets the path as it is, and not as one in the working directory."""
    io = pytest.importorskip("lightning.pytorch.plugins.io")
    seen: list[Any] = []

    class Mending(io.CheckpointIO):  # type: ignore[misc]  # a base that is found at run time
        writes_elsewhere = True

        def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
            seen.append(path)

        def load_checkpoint(self, path: Any, map_location: Any = None) -> Any:
            seen.append(path)

        def remove_checkpoint(self, path: Any) -> None:
            seen.append(path)

    given = Path("s3://bucket/a.ckpt")
    with AsyncCheckpointIO(Mending()) as plugin:
        plugin.save_checkpoint({}, given)
        plugin.load_checkpoint(given)
        plugin.remove_checkpoint(given)
    assert seen == [given] * 3


def test_a_upath_brings_its_options() -> None:
    """The options of a UPath count, and come before those of the service, as they say more."""
    location = locate(UPath("memory://a", {"token": "own"}), storage_options={"token": "ours", "more": 1})
    same = locate("memory://a", storage_options={"token": "own", "more": 1})
    assert (location.key, location.group, location.address) == (same.key, same.group, "memory://a")
    assert locate(UPath("memory://a")).key == locate("memory://a").key


def test_a_upath_without_a_url(here: Path) -> None:
    """What a file system knows by no URL is no local file of such a name."""
    with pytest.raises(OptionError, match=r"'data' without a URL"):
        locate(UPath("data:text/plain,x", protocol="data"))
    assert not os.listdir(here)


def test_real_upaths(here: Path) -> None:
    """A UPath of each kind is the place that it names."""
    Real = pytest.importorskip("upath").UPath
    assert locate(Real("/data/a.ckpt")).key == locate("/data/a.ckpt").key
    assert locate(Real("file:///data/a.ckpt")).key == locate("/data/a.ckpt").key
    assert locate(Real("run/a.ckpt")).path == f"{here}/run/a.ckpt"
    assert locate(Real("memory://a/b") / "c").key == locate("memory://a/b/c").key
    options = {"key": "k", "secret": "hidden", "endpoint_url": "http://127.0.0.1:1"}
    pytest.importorskip("s3fs")
    location = locate(Real("s3://bucket/run", **options) / "a.ckpt")
    assert location.key == locate("s3://bucket/run/a.ckpt", storage_options=options).key
    assert "hidden" not in repr(location)
    assert "hidden" in location.secrets
    with pytest.raises(OptionError, match="chained"):
        locate(Real("simplecache::memory://a"))
