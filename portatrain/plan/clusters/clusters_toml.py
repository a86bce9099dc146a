"""Read the user's own clusters: ``clusters.toml`` beside the recipe, then in the user's config folder.

[lab]                                  # the name, as in --cluster lab
chip = "h100"                          # a chip of the catalog
count = 64                             # chips; or topology = "4x4x8" and slices = 4 for TPUs
engine = "slurm"                       # the launcher
storage = "s3://bucket/runs"
prices = { on_demand = 2.10 }          # USD per chip-hour
scale_out_gbps = 200                   # if the network differs from the catalog's
options = { partition = "gpu" }        # passed to the launcher unchanged
track = ["wandb"]                      # trackers of metrics, unless `launch` has the option --track
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from portatrain.errors import UserError, choice
from portatrain.plan.clusters import slices
from portatrain.plan.clusters.catalog import chip_names, find_chip
from portatrain.plan.clusters.chip import Chip
from portatrain.plan.clusters.figures import Figure, figure
from portatrain.system.paths import config_folder

KEYS = (
    *("chip", "count", "topology", "slices", "engine", "storage", "prices", "scale_out_gbps", "power_w"),
    *("options", "track"),
)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One checked table of the file. ``size``: the text after the chip in a cluster name; ``where``: file:line."""

    name: str
    chip: Chip
    size: str
    slices: int
    engine: str
    storage: str
    prices: Mapping[str, Figure]
    options: Mapping[str, object]
    track: tuple[str, ...]
    where: str
    size_where: str


def files(recipe: str | Path | None = None) -> list[Path]:
    """Return the clusters.toml files that exist, the one beside the recipe (or in this folder) first."""
    beside = Path(recipe).resolve().parent if recipe and str(recipe).endswith(".py") else Path.cwd()
    return [path for path in (beside / "clusters.toml", config_folder() / "clusters.toml") if path.is_file()]


