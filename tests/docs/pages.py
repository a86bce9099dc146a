"""The pages of the project, and the fenced blocks in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Block:
    """One fenced block. `title`: the file that it is to be saved as. `run`: the page asks the test to run it."""

    page: str
    line: int
    language: str
    title: str
    run: bool
    text: str

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[Path]:
    """Return every page in Markdown that a reader is sent to."""
    top = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]
    inside = [p for p in sorted((ROOT / "docs").rglob("*.md")) if not p.name.endswith(".in.md")]
    return [*top, *inside, ROOT / "benchmarks" / "README.md"]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page, in order."""
    found: list[Block] = []
    opened: tuple[int, str] | None = None
    before, body = "", []
    for number, line in enumerate(page.read_text(encoding="utf-8").split("\n"), start=1):
        if line.lstrip().startswith("```"):
            if opened is None:
                opened, body = (number, line.strip()[3:].strip()), []
            else:
                start, info = opened
                title = re.search(r'title="([^"]*)"', info)
                found.append(
                    Block(
                        page=name_of(page),
                        line=start,
                        language=info.split(" ")[0],
                        title=title[1] if title else "",
                        run=before.strip() == "<!-- run -->",
                        text="\n".join(body) + "\n",
                    )
                )
                opened = None
        elif opened is not None:
            body.append(line)
        if opened is None or opened[0] != number:
            before = line if opened is None else before
    assert opened is None, f"{name_of(page)}:{opened[0]}: the block is not closed"
    return found


def without_blocks(text: str) -> str:
    """Return a page's text with its fenced blocks left empty."""
    return re.sub(r"^```.*?^```$", "```\n```", text, flags=re.DOTALL | re.MULTILINE)
