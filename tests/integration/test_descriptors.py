"""The first save when the process has no file descriptors left."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import python

resource = pytest.importorskip("resource")

CODE = """
import errno, os, resource, sys
import torch
from async_ckpt import CheckpointService, StoreError

_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
state = {"weights": torch.ones(8)}
refused = 0
with CheckpointService() as service:  # imports what a save needs
    service.save(state, sys.argv[1]).wait()
with CheckpointService() as service:
    for left in range(20):
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))
        taken = []
        try:
            while True:
                taken.append(os.dup(0))
        except OSError:
            pass
        for _ in range(left):
            os.close(taken.pop())
        try:
            service.save(state, sys.argv[1]).wait()
        except StoreError:  # the loop runs; it is the file that cannot be opened
            break
        except BaseException as error:
            assert type(error) is OSError and error.errno == errno.EMFILE, repr(error)
            assert "ulimit -n" in str(error), str(error)
            refused += 1
        else:
            break
        finally:
            for each in taken:
                os.close(each)
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    service.save(state, sys.argv[1]).wait()
print("refused", refused)
"""


def test_no_descriptor_for_the_loop(tmp_path: Path) -> None:
    """However many are missing, the call raises a plain OSError that says what to do, and a later one works (E1)."""
    done = python(CODE, tmp_path / "a.ckpt")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[1]) > 2
