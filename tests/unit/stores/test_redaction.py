"""Tests of what is hidden of URLs, texts and errors, and of what is not."""

from __future__ import annotations

import errno
import traceback

import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_ckpt.stores.redaction import presentable, redacted_text, redacted_url, secrets_in

_QUOTED = st.text("abcXYZ019._~-!$&'()*+,;=:%", min_size=4, max_size=30)  # what a password may be as it is


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("sftp://ann:hunter2@host:22/run/x.ckpt", "sftp://ann:***@host:22/run/x.ckpt"),
        ("sftp://ann:p@ss:w@host/x", "sftp://ann:***@host/x"),
        ("sftp://ann:p/w?x@host/x", "sftp://ann:***@host/x"),
        ("sftp://ann:a::b@host/x", "sftp://ann:***@host/x"),
        ("sftp://ann:hunter2@[::1]:22/x", "sftp://ann:***@[::1]:22/x"),
        ("sftp://:hunter2@host/x", "sftp://:***@host/x"),
        ("sftp:/ann:hunter2@host/x", "sftp:/ann:***@host/x"),
        ("WEBDAVS://ann:hunter2@host/x", "WEBDAVS://ann:***@host/x"),
        ("https://ghp_0123456789@host/x", "https://***@host/x"),
        ("https://host/x?token=hunter2&versionId=7", "https://host/x?token=***&versionId=7"),
        ("https://host/x?anything=hunter2", "https://host/x?anything=***"),
        ("https://host/x?hunter2", "https://host/x?***"),
        ("abfs://box@account.dfs.core.windows.net/x?sv=2024&sig=hunter2", "abfs://box@account.dfs.core.windows.net/x?sv=***&sig=***"),
        ("s3://key:secret@bucket/x", "s3://key:***@bucket/x"),
        ("s3://bucket/x?X-Amz-Signature=hunter2&versionId=7", "s3://bucket/x?X-Amz-Signature=***&versionId=7"),
        ("simplecache::sftp://ann:hunter2@host/x", "simplecache::sftp://ann:***@host/x"),
    ],
)  # fmt: skip
def test_what_is_secret_in_a_url_is_hidden(url: str, shown: str) -> None:
    """A password, a lone token, a signature or an unknown parameter is hidden; who, where and which version is not."""
    assert redacted_url(url) == shown


@pytest.mark.parametrize(
    "url",
    [
        "run/x.ckpt",
        "/runs/a:b@c/epoch=1-step=2.ckpt",
        "C:\\run\\x.ckpt",
        "file:///runs/sig=1/token=2.ckpt",
        "sftp://ann@host/runs/step@100.ckpt",
        "sftp://host:22/runs/step@100.ckpt",
        "sftp://[::1]/runs/step@100.ckpt",
        "abfs://box@account.dfs.core.windows.net/x.ckpt",
        "s3://bucket/what?/epoch=1.ckpt",
        "s3://bucket/run?lr=0.1&sigma=2&max_tokens=100&author=me/x.ckpt",
        "gs://bucket/x::y#3",
        "memory://x",
    ],
)
def test_a_url_without_a_secret_is_shown_as_it_is(url: str) -> None:
    """Where nothing is secret, what is shown can be loaded from."""
    assert redacted_url(url) == url
    assert not secrets_in(url)


@given(password=_QUOTED)
def test_no_password_comes_through_in_any_url_or_text(password: str) -> None:
    """However a password is made of what may stand in a URL, neither the URL nor a text that repeats it tells it."""
    url = f"sftp://ann:{password}@host/run.ckpt"
    assert redacted_url(url) == "sftp://ann:***@host/run.ckpt"
    if len(password.strip()) > 3 and password.lower() not in ("anon", "true", "false", "none", "host"):
        told = redacted_text(f"no login with [{password}] for {url}", secrets_in(url))
        assert f"[{password}]" not in told
        assert f":{password}@" not in told


