"""Processes that save to Azure, and are killed or end."""

from __future__ import annotations

import json

import pytest

from tests.integration.azure.network import (
    Network,
    body,
    read,
    run,
    save,
)
from tests.support import python, start_python

pytestmark = pytest.mark.integration


KILLED = """
    import json, sys
    import torch
    from async_ckpt import CheckpointService
    url, options = sys.argv[1:]
    def tell(event):
        if type(event).__name__ == "PartWritten":
            print("under way", flush=True)
            sys.stdin.read()
    service = CheckpointService(storage_options=json.loads(options), part_size="64KiB", observer=tell)
    service.save({"weights": torch.zeros(1_000_000)}, url)
    service.wait()
"""


def test_a_killed_process_leaves_the_old_blob(network: Network) -> None:
    """A process killed in mid-upload leaves the earlier checkpoint, and the next save of the name ends durable."""
    old, new = body(1000, 1), body(1000, 2)

    async def first() -> None:
        async with network.store() as store:
            await save(store, network.locate(), old)

    async def then() -> None:
        async with network.store() as store:
            assert await read(store, network.locate()) == old
            await save(store, network.locate(), new)
            assert await read(store, network.locate()) == new

    run(first)
    with start_python(KILLED, network.url(), json.dumps(network.storage_options), stdin=-1) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "under way\n"
        finally:
            process.kill()
    run(then)


QUIET = """
    import gc, logging, sys, threading, warnings
    warnings.simplefilter("error")
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # the dev mode's word on callbacks that a busy machine slows
    import torch
    from async_ckpt import CheckpointService
    url, closed = sys.argv[1:]
    service = CheckpointService()
    handle = service.save({"weights": torch.zeros(10)}, url)
    handle.wait(50)
    assert float(service.load(url)["weights"].sum()) == 0
    if closed == "closed":
        service.close()
        gc.collect()
    print([thread.name for thread in threading.enumerate() if "fsspec" in thread.name])
"""


@pytest.mark.parametrize("closed", ["closed", "left open"])
def test_nothing_is_said_at_exit(network: Network, closed: str) -> None:
    """A process that saved to the account in its environment ends without a word, and never started fsspec's loop."""
    ran = python(
        QUIET,
        network.url(),
        closed,
        env={"PYTHONDEVMODE": "1", **network.server.environment},
    )

    assert (ran.stdout, ran.stderr, ran.returncode) == ("[]\n", "", 0)
