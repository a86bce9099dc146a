"""Say how a recipe would run on each of several clusters: mesh, memory, time, cost, and why.

Arithmetic on nominal figures: nothing is run, no accelerator and no framework is needed. RECIPE is a file, a
shipped recipe (tiny-lm, llama3-1b, llama3-8b, llama3-70b, llama3-405b) or a preset shape (llama2-70b, mixtral-8x7b,
deepseek-v3). `portatrain clusters` lists chips; a cluster is CHIP-COUNT or a name of your clusters.toml.

examples:
  portatrain plan llama3-8b --cluster tpu-v5p-256,h100-64,mi300x-64
  portatrain plan llama3-405b --cluster 4*tpu-v5p-4096 --details
  portatrain plan tiny-lm --cluster cpu-2 --json
  portatrain plan llama3-70b --cluster all --plot cost.png
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

from portatrain.commands.options import add_recipe
from portatrain.errors import UserError
from portatrain.layout import Mesh
from portatrain.overrides import override
from portatrain.plan import names, recipes, toml
from portatrain.plan.as_json import as_json
from portatrain.plan.policy import PRECISIONS, REMATS
from portatrain.plan.result import Plan
from portatrain.plan.search import plan
from portatrain.plan.shapes import ModelShape
from portatrain.plan.tensors import sizes_of
from portatrain.recipe import Recipe

SUMMARY = "plan a recipe for clusters: mesh, memory, time and cost"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command on ``parser``."""
    add_recipe(parser)
    parser.add_argument(
        "--cluster", metavar="NAME[,NAME...]", default="all",
        help="clusters to plan for; all: one of each kind of chip, and your own (default)",
    )  # fmt: skip
    parser.add_argument("--batch", type=int, metavar="N", help="samples a step, in place of the recipe's")
    parser.add_argument("--seq-len", type=int, metavar="N", help="positions a sample, in place of the recipe's")
    parser.add_argument(
        "--precision", metavar="NAME[,NAME...]",
        help=f"choose from these ({', '.join(PRECISIONS)}; default: the recipe's own)",
    )  # fmt: skip
    parser.add_argument(
        "--remat", metavar="NAME[,NAME...]", help=f"choose from these ({', '.join(REMATS)}; default: all)"
    )
    parser.add_argument("--mesh", metavar="AXIS=N,...", help="plan this mesh only, as in fsdp=16,tensor=8")
    parser.add_argument(
        "--details", action="store_true", help="terms, placement, the ten best and why not the others"
    )
    parser.add_argument("--json", action="store_true", help="print a list with one object a cluster")
    parser.add_argument("--plot", metavar="FILE", help="write a plot of cost against days (png, svg, pdf)")


def run(args: argparse.Namespace) -> int:
    """Carry the command out; 0 also where nothing fits, since that is an answer."""
    shape = _shape(args)
    files = toml.files(args.recipe)
    clusters = [names.resolve(name, files=files) for name in _cluster_names(args.cluster, files)]
    began_s = time.perf_counter()
    mesh = sizes_of(Mesh.parse(args.mesh)) if args.mesh else None
    plans: list[Plan] = [
        plan(
            shape, cluster, mesh=mesh, precisions=_words(args.precision) or None,
            remats=_words(args.remat) or tuple(REMATS),
        )
        for cluster in clusters
    ]  # fmt: skip
    took_s = time.perf_counter() - began_s
    if args.json:
        print(json.dumps([as_json(one) for one in plans], indent=1))
    if args.plot or not args.json:
        from rich.console import Console

        from portatrain.plan import render

        if args.plot:
            render.plot(plans, _plot_file(args.plot))
        if not args.json:
            console = Console() if Console().is_terminal else Console(width=180)
            render.show(plans, console, details=args.details or len(plans) == 1)
            tried = sum(one.counts.meshes for one in plans)
            console.print(f"{tried} meshes on {len(plans)} clusters in {took_s:.2f} s.", style="dim")
    return 0


def _shape(args: argparse.Namespace) -> ModelShape:
    found = recipes.find(args.recipe, cwd=Path.cwd())
    changed = override(found, args.overrides) if args.overrides else found
    if isinstance(changed, Recipe) and args.seq_len is not None and hasattr(changed.data, "seq_len"):
        changed = override(changed, [f"data.seq_len={args.seq_len}"])
    shape = recipes.shape_of(changed)
    for name in ("batch", "seq_len"):
        value = getattr(args, name)
        if value is None:
            continue
        if value < 1:
            raise UserError(
                f"--{name.replace('_', '-')}", expected="a whole number of at least 1", got=str(value),
                do="Choose a larger one.",
            )  # fmt: skip
        if name == "seq_len" and isinstance(changed, Recipe) and not hasattr(changed.data, "seq_len"):
            raise UserError(
                "--seq-len", expected="a recipe whose samples have a length", got=f"recipe {shape.name}",
                do="Leave it out: the model says how long its samples are.",
            )  # fmt: skip
        shape = replace(shape, **{name: value})
    return shape


def _cluster_names(text: str, files: list[Path]) -> list[str]:
    if text == "all":
        return [*(name for path in files for name in toml.read(path)), *names.EXAMPLES]
    found = _words(text)
    if not found:
        raise UserError(
            "--cluster", expected="a name", got=repr(text), do="Write --cluster tpu-v5p-256,h100-64."
        )
    return list(dict.fromkeys(found))


def _words(text: str | None) -> tuple[str, ...]:
    return tuple(word.strip() for word in (text or "").split(",") if word.strip())


def _plot_file(text: str) -> Path:
    path = Path(text)
    if path.suffix not in (".png", ".svg", ".pdf") or not path.parent.is_dir():
        raise UserError(
            f"--plot {text}", expected="a file ending in .png, .svg or .pdf in a folder that exists", got=text,
            do="Write --plot cost.png.",
        )  # fmt: skip
    return path
