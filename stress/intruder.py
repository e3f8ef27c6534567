"""The actions of the hostile user, in random order; uses only the standard library.

It says a number, how much it has done since it said one last, or what it should not have been able to do.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from random import Random
from time import sleep

from stress.children import Say

__all__ = ["intrude"]

_NOBODY = 65534
_MARK = b"planted"
_MOST_OPEN = 64
_LONGEST_PAUSE_SECONDS = 0.0003
_ACTS_A_WORD = 50
_TEMPORARY = re.compile(r"(\.async_ckpt\.[0-9a-f]+\.)([0-9]+)\.[0-9a-f]+\.tmp")


def intrude(say: Say, shared: Path, private: Path, names: Sequence[str], seed: int) -> None:
    """Become another user, and go on until killed.

    Args:
        say: tells the parent.
        shared: the directory in which both may put something.
        private: what is none of the other user's.
        names: where the parent works, in *shared*.
        seed: decides what is done.
    """
    os.setgroups([])
    os.setgid(_NOBODY)
    os.setuid(_NOBODY)
    os.umask(0)
    signal.signal(signal.SIGIO, signal.SIG_IGN)  # so he is told that somebody waits for a file of his
    intruder = Intruder(shared, private, names, Random(seed))
    said: set[str] = set()
    while True:
        say(_ACTS_A_WORD)
        for _ in range(_ACTS_A_WORD):
            with suppress(OSError):
                intruder.act()
        for word in intruder.found - said:
            say(word)
            said.add(word)


class Intruder:
    """Plants files, and reads what it can.

    Args:
        shared: where both may put something.
        private: what it wants.
        names: at which the other one works.
        random: its own.

    Attributes:
        found: what it should not have come to.
    """

    def __init__(self, shared: Path, private: Path, names: Sequence[str], random: Random) -> None:
        self.found: set[str] = set()
        self._shared = shared
        self._private = private
        self._names = names
        self._random = random
        self._open: list[tuple[str, int]] = []

    def act(self) -> None:
        """Do one thing."""
        self._random.choice(
            (self._plant, self._plant, self._plant_directory, self.read, self.read_planted, self._tidy)
        )()
        sleep(self._random.uniform(0.0, _LONGEST_PAUSE_SECONDS))

    def _plant(self) -> None:
        ways: tuple[Callable[[str], object], ...] = (
            self._plant_link, self._plant_link, self.plant_pipe, self.plant_file, self._plant_held_file,
            self._plant_hard_link,
            self._plant_empty_directory,
        )  # fmt: skip
        self._random.choice(ways)(self._place())

    def _place(self) -> str:
        """Return a path at which something of the other's may come to be."""
        files = [name for name in self._names if "/" not in name]
        names = [*files, "sub", "trace.json", ".timeline.0123456789abcdef.tmp"]
        for entry in os.scandir(self._shared):
            if matched := _TEMPORARY.fullmatch(entry.name):  # of that process, or of one that lives no more
                pid = self._random.choice([matched[2], "4194304"])
                names += [f"{matched[1]}{pid}.{self._random.getrandbits(64):016x}.tmp"] * 2
                of = f"{self._random.choice(files)}.previous-{matched[1].split('.')[2]}"
                names.append(f"{of}.{pid}.{self._random.getrandbits(32):08x}")
        return str(self._shared / self._random.choice(names))

    def _plant_link(self, path: str) -> None:
        targets = ["precious", "c.ckpt", "new.ckpt", "kept", "kept/d.ckpt", ".", "nothing/new.ckpt"]
        os.symlink(self._random.choice([str(self._private / name) for name in targets] + [path]), path)

    def plant_pipe(self, path: str) -> None:
        """Put a pipe there, which whoever opens it waits at."""
        os.mkfifo(path, 0o666)
        if self._random.random() < 0.5:
            self._keep(path, os.open(path, os.O_RDONLY | os.O_NONBLOCK))

    def plant_file(self, path: str) -> int:
        """Put a file there that anybody may write to; return its descriptor."""
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        self._keep(path, fd)
        os.write(fd, _MARK)
        return fd

    def _plant_held_file(self, path: str) -> None:
        """Put one there that whoever opens it, or locks it, waits for."""
        fd = self.plant_file(path)
        if self._random.random() < 0.5:
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        else:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _plant_hard_link(self, path: str) -> None:
        ours = [entry.path for entry in os.scandir(self._shared)]
        os.link(self._random.choice([str(self._private / "precious"), *ours]), path, follow_symlinks=False)

    def _plant_empty_directory(self, path: str) -> None:
        os.mkdir(path)

    def _plant_directory(self) -> None:
        """Put a directory where one is to be made, with links in it that were there before it came to that name.

        Nobody who saves into a directory is safe from its owner, who may exchange what is in it at any moment. This
        one never does.
        """
        made = self._shared / f"{self._random.getrandbits(64):x}"
        made.mkdir()
        if self._random.random() < 0.7:
            os.symlink(self._private / "c.ckpt", made / "c.ckpt")
        if self._random.random() < 0.7:
            os.symlink(self._private / self._random.choice(["kept", "nothing"]), made / "deep")
        try:
            made.rename(self._shared / "sub")
        except OSError:
            shutil.rmtree(made)

    def read(self) -> None:
        """Try to read everything that is not this user's."""
        for folder, _, names in os.walk(self._shared):
            for name in names:
                with suppress(OSError):
                    fd = os.open(os.path.join(folder, name), os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
                    try:
                        found = os.fstat(fd)
                        if stat.S_ISREG(found.st_mode) and found.st_uid != os.geteuid():
                            kind = "a temporary file" if name.endswith(".tmp") else name
                            self.found.add(f"may read {kind}, {stat.filemode(found.st_mode)}")
                    finally:
                        os.close(fd)

    def read_planted(self) -> None:
        """See whether somebody has written to what was planted."""
        for path, fd in self._open:
            with suppress(BlockingIOError):
                os.set_blocking(fd, False)
                regular = stat.S_ISREG(os.fstat(fd).st_mode)
                content = os.pread(fd, 100, 0) if regular else os.read(fd, 100)
                if content != (_MARK if regular else b""):
                    self.found.add(f"is written to: {os.path.basename(path)} holds {content[:8]!r}")

    def close(self) -> None:
        """Let go of what was planted."""
        while self._open:
            os.close(self._open.pop()[1])

    def _keep(self, path: str, fd: int) -> None:
        self._open.append((path, fd))
        if len(self._open) > _MOST_OPEN:
            os.close(self._open.pop(0)[1])

    def _tidy(self) -> None:
        """Take away what was planted at some place, so that the other one gets on."""
        path = self._place()
        if os.path.basename(path) == "sub":
            os.unlink(path)  # if it is no directory
        elif stat.S_ISDIR(os.lstat(path).st_mode):
            os.rmdir(path)
        else:
            os.unlink(path)
