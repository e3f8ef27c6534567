"""Recordings: samples of one benchmark in a JSON file, with what kind of machine they are of.

Guarantees: a recording grows by whole rounds, and only by rounds of the same kind of machine, versions and
parameters, so that ratios within a round mean something. It holds no name of a host or a user, and no path.

What does not belong here: what is measured, and what is made of it (`report`, `charts`).
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

__all__ = ["PACKAGES", "SAMPLES", "machine", "read", "record"]

SAMPLES = Path(__file__).parent / "samples"
"""Where the recordings are that the documentation is made from."""

PACKAGES = ("async-ckpt", "torch", "pytorch-lightning", "s3fs", "obstore")
_DIGITS = 6


def machine(directory: Path | str | None = None) -> dict[str, Any]:
    """Return what a reader needs to know of this machine, and of the disk that *directory* is on."""
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "architecture": platform.machine(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "disk": _file_system(Path(directory or ".").resolve()),
        "system": platform.system(),
        "python": ".".join(platform.python_version_tuple()[:2]),
        **{name: found for name in PACKAGES if (found := _version(name))},
    }


def record(
    path: Path, samples: Mapping[str, Any], *, parameters: Mapping[str, Any], where: Path | str | None = None
) -> Any:
    """Add *samples* to the recording at *path*, or begin one.

    Args:
        path: of the JSON file.
        samples: lists of samples, one a round, in dictionaries by name.
        parameters: what was asked for; the number of rounds and the order are not among it.
        where: the directory that was written to.

    Returns:
        every sample that the recording holds now.

    Raises:
        ValueError: the recording is of another machine, other versions or other parameters.
    """
    facts = machine(where)
    asked = json.loads(json.dumps(parameters))
    kept: dict[str, Any] = {}
    if path.exists():
        earlier = read(path)
        for what, now in (("machine", facts), ("parameters", asked)):
            if earlier[what] != now:
                raise ValueError(
                    f"{path}: was recorded with {earlier[what]}, and this is {now}; remove it to begin anew"
                )
        kept = earlier["samples"]
    recording = {
        "recorded": datetime.now(timezone.utc).date().isoformat(),
        "machine": facts,
        "parameters": asked,
        "samples": _joined(kept, _rounded(samples)),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_text(recording) + "\n", encoding="utf-8")
    return recording["samples"]


def read(path: Path) -> dict[str, Any]:
    """Return the recording at *path*: ``recorded``, ``machine``, ``parameters`` and ``samples``."""
    recording: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return recording


def _joined(these: Any, those: Any) -> Any:
    if isinstance(those, Mapping):
        return {
            **these,
            **{name: _joined(these.get(name, type(more)()), more) for name, more in those.items()},
        }
    return [*these, *those]


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(each) for each in value]
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value


def _text(value: Any, indent: str = "") -> str:
    """Return JSON with a line for each sample, so that a diff shows what came along."""
    inner = indent + " "
    if isinstance(value, Mapping) and (indent == "" or all(map(_holds_more, value.values()))):
        parts = [f"{inner}{json.dumps(name)}: {_text(each, inner)}" for name, each in value.items()]
        return "{\n" + ",\n".join(parts) + f"\n{indent}}}"
    if isinstance(value, list) and value and all(isinstance(each, Mapping) for each in value):
        return "[\n" + ",\n".join(inner + json.dumps(each) for each in value) + f"\n{indent}]"
    return json.dumps(value)


def _holds_more(value: Any) -> bool:
    return isinstance(value, (Mapping, list))


def _file_system(directory: Path) -> str:
    """Return the kind of file system that *directory* is on, as the kernel calls it."""
    mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    around = [(len(point), kind) for point, kind in mounts if directory.is_relative_to(point)]
    return max(around, default=(0, "unknown"))[1]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
