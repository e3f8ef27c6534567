"""What the S3 servers have in common: the credentials, the signing of a bucket's making, what fsspec is told."""

from __future__ import annotations

import urllib.error
import urllib.request

from stress.servers.process import Server, StartedServer

__all__ = ["ACCESS_KEY", "SECRET_KEY", "call", "check", "describe"]

ACCESS_KEY = "test"
SECRET_KEY = "testsecret"
REGION = "us-east-1"
CALL_SECONDS = 10.0


def describe(started: StartedServer) -> Server:
    """Return how a user of s3fs reaches the server."""
    return Server(
        protocol="s3",
        url=started.url,
        storage_options={
            "key": ACCESS_KEY,
            "secret": SECRET_KEY,
            "endpoint_url": started.url,
            "client_kwargs": {"region_name": REGION},
        },
        environment={
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_ENDPOINT_URL": started.url,
        },
        make_bucket=lambda name: _make_bucket(started.url, name),
        pid=started.pid,
    )


def check(started: StartedServer) -> None:
    """Make a bucket, write and delete an object: a server that answers may still be unable to store."""
    for method, path, body in (
        ("PUT", "started", b""),
        ("PUT", "started/object", b"x"),
        ("DELETE", "started/object", b""),
        ("DELETE", "started", b""),
    ):
        call(started.url, method, path, body)


def _make_bucket(url: str, name: str) -> None:
    call(url, "PUT", name)


def call(url: str, method: str, path: str, body: bytes = b"") -> bytes:
    """Make one signed request; return the answer's body.

    Raises:
        OSError: Nobody answered, or the answer was an error.
    """
    from botocore.auth import S3SigV4Auth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials

    request = AWSRequest(method=method, url=f"{url}/{path}", data=body)
    S3SigV4Auth(Credentials(ACCESS_KEY, SECRET_KEY), "s3", REGION).add_auth(request)
    sent = urllib.request.Request(request.url, body, dict(request.headers.items()), method=method)
    try:
        with urllib.request.urlopen(sent, timeout=CALL_SECONDS) as answer:
            return bytes(answer.read())
    except urllib.error.HTTPError as error:
        with error:  # it holds the connection
            raise OSError(f"{method} {path}: {error.code} {error.read().decode(errors='replace')}") from None
