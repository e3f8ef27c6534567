"""The README's table of options is the code's."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from async_ckpt import RetryPolicy, ServiceOptions

README = Path(__file__).parents[2] / "README.md"


def test_the_table_lists_every_option_with_its_default() -> None:
    """The README names every option, in the order of the code, with the default that it has."""
    section = README.read_text(encoding="utf-8").split("\n## Options\n")[1].split("\n## ")[0]
    table = re.findall(r"^\| `(\w+)` \| `(.+?)` \|", section, flags=re.MULTILINE)
    options = ServiceOptions()
    assert [name for name, _ in table] == [field.name for field in fields(ServiceOptions)]
    for name, default in table:
        value = getattr(options, name)
        written = default.replace('"', "'")
        assert written == (repr(value) if value != RetryPolicy() else "RetryPolicy()"), name
