"""List the known chips, or show all data of one cluster or chip."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from portatrain.plan.clusters import catalog, clusters_toml, names
from portatrain.plan.clusters.chip import Chip
from portatrain.plan.clusters.cluster import Cluster
from portatrain.system import terminal

if TYPE_CHECKING:
    from rich.table import Table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to ``parser``."""
    parser.add_argument("name", nargs="?", help="a cluster (tpu-v5p-256, h100-64, one of clusters.toml) or a chip")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    found = clusters_toml.files()
    own = {name: names.resolve(name, files=[path]) for path in reversed(found) for name in clusters_toml.read(path)}
    if args.name is None:
        data: object = {
            "chips": [_chip_json(row) for row in catalog.all_chips().values()],
            "clusters": [_cluster_json(made) for made in own.values()],
        }
        tables = [_chips_table(), *([_own_table(own)] if own else [])]
    elif args.name in catalog.chip_names() and args.name not in own:
        chip = catalog.find_chip(args.name)
        data, tables = _chip_json(chip), [_figures_table(chip)]
    else:
        cluster = names.resolve(args.name, files=found)
        data, tables = _cluster_json(cluster), [_cluster_table(cluster), _figures_table(cluster.chip)]
    if args.json:
        print(json.dumps(data, indent=1))
        return 0

    console = terminal.console(180)
    for table in tables:
        console.print(table)
    console.print("~ marks an estimate: no source read so far confirms it. All figures are nominal.", style="dim")
    return 0


def _chip_json(chip: Chip) -> dict[str, object]:
    return {
        "chip": chip.name,
        "aliases": chip.aliases,
        "vendor": chip.vendor,
        "kind": chip.kind,
        "stack": chip.stack,
        "backend": catalog.stack_of(chip).backend,
        "devices_per_chip": chip.devices_per_chip,
        "figures": {name: value.as_json() for name, value in chip.figures().items()},
        "sizes": names.legal_sizes(chip),
        "machine_types": chip.skus,
        "status": chip.status,
        "unpublished": chip.unpublished,
    }


def _cluster_json(cluster: Cluster) -> dict[str, object]:
    return {
        "cluster": cluster.name,
        "chip": cluster.chip.name,
        "chips": cluster.chips,
        "devices": cluster.devices,
        "hosts": cluster.hosts,
        "slices": cluster.slices,
        "domain": cluster.domain,
        "topology": cluster.topology,
        "dims": cluster.dims,
        "wraps": cluster.wraps,
        "engine": cluster.engine,
        "storage": cluster.storage,
        "prices": {kind: price.as_json() for kind, price in (cluster.prices or cluster.chip.prices).items()},
        "options": dict(cluster.options),
        "where": cluster.where,
        "figures": {name: value.as_json() for name, value in cluster.chip.figures().items()},
    }


def _chips_table() -> Table:
    from rich.table import Table

    table = Table(title="Chips (a cluster is CHIP-COUNT; see portatrain clusters CHIP)")
    for name in ("chip", "memory", "HBM", "bf16", "scale-up", "domain", "scale-out", "power", "USD/h", "backend"):
        table.add_column(name, justify="left" if name in ("chip", "backend") else "right", overflow="fold")
    for chip in catalog.all_chips().values():
        peak = chip.peaks.get("bf16")
        price = next(iter(chip.prices.values()), None)
        cells = (chip.memory, chip.memory_bw, peak, chip.scale_up, chip.domain, chip.scale_out, chip.power, price)
        short = [str(cell).replace("/chip-hour", "").replace("USD", "").strip() if cell else "-" for cell in cells]
        label = chip.name + (f" ({chip.aliases[0]})" if chip.aliases else "")
        table.add_row(label, *short, catalog.stack_of(chip).backend or "-")
    return table


def _own_table(own: dict[str, Cluster]) -> Table:
    from rich.table import Table

    table = Table("cluster", "chip", "chips", "topology", "engine", "storage", "from", title="Your clusters")
    for cluster in own.values():
        table.add_row(
            cluster.name,
            cluster.chip.name,
            str(cluster.chips),
            cluster.topology,
            cluster.engine or "-",
            cluster.storage or "-",
            _near(cluster.where),
        )
    return table


def _cluster_table(cluster: Cluster) -> Table:
    from rich.table import Table

    table = Table(title=cluster.name, show_header=False)
    rows = {
        "chips": f"{cluster.chips} {cluster.chip.name}",
        "devices": str(cluster.devices),
        "hosts": str(cluster.hosts),
        "topology": cluster.topology,
        "memory": f"{cluster.chips * cluster.chip.memory_bytes / 1e12:.2f} TB in all",
        "engine": cluster.engine,
        "storage": cluster.storage,
        "options": str(dict(cluster.options) or ""),
        "defined in": _near(cluster.where),
    }
    price = cluster.price
    if price is not None:
        rows["price"] = f"{cluster.chips * price[1].value:,.2f} USD/h at {price[1]} ({price[0]})"
    for name, value in rows.items():
        if value:
            table.add_row(name, value)
    return table


def _figures_table(chip: Chip) -> Table:
    from rich.table import Table

    title = f"{chip.name}, per chip" + (f"; {chip.status}" if chip.status else "")
    table = Table("figure", "value", "source", "read", "note", title=title)
    for name, value in chip.figures().items():
        table.add_row(name, str(value), value.source, value.date, value.note)
    if chip.unpublished:
        table.add_row("not published", ", ".join(chip.unpublished), "", "", "so it is not planned")
    table.add_row("sizes", ", ".join(names.legal_sizes(chip)), "", "", "")
    if chip.skus:
        table.add_row("machine types", ", ".join(chip.skus), "", "", "")
    stack = catalog.stack_of(chip)
    table.add_row("stack", f"{stack.backend or 'none here'}: {stack.plugin}; {stack.collectives}", "", "", "")
    return table


def _near(where: str) -> str:
    """Return file:line, with the path relative to the working directory if possible."""
    try:
        return str(Path(where).relative_to(Path.cwd())) if where else ""
    except ValueError:
        return where
