"""What ``import async_ckpt`` may cost and pull in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

#: Imported by nobody but the user, or by us only for a URL or a plugin that needs it.
UNWANTED = frozenset(
    {
        "adlfs",
        "aiohttp",
        "async_ckpt.sharded",
        "gcsfs",
        "hypothesis",
        "lightning",
        "lightning_fabric",
        "pytest",
        "pytorch_lightning",
        "s3fs",
        "sklearn",
        "torch.distributed",
        "torch_xla",
        "trio",
    }
)
LIMIT_SECONDS = 0.050


def _python(code: str, *, byte_code: Path | None = None) -> str:
    """Run *code* in a fresh interpreter, keeping byte code in a folder where one is given; return what it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"PYTHONPYCACHEPREFIX": str(byte_code)} if byte_code else {"PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True, timeout=100
    )
    return done.stdout


def test_import_loads_no_optional_dependency() -> None:
    """``import async_ckpt`` loads neither Lightning nor any remote file system."""
    new = "set(sys.modules) - before"
    printed = _python(f"import sys, torch; before = set(sys.modules); import async_ckpt; print(*({new}))")
    assert set(printed.split()) & UNWANTED == set()


def test_numpy_is_optional() -> None:
    """The package imports where there is no numpy."""
    _python("import sys; sys.modules['numpy'] = None; import torch, async_ckpt")


def test_import_is_quick(tmp_path: Path) -> None:
    """``import async_ckpt`` adds less than 50 ms to ``import torch``; on a slow machine, a twentieth of that.

    Byte code is there, as an installed package has it. In processor time, and the least of up to twenty interpreters:
    what a busy neighbour adds is not our import.
    """
    code = """if True:
        import gc
        from time import process_time
        gc.disable()  # a pass over what torch has made, a tenth of a second, comes due with whoever imports next
        start = process_time()
        import torch
        between = process_time()
        import async_ckpt
        print(between - start, process_time() - between)
    """
    _python("import torch, async_ckpt", byte_code=tmp_path)
    seconds = (map(float, _python(code, byte_code=tmp_path).split()) for _ in range(20))
    assert any(ours < max(LIMIT_SECONDS, of_torch / 20) for of_torch, ours in seconds)
