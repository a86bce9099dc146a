"""Draw the rooms of this repository and the imports between them into docs/images/rooms.svg.

    python -m docs.tools.draw_rooms              # print the counts; exit code 1 if the drawing is old
    python -m docs.tools.draw_rooms --write      # write the drawing
    python -m docs.tools.draw_rooms --arrows     # print every arrow, with one import that makes it

A room is a package of `portatrain/`, a module at its top, or another package at the top of the repository. An arrow
from A to B says that a file of A imports something of B, also inside a function or for types alone.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[2]
SVG = ROOT / "docs" / "images" / "rooms.svg"
PACKAGES = ("portatrain", "launchers", "recipes", "checkpoints_format", "benchmarks")
PUBLIC = "portatrain"
"""The room of `portatrain/__init__.py`: the public names."""

# From low to high. A room imports rooms that stand before it; tests/unit/test_rooms.py holds the code to that.
ORDER = (
    "errors",
    "config",
    "checkpoints_format",
    "system",
    "model",
    "optim",
    "data",
    "recipe",
    "backends",
    "checkpoint",
    "runs",
    "plan",
    "training",
    PUBLIC,
    "recipes",
    "testing",
    "launchers",
    "commands",
    "cli",
    "benchmarks",
)

Arrows = Mapping[tuple[str, str], str]
"""(importing room, imported room) -> one import that makes the arrow, as file:line."""


def room_of(module: str) -> str | None:
    """Return the room of a dotted module name, or None if it is not of this repository."""
    parts = module.split(".")
    if parts[0] not in PACKAGES:
        return None
    if parts[0] != "portatrain":
        return parts[0]
    inside = len(parts) > 1 and (ROOT / "portatrain" / parts[1])
    return parts[1] if inside and (inside.is_dir() or inside.with_suffix(".py").is_file()) else PUBLIC


def imported(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of every import of a file; of `from a import b` the name is a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def arrows_of(root: Path = ROOT) -> tuple[list[str], Arrows]:
    """Return the rooms, from low to high, and the arrows between them."""
    rooms, arrows = set(), {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
            here = room_of(name)
            if here is None or name == "portatrain.__main__":
                continue
            rooms.add(here)
            for line, target in imported(ast.parse(path.read_text(encoding="utf-8"))):
                there = room_of(target)
                if there is not None and there != here:
                    arrows.setdefault((here, there), f"{path.relative_to(root)}:{line} {target}")
    unknown = rooms - set(ORDER)
    if unknown:
        raise SystemExit(f"docs.tools.draw_rooms: give {', '.join(sorted(unknown))} a place in ORDER.")
    return [room for room in ORDER if room in rooms], arrows


def floors(rooms: list[str], arrows: Arrows) -> dict[str, int]:
    """Return the floor of every room: one above the highest room that it imports. Arrows that point up do not count."""
    floor: dict[str, int] = {}
    for room in rooms:
        below = [floor[there] for here, there in arrows if here == room and there in floor]
        floor[room] = max(below, default=-1) + 1
    return floor


def implied(arrows: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Return the arrows that a longer way says as well: they are drawn faintly."""
    after: dict[str, set[str]] = {}
    for here, there in arrows:
        after.setdefault(here, set()).add(there)

    def reachable(start: str, goal: str) -> bool:
        seen, left = {start}, [room for room in after.get(start, ()) if room != goal]
        while left:
            room = left.pop()
            if room == goal:
                return True
            if room not in seen:
                seen.add(room)
                left.extend(after.get(room, ()))
        return False

    return {pair for pair in arrows if reachable(*pair)}


WIDTH, BOX_W, BOX_H, STEP, MARGIN = 1000, 150, 40, 88, 30


