"""Every Python block of the README and of the site runs, in the order of its page, with one namespace a page.

Only fences that say ``python`` are run. A block that needs an account or a server stands behind
``<!-- skip: next "the reason" -->``.
"""

from __future__ import annotations

import re
import unittest
from pathlib import Path

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
LANGUAGES = {"console", "ini", "json", "python", "text", "toml", "yaml"}

sybil = Sybil(parsers=[PythonCodeBlockParser(), SkipParser()])


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python blocks of a page run as they stand."""
    monkeypatch.chdir(tmp_path)
    for example in sybil.parse(page).examples():
        try:
            example.evaluate()
        except unittest.SkipTest:  # this block only; those after it count
            continue


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_fences_name_a_language(page: Path) -> None:
    """Every fence names a language that we know or is a directive, so none escapes being run by a slip."""
    fences = re.findall(r"^ *```(.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(fences) % 2 == 0
    opened = [fence.strip() for fence in fences[::2]]
    assert [fence for fence in opened if fence not in LANGUAGES and not fence.startswith("{")] == []
    assert set(fences[1::2]) <= {""}


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_skips_say_why(page: Path) -> None:
    """Every skipped block says why it is skipped, and skips itself only."""
    skips = re.findall(r"<!--+\s*skip:(.*)-->", page.read_text(encoding="utf-8"))
    assert [skip for skip in skips if not re.fullmatch(r'\s*next\s+".+"\s*', skip)] == []
