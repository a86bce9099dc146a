"""Hold figures of the catalog: numbers with a unit, a source, the date of its reading, and a certainty."""

from __future__ import annotations

from dataclasses import dataclass

# key -> (source, date of reading). Most pages have no date of their own, so the year is that of the reading.
SOURCES: dict[str, tuple[str, str]] = {
    "tpu-docs": ("Google Cloud TPU documentation", "2026"),
    "tpu-info": ("jax, tpu_info.py", "2026"),
    "scaling-book": ("jax-ml/scaling-book", "2026"),
    "xpk": ("xpk, system_characteristics.py", "2026"),
    "maxtext": ("MaxText", "2026"),
    "tpu8": ("Google's announcement of TPU 8t and 8i", "2026-04-22"),
    "prices": ("list prices of the clouds, SkyPilot catalog v8", "2026"),
    "pages": ("public vendor and cloud pages, page not recorded", "2026"),
    "surveys": ("secondary chip surveys", "2026 autumn"),
    "primus": ("AMD Primus hardware configurations", "2026"),
    "rocm": ("AMD ROCm hardware specifications", "2026"),
    "neuron": ("AWS Neuron documentation", "2026"),
    "semianalysis": ("SemiAnalysis, MI300X against H100 and H200, part 1", "2026"),
    "gaudi": ("Intel Gaudi vendor data", "2026"),
    "cloudmatrix": ("the CloudMatrix papers", "2026"),
    "nvidia-press": ("NVIDIA and press material", "2026"),
    "maia100": ("Microsoft at Hot Chips 2024, Inside Maia 100", "2026"),
    "maia200": ("Microsoft's announcement of Maia 200", "2026-01-26"),
    "mtia2": ("Meta's announcement of its second MTIA chip, April 2024", "2026"),
    "mthreads": ("Moore Threads' figures of the MTT cards, as the press repeats them", "2026"),
    "domestic": ("Gitee AI, its pages on GPUs made in China", "2026"),
    "derived": ("derived from other figures of this row", "2026"),
    "none": ("no source; an assumption of this catalog", "2026"),
    "user": ("the user's clusters.toml", "now"),
    "host": ("read from this machine", "now"),
}


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One nominal value. ``estimate`` marks a value that no source read so far confirms.

    A bandwidth is per chip and per direction unless its unit says otherwise; GB and TB are decimal,
    GiB is binary.
    """

    value: float
    unit: str
    source: str
    date: str
    estimate: bool = False
    note: str = ""

    def __str__(self) -> str:
        return f"{'~' if self.estimate else ''}{self.value:g} {self.unit}"

    def as_json(self) -> dict[str, object]:
        return {
            "value": self.value,
            "unit": self.unit,
            "source": self.source,
            "date": self.date,
            "estimate": self.estimate,
            **({"note": self.note} if self.note else {}),
        }


@dataclass(frozen=True, kw_only=True)
class Raw:
    """A number of a row that differs from the row in source or certainty."""

    value: float
    source: str | None = None
    estimate: bool = False
    note: str = ""


def est(value: float, note: str = "", *, source: str | None = None) -> Raw:
    """Return a value that no source read so far confirms."""
    return Raw(value=value, source=source, estimate=True, note=note)


def cite(value: float, source: str, note: str = "") -> Raw:
    """Return a value from another source than the rest of its row."""
    return Raw(value=value, source=source, note=note)


def figure(raw: float | Raw, unit: str, default_source: str) -> Figure:
    """Return the figure for one entry of a row. ``source`` may name several keys of SOURCES, separated by spaces."""
    entry = raw if isinstance(raw, Raw) else Raw(value=raw)
    keys = (entry.source or default_source).split()
    texts, dates = zip(*(SOURCES[key] for key in keys), strict=True)
    return Figure(
        value=float(entry.value),
        unit=unit,
        source="; ".join(texts),
        date=max(dates),
        estimate=entry.estimate,
        note=entry.note,
    )
