"""Predict how a recipe would run on each of several clusters: mesh, memory, time, cost, and the reasons.

The plan is arithmetic on nominal figures: it runs nothing, and needs no accelerator and no framework. RECIPE is a file,
a shipped recipe (tiny-lm, llama3-8b, qwen3-8b, mixtral-8x7b, deepseek-v3 and more: docs/start/released.md) or a preset
shape (llama2-70b). `portatrain clusters` lists chips; a cluster is CHIP-COUNT or a name of your clusters.toml.

examples:
  portatrain plan llama3-8b --cluster tpu-v5p-256,h100-64,mi300x-64
  portatrain plan llama3-405b --cluster 4*tpu-v5p-4096 --details
  portatrain plan tiny-lm --cluster cpu-2 --json
  portatrain plan llama3-70b --cluster all --plot cost.svg
  portatrain plan --calibrate runs/demo runs/wide                  # planned against measured; fits the factor
  portatrain plan llama3-8b --cluster tpu-v5p-256 --compile       # check with the real compiler; takes minutes
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from portatrain.commands.options import add_recipe, folder
from portatrain.errors import UserError
from portatrain.model.layout import Mesh, axis_warning, unknown_axes
from portatrain.plan.as_json import as_json
from portatrain.plan.clusters import clusters_toml, names
from portatrain.plan.cost import recipes
from portatrain.plan.cost.policy import PRECISIONS, REMATS
from portatrain.plan.cost.shapes import ModelShape
from portatrain.plan.cost.tensors import sizes_of
from portatrain.plan.result import Plan
from portatrain.plan.search import plan
from portatrain.recipe import Recipe
from portatrain.recipe.overrides import override
from portatrain.system import terminal

if TYPE_CHECKING:
    from rich.console import Console

COMPILERS = ("auto", "tpu", "cuda", "rocm", "fsdp2")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to ``parser``."""
    add_recipe(parser, required=False)
    parser.add_argument(
        "--cluster",
        metavar="NAME[,NAME...]",
        default="all",
        help="clusters to plan for; all (the default): one for each kind of chip, and your own",
    )
    parser.add_argument("--batch", type=int, metavar="N", help="samples per step, instead of the recipe's value")
    parser.add_argument("--seq-len", type=int, metavar="N", help="positions per sample, instead of the recipe's value")
    parser.add_argument(
        "--precision",
        metavar="NAME[,NAME...]",
        help=f"choose from these ({', '.join(PRECISIONS)}; default: the recipe's own)",
    )
    parser.add_argument(
        "--remat", metavar="NAME[,NAME...]", help=f"choose from these ({', '.join(REMATS)}; default: all)"
    )
    parser.add_argument("--mesh", metavar="AXIS=N,...", help="plan only this mesh, such as fsdp=16,tensor=8")
    parser.add_argument(
        "--details", action="store_true", help="show terms, placement, the ten best meshes, and why others lost"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list with one object per cluster")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="check the best mesh with the chip's own compiler, without an accelerator: libtpu, or XLA for NVIDIA and "
        "AMD; otherwise FSDP2 traced with fake tensors. Takes minutes; the result is kept",
    )
    parser.add_argument(
        "--compiler", metavar="NAME", choices=COMPILERS, default="auto", help=f"for --compile: {', '.join(COMPILERS)}"
    )
    parser.add_argument("--fresh", action="store_true", help="compile again, even if a result is kept")
    parser.add_argument(
        "--calibrate",
        metavar="RUN_DIR",
        nargs="+",
        type=folder,
        help="instead of planning: fit the efficiency factors to these runs, print the changes, and keep them",
    )
    parser.add_argument("--plot", metavar="FILE", help="write an SVG plot of cost against days")


def run(args: argparse.Namespace) -> int:
    """Run the command; return 0 even if the recipe fits on no cluster, because that is a valid answer.

    Raises UserError if the chip of every cluster refuses the recipe's precision.
    """
    if args.calibrate:
        return _calibrate(args)
    if args.recipe is None:
        raise UserError(
            "portatrain plan", expected="a recipe", got="none", do="Write portatrain plan llama3-8b --cluster h100-64."
        )
    shape = _shape(args)
    files = clusters_toml.files(args.recipe)
    clusters = [names.resolve(name, files=files) for name in _cluster_names(args.cluster, files)]
    began_s = time.perf_counter()
    mesh = sizes_of(Mesh.parse(args.mesh)) if args.mesh else None
    plans: list[Plan] = [
        plan(
            shape,
            cluster,
            mesh=mesh,
            precisions=_words(args.precision) or None,
            remats=_words(args.remat) or tuple(REMATS),
        )
        for cluster in clusters
    ]
    took_s = time.perf_counter() - began_s
    if all(one.refusal for one in plans) and plans[0].refusal is not None:
        raise plans[0].refusal
    checks: dict[str, dict[str, object]] = {}
    if args.json:
        if args.compile:
            checks = {one.cluster.name: _compiled(one, args, None) for one in plans if one.chosen}
        print(json.dumps([as_json(one) | checks.get(one.cluster.name, {}) for one in plans], indent=1))
    if args.plot or not args.json:
        from portatrain.plan import render

        if args.plot:
            render.plot(plans, _plot_file(args.plot))
        if not args.json:
            console = terminal.console(180)
            render.show(plans, console, details=args.details or len(plans) == 1)
            tried = sum(one.counts.meshes for one in plans)
            console.print(f"{tried} meshes on {len(plans)} clusters in {took_s:.2f} s.", style="dim")
            for one in plans if args.compile else ():
                if one.chosen:
                    _compiled(one, args, console)
    return 0


