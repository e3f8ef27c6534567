"""The pictures that are drawn from something are what that something gives."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from docs import package_map
from stress.bench import page

DOCS = Path(__file__).parents[2] / "docs"
CHARTS = ("overview", "stall", "loop", "steps", "memory", "load")


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


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", CHARTS)
def test_a_chart_is_what_the_samples_give(name: str, theme: str) -> None:
    """Each chart is drawn from the recorded samples; ``python -m stress.bench.charts`` draws it again."""
    pytest.importorskip("matplotlib", reason="matplotlib, of the group docs, is not installed")
    from stress.bench import charts
    from stress.bench.chart_style import THEMES, rendered

    (paper,) = (each for each in THEMES if each.name == theme)
    kept = charts.STATIC / f"{name}-{theme}.svg"
    assert kept.read_text(encoding="utf-8") == rendered(charts.CHARTS[name], paper)


def test_every_chart_is_looked_at() -> None:
    """There is no chart that the test above leaves out."""
    pytest.importorskip("matplotlib", reason="matplotlib, of the group docs, is not installed")
    from stress.bench import charts

    assert tuple(charts.CHARTS) == CHARTS


def test_the_tables_are_what_the_samples_give() -> None:
    """The tables of the page about performance hold the samples' figures, and each of them is shown."""
    text = page.PAGE.read_text(encoding="utf-8")
    assert text == page.filled(text)
    assert set(re.findall(r"<!-- table: ([\w-]+) -->", text)) == set(page.tables())


@pytest.mark.parametrize("path", sorted(DOCS.glob("*.md")), ids=lambda path: path.stem)
def test_pictures_come_for_light_and_for_dark_paper(path: Path) -> None:
    """A page shows each picture that there is for both papers on both, with words for those who see neither."""
    images = re.findall(
        r"```{image} (_static/\S+)\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL
    )
    shown = {source: options for source, options in images if re.search(r"-(light|dark)\.svg$", source)}
    for source, options in shown.items():
        theme = source.removesuffix(".svg").rpartition("-")[2]
        assert f":class: only-{theme}" in options
        assert re.search(r":alt: \S+", options)
        assert source.replace(f"-{theme}", "-light" if theme == "dark" else "-dark") in shown
        assert (DOCS / source).exists()