_OPTIONS = {
    "key": "AKIA-secret-key",
    "secret": "secret/with+signs",
    "client_kwargs": {"aws_session_token": "secret-session", "endpoint_url": "http://ann:secret-proxy@host:80"},
    "token": {"private_key": "-----BEGIN\nsecret-lines\n", "token_uri": "https://oauth2.example/token"},
    "connection_string": "AccountName=box;AccountKey=secret-account==;EndpointSuffix=core.windows.net",
    "sas_token": "?sv=2024&sig=secret-signature%3D",
    "headers": [("Authorization", "secret-header")],
    "key_filename": "/home/ann/.ssh/id",
    "password": b"secret-bytes",
    "host": "host",
}  # fmt: skip


@pytest.mark.parametrize(
    "secret",
    [
        "AKIA-secret-key", "secret/with+signs", "secret%2Fwith%2Bsigns", "secret-session", "secret-proxy",
        "-----BEGIN\\nsecret-lines", "secret-account==", "secret-signature=", "secret-bytes",
        "secret-header",
    ],
)  # fmt: skip
def test_options_secrets_are_found_in_any_text(secret: str) -> None:
    """What storage_options hold of secrets, however deep, is hidden in any text, in any of its spellings."""
    assert (
        redacted_text(f"cannot log in: <{secret}>", secrets_in("s3://b/x", _OPTIONS))
        == "cannot log in: <***>"
    )


def test_what_is_no_secret_of_the_options_is_left_in_texts() -> None:
    """A host, a key's file and the address of a login are what a message is about."""
    text = "no /home/ann/.ssh/id for host, asked https://oauth2.example/token, 3 tokens anon"
    assert redacted_text(text, secrets_in("s3://b/x", {**_OPTIONS, "token": "anon"})) == text


@pytest.mark.parametrize(
    "text",
    [
        "GET https://host/x?sig=hunter2&x=1 was refused",
        "Url('ftp://ann:hunter2@host/x')",
        "{'Authorization': 'Bearer hunter2hunter2'}",
        "AccountName=a;AccountKey=hunter2==;x",
        "upload_id=hunter2",
    ],
)
def test_an_unknown_secret_is_hidden_by_its_looks(text: str) -> None:
    """What a library tells of a login of its own is hidden, too."""
    assert "hunter2" not in redacted_text(text)


_SECRET = "hunter2"  # in no line of the source that a traceback shows


class _Odd(Exception):
    def __init__(self, first: str, *, second: str) -> None:
        super().__init__(first, second)
        self.second = second

    def __str__(self) -> str:
        return f"odd {self.second}"


def _chain() -> Exception:
    try:
        try:
            raise _Odd("a", second=_SECRET)
        except _Odd as error:
            raise FileNotFoundError(errno.ENOENT, "no such file", _SECRET) from error
    except FileNotFoundError as error:
        return error


def test_a_stand_in_is_like_the_error_but_for_its_secrets() -> None:
    """Kind, errno, attributes and traceback stay; of the whole chain no text tells the secret."""
    error = _chain()
    shown = presentable(error, ("hunter2",))
    assert isinstance(shown, FileNotFoundError)
    assert shown.errno == errno.ENOENT
    assert isinstance(shown.__cause__, _Odd)
    assert shown.__cause__.second == "hunter2"  # for the program, which has given it
    told = "".join(traceback.format_exception(shown))
    assert "hunter2" not in told
    assert "in _chain" in told
    assert "_Odd: odd ***" in told
    assert "hunter2" not in repr(shown)


def test_an_error_without_secrets_is_itself() -> None:
    """Nothing is made anew where there is nothing to hide."""
    error = _chain()
    assert presentable(error, ("other",)) is error


def test_a_cycle_of_errors_comes_to_an_end() -> None:
    """A chain that bites its tail is gone through once."""
    first, second = ValueError("hunter2"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert "hunter2" not in str(presentable(first, ("hunter2",)))
