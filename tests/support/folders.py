"""What lies in a folder, to be compared with later."""

from __future__ import annotations

import os
from pathlib import Path


def listing(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Every file and folder below ``folder``: relative path -> mode, time of change, content."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        content = path.read_bytes() if path.is_file() and os.access(path, os.R_OK) else b""
        found[str(path.relative_to(folder))] = (status.st_mode, status.st_mtime_ns, content)
    return found
