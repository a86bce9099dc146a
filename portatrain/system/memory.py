"""The host memory that is free for this process: what the host has, and what its cgroups (containers, jobs) allow."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from portatrain.system import environment

UNLIMITED = 1 << 60
"""Version 1 of cgroups writes a number above this one where there is no limit."""


def free_for_process_bytes(root: Path = Path("/")) -> int:
    """Return the share of one process of this host: `free_bytes` over the number of the run's processes here."""
    return free_bytes(root) // max(1, environment.LOCAL_WORLD_SIZE.get())


def free_bytes(root: Path = Path("/")) -> int:
    """Return the bytes of memory that are free, or that can be freed, on this host and in each cgroup of this process.

    `root` is the folder that has proc/ and sys/.
    """
    return max(0, min([_host_bytes(root), *_cgroup_bytes(root)]))


def peak_rss_bytes() -> int:
    """Return the maximum host memory that this process has used, in bytes."""
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _host_bytes(root: Path) -> int:
    for line in _lines(root / "proc/meminfo"):
        name, _, value = line.partition(":")
        if name == "MemAvailable" and value.split()[:1]:
            return int(value.split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _cgroup_bytes(root: Path) -> Iterator[int]:
    """Yield what is left in the memory cgroup of this process and in each one around it."""
    mounts = [line.split() for line in _lines(root / "proc/self/mountinfo")]
    for line in _lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            kind, names = "cgroup2", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            kind, names = "cgroup", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        for folder in _folders(root, mounts, kind, path):
            if (left := _left_bytes(folder, *names)) is not None:
                yield left


def _folders(root: Path, mounts: list[list[str]], kind: str, path: str) -> Iterator[Path]:
    """Yield the folder of a cgroup and those of the ones around it, as far as the mount shows them.

    A line of mountinfo is: id, parent, device, the cgroup that is mounted, mount point, options, ..., '-', file system,
    source, options. A container may see its own cgroup as the root of the mount, or the whole hierarchy.
    """
    for fields in mounts:
        after = fields[fields.index("-") + 1 :] if "-" in fields else []
        if len(fields) < 5 or after[:1] != [kind]:
            continue
        if kind == "cgroup" and "memory" not in after[-1].split(","):
            continue
        shown, top = fields[3].rstrip("/"), root / fields[4].lstrip("/")
        if path == shown or path.startswith(f"{shown}/"):
            path = path[len(shown) :]
        folder = top / path.lstrip("/")
        if ".." in folder.parts or not folder.is_dir():  # of another namespace: the mount's own root is what is seen
            folder = top
        yield folder
        while folder != top:
            folder = folder.parent
            yield folder
        return


def _left_bytes(folder: Path, limit_name: str, usage_name: str, cache_name: str) -> int | None:
    """Return the limit of a cgroup minus what it uses; None if it has no limit. The file cache can be freed."""
    limit, usage = _number(folder / limit_name), _number(folder / usage_name)
    if limit is None or usage is None or limit >= UNLIMITED:
        return None
    stat = (line.split() for line in _lines(folder / "memory.stat"))
    cache = next((int(f[1]) for f in stat if len(f) == 2 and f[0] == cache_name and f[1].isascii()), 0)
    return limit - max(0, usage - cache)


def _number(path: Path) -> int | None:
    """Return the number in a file; None if it has another content, such as 'max', or cannot be read."""
    text = "".join(_lines(path)).strip()
    return int(text) if text.isascii() and text.isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
