"""Links between pages, their anchors, and paths of pages that are named in the code, without any tool of the site."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, name_of, pages, without_blocks

LINK = re.compile(r"!?\[[^\]]*\]\(([^()\s]+)\)")


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as the site and GitHub make them."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.*)$", without_blocks(page.read_text(encoding="utf-8")), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        base = re.sub(r"[^\w\s-]", "", plain.lower()).strip()
        base = re.sub(r"\s+", "-", base)
        name, number = base, 1
        while name in found:
            name, number = f"{base}_{number}", number + 1
        found.add(name)
    return found


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_links(page: Path) -> None:
    broken = []
    for target in LINK.findall(without_blocks(page.read_text(encoding="utf-8"))):
        if "://" in target or target.startswith("mailto:"):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if not there.exists():
            broken.append(f"{target}: no such file")
        elif anchor and anchor not in anchors(there):
            broken.append(f"{target}: no such heading among {', '.join(sorted(anchors(there)))}")
    assert not broken, f"{name_of(page)}: {broken}"


def test_every_page_is_in_the_sites_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = set(re.findall(r"[\w./-]+\.md", text.split("\nnav:", 1)[1]))
    there = {str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md") if not p.name.endswith(".in.md")}
    brought = {"contributing.md", "security.md", "changes.md", "checkpoint-format.md"}  # by docs/tools/site.py
    assert named - brought == there


def test_the_index_lists_every_page() -> None:
    """README.md says so."""
    index = ROOT / "docs" / "index.md"
    named = {target.partition("#")[0] for target in LINK.findall(index.read_text(encoding="utf-8"))}
    there = {str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md") if not p.name.endswith(".in.md")}
    assert there - named == {"index.md"}


def test_pages_that_code_and_text_name_exist() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    wrong = []
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.suffix not in (".py", ".md", ".toml", ".yml", ".txt", "") or not path.is_file():
            continue
        if path == Path(__file__) or path.stat().st_size > 1_000_000:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        for found in re.findall(r"\bdocs/(?:[\w-]+/)*[\w.-]+\.(?:md|json|svg|png)\b", text):
            if not (ROOT / found).exists():
                wrong.append(f"{name}: {found}")
    assert not wrong, wrong


def test_files_of_the_maps_exist() -> None:
    """README.md and the page of the architecture say which file does what; each file must be there."""
    rows: list[str] = []
    for page in (ROOT / "README.md", ROOT / "docs" / "understand" / "architecture.md"):
        section = re.split(r"^## Where (?:things happen|is what)$", page.read_text(encoding="utf-8"), flags=re.M)[1]
        rows += [row for row in section.split("\n## ")[0].split("\n") if row.startswith("| ") and "`" in row]
    assert len(rows) > 15
    missing = []
    for row in rows:
        folder = ROOT
        for path in re.findall(r"`([\w/]+(?:\.py|/))`", row.split("|")[2]):
            if "/" in path:
                folder = (ROOT / path).parent if path.endswith(".py") else ROOT / path
            there = ROOT / path if "/" in path else folder / path
            named = path in ("attention.py", "base.py") and list(folder.rglob(path))  # one for each framework, or below
            if not there.exists() and not named:
                missing.append(f"{path} of {row}")
    assert not missing, missing
