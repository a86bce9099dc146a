"""`portatrain data plan`: what each source of a recipe gives over a run, before it starts."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from portatrain.commands.options import add_recipe, resolved_recipe
from portatrain.system.text import counted

if TYPE_CHECKING:
    from portatrain.data import DataSpec

PLAN = """Show what each source of a recipe's data gives over the run: samples, tokens and epochs.

The order of the samples is a function of their number, so this is what the run reads, on any mesh. Text that is not in
a packed store is tokenised for the count, in memory.

examples:
  portatrain data plan my_mixture.py
  portatrain data plan tiny-lm --set steps=20000 --json
"""


def add_plan(commands: Any) -> None:
    about = "show what each source gives over a run, and how often it is repeated"
    made = commands.add_parser(
        "plan", help=about, description=PLAN, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_recipe(made)
    made.add_argument("--json", action="store_true", help="print JSON")


def plan(args: argparse.Namespace) -> int:
    from portatrain.data import Mixture, open_data
    from portatrain.data.mixture import Mixed, source_names

    recipe = resolved_recipe(args)
    spec, total = recipe.data, recipe.steps * recipe.batch
    data = open_data(spec, seed=recipe.seed)
    length = spec.tokens_per_sample()
    if isinstance(data.train, Mixed) and isinstance(spec, Mixture):
        given, windows = data.train.given(total).tolist(), [part.windows for part in data.train.parts]
        sources: list[DataSpec] = list(spec.sources)
        names = source_names(spec)
    else:
        given, windows, sources, names = [total], [data.train.windows], [spec], ("source-0",)
    rows = [
        {
            "source": number,
            "name": names[number],
            "data": _name(source),
            "samples": count,
            "share": count / total if total else 0.0,
            "tokens": None if length is None else count * length,
            "epoch": size,
            "epochs": count / size,
        }
        for number, (source, count, size) in enumerate(zip(sources, given, windows, strict=True))
    ]
    held = 0 if data.validation is None else data.validation.windows
    if args.json:
        print(json.dumps({"steps": recipe.steps, "batch": recipe.batch, "sources": rows, "validation": held}, indent=1))
        data.train.check_end(total)
        return 0
    print(f"{recipe.name}: {counted(recipe.steps, 'steps')} of {counted(recipe.batch, 'samples')}")
    for row in rows:
        tokens = "" if row["tokens"] is None else f", {counted(row['tokens'], 'tokens')}"
        print(
            f"{row['name']}, {row['data']}: {counted(row['samples'], 'samples')} ({100 * row['share']:.2f} %){tokens}"
        )
        print(f"  {row['epochs']:.2f} epochs of {counted(row['epoch'], 'samples')}")
    print(f"validation: {counted(held, 'samples')}" if held else "validation: nothing is held out")
    data.train.check_end(total)
    return 0


def _name(spec: DataSpec) -> str:
    where = next((getattr(spec, name) for name in ("paths", "path") if getattr(spec, name, None)), None)
    return type(spec).__name__ if where is None else f"{type(spec).__name__}({where!r})"
