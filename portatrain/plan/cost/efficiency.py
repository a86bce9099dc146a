"""Keep the one fitted number: the share of its peak that a chip's matmuls reach inside a training step.

``python -m benchmarks.plan_published`` fits it from published runs and prints this table's values; a test
holds the two together. One factor for a chip with several published rows, one for a vendor otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from portatrain.errors import UserError
from portatrain.plan.clusters.chip import Chip
from portatrain.system import json_files
from portatrain.system.paths import config_folder


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """An efficiency factor. ``value``: matmul FLOPs reached over the peak. ``basis``: the data that it was fitted
    from. ``estimate``: True if it rests on no published run of that vendor."""

    value: float
    basis: str
    estimate: bool = False


BY_CHIP: dict[str, float] = {
    "h100-sxm": 0.604,
    "h100-sxm of 500 W": 0.441,
    "tpu-7x": 0.767,
    "tpu-v5p": 0.808,
    "tpu-v6e": 0.759,
}
BY_VENDOR: dict[str, float] = {"google": 0.776, "nvidia": 0.509}
ALL = 0.652

RELATIVE: dict[str, tuple[str, float, str]] = {
    "amd": ("h100-sxm", (620 / 1307) / (720 / 989.5), "the H100's, by both chips' sustained matmul rates"),
    "mi250x": ("nvidia", 0.765 * 312 / 383, "an A100's, of which an MI250 reached 73 to 80 % (MosaicML)"),
    "gaudi2": ("nvidia", 1.22 * 312 / 432, "an A100's, of which a Gaudi2 reached 1.22 (Databricks)"),
    "intel": ("nvidia", 1.22 * 312 / 432, "Gaudi2's"),
}
"""Chip or vendor -> (the chip or vendor whose factor it takes, multiplier, reason): figures published side by side
carry a factor over to a vendor without a published run."""

TYPICAL_ERROR, WORST_ERROR = 0.066, 0.334
"""Median and largest error of the predictions for published runs, leave-one-out."""


def own_file() -> Path:
    """Return the file in which `portatrain plan --calibrate` keeps the factors of the user's own runs."""
    return config_folder() / "efficiency.json"


def of(chip: Chip) -> Efficiency:
    """Return the factor for a chip: from the user's own runs if there are any, else from published runs.

    Raises:
      UserError: the file of the user's own factors cannot be read.
    """
    own = _own(own_file()).get(chip.name)
    if own is not None:
        return Efficiency(value=own, basis="your own runs")
    return published(chip)


def _own(path: Path) -> dict[str, float]:
    if not path.is_file():
        return {}
    try:
        found = {name: float(entry["factor"]) for name, entry in json_files.loads(path.read_text("utf-8")).items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        found = {"?": 0.0}
        told = f"{type(error).__name__}: {error}"
    else:
        told = ", ".join(f"{name} {value}" for name, value in found.items())
    if any(not 0 < value < 10 for value in found.values()):
        raise UserError(
            str(path),
            expected="factors of your own runs, as `portatrain plan --calibrate` writes them",
            got=told,
            do="Delete the file, and calibrate again.",
        )
    return found


def published(chip: Chip) -> Efficiency:
    """Return the factor for a chip from published runs."""
    if chip.name in BY_CHIP:
        return Efficiency(value=BY_CHIP[chip.name], basis=f"published runs on {chip.name}")
    if chip.vendor in BY_VENDOR:
        return Efficiency(value=BY_VENDOR[chip.vendor], basis=f"published runs on {chip.vendor} chips")
    for name in (chip.name, chip.vendor):
        if name in RELATIVE:
            base, share, why = RELATIVE[name]
            return Efficiency(value={**BY_VENDOR, **BY_CHIP}[base] * share, basis=why, estimate=True)
    return Efficiency(value=ALL, basis="the mean of all published runs", estimate=True)
