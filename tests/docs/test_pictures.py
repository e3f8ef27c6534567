"""The pictures that are drawn from something are what that something gives."""

from __future__ import annotations

import pytest

from docs import package_map


@pytest.mark.parametrize("theme", package_map.THEMES)
def test_the_map_of_packages_is_current(theme: str) -> None:
    """The map is what the import contract and the imports give; ``python -m docs.package_map`` draws it again."""
    kept = package_map.STATIC / f"packages-{theme}.svg"
    assert kept.read_text(encoding="utf-8") == package_map.draw(theme)


def test_the_map_shows_every_package_once() -> None:
    """Each package and module of the top that imports or is imported has its box, those to come have theirs."""
    picture = package_map.draw("light")
    found = package_map.imports()
    for name in {*found, *package_map.PLANNED}:
        assert picture.count(f">{name}</text>") == 1, name
    assert {name for names in found.values() for name in names} <= {*found, "_version"}
