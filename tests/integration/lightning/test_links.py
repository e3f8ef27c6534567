"""A save to a link: what Lightning's own writer does with it, the plugin does (D2)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from async_ckpt import AsyncCheckpointIO
from tests.integration.lightning.both_ways import BOTH_WAYS, ONE_TREE, WITH_CALLBACK, Both, contents, saving
from tests.support import reached

pytestmark = BOTH_WAYS

LINKS = {
    "to a checkpoint": "best.ckpt",
    "to a checkpoint elsewhere": "elsewhere/other.ckpt",
    "to a link": "between.ckpt",
    "to nothing": "gone.ckpt",
    "to nothing, below nothing": "gone/gone.ckpt",
    "to itself": "last.ckpt",
    "below a link to a directory": "",
}


def lay_out(folder: Path, target: str) -> Path:
    """Make a folder with a link in it; return where to save."""
    (folder / "elsewhere").mkdir(parents=True)
    torch.save({"step": 1}, folder / "best.ckpt")
    torch.save({"step": 1}, folder / "elsewhere" / "other.ckpt")
    (folder / "between.ckpt").symlink_to("best.ckpt")
    if not target:
        (folder / "alias").symlink_to("elsewhere")
        return folder / "alias" / "last.ckpt"
    (folder / "last.ckpt").symlink_to(target)
    return folder / "last.ckpt"


def plugin_of(tree: Any, base: bool, **options: Any) -> AsyncCheckpointIO:
    """Return a plugin, around Lightning's own writer if *base*."""
    return AsyncCheckpointIO(tree.fabric.plugins.TorchCheckpointIO() if base else None, **options)


BASE = pytest.mark.parametrize("base", [False, True], ids=["own writer", "with a base"])


@ONE_TREE
@BASE
@pytest.mark.parametrize("target", LINKS.values(), ids=LINKS)
@pytest.mark.parametrize("synchronous", [False, True])
def test_a_link_is_replaced_by_a_file(
    tree: Any, tmp_path: Path, base: bool, target: str, synchronous: bool
) -> None:
    """As with Lightning's own writer, a link becomes a file, and what it has led to stays as it was."""
    tree.fabric.plugins.TorchCheckpointIO().save_checkpoint(
        {"step": 2}, lay_out(tmp_path / "expected", target)
    )
    plugin = plugin_of(tree, base)
    plugin.synchronous = synchronous
    path = lay_out(tmp_path / "run", target)
    plugin.save_checkpoint({"step": 2}, path)
    assert plugin.load_checkpoint(path) == {"step": 2}
    plugin.teardown()
    assert contents(tmp_path / "run").keys() == contents(tmp_path / "expected").keys()
    for name, expected in contents(tmp_path / "expected").items():
        found = tmp_path / "run" / name
        if isinstance(expected, str):
            assert os.readlink(found) == expected
        else:
            assert not found.is_symlink()
            assert torch.load(found) == torch.load(tmp_path / "expected" / name)
            assert found.stat().st_mode == (tmp_path / "expected" / name).stat().st_mode


@ONE_TREE
@pytest.mark.parametrize("target", LINKS.values(), ids=LINKS)
def test_a_base_that_writes_in_place_does_not_write_through(tree: Any, tmp_path: Path, target: str) -> None:
    """As ``torch.save`` does, and Lightning's own where its temporary folder is on another file system."""

    class InPlace(tree.fabric.plugins.TorchCheckpointIO):  # type: ignore[misc]  # a base that is found at run time
        def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
            torch.save(checkpoint, path)

    path = lay_out(tmp_path / "run", target)
    others = {name: content for name, content in contents(tmp_path / "run").items() if name != "last.ckpt"}
    plugin = AsyncCheckpointIO(InPlace())
    plugin.save_checkpoint({"step": 2}, path)
    plugin.teardown()
    assert not path.is_symlink()
    assert torch.load(path) == {"step": 2}
    found = contents(tmp_path / "run")
    assert {name: found[name] for name in others} == others
    assert found.keys() - others.keys() == {str(path.resolve().relative_to(tmp_path / "run"))}


