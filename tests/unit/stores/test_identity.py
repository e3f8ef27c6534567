"""Which spellings name one place, and which do not (O1)."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest

from async_ckpt.errors import OptionError
from async_ckpt.stores import locate
from async_ckpt.system.trusted_paths import resolve

ONE = [
    ("ftp://h/run//a", {}, "ftp://h/run/a", {}),
    ("ftp://h/run/./a", {}, "ftp://h/run/a", {}),
    ("ftp://h/other/../run/a", {}, "ftp://h/run/a", {}),
    ("ftp://h:21/run/a", {}, "ftp://h/run/a", {}),
    ("ftp://H/run/a", {}, "ftp://h/run/a", {}),
    ("ftp://h/run/a", {"timeout": 5, "block_size": 1 << 20}, "ftp://h/run/a", {}),
    ("ftp://u:p@h/run/a", {}, "ftp://h/run/a", {"username": "u", "password": "p"}),
    ("sftp://u@h:22//run/a", {}, "ssh://u@h/run/a", {}),
    ("webhdfs://h:50070/run/a", {}, "webhdfs://h/run/a", {}),
    ("s3://b/a", {}, "s3a://b/a", {"anon": True, "max_concurrency": 3}),
    (
        "s3://b/a",
        {"endpoint_url": "http://h:80"},
        "s3://b/a",
        {"client_kwargs": {"endpoint_url": "http://H/"}},
    ),
    ("gs://b/a", {"token": "anon"}, "gcs://b/a", {}),
    ("abfs://c@acct.dfs.core.windows.net/a", {}, "az://c/a", {"account_name": "acct", "account_key": "eA=="}),
    ("abfs://c@acct.blob.core.windows.net/a", {}, "abfss://c/a", {"account_name": "acct"}),
    (
        "az://c/a",
        {"connection_string": "AccountName=acct;AccountKey=eA=="},
        "az://c/a",
        {"account_name": "acct"},
    ),
]
TWO = [
    ("ftp://h/a", {}, "ftp://other/a", {}),
    ("ftp://h/a", {}, "ftp://h:2121/a", {}),
    ("sftp://u@h/a", {}, "sftp://v@h/a", {}),
    ("ftp://h/a", {}, "sftp://h/a", {}),
    ("s3://b/run//a", {}, "s3://b/run/a", {}),
    ("s3://b/./a", {}, "s3://b/a", {}),
    ("gs://b/x/../a", {}, "gs://b/a", {}),
    ("s3://b/a", {}, "s3://b/a", {"endpoint_url": "http://h:9000"}),
    ("s3://b/a", {"profile": "one"}, "s3://b/a", {"profile": "two"}),
    ("az://c/a", {"account_name": "one"}, "az://c/a", {"account_name": "two"}),
    ("memory://a//b", {}, "memory://a/b", {}),
    ("memory://a/b", {"anything": 1}, "memory://a/b", {"anything": 2}),
]
NEEDS = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "abfs": "adlfs",
    "az": "adlfs",
    "sftp": "paramiko",
}

Spelling = tuple[str, dict[str, Any], str, dict[str, Any]]


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "AWS_ENDPOINT_URL",
        "AWS_ENDPOINT_URL_S3",
        "STORAGE_EMULATOR_HOST",
        "AZURE_STORAGE_CONNECTION_STRING",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)


@pytest.mark.parametrize("spelling", ONE, ids=lambda spelling: f"{spelling[0]} {spelling[2]}")
def test_spellings_of_one_place(spelling: Spelling) -> None:
    """A usual port, the case of a host, credentials, time-outs, and a path's detours make no other place."""
    assert _key(*spelling[:2]) == _key(*spelling[2:])


@pytest.mark.parametrize("spelling", TWO, ids=lambda spelling: f"{spelling[0]} {spelling[2]}")
def test_places_that_differ(spelling: Spelling) -> None:
    """Another server, account or user is another place; so is any other name in an object store."""
    assert _key(*spelling[:2]) != _key(*spelling[2:])


def test_the_environment_names_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """An endpoint counts wherever it was named."""
    pytest.importorskip("s3fs")
    given = _key("s3://b/a", {"endpoint_url": "http://h:9000"})
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://h:9000/")
    assert _key("s3://b/a", {}) == given


def test_a_directory_of_a_remote_place_is_above_what_lies_in_it() -> None:
    """The key of a place begins with that of the directory it lies in, so that the queue sees it (O1)."""
    assert _key("ftp://h/run/deep//a", {}).startswith(_key("ftp://h:21/run/", {}) + "/")


def test_keys_tell_no_secret() -> None:
    """Nothing of the options can be read in a key."""
    key = _key("memory://a", {"secret": "hunter2", "password": "hunter2"})
    assert "hunter2" not in key


def test_links_on_the_way(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A path is resolved as the kernel does it, and the links passed are told in order."""
    root = tmp_path_factory.mktemp("links").resolve()
    (root / "real" / "deep").mkdir(parents=True)
    (root / "run").symlink_to("real")
    (root / "real" / "up").symlink_to("..")
    (root / "real" / "last").symlink_to(root / "run" / "deep" / "a")
    for path, where, links in [
        ("run/deep/a", "real/deep/a", ["run"]),
        ("run/../x", "x", ["run"]),
        ("run/up/run/y", "real/y", ["run", "real/up", "run"]),
        ("run/last", "real/deep/a", ["run", "real/last", "run"]),
        ("none/./there//z", "none/there/z", []),
    ]:
        assert resolve(f"{root}/{path}")[:2] == (
            f"{root}/{where}",
            tuple(f"{root}/{link}" for link in links),
        )
    assert resolve(f"{root}/run/last", follow=False)[:2] == (f"{root}/real/last", (f"{root}/run",))


def test_links_that_are_about_to_change(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Names that will be no link, or lead elsewhere, are taken for what they will be."""
    root = str(tmp_path_factory.mktemp("links").resolve())
    link = f"{root}/run"
    assert resolve(f"{link}/a", follow=True, changes={link: f"{root}/new"})[:2] == (f"{root}/new/a", (link,))
    os.symlink("old", link)
    assert resolve(f"{link}/a")[:2] == (f"{root}/old/a", (link,))
    assert resolve(f"{link}/a", follow=True, changes={link: None})[:2] == (f"{link}/a", ())


def _key(url: str, options: dict[str, Any]) -> str:
    package = NEEDS.get(url.partition(":")[0])
    if package is not None and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    return locate(url, storage_options=options).key


@pytest.mark.parametrize("url", ["ftp://h/run/..", "ftp://h/./", "webdav://run/.."])
def test_detours_that_come_to_the_root(url: str) -> None:
    """A path that comes to no name after its detours is refused at the call."""
    with pytest.raises(OptionError, match="does not name a file"):
        locate(url)
