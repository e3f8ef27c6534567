"""A hostile user of the same machine, in a directory in which both may create files, such as ``/tmp``.

He reads what he can, and puts links, pipes, directories and files where checkpoints, links and temporary files of ours
are, or will be. Ours are nobody else's to read (umask 077). Then:

* nothing of ours is read by him, and nothing that is ours, elsewhere, changes;
* what he has put somewhere may make a request fail, with an error; it is not written to, nor waited for;
* what was durable in the shared directory itself is there, for its owner alone; no temporary file of ours is left.

A directory of his own is his: what is saved in there he may take away, but neither read nor lead elsewhere.
"""

from __future__ import annotations

import faulthandler
import os
import stat
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from random import Random

import torch

from async_ckpt import CheckpointService, FlushTimeoutError, Handle
from async_ckpt.stores import locate
from async_ckpt.timeline import Timeline
from stress.checker import lies_in
from stress.children import child
from stress.intruder import intrude
from stress.workload import digest

__all__ = ["besiege_once", "broken", "picture", "reason_for_none"]

NAMES = ("a.ckpt", "b.ckpt", "last.ckpt", "sub/c.ckpt", "sub/deep/d.ckpt")
_LAST = "last.ckpt"
_CALLS = 60
_CALLS_OF_ONE_SERVICE = 12
_FLOATS = (10, 30_000)
_PATIENCE_SECONDS = 30.0  # all of this is a matter of milliseconds


def reason_for_none() -> str:
    """Return why there cannot be a second user here; an empty string if there can."""
    if os.geteuid() != 0:
        return "only root can be two users"
    temporary = Path(tempfile.gettempdir()).resolve()
    for folder in (temporary, *temporary.parents):
        if not folder.stat().st_mode & stat.S_IXOTH:
            return f"others may not enter {folder}"
    return ""


def besiege_once(random: Random, tally: Counter[str]) -> list[str]:
    """Work beside the other user for a while, and return what is wrong.

    Args:
        random: decides what both do, not when.
        tally: is told what came of it.
    """
    with _private_umask(), tempfile.TemporaryDirectory(prefix="async_ckpt-stress-") as directory:
        shared, private = Path(directory, "shared"), Path(directory, "private")
        os.chmod(directory, 0o711)
        for folder, mode in ((shared, 0o1777), (private, 0o711), (private / "kept", 0o700)):
            folder.mkdir()
            folder.chmod(mode)
        for name in ("precious", "c.ckpt", "kept/d.ckpt"):
            (private / name).write_text("precious")
        before = picture(private)
        besieged = _Besieged(shared, random)
        with child(intrude, shared, private, NAMES, random.getrandbits(64)) as intruder:
            next(intruder.words(seconds=0.0))  # he is there
            worker = threading.Thread(target=besieged.work, name="besieged", daemon=True)
            worker.start()
            worker.join(_PATIENCE_SECONDS * 2)
            if not intruder.is_alive():
                raise RuntimeError("the second user has died of what he did")
            said = list(intruder.kill())
        tally.update(besieged.tally)
        tally["hostile acts"] += sum(word for word in said if isinstance(word, int))
        found = [f"a second user {word}" for word in said if isinstance(word, str)]
        if worker.is_alive():
            faulthandler.dump_traceback()
            return [*found, "B2: what a second user has put somewhere is waited for"]
        if (after := picture(private)) != before:
            found.append(f"what is private was {before}, and is {after}")
        return [*found, *besieged.wrong, *broken(shared, besieged.durable)]


