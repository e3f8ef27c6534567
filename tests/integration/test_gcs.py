"""Checkpoints on fake-gcs-server, by the ways a user takes; what Google refuses is tested on a stricter double."""

from __future__ import annotations

import io
import signal
import urllib.parse
import urllib.request
from collections.abc import Mapping

import pytest
import torch

from async_ckpt import CheckpointService
from async_ckpt.retry import RetryPolicy
from stress.httpfaults import response
from stress.proxy import FaultProxy
from stress.servers.process import Server
from tests.servers import fresh_bucket
from tests.support import PATIENCE_SECONDS, python, state

pytestmark = pytest.mark.integration

NBYTES = 3 << 20


def stored(server: Server, bucket: str, key: str) -> bytes:
    """Return an object's bytes, without any of our code."""
    name = urllib.parse.quote(key, safe="")
    url = f"{server.url}/download/storage/v1/b/{bucket}/o/{name}?alt=media"
    with urllib.request.urlopen(url, timeout=PATIENCE_SECONDS) as answer:
        return bytes(answer.read())


def saved(value: object) -> bytes:
    """Return what ``torch.save`` makes of *value*."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def test_the_bytes_are_those_of_torch(fake_gcs: Server) -> None:
    """An object holds what ``torch.save`` would have written, in one part and in several."""
    bucket = fresh_bucket(fake_gcs)
    with CheckpointService(storage_options=fake_gcs.storage_options, part_size="1MiB") as service:
        for key, nbytes in (("small.ckpt", 1000), ("run/epoch=1-step=2.ckpt", NBYTES)):
            value = state(1, nbytes=nbytes)
            service.save(value, f"gs://{bucket}/{key}").wait(PATIENCE_SECONDS)
            assert stored(fake_gcs, bucket, key) == saved(value)


def test_the_environment_is_enough(fake_gcs: Server) -> None:
    """Where gcsfs finds its settings in the environment, nothing is to be given; the process ends without a word."""
    url = f"gcs://{fresh_bucket(fake_gcs)}/a.ckpt"
    done = python(
        """
        import sys, warnings
        warnings.simplefilter("error")
        from async_ckpt import CheckpointService
        with CheckpointService() as service:
            service.save({"step": 7}, sys.argv[1])
            print(service.load(sys.argv[1]))
        """,
        url,
        env=dict(fake_gcs.environment),
    )
    assert (done.stdout.strip(), done.stderr, done.returncode) == ("{'step': 7}", "", 0)


def test_killed_in_the_middle(fake_gcs: Server) -> None:
    """A process that is killed between two parts leaves the old object, and the next save is not hindered."""
    bucket = fresh_bucket(fake_gcs)
    url = f"gs://{bucket}/a.ckpt"
    old, new = state(1, nbytes=NBYTES), state(2, nbytes=NBYTES)
    with CheckpointService(storage_options=fake_gcs.storage_options, part_size="1MiB") as service:
        service.save(old, url).wait(PATIENCE_SECONDS)
        done = python(
            """
            import os, signal, sys, torch
            from async_ckpt import CheckpointService
            from async_ckpt.events import PartWritten
            from tests.support import state

            def kill(event):
                if isinstance(event, PartWritten) and event.index == 1:
                    os.kill(os.getpid(), signal.SIGKILL)

            service = CheckpointService(observer=kill, part_size="1MiB")
            service.save(state(2, nbytes=int(sys.argv[2])), sys.argv[1]).wait(60)
            """,
            url,
            NBYTES,
            env=dict(fake_gcs.environment),
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert stored(fake_gcs, bucket, "a.ckpt") == saved(old)
        service.save(new, url).wait(PATIENCE_SECONDS)
        assert stored(fake_gcs, bucket, "a.ckpt") == saved(new)


def test_reading_through_a_bad_network(fake_gcs: Server) -> None:
    """A load whose connections break and whose requests are refused still gives what was saved."""
    url = f"gs://{fresh_bucket(fake_gcs)}/a.ckpt"
    value = state(3, nbytes=NBYTES)
    refused: list[str] = []

    def refuse_first_of_each(method: str, target: str, headers: Mapping[str, str]) -> bytes | None:
        asked = f"{method} {target} {headers.get('range')}"
        if asked in refused:
            return None
        refused.append(asked)
        return response(503)

    with FaultProxy(fake_gcs.url, answer=refuse_first_of_each) as proxy:
        proxy.set(reset_after=1 << 20)
        with CheckpointService(
            storage_options={**fake_gcs.storage_options, "endpoint_url": proxy.url},
            retry=RetryPolicy(attempts=20, initial_seconds=0.001),
        ) as service:
            with CheckpointService(storage_options=fake_gcs.storage_options) as direct:
                direct.save(value, url).wait(PATIENCE_SECONDS)
            loaded = service.load(url)
    assert torch.equal(loaded["weights"], value["weights"])
    assert refused
