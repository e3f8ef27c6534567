"""Whose a temporary file is."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from async_ckpt.stores.leftovers import is_leftover, is_of_this_host, owner_is_dead, temporary_name


def dead_pid() -> int:
    """Return the id of a process that has ended and been waited for."""
    child = subprocess.Popen([sys.executable, "-S", "-c", ""])
    child.wait()
    return child.pid


def test_names_are_fresh_short_and_recognised() -> None:
    """Each name is new, fits anywhere, and is known as a leftover of this host."""
    first, second = temporary_name(), temporary_name()
    assert first != second
    assert len(first) < 64
    assert re.fullmatch(r"\.async_ckpt\.[0-9a-f]{12}\.\d+\.[0-9a-f]{16}\.tmp", first)
    assert is_leftover(first)
    assert is_of_this_host(first)


def test_other_names_are_not_ours() -> None:
    """A checkpoint, someone else's temporary file or a near miss is never a leftover."""
    for name in ("x.ckpt", ".async_ckpt.tmp", "x" + temporary_name(), temporary_name() + "x", ""):
        assert not is_leftover(name)
        assert not owner_is_dead(name)


def test_this_process_lives() -> None:
    """Our own files are not left over."""
    assert not owner_is_dead(temporary_name())


def test_a_process_that_ended_is_dead() -> None:
    """The file of a process that ended here is left over; of one elsewhere, nobody can tell."""
    own = f".{os.getpid()}."
    name = temporary_name().replace(own, f".{dead_pid()}.")
    assert owner_is_dead(name)
    host = name.split(".")[2]
    elsewhere = name.replace(host, "0" * len(host))
    assert not owner_is_dead(elsewhere)
    assert not is_of_this_host(elsewhere)


def test_a_process_of_another_user_lives() -> None:
    """A process that we may not signal runs all the same: the first one always does."""
    assert not owner_is_dead(temporary_name().replace(f".{os.getpid()}.", ".1."))
