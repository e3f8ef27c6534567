"""The map of packages, drawn from the import contract and from the imports: ``python -m docs.package_map``.

Guarantees: rows are the layers of the contract in ``pyproject.toml``, the small names in a box those of the contracts
about that package, and arrows are imports, less those that a chain of others makes up for. All of that is read, so a
test can say that the pictures are current. Where a box stands in its row is said here, by hand, and so is what comes
next (``PLANNED``).
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import tomllib

__all__ = ["THEMES", "draw", "imports"]

ROOT = Path(__file__).parent.parent
PACKAGE = "async_ckpt"
STATIC = ROOT / "docs" / "_static"

#: What a box of each kind looks like: paper, line and text of boxes, small text, arrows.
THEMES = {
    "light": {"box": "#eef4fb", "line": "#2f6db5", "ink": "#1f2328", "small": "#4d5761", "arrow": "#6e7781"},
    "dark": {"box": "#1b2a3d", "line": "#6aa5ea", "ink": "#e6edf3", "small": "#a9b4bf", "arrow": "#8b949e"},
}

#: The middle of a box and its width; a package that is not here gets the first free place of its row.
PLACES = {
    "lightning": (62, 104),
    "testing": (446, 104),
    "functions": (212, 104),
    "service": (212, 104),
    "sharded": (330, 104),
    "engine": (212, 236),
    "format": (282, 150),
    "snapshot": (530, 100),
    "stores": (402, 136),
    "options": (306, 104),
    "timeline": (62, 104),
    "telemetry": (190, 104),
    "events": (62, 104),
    "handle": (190, 104),
    "retry": (306, 104),
    "errors": (370, 104),
    "system": (500, 104),
}

#: What comes next: beside which package, and where in that row.
PLANNED = {"command line": ("lightning", 262, 132)}

WIDTH, GAP, LINE, TOP = 592, 22, 15, 12
_SMALL_CHARACTER = 6.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A package, or one to come, in its place."""

    name: str
    rooms: tuple[str, ...]
    middle: float
    top: float
    width: float
    height: float
    planned: bool = False


