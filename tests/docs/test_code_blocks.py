"""Every Python block of the README and of the site runs, in the order of its page, with one namespace a page.

Only fences that say ``python`` are run. A URL in a bucket leads to a real server, and there is a bucket of that name;
pages with such URLs are skipped where no servers are installed. A block that needs more than that stands behind
``<!-- skip: next "the reason" -->``.
"""

from __future__ import annotations

import re
import unittest
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import fsspec
import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

from tests.environment import found_by_environment

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "docs/stores").glob("*.md"),
    ]
)
LANGUAGES = {"console", "ini", "json", "python", "text", "toml", "yaml"}

SERVERS = {
    "s3": "seaweedfs",
    "s3a": "seaweedfs",
    "gs": "fake_gcs",
    "gcs": "fake_gcs",
    "abfs": "azurite",
    "az": "azurite",
}

sybil = Sybil(parsers=[PythonCodeBlockParser(), SkipParser()])


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _buckets(page: Path) -> set[tuple[str, str]]:
    """Return protocol and bucket of every URL in a block of *page* that runs."""
    text = re.sub(r"<!--+\s*skip:.*?```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    return set(re.findall(rf"""["']({"|".join(SERVERS)})://([\w.-]+)/""", "".join(blocks)))


@pytest.fixture
def storage(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[None]:
    """The servers and the buckets that *page* speaks of; emptied afterwards."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with ExitStack() as stack:
        found = set()
        for protocol, bucket in sorted(_buckets(page)):
            server = request.getfixturevalue(SERVERS[protocol])
            if server.url not in found:
                found.add(server.url)
                stack.enter_context(found_by_environment(server))
            server.make_bucket(bucket)
            stack.callback(_remove_bucket, f"{protocol}://{bucket}")
        yield


def _remove_bucket(url: str) -> None:
    file_system, bucket = fsspec.url_to_fs(url)
    file_system.invalidate_cache()
    for path in file_system.find(bucket):
        file_system.rm_file(path)
    file_system.rmdir(bucket)


@pytest.mark.parametrize("page", PAGES, ids=_name)
@pytest.mark.usefixtures("storage")
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
