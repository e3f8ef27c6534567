"""The tables of ``docs/performance.md``, from the recorded samples.

Guarantees: what stands between ``<!-- table: NAME -->`` and ``<!-- end of table -->`` is what the samples give, and
nothing else of the page changes. What does not belong here: charts, which need matplotlib (`charts`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from stress.bench import local_load, loop, page_cache, report, s3_report, sizes
from stress.bench.harness import MIB
from stress.bench.recording import PACKAGES, SAMPLES, read

__all__ = ["PAGE", "filled", "tables"]

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"

_TABLE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end of table -->)", flags=re.DOTALL)


def tables() -> dict[str, str]:
    """Return every table of the page, by its name there."""
    local, s3, trainings = (read(SAMPLES / f"{name}.json") for name in ("local", "s3", "loop"))
    cache = read(SAMPLES / "page_cache.json")
    return {
        "machine": _machine([read(path) for path in sorted(SAMPLES.glob("*.json"))]),
        **report.tables(local["samples"], state_bytes=int(local["parameters"]["size_gib"] * 1024 * MIB)),
        "s3-load": s3_report.tables(s3["samples"], nbytes=s3["parameters"]["mib"] * MIB)["s3-load"],
        **{
            loop.TRAININGS[training].table: loop.training_table(contestants)
            for training, contestants in trainings["samples"].items()
        },
        "sizes": sizes.report(read(SAMPLES / "sizes.json")["samples"]),
        "page-cache": page_cache.size_table(cache["samples"], max(cache["parameters"]["mib"])),
        "load": local_load.report(read(SAMPLES / "local_load.json")["samples"]),
    }


def _machine(recordings: list[dict[str, Any]]) -> str:
    """Return in words what kind of machine the recordings are of.

    Raises:
        ValueError: they are of different ones.
    """
    facts: dict[str, Any] = {}
    for recording in recordings:
        for name, value in recording["machine"].items():
            if name != "disk" and facts.setdefault(name, value) != value:
                raise ValueError(f"some recordings are of {name} {value}, others of {facts[name]}")
    (disk,) = {recording["machine"]["disk"] for recording in recordings} - {
        "tmpfs"
    }  # servers may keep data in one
    packages = ", ".join(f"{name} {facts[name]}" for name in PACKAGES if name in facts)
    return (
        f"{facts['cpus']} CPUs ({facts['architecture']}), {facts['memory_gib']} GiB of memory, "
        f"{facts['gpu'] or 'no GPU'}, {disk} on a virtual disk, {facts['system']}; "
        f"Python {facts['python']}, {packages}. "
        f"Recorded on {max(recording['recorded'] for recording in recordings)}, in {_rounds(recordings)} rounds."
    )


def _rounds(recordings: list[dict[str, Any]]) -> str:
    """Return how many rounds there are of each part."""
    counts: set[int] = set()
    waiting = [recording["samples"] for recording in recordings]
    while waiting:
        for part in waiting.pop().values():
            if isinstance(part, list):
                counts.add(len(part))
            else:
                waiting.append(part)
    return f"{min(counts)} to {max(counts)}" if len(counts) > 1 else f"{counts.pop()}"


def filled(text: str) -> str:
    """Return the page with every table made anew.

    Raises:
        KeyError: there is no table of a name that the page asks for.
    """
    made = tables()
    return _TABLE.sub(lambda found: f"{found[1]}\n{made[found[2]]}\n\n{found[3]}", text)
