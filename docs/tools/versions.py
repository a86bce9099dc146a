"""Print a row of docs/measured/versions.md for the environment that this runs in.

python -m docs.tools.versions
"""

from __future__ import annotations

import importlib.metadata
import platform

PACKAGES = ("jax", "torch", "numpy")


def version(package: str) -> str:
    """Return the installed version of a package, without importing it; a dash if there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def row() -> str:
    """Return the first five cells of a row."""
    cells = [platform.python_version(), *map(version, PACKAGES), f"{platform.system()} {platform.machine()}"]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print(row())