def _calibrate(args: argparse.Namespace) -> int:
    """Print planned and measured figures of every attempt; fit the factors, store them and print where."""
    from rich.table import Table

    from portatrain.plan import calibrate

    if args.recipe is not None:
        args.calibrate.insert(0, Path(args.recipe))  # the first folder may precede `--calibrate`
    attempts = calibrate.seen(args.calibrate)
    changes = calibrate.fit(attempts)
    kept = calibrate.keep(changes) if changes else None
    if args.json:
        print(
            json.dumps(
                {
                    "attempts": [asdict(one) for one in attempts],
                    "changes": [asdict(one) for one in changes],
                    "kept": str(kept) if kept else None,
                },
                indent=1,
            )
        )
        return 0
    console = terminal.console(140)
    table = Table("attempt", "chip", "planned s", "measured s", "planned GiB", "measured GiB", "own factor")
    for one in attempts:
        bytes_ = "-" if one.measured_bytes is None else f"{one.measured_bytes / 2**30:.2f}"
        table.add_row(
            one.where,
            one.chip,
            f"{one.planned_s:.4g}",
            f"{one.measured_s:.4g}",
            f"{one.planned_bytes / 2**30:.2f}",
            bytes_,
            "none" if one.factor is None else f"{one.factor:.3f}",
        )
    console.print(table)
    for change in changes:
        console.print(
            f"{change.chip}: efficiency factor {change.before:.3f} ({change.before_from}) -> {change.after:.3f} "
            f"(your own runs: {change.attempts})",
            soft_wrap=True,
        )
    told = f"Kept in {kept}; delete it to go back to published runs."
    console.print(told if kept else "Nothing was changed: no factor explains these times.", soft_wrap=True)
    return 0


def _compiled(made: Plan, args: argparse.Namespace, console: Console | None) -> dict[str, object]:
    """Compile the best mesh of a plan; return predicted and compiled figures, and print them if there is a console."""
    from portatrain.plan.compilers import compare, job, targets

    chosen = made.chosen
    assert chosen is not None
    if isinstance(recipes.find(args.recipe, cwd=Path.cwd()), ModelShape):
        raise UserError(
            f"--compile of {args.recipe}",
            expected="a recipe, which has a model to compile",
            got="a preset shape",
            do="Use a recipe such as llama3-8b, or leave --compile out.",
        )
    target = targets.target(made.used, args.compiler)
    predicted = compare.predict(made, chosen, target.compiler)
    extra = [f"data.seq_len={args.seq_len}"] if args.seq_len is not None else []
    request = job.request(made, chosen, target, args.recipe, (*args.overrides, *extra))

    def tell(line: str) -> None:
        print(f"{made.cluster.name}: {line}", file=sys.stderr, flush=True)

    found = job.answer(request, target, tell=tell, fresh=args.fresh)
    if console is not None:
        if not found.fits:
            console.print(f"{made.cluster.name}: it does NOT fit, says the compiler: {found.raw.get('said')}")
        console.print(compare.table(made.cluster.name, predicted, found))
    return compare.as_json(predicted, found)


def _shape(args: argparse.Namespace) -> ModelShape:
    found = recipes.find(args.recipe, cwd=Path.cwd())
    changed = override(found, args.overrides) if args.overrides else found
    if isinstance(changed, Recipe) and args.seq_len is not None and hasattr(changed.data, "seq_len"):
        changed = override(changed, [f"data.seq_len={args.seq_len}"])
    if isinstance(changed, Recipe):
        unknown = unknown_axes(changed.describe(), compute=changed.compute, params=changed.params)
        if unknown:
            print(f"warning: {axis_warning(unknown)}", file=sys.stderr)
    shape = recipes.shape_of(changed)
    for name in ("batch", "seq_len"):
        value = getattr(args, name)
        if value is None:
            continue
        if value < 1:
            raise UserError(
                f"--{name.replace('_', '-')}",
                expected="a whole number of at least 1",
                got=str(value),
                do="Choose a larger one.",
            )
        if name == "seq_len" and isinstance(changed, Recipe) and not hasattr(changed.data, "seq_len"):
            tokens = changed.data.tokens_per_sample()
            raise UserError(
                "--seq-len",
                expected="a recipe with data that have a field seq_len",
                got=f"recipe {shape.name} with {type(changed.data).__name__}",
                do="Leave it out: the model says how long its samples are."
                if tokens is None
                else f"Leave it out, or change the length of {tokens} tokens where the recipe makes the data.",
            )
        shape = replace(shape, **{name: value})
    return shape


def _cluster_names(text: str, files: list[Path]) -> list[str]:
    if text == "all":
        return [*(name for path in files for name in clusters_toml.read(path)), *names.EXAMPLES]
    found = _words(text)
    if not found:
        raise UserError("--cluster", expected="a name", got=repr(text), do="Write --cluster tpu-v5p-256,h100-64.")
    return list(dict.fromkeys(found))


def _words(text: str | None) -> tuple[str, ...]:
    return tuple(word.strip() for word in (text or "").split(",") if word.strip())


def _plot_file(text: str) -> Path:
    path = Path(text)
    if path.suffix != ".svg" or not path.parent.is_dir():
        raise UserError(
            f"--plot {text}",
            expected="a file ending in .svg in a folder that exists",
            got=text,
            do="Write --plot cost.svg.",
        )
    return path
