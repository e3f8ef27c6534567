"""The default of memory_limit, from what bounds the memory of this process (B1)."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from async_ckpt.options import default_memory_limit
from async_ckpt.system.limits import smallest_bound
from tests.support import python

MIB = 1 << 20
V1 = "34 25 0:29 / /sys/fs/cgroup/memory rw,nosuid shared:15 - cgroup cgroup rw,memory"
V2 = "35 25 0:30 / /sys/fs/cgroup rw,nosuid,nodev shared:4 - cgroup2 cgroup2 rw,nsdelegate"
HYBRID = "36 25 0:31 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"
OTHERS = (
    "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n33 25 0:28 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct"
)


def tree(folder: Path, *, cgroup: str, mounts: list[str], files: dict[str, str]) -> Path:
    """Make a root directory that says these things."""
    texts = {"proc/self/cgroup": cgroup + "\n", "proc/self/mountinfo": "\n".join([OTHERS, *mounts]) + "\n"}
    for name, text in (texts | files).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


JOB = "/slurm/uid_1000/job_7/step_batch/task_0"
CASES = {
    "Slurm, version 1": (
        f"4:memory:{JOB}\n1:cpu,cpuacct:/\n0::/",
        [V1, HYBRID],
        {
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            f"sys/fs/cgroup/memory{JOB}/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/slurm/uid_1000/job_7/memory.limit_in_bytes": f"{800 * MIB}\n",
        },
        f"/sys/fs/cgroup/memory{Path(JOB).parents[1]}/memory.limit_in_bytes",
    ),
    "systemd, version 2": (
        "0::/system.slice/slurmstepd.scope/job_7/step_0/user/task_0",
        [V2],
        {
            "sys/fs/cgroup/system.slice/memory.max": "max\n",
            "sys/fs/cgroup/system.slice/slurmstepd.scope/job_7/memory.max": f"{800 * MIB}\n",
            "sys/fs/cgroup/system.slice/slurmstepd.scope/job_7/step_0/user/task_0/memory.max": "max\n",
            "sys/fs/cgroup/system.slice/slurmstepd.scope/job_7/memory.high": f"{900 * MIB}\n",
        },
        "/sys/fs/cgroup/system.slice/slurmstepd.scope/job_7/memory.max",
    ),
    "memory.high": (
        "0::/user.slice/run.scope",
        [V2],
        {
            "sys/fs/cgroup/user.slice/memory.max": f"{900 * MIB}",
            "sys/fs/cgroup/user.slice/run.scope/memory.high": f"{800 * MIB}",
        },
        "/sys/fs/cgroup/user.slice/run.scope/memory.high",
    ),
    "a container with a namespace, version 2": (
        "0::/",
        [V2],
        {"sys/fs/cgroup/memory.max": f"{800 * MIB}\n"},
        "/sys/fs/cgroup/memory.max",
    ),
    "a container without a namespace, version 1": (
        "4:memory:/docker/abc/own",
        [V1.replace("0:29 / ", "0:29 /docker/abc ")],
        {
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{800 * MIB}\n",
            "sys/fs/cgroup/memory/own/memory.limit_in_bytes": f"{900 * MIB}\n",
        },
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
    ),
    "a group that is not in what is mounted": (
        "4:memory:/kubepods/pod1",
        [V1.replace("0:29 / ", "0:29 /docker/abc ")],
        {"sys/fs/cgroup/memory/memory.limit_in_bytes": f"{800 * MIB}\n"},
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
    ),
    "a group outside the namespace": (
        "0::/../../job",
        [V2],
        {"sys/fs/cgroup/memory.max": f"{800 * MIB}\n", "job/memory.max": "1"},
        "/sys/fs/cgroup/memory.max",
    ),
    "a second mount, of another group": (
        "4:memory:/mine",
        [V1, V1.replace("0:29 / /sys/fs/cgroup/memory", "0:29 /other /mnt/other")],
        {
            "sys/fs/cgroup/memory/mine/memory.limit_in_bytes": f"{800 * MIB}\n",
            "mnt/other/memory.limit_in_bytes": f"{100 * MIB}\n",
        },
        "/sys/fs/cgroup/memory/mine/memory.limit_in_bytes",
    ),
    "groups around a container, version 1": (
        "4:memory:/",
        [V1],
        {
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.stat": f"rss 5\nhierarchical_memory_limit {800 * MIB}\ntotal_rss 5\n",
        },
        "hierarchical_memory_limit in /sys/fs/cgroup/memory/memory.stat",
    ),
    "names with spaces": (
        "0::/my job",
        [V2.replace("/sys/fs/cgroup", "/sys/c\\040group")],
        {"sys/c group/my job/memory.max": f"{800 * MIB}\n"},
        "/sys/c group/my job/memory.max",
    ),
    "both versions": (
        "4:memory:/a\n0::/b",
        [V1, HYBRID],
        {
            "sys/fs/cgroup/memory/a/memory.limit_in_bytes": f"{900 * MIB}\n",
            "sys/fs/cgroup/unified/b/memory.max": f"{800 * MIB}\n",
        },
        "/sys/fs/cgroup/unified/b/memory.max",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_control_groups(name: str, tmp_path: Path) -> None:
    """The smallest bound of all groups that the process is in counts, wherever they are mounted, and is named."""
    cgroup, mounts, files, source = CASES[name]
    root = tree(tmp_path, cgroup=cgroup, mounts=mounts, files=files)
    bound = smallest_bound(root)
    assert (bound.nbytes, bound.source) == (800 * MIB, source)
    assert default_memory_limit(root) == 400 * MIB


NOTHING = {
    "nothing": ("", [], {}),
    "no bound": ("0::/a", [V2], {"sys/fs/cgroup/a/memory.max": "max\n", "sys/fs/cgroup/a/memory.high": "max"}),
    "unlimited": ("4:memory:/", [V1], {"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712"}),
    "junk": ("0::/a", [V2], {"sys/fs/cgroup/a/memory.max": "-1\n", "sys/fs/cgroup/a/memory.high": "١٢"}),
    "zero": ("0::/a", [V2], {"sys/fs/cgroup/a/memory.max": "0\n", "sys/fs/cgroup/memory.max": ""}),
    "odd lines": (
        ":::\n\n0\n0::relative\n7:memory",
        ["", "x - cgroup2", "1 2 3 / - cgroup", "a b c d e f - cgroup x", "1 2 3 / /sys - cgroup2"],
        {},
    ),
    "a folder for a file": ("0::/a", [V2], {"sys/fs/cgroup/a/memory.max/x": "1"}),
    "no such group": ("0::/gone/too", [V2], {}),
    "not mounted": ("0::/a", [], {"sys/fs/cgroup/a/memory.max": "1"}),
    "another controller": (
        "4:memory:/",
        [V1.replace("rw,memory", "rw,cpu")],
        {"sys/fs/cgroup/memory/memory.limit_in_bytes": "1"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NOTHING)
def test_no_bound(name: str, tmp_path: Path) -> None:
    """Where no group sets a bound, or none that can be understood, the machine's memory is left."""
    cgroup, mounts, files = NOTHING[name]
    bound = smallest_bound(tree(tmp_path, cgroup=cgroup, mounts=mounts, files=files))
    soft = resource.getrlimit(resource.RLIMIT_AS)[0]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert bound.nbytes == (memory if soft == resource.RLIM_INFINITY else min(soft, memory))


