"""The guard of ``tests/conftest.py`` is itself tested: what it does not see, no test would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parents[1] / "conftest.py"

LEAVES = {
    "thread": "threading.Thread(target=threading.Event().wait, name='forgotten', daemon=True).start()",
    "task": """
    async def forever(): await asyncio.Event().wait()
    async def main(): kept.append(kept[0].create_task(forever()))
    kept.append(asyncio.new_event_loop())
    kept[0].run_until_complete(main())
    """,
    "temporary file": "(tmp_path / '.async_ckpt.host.1.nonce.tmp').touch()",
    "descriptor": "kept.append(open(tmp_path / 'forgotten', 'w'))",
}


def _run(folder: Path, body: str) -> str:
    """Run a test with *body* under our conftest in another process; return what pytest says."""
    (folder / "conftest.py").write_text(CONFTEST.read_text())
    (folder / "test_it.py").write_text(
        f"import asyncio, threading\nkept = []\ndef test_it(tmp_path):\n    {body.strip()}\n"
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(folder),
        str(folder),
    ]
    environment = {**os.environ, "PYTHONPATH": str(CONFTEST.parents[1])}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60
    ).stdout


@pytest.mark.parametrize("what", LEAVES)
def test_guard_sees(what: str, tmp_path: Path) -> None:
    """A test that leaves something behind fails, and the message says what."""
    said = _run(tmp_path, LEAVES[what])
    assert f"left behind: {what}" in said


def test_guard_accepts_what_cleans_up(tmp_path: Path) -> None:
    """A test that uses threads, tasks and files, and ends them, passes."""
    body = """
    thread = threading.Thread(target=int); thread.start()
    asyncio.run(asyncio.sleep(0))
    (tmp_path / 'kept.ckpt').touch()
    """
    said = _run(tmp_path, body)
    assert "1 passed" in said
