"""Write the page docs/measured/plan-published.md: published speeds beside predictions, errors, intervals, factors."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from functools import cache
from math import exp, log
from typing import Any

from benchmarks.plan_blind import kept, name, predictions
from benchmarks.plan_held_out import EIGHT, ENTERED, HELD_OUT
from benchmarks.plan_published import ROWS, Checked, Row, check, errors, fit, held
from portatrain.plan.cost import interval

BOUND = 0.15


def report() -> str:
    """Return the page."""
    checked = [check(row) for row in ROWS]
    beyond = [c for c in checked if abs(c.error) > BOUND]
    counted = [abs(c.error) for c in checked if c.row.counted]
    sizes = [abs(c.error) for c in checked]
    by_chip, by_vendor, over_all, sorting = fit(ROWS)
    return "\n".join(
        [
            *_HEAD,
            "| model | chips | precision | published tok/s/chip | predicted | error | own factor | factor used, from "
            "(rows) | mesh; remat; samples | who |",
            "|---|---|---|---|---|---|---|---|---|---|",
            *[_line(one) for one in checked],
            "",
            f"The median leave-one-out error of the {len(checked)} rows is "
            f"**{100 * statistics.median(sizes):.1f} %**, the largest {100 * max(sizes):.0f} %. "
            f"{len(checked) - len(beyond)} of {len(checked)} are within {100 * BOUND:.0f} %. For {len(counted)} rows "
            f"the number of chips was published with the figure; their median error is "
            f"{100 * statistics.median(counted):.1f} %.",
            "",
            f"Rows with an error above {100 * BOUND:.0f} %:",
            "",
            *([f"- {_name(c)}: {100 * c.error:+.0f} %. {_REASONS.get(_name(c), '')}".rstrip() for c in beyond]),
            "",
            *_blind(),
            *_intervals(),
            "## Numbers fitted from all rows",
            "",
            "| for | factor |",
            "|---|---|",
            *[f"| {who} | {value:.3f} |" for who, value in by_chip.items()],
            *[f"| any other {who} chip | {value:.3f} |" for who, value in by_vendor.items()],
            f"| a vendor without a row | {over_all:.3f} |",
            "",
            *_TAIL,
            "",
            "| gathers run on | copies of tokens, through memory, forward |",
            "|---|---|",
            *[f"| the {_WHERE[where]} | {value:.1f} |" for where, value in sorting.items()],
            "",
        ]
    )


def _name(one: Checked) -> str:
    note = f", {one.row.note}" if one.row.note else ""
    return f"{one.row.model} on {one.row.cluster}, {one.row.precision}{note}"


def _chips(row: Row) -> str:
    return f"{row.on.chips} x {row.chip}"


def _line(one: Checked) -> str:
    row, best = one.row, one.chosen
    chips = _chips(row) + ("" if row.counted else " (of its configuration)")
    who = row.who + (f", {row.note}" if row.note else "") + (f"; {row.utilisation}" if row.utilisation else "")
    own = "" if row.mesh else " (the planner's)"
    how = f"{best.mesh_text}; {best.remat}; {best.rows} x {best.accumulation}{own}"
    return (
        f"| {row.model} | {chips} | {row.precision} | {row.tokens:.0f} | {one.predicted:.0f} "
        f"| {100 * one.error:+.1f} % | {one.own:.3f} | {one.factor:.3f}, {one.basis} | {how} | {who} |"
    )


# ---- blind rows


@cache
def _now(row: Row) -> dict[str, Any]:
    return predictions(row)


def blind_errors(rows: Iterable[Row], *, way: str, now: bool) -> list[float]:
    """Return the errors of held-out rows, as they were kept or as the planner is. ``way``: 'planners' or 'publishers'
    configuration."""
    have = kept()
    return [((_now(row) if now else have[name(row)])[way]["tokens"]) / row.tokens - 1 for row in rows]


def _blind() -> list[str]:
    have = kept()
    lines = []
    for row in HELD_OUT:
        then = have[name(row)]
        cells = []
        for said in (then, _now(row)):
            cells += [f"{_one(said, 'planners', row)}", f"{_one(said, 'publishers', row)}"]
        entered = ", entered the fit afterwards" if row in ENTERED else ""
        lines.append(
            f"| {row.model} | {_chips(row)}{', ' + row.note if row.note else ''} | {row.tokens:.1f} | {then['date']} | "
            + " | ".join(cells)
            + f" | {row.who}{entered} |"
        )
    return [
        *_BLIND,
        "| model | chips | published tok/s/chip | predicted on | blind: own configuration | blind: publisher's "
        "| now: own configuration | now: publisher's | who |",
        "|---|---|---|---|---|---|---|---|---|",
        *lines,
        "",
        "Errors of the first eight rows, which never entered a fit:",
        "",
        "| configuration | blind: median | blind: largest | now: median | now: largest |",
        "|---|---|---|---|---|",
        *[_summary(way, title) for way, title in (("planners", "the planner's"), ("publishers", "the publisher's"))],
        "",
        *_EXPLAINED,
        "",
    ]


def _one(said: dict[str, Any], way: str, row: Row) -> str:
    tokens = said[way]["tokens"]
    mesh = f" ({said[way]['mesh']})" if way == "planners" else ""
    return f"{tokens:.{0 if tokens >= 1000 else 1}f}, {100 * (tokens / row.tokens - 1):+.1f} %{mesh}"


def _summary(way: str, title: str) -> str:
    found = [f"{title}"]
    for now in (False, True):
        sizes = [abs(error) for error in blind_errors(EIGHT, way=way, now=now)]
        found += [f"{100 * statistics.median(sizes):.1f} %", f"{100 * max(sizes):.1f} %"]
    return "| " + " | ".join(found) + " |"


# ---- intervals


def _intervals() -> list[str]:
    inside = held(ROWS)
    lines = []
    for far, near in enumerate(interval.NEAR):
        known = list(errors(far).values())
        width = 100 * (exp(interval.SPREADS[far]) - 1)
        these = [at for row, _, at in inside if check(row).far == far]
        mine = f"{sum(these)} of {len(these)}" if these else "-"
        lines.append(f"| {near} | {len(known)} | {width:.0f} % | {mine} |")
    eight = [log(1 + error) for error in blind_errors(EIGHT, way="publishers", now=True)]
    within = sum(abs(error) <= interval.SPREADS[0] for error in eight)
    return [
        *_INTERVALS,
        "| nearest to it | errors of this group | width, either way | rows that lie in it, leave-one-out |",
        "|---|---|---|---|",
        *lines,
        "",
        f"**{sum(at for _, _, at in inside)} of {len(inside)}** rows lie in an interval that was made without them. "
        f"Of the eight held-out rows, {within} lie in the planner's interval for their chip.",
        "",
    ]


_WHERE = {"core": "TensorCore", "sparsecore": "SparseCores"}

_HEAD = (
    "# Published speeds beside predictions",
    "",
    "`python -m benchmarks.plan_published --write` writes this page by arithmetic; nothing was run. Each",
    "prediction is leave-one-out: the efficiency factor of a row is fitted from the other rows. Mesh, microbatch,",
    "remat policy and the blocks of attention come from the publisher's configuration files. The planner has no",
    "pipeline stages: if the publisher used them, the row shows the planner's own best configuration instead, the",
    "best of 1, 2, 4 and 8 samples a device. Offloading of activations is assumed to cost no time. torchtitan's",
    "rows ran on an H100 of 96 GB, 2.4 TB/s and 500 W, which is a chip of its own here. A configuration file may",
    "belong to another release than the published figure.",
    "",
)
_REASONS = {
    "llama3-8b on h100-8, bf16, eager": "The planner plans compiled steps.",
    "llama3-70b on gb300-64, fp8": "It is predicted from six rows, five of them H100s; its bf16 and fp8 peaks are "
    "estimates.",
    "qwen3-235b on tpu-7x-512, bf16": "No other row has experts whose tokens are gathered by SparseCores, so their "
    "time comes from v5p rows, whose TensorCores gather them.",
}
_BLIND = (
    "## Predicted blind",
    "",
    "`python -m benchmarks.plan_blind --freeze` predicts a row of `benchmarks/plan_held_out.py` once, as the",
    "planner is at that moment, and keeps the prediction in `plan-blind.json`. Nothing had been fitted to any of",
    "these rows. Each is predicted in the planner's own configuration and in the publisher's. The columns *now*",
    "show what the planner says after it was mended, so they are not blind. The first eight rows never enter a",
    "fit. The last three entered it after their blind predictions were kept; the last one has the model and the",
    "chip of the third.",
    "",
)
_EXPLAINED = (
    "What the blind predictions taught, and what was mended. The terms were looked for after the blind errors were",
    "known; each has a source other than these eight rows:",
    "",
    "- **DeepSeek-V3 did not fit where its publisher runs it**: on 128 7x chips a device would have needed 165",
    "  GiB. The planner held the up-projections of its latent attention, 3.3 billion parameters with their",
    "  gradients and moments (55 GiB in all), whole on every device. MaxText shards their input over fsdp, as the",
    "  preset does now: 110 GiB. The publisher also keeps gradients and first moments in bf16, which no precision",
    "  of the planner does. An earlier comparison, with kernels that wrote attention's scores to memory, had this",
    "  row at -29 % in the planner's own configuration. Its blind -2 % was luck: a mesh that was too careful, and",
    "  terms that were too small.",
    "- **Grouped matmuls compute rows in vain.** Where the rows of one expert end inside of a tile, the tile is",
    "  computed for both. MaxText's tiles have 512 rows (`wi_tile_fwd_batch_seq`). 256 experts of 1,024 rows",
    "  each: 1.5 times.",
    "- **A router needs the results of its experts** for the gradient of their weights, so their last projection",
    "  is recomputed too.",
    "- **Experts of limited capacity get their tokens by matmuls with one-hot tables** (MaxText's",
    "  `generate_masks`): 2 x tokens of a sample x experts of a token x capacity factor x width FLOPs a token,",
    "  five times a step, and once more if recomputed.",
    "- **A head of 128 fills half of a matrix unit of 256** (v6e and 7x; `tpu_info.py` of jax), a head of 192",
    "  fills three quarters of 256.",
    "- **Attention computes whole blocks on the diagonal**: the publishers' blocks have 2,048 positions.",
    "- **To sort tokens by expert takes longer than their bytes.** It is the second fitted number, below. XLA's",
    "  own programs move 7 to 8 copies of the tokens forward.",
    "",
    "Of the first eight rows, five are dense and three are mixtures of experts. What the planner cannot express",
    "of them: the second sharding axis of weights (`ici_fsdp_transpose_parallelism=2` on 256 7x chips; it is one",
    "fsdp axis here), bf16 gradients and moments, and an imbalance of experts, which their synthetic data with",
    "random routing do not have.",
)
_INTERVALS = (
    "## Intervals",
    "",
    f"`portatrain plan` gives an interval that is to hold {100 * interval.LEVEL:.0f} % of published runs. Its",
    "width is the conformal quantile of |log(predicted / published)| in one of three groups: the errors of rows",
    "predicted from their chip's other rows, from other chips of their vendor alone, and from other vendors",
    "alone. A precision, a size (by more than a factor of 4) or experts that were not seen move a plan one group",
    "on. The last column counts rows that lie in an interval made of other rows' errors.",
    "",
)
_TAIL = (
    "A factor is the share of the nominal peak that matmuls reach inside a step. For a vendor without a row, the",
    "planner takes the factor of another vendor, scaled by a figure that was published for both if there is one.",
    "Wherever the planner uses such a factor, it is marked as an estimate.",
    "",
    "Experts that sort their tokens have one more fitted number: the time to sort tokens and to bring them back,",
    "as the number of times that the tokens' copies would go through memory. It depends on the version of XLA:",
    "libtpu 0.0.52 gathers rows on the SparseCores, which the planner assumes on every TPU, and the flags of the",
    "7x rows ask for it; those of the v5p rows, of 2025, do not.",
)
