"""Measure what muP promises on a small decoder: activations and the best learning rate do not depend on the width.

    python -m benchmarks.widths sizes            # the coordinate check: what docs/measured/widths.json lacks of it
    python -m benchmarks.widths sweep            # losses over the learning rate, on two processes
    python -m benchmarks.widths sweep --write    # the same, with its part of docs/measured/widths.md and its picture
    python -m benchmarks.widths sweep --from FILE    # with results in another file

Each point of the sweep is one training run: a parametrization, a width and a learning rate. All runs have the same
samples. The coordinate check (Yang et al. 2022, appendix D.1) takes steps at one learning rate and looks at the size of
what the layers give. Everything runs on the torch backend, each process on one core; losses do not depend on how busy
the machine is.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import multiprocessing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from portatrain.data import Stdlib, open_data
from portatrain.model.widths import MuP
from portatrain.optim import AdamW, Cosine
from portatrain.recipe import Recipe
from portatrain.system import svg
from recipes.models.decoder import DecoderConfig

KEPT = Path("docs/measured/widths.json")
PAGE, PICTURES = Path("docs/measured/widths.md"), Path("docs/images")
MARK, END = "<!-- written by benchmarks.widths {} -->", "<!-- end -->"

KINDS = {"standard": "standard parametrization", "muP": "muP, base width 32"}
BASE, WIDTHS = 32, (32, 64, 128, 256)
RATES = tuple(2.0**-e for e in (10, 9, 8, 7, 6, 5, 4))
STEPS, LAST = 80, 10
"""Steps of a run, and the last ones of which the mean loss is its result."""
CHECK_RATE, CHECK_STEPS = 2.0**-7, 4
LAYERS = ("embed", "attn 1", "mlp 1", "attn 2", "mlp 2", "logits")


def recipe(kind: str, width: int, lr: float) -> Recipe:
    """Heads have 16 features at every width, so their number grows. In the standard parametrization each width is its
    own base: all factors are 1, but that by name, which makes embedded tokens as large as normalised ones."""
    sizes = {"embed": width, "heads": width // 16, "mlp": 2 * width}
    base = {name: n * BASE // width for name, n in sizes.items()} if kind == "muP" else sizes
    return Recipe(
        name="widths",
        model=DecoderConfig(vocab=256, layers=2, head_dim=16, tied=False, **sizes),
        data=Stdlib(seq_len=64, validation=0.03),
        optimizer=AdamW(lr=lr, b2=0.95),
        schedule=Cosine(warmup=10, min_ratio=0.0),
        steps=STEPS,
        batch=16,
        parametrization=MuP(base=base, init={"embed/table": 50.0}),
    )


@functools.cache
def batches() -> list[dict[str, np.ndarray]]:
    """The samples of all runs, as (1, batch, ...) arrays."""
    made = recipe("muP", BASE, 1e-3)
    train = open_data(made.data, seed=0).train
    return [made.microbatches(train.batch(n * made.batch, made.batch)) for n in range(STEPS)]


def begun(made: Recipe) -> tuple[Any, Any]:
    from portatrain.backends.base import backend_class
    from portatrain.backends.program import make_program

    backend: Any = backend_class("torch")(make_program(made))
    return backend, backend.init_state()


def trained(point: tuple[str, int, float]) -> tuple[tuple[str, int, float], float]:
    """Return the point and the mean loss of its last steps; infinity if the loss is not finite."""
    made = recipe(*point)
    backend, state = begun(made)
    losses = []
    for step, batch in enumerate(batches(), start=1):
        state, result = backend.step(state, batch, step=step, scale=made.lr_scale(step))
        losses.append(float(result.loss))
        if not math.isfinite(losses[-1]):
            return point, math.inf
    return point, float(np.mean(losses[-LAST:]))


def checked(point: tuple[str, int]) -> tuple[tuple[str, int], list[list[float]]]:
    """Return the point and the mean absolute value of what each of `LAYERS` gives, after 0 to `CHECK_STEPS` steps."""
    made = dataclasses.replace(recipe(*point, CHECK_RATE), clip_norm=None)
    backend, state = begun(made)
    found = []
    for step in range(1, CHECK_STEPS + 2):
        # The same samples each time, so that only the parameters differ.
        (seen,) = backend.watch(state, batches()[0], step=1)
        sizes: dict[str, float] = {}
        for call in seen.calls:
            name = {"embed": "embed", "blocks/attn": "attn", "blocks/mlp": "mlp"}.get(call.path, "")
            key = name if call.layer is None else f"{name} {call.layer + 1}"
            if key in LAYERS and call.name in ("embed", "einsum"):  # the last einsum of a module is what it gives
                sizes[key] = float(np.abs(call.results[0]).mean())
        logits = backend.predict(state, {k: v[0] for k, v in batches()[0].items()})
        sizes["logits"] = float(np.abs(logits).mean())
        found.append([sizes[name] for name in LAYERS])
        state, _ = backend.step(state, batches()[0], step=step, scale=1.0)
    return point, found


def measured(path: Path, part: str) -> dict[str, Any]:
    """Return all results, after those that `part` lacks have been computed; each is kept as soon as it is there."""
    held = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"losses": {}, "sizes": {}}
    kinds = "sizes" if part == "sizes" else "losses"
    rates = ((),) if part == "sizes" else tuple((rate,) for rate in RATES)
    points = [(kind, width, *rate) for kind in KINDS for width in WIDTHS for rate in rates]
    points = [p for p in points if _key(*p) not in held[kinds]]
    if part == "sweep":  # at the base width both recipes are one; widest first, so that both processes end together
        points = sorted((p for p in points if p[:2] != ("muP", BASE)), key=lambda p: -p[1])
    if points:
        with multiprocessing.get_context("spawn").Pool(2, initializer=_one_core) as pool:
            run: Any = checked if part == "sizes" else trained
            for point, found in pool.imap_unordered(run, points):
                print(*point, "" if part == "sizes" else f"{found:.4f}", flush=True)
                held[kinds][_key(*point)] = None if found == math.inf else found
                _keep(path, held)
    if part == "sweep":
        held["losses"] |= {_key("muP", BASE, r): held["losses"][_key("standard", BASE, r)] for r in RATES}
        _keep(path, held)
    return held


def _one_core() -> None:
    import torch

    torch.set_num_threads(1)


def _key(*parts: object) -> str:
    return " ".join(f"{part:g}" if isinstance(part, float) else str(part) for part in parts)


def _keep(path: Path, held: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(held, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def losses_of(held: Mapping[str, Any], kind: str, width: int) -> list[float]:
    found = [held["losses"][_key(kind, width, rate)] for rate in RATES]
    return [math.inf if loss is None else loss for loss in found]


def best(losses: Sequence[float]) -> float:
    """Return the log2 of the best rate: the minimum of the parabola through the best point and its neighbours."""
    at = min(range(len(losses)), key=losses.__getitem__)
    middle = math.log2(RATES[at])
    if at in (0, len(losses) - 1) or not all(map(math.isfinite, losses[at - 1 : at + 2])):
        return middle
    left, low, right = losses[at - 1 : at + 2]
    return middle + 0.5 * (left - right) / (left - 2 * low + right)


def sweep_lines(held: Mapping[str, Any]) -> list[str]:
    """The part of the page about the sweep."""
    rows = []
    for kind, said in KINDS.items():
        base = losses_of(held, kind, BASE)
        at = min(range(len(RATES)), key=base.__getitem__)
        for width in WIDTHS:
            losses = losses_of(held, kind, width)
            edge = min(range(len(losses)), key=losses.__getitem__) == len(losses) - 1
            rate = f"2^{best(losses):.1f}" + (" or more" if edge else "")
            rows.append(f"| {said} | {width} | {rate} | {min(losses):.3f} | {losses[at]:.3f} |")
    return [
        "## The best learning rate",
        "",
        f"Runs of {STEPS} steps with a cosine schedule; a loss is the mean of the last {LAST} steps, of one seed. The "
        "best rate is the minimum of a parabola, in the logarithm of the rate, through the best rate of the grid "
        "(powers of two) and its two neighbours. At width 32, the base, both parametrizations are one run.",
        "",
        "| parametrization | width | best learning rate | least loss of the grid | loss at the best rate of width 32 |",
        "|---|---|---|---|---|",
        *rows,
        "",
        "![Loss over the learning rate](../images/width-sweep.svg)",
    ]


def sizes_lines(held: Mapping[str, Any]) -> list[str]:
    """The part of the page about the coordinate check."""
    rows = []
    for kind, said in KINDS.items():
        ends = [held["sizes"][_key(kind, width)][CHECK_STEPS] for width in (WIDTHS[0], WIDTHS[-1])]
        grown = " | ".join(f"{wide / narrow:.2f}" for narrow, wide in zip(*ends, strict=True))
        rows.append(f"| {said} | {grown} |")
    return [
        f"| size at width {WIDTHS[-1]} / at width {WIDTHS[0]}, after {CHECK_STEPS} steps | {' | '.join(LAYERS)} |",
        "|---|" + "---|" * len(LAYERS),
        *rows,
        "",
        "![The size of what layers give](../images/width-sizes.svg)",
    ]


def sweep_picture(held: Mapping[str, Any]) -> str:
    """The loss over the learning rate, a curve for each width, a panel for each parametrization."""
    shown = [x for kind in KINDS for width in WIDTHS for x in losses_of(held, kind, width) if x < 4.2]
    low, high = svg.padded(shown)
    parts = []
    for i, (kind, said) in enumerate(KINDS.items()):
        x = svg.Scale(low=min(RATES) / 1.2, high=max(RATES) * 1.2, start=60 + 440 * i, end=460 + 440 * i, log=True)
        y = svg.Scale(low=low, high=high, start=340, end=60)
        parts += svg.frame(x, y, x_label="learning rate", y_label="loss" if not i else "")
        parts.append(f'<text x="{260 + 440 * i}" y="50" text-anchor="middle">{said}</text>')
        for width, colour in zip(WIDTHS, svg.COLOURS, strict=False):
            losses = losses_of(held, kind, width)
            points = [p for p in zip(RATES, losses, strict=True) if p[1] <= high]
            parts.append(svg.polyline(points, x, y, colour=colour))
            at = min(points, key=lambda p: p[1])
            parts.append(f'<circle cx="{x(at[0]):.1f}" cy="{y(at[1]):.1f}" r="4.5" fill="{colour}"/>')
    return svg.document("Loss over the learning rate; a dot is the best rate", 920, 420, [*parts, *_legend(398)])


def sizes_picture(held: Mapping[str, Any]) -> str:
    """The size of what layers give over the width, a curve for each number of steps, a panel for each layer."""
    parts, shown = [], ("attn 2", "mlp 2", "logits")
    values = [
        held["sizes"][_key(k, w)][t][LAYERS.index(n)] for k in KINDS for w in WIDTHS for t in range(5) for n in shown
    ]
    for row, (kind, said) in enumerate(KINDS.items()):
        for column, name in enumerate(shown):
            x = svg.Scale(low=28, high=290, start=60 + 290 * column, end=310 + 290 * column, log=True)
            y = svg.Scale(
                low=min(values) / 1.3, high=max(values) * 1.3, start=250 + 250 * row, end=70 + 250 * row, log=True
            )
            last = row == len(KINDS) - 1
            parts += svg.frame(x, y, x_label="width" if last else "", y_label="mean size" if not column else "")
            at = (x.start + x.end) / 2
            parts.append(f'<text x="{at:.0f}" y="{y.end - 8:.0f}" text-anchor="middle">{name}, {said}</text>')
            for t, colour in zip(range(CHECK_STEPS + 1), svg.COLOURS, strict=False):
                points = [(w, held["sizes"][_key(kind, w)][t][LAYERS.index(name)]) for w in WIDTHS]
                parts.append(svg.polyline(points, x, y, colour=colour))
    steps = [f"after {t} steps" for t in range(CHECK_STEPS + 1)]
    return svg.document("The mean size of what layers give, over the width", 920, 590, [*parts, *_legend(572, steps)])


def _legend(at: int, names: Sequence[str] = tuple(f"width {w}" for w in WIDTHS)) -> list[str]:
    found = []
    for i, (name, colour) in enumerate(zip(names, svg.COLOURS, strict=False)):
        left = 90 + 160 * i
        found.append(f'<line x1="{left}" x2="{left + 24}" y1="{at}" y2="{at}" stroke="{colour}" stroke-width="3"/>')
        found.append(f'<text x="{left + 30}" y="{at + 4}">{name}</text>')
    return found


PARTS = {"sizes": (sizes_lines, sizes_picture), "sweep": (sweep_lines, sweep_picture)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--from", dest="kept", type=Path, default=KEPT, metavar="FILE", help="where results are kept")
    parser.add_argument("--write", action="store_true", help="write its part of the page, and its picture")
    args = parser.parse_args()
    lines, picture = PARTS[args.part]
    held = measured(args.kept, args.part)
    text = "\n".join(lines(held))
    print(text)
    if args.write:
        mark = MARK.format(args.part)
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(mark)
        PAGE.write_text(f"{before}{mark}\n\n{text}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")
        (PICTURES / f"width-{args.part}.svg").write_text(picture(held), encoding="utf-8")


if __name__ == "__main__":
    main()
