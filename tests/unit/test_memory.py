"""The memory that a save may take: the host's, the cgroups' of versions 1 and 2, and the share of one process."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from portatrain.checkpoint.saver import Checkpoints
from portatrain.system import memory
from portatrain.system.environment import LOCAL_WORLD_SIZE

GIB = 2**30
HOST = 100 * GIB
FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", str(2**63 - 4096)),
    2: ("memory.max", "memory.current", "inactive_file", "max"),
}
GROUPS = ("", "/kubepods", "/kubepods/pod7", "/kubepods/pod7/c0")


class Host:
    """A folder with the /proc and /sys of a host."""

    def __init__(self, root: Path, version: int, *, shown: str = "/", path: str = GROUPS[-1]) -> None:
        self.root, self.version = root, version
        self.top = root / ("sys/fs/cgroup/memory" if version == 1 else "sys/fs/cgroup")
        own = root / "proc/self"
        own.mkdir(parents=True)
        (root / "proc/meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {HOST // 1024} kB\n")
        mount = f"35 31 0:32 {shown} /{self.top.relative_to(root)} rw,relatime shared:9 - "
        mount += "cgroup cgroup rw,memory\n" if version == 1 else "cgroup2 cgroup rw\n"
        (own / "mountinfo").write_text(f"31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n{mount}")
        (own / "cgroup").write_text(f"3:cpu:/elsewhere\n4:memory:{path}\n0::/\n" if version == 1 else f"0::{path}\n")

    def group(self, path: str, limit: int | None, used: int = 0, cache: int = 0) -> None:
        """Make a cgroup; `limit` None: without a limit."""
        folder = self.top / path.lstrip("/")
        folder.mkdir(parents=True, exist_ok=True)
        names = FILES[self.version]
        (folder / names[0]).write_text(f"{names[3] if limit is None else limit}\n")
        (folder / names[1]).write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {cache}\n")


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("limited", [c for n in range(5) for c in itertools.combinations(range(4), n)], ids=str)
def test_the_least_of_the_host_and_of_every_cgroup_around_the_process(
    version: int, limited: tuple[int, ...], tmp_path: Path
) -> None:
    host = Host(tmp_path, version)
    for i, path in enumerate(GROUPS):
        host.group(path, (10 + i) * GIB if i in limited else None, used=4 * GIB, cache=GIB)
    # The file cache of a cgroup, one of the four GiB that it uses, can be freed.
    assert memory.free_bytes(tmp_path) == (min(limited, default=93) + 10 - 3) * GIB


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("shown", "path"),
    [("/", "/"), ("/kubepods/pod7", "/kubepods/pod7"), ("/../..", "/"), ("/", "/../../of-the-host"), ("/", "/gone/x")],
)
def test_the_views_of_a_container(version: int, shown: str, path: str, tmp_path: Path) -> None:
    host = Host(tmp_path, version, shown=shown, path=path)
    host.group("", 8 * GIB, used=2 * GIB)
    assert memory.free_bytes(tmp_path) == 6 * GIB


@pytest.mark.parametrize("version", [1, 2])
def test_a_limit_that_is_exceeded_leaves_nothing(version: int, tmp_path: Path) -> None:
    Host(tmp_path, version, path="/").group("", 2 * GIB, used=3 * GIB)
    assert memory.free_bytes(tmp_path) == 0


@pytest.mark.parametrize("broken", ["proc/self/cgroup", "proc/self/mountinfo", "sys"])
def test_without_cgroups_the_host_counts(broken: str, tmp_path: Path) -> None:
    host = Host(tmp_path, 2)
    host.group(GROUPS[-1], GIB)
    (tmp_path / broken).rename(tmp_path / "away")
    assert memory.free_bytes(tmp_path) == HOST


def test_the_processes_of_a_host_share_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Host(tmp_path, 2).group(GROUPS[-1], 8 * GIB)
    for n in (1, 2, 8):
        monkeypatch.setenv(LOCAL_WORLD_SIZE.name, str(n))
        assert memory.free_for_process_bytes(tmp_path) == 8 * GIB // n


def test_a_save_takes_half_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr("portatrain.checkpoint.saver.memory.free_for_process_bytes", lambda: 12 * GIB)
    monkeypatch.setattr("portatrain.checkpoint.saver.Staging", lambda *_, budget_bytes: given.append(budget_bytes))
    checkpoints: Any = Checkpoints(tmp_path)
    layout: Any = type("Layout", (), {"tensors": ()})
    checkpoints._staging(type("Holds", (), {"local_boxes": lambda self, state: ()})(), None, layout, {})
    assert given == [6 * GIB]