def test_files_that_may_not_be_read(tmp_path: Path) -> None:
    """A group that this user may not read sets no bound, and is no error."""
    files = {"sys/fs/cgroup/a/memory.max": "1", "sys/fs/cgroup/memory.max": f"{800 * MIB}"}
    root = tree(tmp_path, cgroup="0::/a", mounts=[V2], files=files)
    hidden = root / "sys/fs/cgroup/a/memory.max"
    hidden.unlink()
    hidden.symlink_to(hidden)  # not even root can read that
    assert smallest_bound(root).nbytes == 800 * MIB


def test_address_space() -> None:
    """RLIMIT_AS counts, and a debug line names what does."""
    done = python(
        """
        import logging, resource
        from async_ckpt import CheckpointService
        resource.setrlimit(resource.RLIMIT_AS, (1 << 32, 1 << 32))
        logging.basicConfig(level=logging.DEBUG, format="%(name)s %(message)s")
        with CheckpointService(max_concurrent_parts=1) as service:
            print(service.options.memory_limit_bytes <= 1 << 31)
        """
    )
    assert done.stdout == "True\n", done.stderr
    line = next(line for line in done.stderr.splitlines() if "memory_limit" in line)
    assert line.startswith("async_ckpt.options memory_limit is ")


def test_a_real_group() -> None:
    """A process that is put into a group with a bound has half of it."""
    made = _group_of_ours(800 * MIB)
    try:
        done = python(
            """
            import os, sys
            with open(sys.argv[1] + "/cgroup.procs", "w") as members:
                members.write(str(os.getpid()))
            from async_ckpt.options import default_memory_limit
            print(default_memory_limit())
            """,
            made,
        )
    finally:
        made.rmdir()
    assert done.stdout == f"{400 * MIB}\n", done.stderr


def _group_of_ours(nbytes: int) -> Path:
    """Make a control group; skip the test where that is not allowed."""
    tried = []
    for line in (
        Path("/proc/self/cgroup").read_text().splitlines() if Path("/proc/self/cgroup").exists() else ()
    ):
        _, controllers, path = line.split(":", 2)
        place = {"memory": "memory", "": ""}.get(controllers)
        if place is None:
            continue
        made = Path("/sys/fs/cgroup", place, path.lstrip("/"), f"async_ckpt-test-{os.getpid()}")
        try:
            made.mkdir()
        except OSError as error:
            tried.append(str(error))
            continue
        try:
            (made / ("memory.limit_in_bytes" if place else "memory.max")).write_text(str(nbytes))
        except OSError as error:
            made.rmdir()
            tried.append(str(error))
        else:
            return made
    pytest.skip(f"no control group can be made here: {tried}")