def contracts() -> dict[str, list[list[str]]]:
    """Return the layers of each contract, from the top down, by the package that it is about."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        found: list[dict[str, Any]] = tomllib.load(file)["tool"]["importlinter"]["contracts"]
    layers = {
        contract["containers"][0].removeprefix(PACKAGE).lstrip("."): [
            [name for part in layer.split("|") if (name := part.strip()) != "_version"]
            for layer in contract["layers"]
        ]
        for contract in found
        if contract["type"] == "layers"
    }
    for contract in found:
        if contract["type"] == "independence":
            parents, names = zip(*(module.rsplit(".", 1) for module in contract["modules"]), strict=True)
            layers[parents[0].removeprefix(f"{PACKAGE}.")] = [sorted(names)]
    return layers


def imports() -> dict[str, set[str]]:
    """Return which of the top-level packages and modules each of them imports, wherever in it."""
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        importer = path.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py")
        if importer not in ("__init__", "_version"):  # names handed on, and a number
            found.setdefault(importer, set()).update(set(_imported(path)) - {importer})
    return found


def draw(theme: str) -> str:
    """Return the picture, as SVG, for light or for dark paper."""
    layers = contracts()
    boxes, height = _boxes(layers)
    parts = [_style(THEMES[theme]), f"<title>{escape(_summary(layers['']))}</title>"]
    for importer, imported in _essential(imports()):
        parts.append(_arrow(boxes[importer], boxes[imported]))
    for box in boxes.values():
        parts += _shape(box)
    size = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">\n' + "\n".join(parts) + "\n</svg>\n"


# -- what imports what


def _imported(path: Path) -> Iterator[str]:
    """Yield the top-level names of our own that a module imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == PACKAGE:
            modules = [f"{PACKAGE}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        else:
            continue
        for module in modules:
            package, _, inner = module.partition(".")
            if package == PACKAGE and inner:
                yield inner.partition(".")[0]


def _essential(found: Mapping[str, set[str]]) -> Iterator[tuple[str, str]]:
    """Yield the imports that no chain of others makes up for."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for name in found.get(waiting.pop(), set()) - seen:
                seen.add(name)
                waiting.append(name)
        return seen

    for importer, names in sorted(found.items()):
        others = {name: reached(name) for name in names}
        for name in sorted(names):
            if not any(name in others[other] for other in names - {name}):
                yield importer, name


# -- what is drawn


def _boxes(layers: Mapping[str, list[list[str]]]) -> tuple[dict[str, Box], int]:
    """Return every box, and how high the picture is."""
    boxes: dict[str, Box] = {}
    top = TOP
    for names in layers[""]:
        places = {name: place for name, (near, *place) in PLANNED.items() if near in names}
        planned = set(places)
        places |= {name: PLACES[name] for name in names if name in PLACES}
        for name in names:
            places.setdefault(name, _free(places.values()))
        rooms = {name: _wrapped(layers.get(name, []), width) for name, (_, width) in places.items()}
        height = 26 + LINE * max(len(lines) for lines in rooms.values())
        for name, (middle, width) in places.items():
            boxes[name] = Box(
                name=name,
                rooms=rooms[name],
                middle=middle,
                top=top,
                width=width,
                height=height,
                planned=name in planned,
            )
        top += height + GAP
    return boxes, top - GAP + TOP


def _free(taken: Collection[Sequence[float]]) -> tuple[float, float]:
    """Return the first place of a row, from the left, that no other box has."""
    width = 104.0
    middle = 62.0
    while any(abs(middle - other) < (width + wide) / 2 + 8 for other, wide in taken):
        middle += 8
    return middle, width


def _wrapped(layers: list[list[str]], width: float) -> tuple[str, ...]:
    """Return the rooms of a package as lines that fit into its box."""
    lines: list[str] = []
    for name in (name for layer in layers for name in layer):
        longer = f"{lines[-1]} · {name}" if lines else name
        if lines and len(longer) * _SMALL_CHARACTER <= width - 8:
            lines[-1] = longer
        else:
            lines.append(name)
    return tuple(lines)


def _style(colours: Mapping[str, str]) -> str:
    return (
        "<style>\ntext { font-family: system-ui, sans-serif; text-anchor: middle }\n"
        f".name {{ font-size: 15px; font-weight: 600; fill: {colours['ink']} }}\n"
        f".small {{ font-size: 11.5px; fill: {colours['small']} }}\n"
        f".box {{ fill: {colours['box']}; stroke: {colours['line']}; stroke-width: 1.2 }}\n"
        f".planned {{ fill: none; stroke: {colours['line']}; stroke-width: 1.2; stroke-dasharray: 4 4 }}\n"
        f".arrow {{ fill: none; stroke: {colours['arrow']}; stroke-width: 1.3 }}\n"
        f".head {{ fill: {colours['arrow']} }}\n</style>"
    )


def _summary(layers: list[list[str]]) -> str:
    rows = ", ".join(" and ".join(names) for names in layers)
    return f"The packages of async_ckpt in layers; each imports only what is below it. From the top: {rows}"


def _arrow(upper: Box, lower: Box) -> str:
    """Draw an arrow from the foot of a box to the head of another, where they face each other if they do."""
    left = max(upper.middle - upper.width / 2, lower.middle - lower.width / 2)
    right = min(upper.middle + upper.width / 2, lower.middle + lower.width / 2)
    start, end = upper.middle, lower.middle
    if right - left > 24:
        start = end = min(max(lower.middle, left + 12), right - 12)
    else:  # towards each other, but not to the very corner
        reach = 0.6
        sign = 1 if lower.middle > upper.middle else -1
        start += sign * reach * upper.width / 2
        end -= sign * reach * lower.width / 2
    foot, head = upper.top + upper.height, lower.top
    length = ((end - start) ** 2 + (head - foot) ** 2) ** 0.5
    across, down = (end - start) / length, (head - foot) / length
    neck = (end - 7 * across, head - 7 * down)
    corners = [
        (end, head),
        (neck[0] - 4 * down, neck[1] + 4 * across),
        (neck[0] + 4 * down, neck[1] - 4 * across),
    ]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
    return (
        f'<path class="arrow" d="M{start:.1f} {foot}L{neck[0]:.1f} {neck[1]:.1f}"/>'
        f'<polygon class="head" points="{points}"/>'
    )


def _shape(box: Box) -> Iterator[str]:
    left = box.middle - box.width / 2
    kind = "planned" if box.planned else "box"
    size = f'width="{box.width}" height="{box.height}" rx="5"'
    yield f'<rect class="{kind}" x="{left:g}" y="{box.top:g}" {size}/>'
    first = box.top + (box.height - LINE * len(box.rooms)) / 2 + 5
    yield f'<text class="name" x="{box.middle:g}" y="{first:g}">{escape(box.name)}</text>'
    for number, line in enumerate(box.rooms, 1):
        at = first + LINE * number
        yield f'<text class="small" x="{box.middle:g}" y="{at:g}">{escape(line)}</text>'


def main() -> None:
    """Draw both pictures."""
    for theme in THEMES:
        (STATIC / f"packages-{theme}.svg").write_text(draw(theme), encoding="utf-8")


if __name__ == "__main__":
    main()
