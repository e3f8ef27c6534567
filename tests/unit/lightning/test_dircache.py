"""Which listings are forgotten, and when."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from async_ckpt import AsyncCheckpointIO
from async_ckpt.events import Event
from async_ckpt.lightning.dircache import forget_listings


class Remembering(MemoryFileSystem):  # type: ignore[misc]  # fsspec is untyped
    """A file system in memory that remembers listings, as those of object stores do."""

    protocol = ("remembering",)
    store: dict[str, Any] = {}  # noqa: RUF012 - as its base has it
    pseudo_dirs = [""]  # noqa: RUF012 - as its base has it

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        path = self._strip_protocol(path)
        if path not in self.dircache:
            self.dircache[path] = super().ls(path, detail=True)
        return self.dircache[path] if detail else [entry["name"] for entry in self.dircache[path]]

    def invalidate_cache(self, path: str | None = None) -> None:
        self.dircache.pop(path, None)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("remembering://", "memory://")))


@pytest.fixture
def file_system() -> Iterator[Remembering]:
    """The one that fsspec keeps, with a listing of two folders."""
    fsspec.register_implementation("remembering", Remembering, clobber=True)
    try:
        yield fsspec.filesystem("remembering")
    finally:
        Remembering.clear_instance_cache()
        Remembering.store.clear()


def test_the_folders_above_are_forgotten_and_no_others(file_system: Remembering) -> None:
    """Listings of the file, its folder and the folders above it go; others stay."""
    for path in ("/", "/run", "/run/a.ckpt", "/other"):
        file_system.dircache[path] = []
    forget_listings("remembering://run/a.ckpt")
    assert list(file_system.dircache) == ["/other"]


@pytest.mark.parametrize("url", ["/run/a.ckpt", "run/a.ckpt", "nothing-like-it://run/a.ckpt"])
def test_what_remembers_nothing_is_passed_over(url: str) -> None:
    """A local path, and a URL that only a base CheckpointIO understands, are no error."""
    forget_listings(url)


def test_forgotten_before_the_user_is_told(file_system: Remembering) -> None:
    """The user's observer sees what a save or a removal has changed as soon as it hears of it."""
    seen: list[tuple[str, bool]] = []

    def observer(event: Event) -> None:
        seen.append((type(event).__name__, "/run" in file_system.dircache))
        file_system.dircache["/run"] = []

    plugin = AsyncCheckpointIO(observer=observer)
    plugin.save_checkpoint({"step": 1}, "remembering://run/a.ckpt")
    plugin.remove_checkpoint("remembering://run/a.ckpt")
    plugin.teardown()
    assert ("Writing", True) in seen
    assert ("Durable", False) in seen
    assert ("Removed", False) in seen


def test_the_plugin_forgets(file_system: Remembering) -> None:
    """What fsspec has listed shows a save and a removal of the plugin once they have ended."""
    plugin = AsyncCheckpointIO()
    for name in ("a", "b"):
        plugin.save_checkpoint({"step": 1}, f"remembering://run/{name}.ckpt")
        plugin.wait()
        assert f"/run/{name}.ckpt" in file_system.ls("/run", detail=False)
    plugin.remove_checkpoint("remembering://run/a.ckpt")
    plugin.wait()
    assert file_system.ls("/run", detail=False) == ["/run/b.ckpt"]
    plugin.teardown()


def test_forgotten_where_events_show_less_than_was_written(file_system: Remembering) -> None:
    """A name that looks as if it held a signature is forgotten by what it is, not by what is shown of it."""
    file_system.dircache["/run?sig=1"] = []
    with AsyncCheckpointIO() as plugin:
        plugin.save_checkpoint({"step": 1}, "remembering://run?sig=1/a.ckpt")
    assert "/run?sig=1" not in file_system.dircache
