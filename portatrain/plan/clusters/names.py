"""Parse cluster names: ``tpu-v5p-256``, ``tpu-v5p-4x4x8``, ``4*tpu-v5p-256``, ``h100-64``, ``m4-max-1``, ``cpu-2``.

The number in a TPU name counts what Google's names count: two per chip on v4, v5p and 7x, chips on v5e
and v6e. For every other kind it counts chips. A name is checked against the legal slices, or against
whole hosts, before anything else happens.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from portatrain.errors import UserError, choice
from portatrain.plan.clusters import clusters_toml, slices
from portatrain.plan.clusters.catalog import all_chips, chip_names, find_chip
from portatrain.plan.clusters.chip import GIB, Chip
from portatrain.plan.clusters.cluster import Cluster
from portatrain.plan.clusters.figures import Figure, figure

_FIXED_TORUS = {"trn-4x4": (4, 4), "trn-4x4x4": (4, 4, 4)}

# What `portatrain plan --cluster all` and the documentation show: one of each kind that people rent or own.
EXAMPLES = (
    "tpu-v4-256",
    "tpu-v5e-256",
    "tpu-v5p-256",
    "tpu-v6e-256",
    "tpu-7x-128",
    "4*tpu-v5p-256",
    "a100-64",
    "h100-64",
    "h200-64",
    "b200-64",
    "gb200-72",
    "gb300-72",
    "mi300x-64",
    "mi325x-64",
    "mi355x-64",
    "trn2-64",
    "trn2u-64",
    "gaudi3-64",
    "ascend910c-384",
    "h200-8",
    "m4-max-1",
    "cpu-2",
)


def resolve(name: str, *, files: Iterable[Path] = (), others: Iterable[str] = ()) -> Cluster:
    """Return the cluster of that name: one of the user's own (``files``, first match wins), or a chip and a count.

    ``others``: names that are valid where the caller looks, for the error.

    Raises:
      UserError: an unknown chip, a count that is no legal slice or no whole hosts (with the nearest that
        are), or a clusters.toml that contradicts itself (with its line).
    """
    mine: list[str] = list(others)
    for path in files:
        entries = clusters_toml.read(path)
        if name in entries:
            return _from_entry(entries[name])
        mine += entries
    return parse(name, own=mine)


def parse(name: str, *, own: Iterable[str] = ()) -> Cluster:
    """Return the cluster of a name in the catalog's form. ``own`` are further names for the error."""
    times, star, one = name.rpartition("*")
    count = 1
    if star:
        if not times.strip().isdigit() or int(times) < 1:
            raise UserError(
                f"cluster {name!r}",
                expected="a whole number of slices before '*'",
                got=repr(times),
                do="Write 4*tpu-v5p-256 for four slices.",
            )
        count = int(times)
    found = re.fullmatch(r"(?P<chip>.+?)-(?P<size>\d+(?:x\d+)*)", one.strip())
    if found is None or found["chip"] not in chip_names():
        raise _unknown(name, found["chip"] if found else one.strip(), own)
    return build(find_chip(found["chip"]), found["size"], multislice=count, name=name)


def build(chip: Chip, size: str, *, multislice: int = 1, name: str = "") -> Cluster:
    """Return the cluster of ``size`` (a number as in a name, or a topology such as 4x4x8) of ``chip``."""
    what = f"cluster {name!r}" if name else f"{chip.name} {size}"
    if chip.name in slices.RULES:
        return _slice(chip, size, multislice, what)
    if multislice > 1 or "x" in size:
        raise UserError(
            what,
            expected=f"{chip.name} and a number of chips",
            got=f"{multislice}*{size}" if multislice > 1 else size,
            do=f"Slices and topologies are for TPUs; write {chip.name}-{multislice * math.prod(_dims(size))}.",
        )
    return _hosts(chip, int(size), what)