def read(path: Path) -> dict[str, Entry]:
    """Return every cluster of a file, by name.

    Raises:
      UserError: not TOML, an unknown key or chip, a value of the wrong kind, or two values that cannot
        both be true; file and line are named.
    """
    try:
        text = path.read_text(encoding="utf-8")
        tables = tomllib.loads(text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(str(path), expected="a TOML file", got=str(error), do="Correct the file.") from None
    return {name: _Table(path, text, name, table).entry() for name, table in tables.items()}


class _Table:
    """Turn one table into an Entry: find its lines, and report errors with their line."""

    def __init__(self, path: Path, text: str, name: str, table: object) -> None:
        self.path, self.lines, self.name = path, text.splitlines(), name
        if not isinstance(table, dict):
            raise self._error(
                None, "a table for each cluster, as in [lab]", f"{name} = {table!r}", "Put it in a table."
            )
        self.table: dict[str, object] = table

    def entry(self) -> Entry:
        for key in self.table:
            if key not in KEYS:
                raise self._choice(key, key, KEYS, f"key {key!r}")
        name = self._get("chip", str)
        if name is None:
            raise self._error(None, "a chip of the catalog", "none", 'Add a line such as chip = "h100".')
        if name not in chip_names():
            raise self._choice("chip", name, chip_names(), "chip")
        chip = self._chip(find_chip(name))
        return Entry(
            name=self.name,
            chip=chip,
            size=self._size(chip),
            slices=self._get("slices", int) or 1,
            engine=self._get("engine", str) or "",  # launchers.targets judges it: the planner knows no launchers
            storage=self._get("storage", str) or "",
            prices=self._prices(),
            options=self._get("options", dict) or {},
            track=self._track(),
            where=self._where(None),
            size_where=self._where("topology" if "topology" in self.table else "count"),
        )

    def _chip(self, chip: Chip) -> Chip:
        """Return the catalog's row, with this cluster's own values in place of the catalog's."""
        changes = {"scale_out_gbps": ("scale_out", "Gbit/s"), "power_w": ("power", "W")}
        for key, (field, unit) in changes.items():
            value = self._get(key, float)
            if value is not None:
                chip = replace(chip, **{field: figure(value, unit, "user")})  # type: ignore[arg-type]
        return chip

    def _size(self, chip: Chip) -> str:
        count, topology = self._get("count", int), self._get("topology", str)
        times = self._get("slices", int) or 1
        tpu = chip.name in slices.RULES
        if not tpu:
            for key in ("topology", "slices"):
                if key in self.table:
                    do = "Leave it out: topologies and slices are for TPUs."
                    raise self._error(key, f"no {key} for {chip.name}", repr(self.table[key]), do)
        if count is None and topology is None:
            raise self._error(None, "count, the number of chips", "none", "Add a line such as count = 64.")
        if topology is None:
            assert count is not None
            each, rest = divmod(count, times)
            if rest:
                do = "count is the chips of all slices together."
                raise self._error("count", f"a multiple of slices = {times}", str(count), do)
            return str(each * slices.RULES[chip.name].per_name) if tpu else str(each)
        if not re.fullmatch(r"\d+(x\d+)+", topology):
            raise self._error("topology", "dimensions such as 4x4x8", repr(topology), "Write them in chips.")
        chips = times
        for n in topology.split("x"):
            chips *= int(n)
        if count is not None and count != chips:
            do = f"Give one of the two, or count = {chips}."
            raise self._error("count", f"{times} x {topology} = {chips} chips", str(count), do)
        return topology

    def _prices(self) -> dict[str, Figure]:
        found = {}
        for kind, value in (self._get("prices", dict) or {}).items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 0 <= value < math.inf:
                raise self._error("prices", f"USD per chip-hour for {kind!r}", repr(value), "Give a number.")
            found[kind] = figure(float(value), "USD/chip-hour", "user")
        return found

    def _track(self) -> tuple[str, ...]:
        value = self.table.get("track", [])
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise self._error("track", "a list of names", repr(value), 'Write track = ["wandb"].')
        return tuple(value)

    def _get(self, key: str, kind: type) -> Any:
        value: Any = self.table.get(key)
        wanted = {str: "text", int: "a whole number of at least 1", float: "a positive number", dict: "a table"}
        right = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
        if value is not None and (not right or (kind in (int, float) and not 0 < value < math.inf)):
            raise self._error(key, wanted[kind], repr(value), "Correct that line.")
        return float(value) if kind is float and value is not None else value

    def _where(self, key: str | None) -> str:
        """Return file:line of a key of this table, or of the table."""
        quoted = re.escape(self.name)
        header = re.compile(rf"\s*\[\s*[\"']?{quoted}[\"']?\s*(\.[^\]]*)?\]")
        inside, start = False, 0
        for number, line in enumerate(self.lines, 1):
            if line.lstrip().startswith("["):
                inside = bool(header.match(line))
                start = start or (number if inside else 0)
                if inside and key and re.match(rf"\s*\[[^\]]*\.\s*[\"']?{re.escape(key)}[\"']?\s*\]", line):
                    return f"{self.path}:{number}"
            elif re.match(rf"\s*[\"']?{quoted}[\"']?\s*=", line) and not inside:
                start = start or number
            if inside and key and re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*[=.]", line):
                return f"{self.path}:{number}"
        return f"{self.path}:{max(1, start)}"

    def _error(self, key: str | None, expected: str, got: str, do: str) -> UserError:
        what = f"{self._where(key)}: cluster {self.name!r}" + (f", {key}" if key else "")
        return UserError(what, expected=expected, got=got, do=do)

    def _choice(self, key: str, got: str, valid: Iterable[str], what: str) -> UserError:
        error = choice(what, got, valid)
        return UserError(
            f"{self._where(key)}: cluster {self.name!r}, {what}", expected=error.expected, got=error.got, do=error.do
        )