@ONE_TREE
def test_a_link_stays_until_the_file_is_durable(tree: Any, tmp_path: Path, faults: Any) -> None:
    """While the file is under way, and if it fails, the name leads where it has led (D2)."""
    gate = faults.hold()
    faults.fail(2, error=lambda: OSError("broken"))
    plugin = plugin_of(tree, False, store_factory=faults.make)
    path = lay_out(tmp_path / "run", "best.ckpt")
    before = contents(tmp_path / "run")
    plugin.save_checkpoint({"step": 2}, path)
    reached(gate)
    assert contents(tmp_path / "run") == before
    gate.open()
    plugin.wait()
    assert not path.is_symlink()
    path.unlink()
    path.symlink_to("best.ckpt")
    plugin.save_checkpoint({"step": 3}, path)
    with pytest.raises(OSError, match="broken"):
        plugin.wait()
    plugin.teardown()
    assert contents(tmp_path / "run") == before


@ONE_TREE
def test_a_link_to_a_directory_is_replaced_too(tree: Any, tmp_path: Path) -> None:
    """Lightning's own writer puts the checkpoint into that directory, under a random name; ours has its name."""
    (tmp_path / "sharded").mkdir()
    (tmp_path / "last.ckpt").symlink_to("sharded")
    plugin = plugin_of(tree, False)
    plugin.save_checkpoint({"step": 2}, tmp_path / "last.ckpt")
    plugin.teardown()
    assert torch.load(tmp_path / "last.ckpt") == {"step": 2}
    assert os.listdir(tmp_path / "sharded") == []


@ONE_TREE
def test_overwrite_false_spares_a_link(tree: Any, tmp_path: Path) -> None:
    """Nothing is replaced with ``overwrite=False``, and a link, dangling or not, is something."""
    plugin = plugin_of(tree, False, overwrite=False)
    for target in ("best.ckpt", "gone.ckpt"):
        path = lay_out(tmp_path / target, target)
        before = contents(tmp_path / target)
        plugin.save_checkpoint({"step": 2}, path)
        with pytest.raises(FileExistsError):
            plugin.wait()
        assert contents(tmp_path / target) == before
    plugin.teardown()


@WITH_CALLBACK
@ONE_TREE
def test_nothing_better_comes(both: Both) -> None:
    """What a resumed run saves at its end leaves the best checkpoint, to which ``last`` has led, as it is."""
    files = both.fit(saving({"monitor": "val_loss", "save_last": "link"}), resume="last")
    assert files.keys() == {"ckpt/epoch=1-step=8.ckpt", "ckpt/last.ckpt"}
    assert not any(isinstance(content, str) for content in files.values())


def _logging(*losses: float) -> Any:
    def validation_step(self: Any, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", torch.tensor(losses[self.current_epoch]))

    return validation_step


@WITH_CALLBACK
@ONE_TREE
def test_something_better_comes(both: Both) -> None:
    """Where the best checkpoint is replaced, ``last``, which led to it, counts as absent, and leads to the new one."""
    files = both.fit(
        saving({"monitor": "val_loss", "save_last": "link"}),
        resume="last",
        validation_step=_logging(0.3, 0.4, 0.2, 0.1),
    )
    assert {name for name, content in files.items() if content == "epoch=3-step=16.ckpt"} == {
        "ckpt/last.ckpt"
    }
    assert files.keys() == {"ckpt/epoch=3-step=16.ckpt", "ckpt/last.ckpt"}


@WITH_CALLBACK
@ONE_TREE
def test_a_link_to_what_was_removed_is_left(both: Both) -> None:
    """Lightning sees nothing at a link to a checkpoint that has gone, and leaves the link: so it is with ours."""

    def callbacks(tree: Any, folder: Path) -> list[Any]:
        checkpoint = tree.checkpoints(folder / "ckpt", save_last="link")
        checkpoint.CHECKPOINT_NAME_LAST = "last-{epoch}"
        return [checkpoint]

    files = both.fit(callbacks)
    assert {name for name in files if "last" in name} == {f"ckpt/last-epoch={n}.ckpt" for n in range(4)}
