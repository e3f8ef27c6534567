"""When Lightning takes our classes for its own."""

from __future__ import annotations

import pytest

from tests.support import python


@pytest.mark.parametrize("tree", ["pytorch_lightning", "lightning.pytorch"])
def test_classes_are_lightnings_before_one_is_made(tree: str) -> None:
    """Where Lightning is imported first, the classes themselves pass for its own, as LightningCLI wants them to."""
    ended = python(f"""
        import {tree} as pl
        from {tree}.plugins import CheckpointIO
        from async_ckpt import AsyncCheckpointCallback, AsyncCheckpointIO

        assert issubclass(AsyncCheckpointIO, CheckpointIO)
        assert issubclass(AsyncCheckpointCallback, pl.Callback)
    """)
    assert ended.returncode == 0, ended.stderr


def test_classes_are_lightnings_when_they_are_asked_for_again() -> None:
    """Where this package is imported first, they do so from the next time on that somebody names them."""
    ended = python("""
        from async_ckpt import AsyncCheckpointCallback, AsyncCheckpointIO
        import lightning.pytorch as pl
        from lightning.pytorch.plugins import CheckpointIO
        import async_ckpt

        assert issubclass(async_ckpt.AsyncCheckpointIO, CheckpointIO)
        assert issubclass(async_ckpt.AsyncCheckpointCallback, pl.Callback)
        assert async_ckpt.AsyncCheckpointIO is AsyncCheckpointIO
    """)
    assert ended.returncode == 0, ended.stderr


def test_what_is_made_is_lightnings_whenever_it_is_imported() -> None:
    """Made before Lightning is imported, it is a CheckpointIO of both distributions all the same."""
    ended = python("""
        from async_ckpt import AsyncCheckpointIO

        plugin = AsyncCheckpointIO()
        import lightning.pytorch.plugins, pytorch_lightning.plugins

        for tree in (lightning.pytorch, pytorch_lightning):
            assert isinstance(plugin, tree.plugins.CheckpointIO)
    """)
    assert ended.returncode == 0, ended.stderr