def canonical(chip: Chip, chips: int, dims: tuple[int, ...] = (), multislice: int = 1) -> str:
    """Return the name of a cluster, as ``parse`` takes it."""
    rule = slices.RULES.get(chip.name)
    if rule is None:
        return f"{_short(chip)}-{chips}"
    usual = slices.default_shape(chip.name, math.prod(dims)) == dims
    size = str(math.prod(dims) * rule.per_name) if usual else slices.text(dims)
    return (f"{multislice}*" if multislice > 1 else "") + f"{chip.name}-{size}"


def legal_sizes(chip: Chip) -> tuple[str, ...]:
    """Return names that show the sizes of a chip: all of them for 2D slices, the usual ones otherwise."""
    if chip.name in slices.RULES:
        counts = list(slices.legal_counts(chip.name))
        shown = [n for n in counts if n & (n - 1) == 0 or n == counts[-1]]
        shapes = [slices.default_shape(chip.name, n) for n in shown]
        return tuple(f"{canonical(chip, 0, dims)} ({slices.text(dims)})" for dims in shapes if dims)
    host = chip.chips_in_host
    inside = [n for n in (1, 2, 4, 8, 16) if n <= host and host % n == 0]
    racks = [chip.chips_in_domain * k for k in (1, 2, 8)] if chip.chips_in_domain > host else []
    many = [2, 4] if chip.kind == "single" else [*(host * k for k in (2, 8)), *(racks or (host * 32, host * 128))]
    return tuple(f"{_short(chip)}-{n}" for n in [*inside, *many])


def _slice(chip: Chip, size: str, multislice: int, what: str) -> Cluster:
    rule = slices.RULES[chip.name]
    if "x" in size:
        dims = _dims(size)
        if not slices.is_legal(chip.name, dims):
            near = slices.nearest_shapes(chip.name, dims)
            raise _illegal(chip, what, size, [canonical(chip, 0, shape) for shape in near], near)
    else:
        chips, odd = divmod(int(size), rule.per_name)
        shape = None if odd else slices.default_shape(chip.name, chips)
        if shape is None:
            counts = slices.nearest_counts(chip.name, chips)
            near = tuple(s for s in (slices.default_shape(chip.name, n) for n in counts) if s)
            raise _illegal(chip, what, size, [canonical(chip, 0, s) for s in near], near)
        dims = shape
    chips = math.prod(dims)
    return Cluster(
        name=canonical(chip, chips, dims, multislice),
        chip=chip,
        chips=chips * multislice,
        domain=chips,
        dims=dims,
        wraps=slices.wraps(chip.name, dims),
        slices=multislice,
    )


def _illegal(chip: Chip, what: str, got: str, names: list[str], near: tuple[tuple[int, ...], ...]) -> UserError:
    rule = slices.RULES[chip.name]
    if rule.max_cubes:
        order = ", in rising order," if rule.rising else ""
        expected = (
            f"a legal {chip.name} slice: {', '.join(slices.text(s) for s in rule.small)}, or dimensions{order} "
            f"that are multiples of 4, at most {rule.max_chips} chips"
        )
    else:
        expected = f"a legal {chip.name} slice: {', '.join(slices.text(s) for s in rule.small)}"
    counts = {1: "chips", 2: "two per chip"}[rule.per_name]
    both = [f"{name} ({slices.text(dims)})" for name, dims in zip(names, near, strict=True)]
    return UserError(
        what,
        expected=expected,
        got=got,
        do=f"The nearest legal ones are {' and '.join(both)}; the number in such a name counts {counts}.",
    )


