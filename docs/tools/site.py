"""Hooks of mkdocs: pages that stand outside docs/, links that lead outside it, and whole docstrings of public names."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
BROUGHT = {
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
    "changes.md": "CHANGELOG.md",
    "checkpoint-format.md": "checkpoints_format/SPEC.md",
}
"""Page of the site -> file of the repository."""


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that stand outside docs/."""
    for page, path in BROUGHT.items():
        files.append(File.generated(config, page, content=(ROOT / path).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Point links to the pages of the site; a link to another file of the repository becomes its name.

    A comment `<!-- whole: NAME -->` becomes the directive of mkdocstrings, which inserts the docstring of NAME.
    """
    markdown = re.sub(r"^<!-- whole: (\S+) -->$", r"::: \1", markdown, flags=re.MULTILINE)
    uri = page.file.src_uri
    source = ROOT / BROUGHT[uri] if uri in BROUGHT else ROOT / "docs" / uri
    outside = {path: name for name, path in BROUGHT.items()}

    def link(match: re.Match[str]) -> str:
        text, target = match[1], match[2]
        if "://" in target or target.startswith(("#", "mailto:")):
            return match[0]
        path, _, anchor = target.partition("#")
        there = os.path.relpath((source.parent / path).resolve(), ROOT)
        inside = outside.get(there) or (there[len("docs/") :] if there.startswith("docs/") else None)
        if inside is None:
            where = f"{config.repo_url.rstrip('/')}/blob/HEAD/{there}" if config.repo_url else ""
            return f"[{text}]({where})" if where else text
        found = os.path.relpath(inside, os.path.dirname(uri) or ".")
        return f"[{text}]({found}{'#' + anchor if anchor else ''})"

    return re.sub(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)", link, markdown)
