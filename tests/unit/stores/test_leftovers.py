"""Whose a temporary file is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from async_ckpt.stores import leftovers
from async_ckpt.stores.leftovers import host_name, is_leftover, owner_is_dead, temporary_name


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


def test_a_process_of_another_user_lives() -> None:
    """A process that we may not signal runs all the same: the first one always does."""
    assert not owner_is_dead(temporary_name().replace(f".{os.getpid()}.", ".1."))


def shown(folder: Path, *, namespace: str = "pid:[4026532101]", boot: str = "6f1d") -> Path:
    """Return a directory that shows what ``/proc`` shows of containers and boots."""
    (folder / "self" / "ns").mkdir(parents=True)
    (folder / "sys" / "kernel" / "random").mkdir(parents=True)
    if namespace:
        (folder / "self" / "ns" / "pid").symlink_to(namespace)
    if boot:
        (folder / "sys" / "kernel" / "random" / "boot_id").write_text(f"{boot}\n")
    return folder


linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems give a process one id")


@linux
def test_containers_and_boots_are_told_apart(tmp_path: Path) -> None:
    """Containers of one host name have names of their own, also where a number is another system's as well (D2)."""
    one = host_name(shown(tmp_path / "one"))
    assert one == host_name(shown(tmp_path / "same"))
    others = {
        host_name(shown(tmp_path / "container", namespace="pid:[4026532102]")),
        host_name(shown(tmp_path / "host", namespace="pid:[4026531836]")),
        host_name(shown(tmp_path / "boot", boot="70aa")),
    }
    assert len(others | {one}) == 4


@linux
@pytest.mark.parametrize("missing", [{"namespace": ""}, {"boot": ""}, {"namespace": "", "boot": ""}])
def test_who_cannot_know_where_it_is_shares_no_name(tmp_path: Path, missing: dict[str, str]) -> None:
    """Where the system does not show enough, no other process has this one's name, so none is judged by its id (D2)."""
    proc = shown(tmp_path, **missing)
    assert host_name(proc) != host_name(proc)
    assert re.fullmatch("[0-9a-f]{12}", host_name(proc))


#: Run without the package, whose import takes seconds.
IN_A_CONTAINER = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("leftovers", {leftovers.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.temporary_name(), *map(module.owner_is_dead, sys.argv[1:]))
"""


@linux
@pytest.mark.parametrize("hidden", [True, False])
def test_another_container_judges_nobody(hidden: bool) -> None:
    """A process in another container, with ``/proc`` or without, takes no living process of ours for dead (D2)."""
    prepare = "mount -t tmpfs none /proc && " if hidden else "mount -t proc none /proc && "
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "--pid", "--fork", "sh", "-c"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*unshare, f"{prepare}true"], check=False).returncode
    ):
        pytest.skip("containers cannot be made here")

    def ask(*names: str) -> list[str]:
        command = f'{prepare}exec "$0" "$@"'
        program = [sys.executable, "-S", "-c", IN_A_CONTAINER, *names]
        return subprocess.run(
            [*unshare, command, *program], capture_output=True, text=True, check=True
        ).stdout.split()

    living = temporary_name()
    nearly = living.replace(f".{os.getpid()}.", ".4000000.")  # a process that surely is not in there
    name, *dead = ask(living, nearly)
    assert dead == ["False", "False"]
    assert ask(name)[1:] == ["False"], "another one, of an id that is given out in both"
    assert not owner_is_dead(name.replace(name.split(".")[3], "4000000"))


@linux
def test_a_forked_child_is_where_it_is(tmp_path: Path) -> None:
    """A child asks anew: it may be the first process of another container, with its parent's own id."""
    before = leftovers._host.cache_info().misses
    temporary_name()
    pid = os.fork()
    if pid == 0:
        os._exit(leftovers._host.cache_info().currsize)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert leftovers._host.cache_info().misses - before <= 1