@contextmanager
def _private_umask() -> Iterator[None]:
    """Have new files be their owner's alone for the time of a block."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def picture(folder: Path) -> dict[str, tuple[int, int, int, str]]:
    """Return what is in a directory, and whose it is."""
    found = {}
    for path in (folder, *sorted(folder.rglob("*"))):
        now = path.lstat()
        content = path.read_text(errors="replace")[:20] if stat.S_ISREG(now.st_mode) else ""
        found[str(path.relative_to(folder))] = (now.st_ino, now.st_mode, now.st_uid, content)
    return found


def broken(shared: Path, durable: Mapping[str, str]) -> Iterator[str]:
    """Yield what is wrong with what is there in the end.

    Args:
        shared: the directory in which both put something.
        durable: the digest of what was told to be durable, by its name; in a directory of his own, the other user may
            have done anything to it since.
    """
    for name, content in durable.items():
        path = shared / name
        if path.parent != shared:
            continue
        found = path.lstat() if os.path.lexists(path) else None
        if found is None or found.st_uid != os.geteuid() or not stat.S_ISREG(found.st_mode):
            yield f"D1: {name} was durable, and is gone"
        elif digest(torch.load(path, weights_only=True)) != content:
            yield f"D1: {name} was durable, and is another state"
    for path in shared.rglob("*"):
        found = path.lstat()
        if found.st_uid == os.geteuid() and stat.S_ISREG(found.st_mode):
            if found.st_mode & 0o077:
                yield f"{path.name} is open to others: {stat.filemode(found.st_mode)}"
            if path.name.endswith(".tmp"):
                yield f"D2: {path.name} is left behind"


class _Besieged:
    """What this process does.

    Args:
        shared: where.
        random: its own.

    Attributes:
        tally: what came of it.
        wrong: what is wrong already.
        durable: the digest of what was told to be durable, by its name.
    """

    def __init__(self, shared: Path, random: Random) -> None:
        self.tally: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._shared = shared
        self._random = random
        self.durable: dict[str, str] = {}
        self._state = {"number": 0, "weights": [torch.zeros(0)], "view": torch.zeros(1)}

    def work(self) -> None:
        """Make the calls, one after the other."""
        for _ in range(_CALLS // _CALLS_OF_ONE_SERVICE):
            timeline = Timeline(self._shared / "trace.json")
            with CheckpointService(observer=timeline, part_size="64KiB", on_error="warn") as service:
                steps = (self._save, self._remove, self._link, self._load)
                for step in self._random.choices(steps, weights=(6, 3, 2, 2), k=_CALLS_OF_ONE_SERVICE):
                    step(service, self._random.choice(NAMES))
            with self._counted("timelines"):
                timeline.write()

    def _save(self, service: CheckpointService, name: str) -> None:
        self._state["number"] = number = self._random.getrandbits(60)
        self._state["weights"] = [torch.full((self._random.choice(_FLOATS),), float(number % 1000))]
        path = os.path.realpath(self._shared / name)  # a link of ours is followed
        with self._counted("saves"):
            self._await(service.save(self._state, self._shared / name))
            self.durable[os.path.relpath(path, self._shared)] = digest(self._state)

    def _remove(self, service: CheckpointService, name: str) -> None:
        name = self._random.choice([name, "sub"])
        for each in [each for each in self.durable if lies_in(each, name)]:
            del self.durable[each]
        with self._counted("removals"):
            self._await(service.remove(self._shared / name))

    def _link(self, service: CheckpointService, name: str) -> None:
        if name != _LAST:  # as the plugin does it
            link, target = (locate(self._shared / each, follow=False) for each in (_LAST, name))
            self.durable.pop(_LAST, None)
            with self._counted("links"):
                self._await(service.submit_link(link, target))

    def _load(self, service: CheckpointService, name: str) -> None:
        with self._counted("loads"):
            service.load(self._shared / name)

    def _await(self, handle: Handle) -> None:
        handle.wait(_PATIENCE_SECONDS)

    @contextmanager
    def _counted(self, what: str) -> Iterator[None]:
        try:
            yield
        except FlushTimeoutError as error:
            self.wrong.append(f"B2: {error}")
        except Exception:
            self.tally[f"besieged: {what} refused"] += 1
        else:
            self.tally[f"besieged: {what}"] += 1
