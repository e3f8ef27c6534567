"""From a URL to a location, a check and a store."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from pathlib import Path

import pytest
from fsspec.core import url_to_fs

from async_ckpt.errors import MissingDependencyError, OptionError, StoreError, UnknownProtocolError
from async_ckpt.stores import check_target, is_local, locate, open_store
from async_ckpt.stores.generic.store import GenericStore
from async_ckpt.stores.local.store import LocalStore
from async_ckpt.testing import ThreadWorkers


def test_spellings_of_one_local_file_have_one_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative, absolute, dotted, file:// and through a symlinked directory are one location (O1)."""
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to("a", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    spellings: list[str | Path] = [
        "a/b.ckpt",
        "./a/../a/b.ckpt",
        Path("a/b.ckpt"),
        "link/b.ckpt",
        f"file://{tmp_path}/a/b.ckpt",
        f"local://{tmp_path}/a//b.ckpt",
    ]
    assert {locate(spelling).key for spelling in spellings} == {f"file:{tmp_path.resolve()}/a/b.ckpt"}
    assert {locate(spelling).group for spelling in spellings} == {"file"}


def test_home_is_what_fsspec_has_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``~`` is the home directory, in every spelling, as it is for whatever else opens the path through fsspec."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for spelling in ("~/a.ckpt", Path("~/a.ckpt"), "file://~/a.ckpt"):
        assert locate(spelling).path == f"{tmp_path.resolve()}/a.ckpt"
        assert url_to_fs(str(spelling))[1] == f"{tmp_path}/a.ckpt"


def test_a_link_is_its_file_unless_it_is_not_to_be_followed(tmp_path: Path) -> None:
    """A symlink, dangling or not, means the file that it leads to at the call, or itself."""
    (tmp_path / "last.ckpt").symlink_to("step.ckpt")
    link, file = locate(tmp_path / "last.ckpt"), locate(tmp_path / "step.ckpt")
    assert (link.key, link.path) == (file.key, file.path)
    itself = locate(tmp_path / "last.ckpt", follow=False)
    assert (itself.key, itself.path) == (
        f"file:{tmp_path.resolve()}/last.ckpt",
        f"{tmp_path.resolve()}/last.ckpt",
    )


def test_parent_of_a_symlinked_directory(tmp_path: Path) -> None:
    """``link/..`` is the parent of what the link leads to, as the kernel has it."""
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "link").symlink_to("deep/er", target_is_directory=True)
    assert locate(f"{tmp_path}/link/../x").key == locate(f"{tmp_path}/deep/x").key


def test_remote_keys() -> None:
    """Remote keys are equal for spellings of one path and differ with path and storage options."""
    assert locate("memory://a/b").key == locate("memory:///a/b").key
    assert locate("memory://a/b").key != locate("memory://a/c").key
    with_options = locate("memory://a/b", storage_options={"token": "x"})
    assert with_options.key != locate("memory://a/b").key
    assert with_options.key == locate("memory://a/b", storage_options={"token": "x"}).key


def test_options_stay_out_of_the_location() -> None:
    """A secret among the storage options can be read in no field of a location."""
    assert "hunter2" not in repr(locate("memory://a/b", storage_options={"secret": "hunter2"}))


@pytest.mark.parametrize("url", [None, 3, b"x.ckpt", object()])
def test_wrong_types(url: object) -> None:
    """What is neither text nor a path is a TypeError that names the type."""
    with pytest.raises(TypeError, match=type(url).__name__):
        locate(url)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("url", "hint"),
    [
        ("", "empty"),
        ("  ", "empty"),
        ("a\0b", "null"),
        ("/", "does not name a file"),
        ("file://", "does not name a file"),
        ("memory://", "does not name a file"),
        ("simplecache::s3://bucket/x", "chained"),
        ("simplecache::/data/x", "chained"),
        ("zip::x.zip", "chained"),
        (Path("s3://bucket/x"), "pathlib"),
    ],
)
def test_useless_urls(url: str | Path, hint: str) -> None:
    """Empty, chained and mangled URLs are refused at the call, with a hint."""
    with pytest.raises(OptionError, match=hint):
        locate(url)


def test_colons_in_a_local_name() -> None:
    """A local name may hold colons; only what fsspec has a file system for begins a chain."""
    assert locate("/data/run::1.ckpt").path == "/data/run::1.ckpt"


