"""A tox runner whose environments may be one folder.

tox rebuilds an environment that it finds made under another name. For our environments with torch that would
be a gigabyte and most of a minute each, so with ``runner = shared`` the name does not count; everything else
that tox compares (Python, requirements, the package) still does.

Should tox change inside, the worst is the rebuilding: every environment still works.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from tox.plugin import impl
from tox.tox_env.info import Info
from tox.tox_env.python.virtual_env.runner import VirtualEnvRunner
from tox.tox_env.register import ToxEnvRegister


class NamelessInfo(Info):
    """tox's record of what an environment was made of, less its name."""

    @contextmanager
    def compare(self, value: Any, section: str, sub_section: str | None = None) -> Iterator[Any]:
        """Compare *value* with what was recorded, and record it."""
        if isinstance(value, dict) and "name" in value:
            value = {**value, "name": "shared"}
        with super().compare(value, section, sub_section) as outcome:
            yield outcome


class SharedRunner(VirtualEnvRunner):
    """A virtual environment that others with the same ``env_dir`` use too."""

    @staticmethod
    def id() -> str:
        """Return what ``runner =`` says."""
        return "shared"

    @cached_property
    def cache(self) -> Info:
        """The record in the environment's folder."""
        return NamelessInfo(self.env_dir)


@impl
def tox_register_tox_env(register: ToxEnvRegister) -> None:
    """Make the runner known."""
    register.add_run_env(SharedRunner)