def draw(rooms: list[str], arrows: Arrows) -> str:
    """Return the drawing as SVG. Equal input gives equal text."""
    floor = floors(rooms, arrows)
    top = max(floor.values())
    by_floor = [[room for room in rooms if floor[room] == level] for level in range(top + 1)]
    centre: dict[str, tuple[float, float]] = {}
    for level, row in enumerate(by_floor):
        for index, room in enumerate(row):
            # Rows are shifted to and fro, so that arrows that pass a floor do not run through its boxes.
            shift = (-1) ** level * 200 if len(row) == 1 else (level % 3 - 1) * 45
            x = WIDTH * (index + 1) / (len(row) + 1) + shift
            centre[room] = (x, MARGIN + (top - level) * STEP + BOX_H / 2)
    height = 2 * MARGIN + top * STEP + BOX_H
    place = {room: index for index, room in enumerate(rooms)}
    upward = {pair for pair in arrows if place[pair[0]] < place[pair[1]]}
    faint = implied(set(arrows) - upward)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        f'font-size="15" role="img">',
        f"<title>{len(rooms)} rooms and {len(arrows)} arrows between them</title>",
        '<rect width="100%" height="100%" fill="white"/>',
        "<defs>",
        *(
            f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            f'<path d="M0 0 L8 4 L0 8 z" fill="{colour}"/></marker>'
            for name, colour in (("strong", "#30466b"), ("faint", "#c3cbd9"), ("up", "#b3261e"))
        ),
        "</defs>",
    ]
    kinds = {pair: "up" if pair in upward else "faint" if pair in faint else "strong" for pair in arrows}
    style = {"faint": "#c3cbd9", "strong": "#30466b", "up": "#b3261e"}
    for kind in style:  # faint ones first: the others lie on top
        for here, there in sorted(pair for pair in arrows if kinds[pair] == kind):
            (x0, y0), (x1, y1) = centre[here], centre[there]
            down = BOX_H / 2 if y1 > y0 else -BOX_H / 2
            dash = ' stroke-dasharray="5 4"' if kind == "up" else ""
            out.append(
                f'<line x1="{x0:.0f}" y1="{y0 + down:.0f}" x2="{x1:.0f}" y2="{y1 - down:.0f}" stroke="{style[kind]}" '
                f'stroke-width="{1 if kind == "faint" else 1.6}"{dash} marker-end="url(#{kind})">'
                f"<title>{escape(here)} imports {escape(there)}</title></line>"
            )
    for room in rooms:
        x, y = centre[room]
        label = "portatrain (names)" if room == PUBLIC else room
        outside = room in PACKAGES and room != PUBLIC
        out.append(
            f'<rect x="{x - BOX_W / 2:.0f}" y="{y - BOX_H / 2:.0f}" width="{BOX_W}" height="{BOX_H}" rx="6" '
            f'fill="{"#fff4dd" if outside else "#e8eefb"}" stroke="#30466b"/>'
        )
        out.append(f'<text x="{x:.0f}" y="{y + 5:.0f}" text-anchor="middle" fill="#1b2a41">{escape(label)}</text>')
    return "\n".join([*out, "</svg>", ""])


def main(argv: list[str] | None = None) -> int:
    """Print the counts; draw or compare; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m docs.tools.draw_rooms", description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write docs/images/rooms.svg")
    parser.add_argument("--arrows", action="store_true", help="print every arrow, with one import that makes it")
    args = parser.parse_args(argv)
    rooms, arrows = arrows_of()
    place = {room: index for index, room in enumerate(rooms)}
    up = sum(place[here] < place[there] for here, there in arrows)
    print(f"rooms {len(rooms)}, arrows {len(arrows)}, of which {up} point up")
    if args.arrows:
        for (here, there), why in sorted(arrows.items(), key=lambda item: (place[item[0][0]], place[item[0][1]])):
            print(f"{here} -> {there}: {why}")
    text = draw(rooms, arrows)
    if args.write:
        SVG.write_text(text, encoding="utf-8")
    elif not SVG.is_file() or SVG.read_text(encoding="utf-8") != text:
        print(f"{SVG.relative_to(ROOT)} is old: run python -m docs.tools.draw_rooms --write", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