def test_unknown_protocol() -> None:
    """A protocol that fsspec does not know is named in the error."""
    with pytest.raises(UnknownProtocolError, match="nosuch://"):
        locate("nosuch://bucket/x")


@pytest.mark.parametrize(("protocol", "package", "extra"), [
    ("s3", "s3fs", "s3"), ("s3a", "s3fs", "s3"),
    ("gs", "gcsfs", "gcs"), ("gcs", "gcsfs", "gcs"),
    ("az", "adlfs", "azure"), ("abfs", "adlfs", "azure"),
])  # fmt: skip
def test_missing_package(protocol: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the file system's package is missing, the error says which extra to install."""
    registry = importlib.import_module("fsspec.registry")
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(registry._registry, protocol, raising=False)
    with pytest.raises(MissingDependencyError, match=rf'pip install "async-ckpt\[{extra}\]"'):
        locate(f"{protocol}://bucket/x")


def test_check_target_accepts_what_can_be_saved(tmp_path: Path) -> None:
    """A new file, a present one, one in directories yet to be made, and a remote one pass."""
    (tmp_path / "old.ckpt").write_bytes(b"x")
    for name in ("new.ckpt", "old.ckpt", "a/b/c.ckpt"):
        check_target(locate(tmp_path / name))
    check_target(locate("memory://anything"))
    assert sorted(os.listdir(tmp_path)) == ["old.ckpt"]


def test_check_target_refuses_what_cannot(tmp_path: Path) -> None:
    """A directory, a path that ends in a slash, a path below a file, and a pipe are refused."""
    (tmp_path / "file").write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe")
    refused = {
        str(tmp_path): errno.EISDIR,
        f"{tmp_path}/new/": errno.EISDIR,
        f"{tmp_path}/file/x.ckpt": errno.ENOTDIR,
        f"{tmp_path}/pipe": errno.EINVAL,
    }
    for url, number in refused.items():
        with pytest.raises(StoreError) as caught:
            check_target(locate(url))
        assert (caught.value.errno, caught.value.stage, caught.value.location) == (number, "begin", url)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_check_target_refuses_what_is_not_permitted(tmp_path: Path) -> None:
    """A read-only file, and a directory that lets nobody write, are refused with EACCES."""
    (tmp_path / "old.ckpt").write_bytes(b"x")
    (tmp_path / "old.ckpt").chmod(0o444)
    (tmp_path / "closed").mkdir(mode=0o555)
    for name in ("old.ckpt", "closed/new.ckpt"):
        with pytest.raises(StoreError) as caught:
            check_target(locate(tmp_path / name))
        assert caught.value.errno == errno.EACCES


def test_open_store_chooses(tmp_path: Path) -> None:
    """Local paths get the local store, every other URL the generic one."""
    workers = ThreadWorkers(1)
    local, remote = locate(tmp_path / "x"), locate("memory://x")
    assert is_local(local)
    assert not is_local(remote)
    assert isinstance(open_store(local, workers=workers, durability="process"), LocalStore)
    assert isinstance(open_store(remote, workers=workers), GenericStore)
    workers.close()


@pytest.mark.parametrize("url", ["zip://x.ckpt", "tar://x.ckpt", "data://x.ckpt", "reference://x.ckpt"])
def test_file_systems_that_nothing_can_be_saved_to(url: str) -> None:
    """An archive, or what is read-only by its kind, is refused as a target at the call."""
    with pytest.raises(StoreError, match="only be loaded from") as caught:
        check_target(locate(url))
    assert caught.value.errno == errno.EROFS


def test_http_cannot_be_saved_to() -> None:
    """Neither can HTTP, which is there to be loaded from."""
    pytest.importorskip("aiohttp")
    with pytest.raises(StoreError, match="only be loaded from"):
        check_target(locate("http://127.0.0.1:1/x.ckpt"))


@pytest.mark.parametrize(
    ("url", "package"),
    [("s3://bucket", "s3fs"), ("s3://bucket/", "s3fs"), ("gs://b", "gcsfs"), ("az://c", "adlfs")],
)
def test_a_whole_bucket_cannot_be_saved_to(url: str, package: str) -> None:
    """A bucket without an object's name is refused as a target at the call."""
    pytest.importorskip(package)
    with pytest.raises(StoreError, match="whole bucket") as caught:
        check_target(locate(url))
    assert caught.value.errno == errno.EISDIR


def test_other_file_systems_can_be_saved_to() -> None:
    """Of all others, only the file system itself can tell."""
    check_target(locate("memory://x.ckpt"))