def _hosts(chip: Chip, chips: int, what: str) -> Cluster:
    if chip.name == "cpu" and chips:
        chip = _this_cpu(chip, chips)
    host, domain = chip.chips_in_host, chip.chips_in_domain
    whole = chips % host == 0 if chips > host else chips > 0 and host % chips == 0
    if not whole:
        sizes = sorted({n for n in range(1, host + 1) if host % n == 0} | {host * max(1, chips // host)})
        below = [n for n in sizes if n <= chips][-1:]
        above = [host if chips < host else host * (chips // host + 1)]
        raise UserError(
            what,
            expected=f"whole hosts of {host} {chip.name}, or an even part of one",
            got=f"{chips} chips",
            do=f"The nearest are {' and '.join(f'{_short(chip)}-{n}' for n in dict.fromkeys(below + above))}.",
        )
    if chip.slice_rule in _FIXED_TORUS:
        dims = _FIXED_TORUS[chip.slice_rule]
        # A part of an instance has no torus of its own; a whole one has, and so has each of many.
        inside = dims if chips % domain == 0 else (chips,) if chips < host else (4, 4, chips // 16)[: len(dims)]
        size = math.prod(inside)
        wrapped = tuple(n == full for n, full in zip(inside, dims, strict=False))
        return Cluster(
            name=f"{_short(chip)}-{chips}", chip=chip, chips=chips, domain=min(size, chips), dims=inside, wraps=wrapped
        )
    if chips > domain and chips % domain:
        # No whole number of full racks: equal parts of racks, as large as they can be.
        domain = max(n for n in range(host, domain + 1, host) if chips % n == 0)
    return Cluster(name=f"{_short(chip)}-{chips}", chip=chip, chips=chips, domain=min(domain, chips))


def _this_cpu(chip: Chip, devices: int) -> Chip:
    """Return the CPU row divided into devices of this machine: its cores in equal shares, and its memory if the system
    reports it."""
    count, cores = figure(devices, "chips", "host"), (os.cpu_count() or 1) / devices

    def share(of_a_core: Figure) -> Figure:
        return replace(of_a_core, value=of_a_core.value * cores)

    chip = replace(
        chip,
        domain=count,
        chips_per_host=count,
        peaks={name: share(peak) for name, peak in chip.peaks.items()},
        memory_bw=share(chip.memory_bw) if chip.memory_bw else None,
    )
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # no such call on this system: the catalog's value stands
        return chip
    return replace(chip, memory=figure(total / GIB / devices, "GiB", "host"))


def _from_entry(entry: clusters_toml.Entry) -> Cluster:
    chip = entry.chip
    try:
        made = build(chip, entry.size, multislice=entry.slices, name=entry.name)
    except UserError as error:
        raise UserError(
            f"{entry.size_where}: {error.what}", expected=error.expected, got=error.got, do=error.do
        ) from None
    return replace(
        made,
        name=entry.name,
        chip=replace(made.chip, memory=made.chip.memory),
        engine=entry.engine,
        storage=entry.storage,
        options=entry.options,
        track=entry.track,
        prices=entry.prices,
        where=entry.where,
    )


def _unknown(name: str, chip: str, own: Iterable[str]) -> UserError:
    if chip in chip_names():
        return UserError(
            f"cluster {name!r}",
            expected=f"a size after {chip}",
            got="none",
            do=f"Write for instance {legal_sizes(find_chip(chip))[-1].split()[0]}.",
        )
    short = [_short(row) for row in all_chips().values()]
    error = choice(f"cluster {name!r}", chip, [*short, *own])
    return UserError(
        error.what,
        expected="CHIP-COUNT with a chip of the catalog, or a name in your clusters.toml",
        got=error.got,
        do=f"{error.do.removesuffix('Use one of those names.')}Known are {', '.join(sorted({*short, *own}))}.",
    )


def _short(chip: Chip) -> str:
    """Return the common name of a chip: its first alias, except for TPUs."""
    return chip.aliases[0] if chip.aliases and chip.vendor != "google" else chip.name


def _dims(size: str) -> tuple[int, ...]:
    return tuple(int(n) for n in size.split("x"))


def find(wanted: Sequence[str], recipe: str, others: Sequence[str] = ()) -> list[Cluster]:
    """Return the clusters of these names, from clusters.toml or from the catalog (`others`: also valid names).

    Raises:
      UserError: a name has no cluster; the message has the nearest names.
    """
    files = clusters_toml.files(recipe)
    return [resolve(name, files=files, others=others) for name in wanted]
