"""What every store has in common."""

from __future__ import annotations

from collections.abc import Sequence

import anyio
import anyio.lowlevel
import pytest

from async_ckpt.stores.base import Content, Part, Receipt, aborted_on_error


class Slow:
    """An upload whose abort takes its time; nothing else is asked of it."""

    part_size = max_concurrent_parts = None
    is_paced = False
    swept = ()
    aborts = 0

    async def put(self, part: Part, content: Content) -> Receipt:
        """Not called."""
        raise NotImplementedError

    async def commit(self, receipts: Sequence[Receipt]) -> None:
        """Not called."""
        raise NotImplementedError

    async def abort(self) -> None:
        """Let the loop turn, and count."""
        await anyio.lowlevel.checkpoint()
        self.aborts += 1


def test_a_cancelled_upload_is_aborted_to_the_end() -> None:
    """The cancellation that ends an upload does not end its abort (D2)."""
    upload = Slow()

    async def run() -> None:
        with anyio.CancelScope() as scope:
            async with aborted_on_error(upload):
                scope.cancel()
                await anyio.lowlevel.checkpoint()
        assert scope.cancelled_caught

    anyio.run(run)
    assert upload.aborts == 1


def test_an_upload_that_ends_as_it_should_is_not_aborted() -> None:
    """Only an error aborts, and it is raised as it is."""
    upload = Slow()

    async def run() -> None:
        async with aborted_on_error(upload):
            pass
        assert upload.aborts == 0
        with pytest.raises(SystemExit):
            async with aborted_on_error(upload):
                raise SystemExit

    anyio.run(run)
    assert upload.aborts == 1
