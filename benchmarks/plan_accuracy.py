"""Compare the planner with the real compilers, and write docs/measured/plan-accuracy.md.

    python -m benchmarks.plan_accuracy [--only WORD...] [--fresh | --again] [--write]

Every row is planned first, and all predictions are written to docs/measured/plan-accuracy.json before any compiler
runs. A row that is in the file keeps its prediction until --fresh, or --again if the planner has changed and the
programs have not. Then each row is compiled in a separate process, and the page is written from both. This takes hours
on two cores, minutes for one row; compiled answers are cached (`portatrain plan --compile`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from portatrain.errors import UserError
from portatrain.model.layout import Mesh
from portatrain.plan.clusters import names
from portatrain.plan.compilers import compare, job, targets
from portatrain.plan.cost import recipes
from portatrain.plan.cost.tensors import sizes_of
from portatrain.plan.result import Candidate, Plan
from portatrain.plan.search import plan
from portatrain.recipe import load_recipe
from portatrain.recipe.overrides import override

HERE = Path(__file__).parents[1] / "docs" / "measured"
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Row:
    """One program. ``bound``: the largest error of the memory. ``remat``, ``accumulation`` and ``mesh`` are
    fixed, so that a row stays the same program even if the planner would choose another."""

    recipe: str
    cluster: str
    mesh: str
    batch: int
    bound: float = 0.10
    remat: str = "block"
    accumulation: int = 1
    compiler: str = "auto"
    seq_len: int = 8192
    more: tuple[str, ...] = ()
    blind: bool = False
    """Rows compiled after the last change to the planner's terms; for the others the live buffers have been read."""

    @property
    def name(self) -> str:
        how = f", {self.compiler}" if self.compiler != "auto" else ""
        more = "".join(f", {word}" for word in self.more)
        batch = f"batch {self.batch} in {self.accumulation}"
        return f"{self.recipe} on {self.cluster}: {self.mesh}, {batch}, {self.remat}{more}{how}"


def _mixtral(*, blind: bool = True, **row: Any) -> Row:
    return Row(recipe="mixtral-8x7b", batch=1024, seq_len=4096, blind=blind, **row)


def _deepseek(**row: Any) -> Row:
    return Row(recipe="deepseek-v3", batch=15_360, seq_len=4096, blind=True, **row)


ROWS = (
    # What `portatrain plan llama3-8b --cluster tpu-v5p-256 --compile` plans and compiles.
    Row(
        recipe="llama3-8b",
        cluster="tpu-v5p-256",
        mesh="fsdp=128",
        batch=512,
        accumulation=4,
        remat="none",
        bound=0.05,
        blind=True,
    ),
    Row(recipe="llama3-8b", cluster="tpu-v5p-256", mesh="fsdp=128", batch=512, accumulation=4, bound=0.05),
    Row(recipe="llama3-8b", cluster="tpu-v5p-256", mesh="fsdp=128", batch=512, accumulation=1),
    Row(recipe="llama3-8b", cluster="tpu-v5p-256", mesh="fsdp=32,tensor=4", batch=128, accumulation=1),
    Row(recipe="llama3-70b", cluster="tpu-v5p-256", mesh="fsdp=128", batch=128),
    Row(recipe="llama3-8b", cluster="tpu-v6e-256", mesh="fsdp=256", batch=256),
    Row(recipe="llama3-70b", cluster="tpu-v6e-256", mesh="fsdp=256", batch=256),
    Row(recipe="llama3-8b", cluster="tpu-7x-128", mesh="fsdp=128", batch=256),
    Row(recipe="llama3-70b", cluster="tpu-7x-128", mesh="fsdp=128", batch=128),
    Row(recipe="llama3-1b", cluster="tpu-v5e-64", mesh="fsdp=64", batch=64),
    Row(recipe="llama3-1b", cluster="tpu-v4-64", mesh="fsdp=32", batch=64),
    Row(recipe="llama3-8b", cluster="2*tpu-v5p-64", mesh="replica=2,fsdp=32", batch=64),
    Row(
        recipe="llama3-8b",
        cluster="tpu-v5p-12288",
        mesh="replica=24,fsdp=16,context=4,tensor=4",
        batch=384,
        remat="none",
    ),
    Row(recipe="llama3-8b", cluster="h100-64", mesh="fsdp=64", batch=64),
    Row(recipe="llama3-8b", cluster="b200-64", mesh="fsdp=64", batch=128),
    Row(recipe="llama3-70b", cluster="b200-64", mesh="fsdp=64", batch=64),
    Row(recipe="llama3-8b", cluster="h100-64", mesh="fsdp=64", batch=64, compiler="fsdp2"),
    Row(recipe="llama3-8b", cluster="h100-64", mesh="replica=2,fsdp=32", batch=128, compiler="fsdp2"),
    Row(recipe="llama3-1b", cluster="h100-8", mesh="fsdp=8", batch=16, compiler="fsdp2"),
    *(
        Row(recipe="llama3-8b", cluster="h100-64", mesh="fsdp=64", batch=64, remat=remat, compiler=compiler)
        for remat in ("none", "dots", "attention")
        for compiler in ("auto", "fsdp2")
    ),
    Row(recipe="llama3-8b", cluster="tpu-v6e-64", mesh="fsdp=16,tensor=4", batch=64, remat="dots", blind=True),
    Row(recipe="llama3-1b", cluster="tpu-v5p-32", mesh="fsdp=16", batch=64, accumulation=2, remat="none", blind=True),
    Row(recipe="llama3-8b", cluster="tpu-7x-64", mesh="fsdp=64", batch=64, remat="attention", blind=True),
    Row(
        recipe="llama3-8b",
        cluster="b200-64",
        mesh="fsdp=16,tensor=4",
        batch=64,
        accumulation=4,
        remat="attention",
        blind=True,
    ),
    Row(recipe="llama3-1b", cluster="h100-8", mesh="fsdp=8", batch=32, accumulation=2, remat="none", blind=True),
    Row(recipe="llama3-70b", cluster="h200-64", mesh="fsdp=64", batch=64, compiler="fsdp2", blind=True),
    Row(recipe="llama3-8b", cluster="h200-64", mesh="fsdp=32,tensor=2", batch=64, remat="dots", compiler="fsdp2"),
    Row(recipe="llama3-8b", cluster="mi300x-64", mesh="fsdp=16,tensor=4", batch=64, compiler="fsdp2", blind=True),
    Row(
        recipe="llama3-1b",
        cluster="h100-8",
        mesh="fsdp=2,tensor=4",
        batch=8,
        remat="dots",
        compiler="fsdp2",
        blind=True,
    ),
    Row(
        recipe="llama3-1b",
        cluster="h100-8",
        mesh="fsdp=2,context=4",
        batch=8,
        remat="attention",
        compiler="fsdp2",
        blind=True,
    ),
    Row(
        recipe="llama3-1b",
        cluster="h100-8",
        mesh="replica=2,fsdp=4",
        batch=64,
        accumulation=4,
        remat="none",
        compiler="fsdp2",
        blind=True,
    ),
    # AMD's four chips, on one host and on several.
    Row(recipe="llama3-1b", cluster="mi250x-4", mesh="fsdp=8", batch=8, blind=True),
    Row(recipe="llama3-8b", cluster="mi250x-16", mesh="fsdp=32", batch=32, remat="attention", blind=True),
    Row(recipe="llama3-8b", cluster="mi300x-8", mesh="fsdp=8", batch=16, blind=True),
    Row(recipe="llama3-8b", cluster="mi300x-64", mesh="fsdp=64", batch=64, remat="none", blind=True),
    Row(recipe="llama3-8b", cluster="mi325x-8", mesh="fsdp=4,tensor=2", batch=8, remat="dots", blind=True),
    Row(recipe="llama3-70b", cluster="mi325x-64", mesh="fsdp=64", batch=64, blind=True),
    Row(recipe="llama3-1b", cluster="mi355x-8", mesh="fsdp=8", batch=32, accumulation=2, remat="none", blind=True),
    Row(recipe="llama3-8b", cluster="mi355x-64", mesh="replica=2,fsdp=32", batch=128, blind=True),
    # Mixtures: as planned, and of Mixtral where the plan has no expert axis also with one.
    _mixtral(cluster="b200-256", mesh="fsdp=32,expert=8", remat="dots", blind=False),
    _mixtral(cluster="mi355x-256", mesh="fsdp=32,expert=8", remat="attention"),
    _mixtral(cluster="b200-256", mesh="fsdp=32,expert=8", compiler="fsdp2"),
    _mixtral(cluster="mi355x-256", mesh="fsdp=32,expert=8", compiler="fsdp2"),
    _mixtral(cluster="tpu-v5p-256", mesh="fsdp=32,tensor=4", accumulation=8, remat="none"),
    _mixtral(cluster="tpu-v5p-256", mesh="fsdp=16,expert=8", remat="attention"),
    _mixtral(cluster="tpu-7x-256", mesh="fsdp=128,expert=2", remat="attention"),
    _deepseek(cluster="tpu-v5p-512", mesh="fsdp=64,expert=4", accumulation=30),
    _deepseek(cluster="tpu-7x-256", mesh="fsdp=128,tensor=2", accumulation=20),
)


def planned(row: Row) -> tuple[Plan, Candidate]:
    """Return the row's own configuration, priced by the planner."""
    recipe = load_recipe(row.recipe)
    words = (*row.more, f"batch={row.batch}", f"data.seq_len={row.seq_len}")
    shape = recipes.shape_of(override(recipe, words))
    made = plan(
        shape,
        names.resolve(row.cluster),
        mesh=sizes_of(Mesh.parse(row.mesh)),
        remats=(row.remat,),
        accumulation=row.accumulation,
    )
    if made.chosen is None:
        raise UserError(row.name, expected="a way that fits", got="none", do="Change the row.")
    return made, made.chosen


def asked(row: Row, made: Plan, chosen: Candidate) -> tuple[job.Request, targets.Target]:
    target = targets.target(made.used, row.compiler)
    words = (*row.more, f"data.seq_len={row.seq_len}")
    return job.request(made, chosen, target, row.recipe, words), target


def predictions(rows: list[Row], *, fresh: bool, again: bool = False) -> dict[str, Any]:
    """Return every row's prediction, written before anything is compiled. ``fresh`` drops the compiled results,
    ``again`` keeps them."""
    known = read()
    for row in rows:
        seen = "compiled" in known.get(row.name, {})  # of a blind row, it is that prediction that counts
        if fresh or (again and not (row.blind and seen)) or row.name not in known:
            made, chosen = planned(row)
            compiler = targets.target(made.used, row.compiler).compiler
            kept = {} if fresh else known.get(row.name, {})
            known[row.name] = {**kept, "predicted": compare.predict(made, chosen, compiler).as_json()}
    write(known)
    return known


def read() -> dict[str, Any]:
    """Return every row's entry by its name, from docs/measured/plan-accuracy.json."""
    path = HERE / "plan-accuracy.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write(known: dict[str, Any]) -> None:
    text = json.dumps(known, indent=1, sort_keys=True) + "\n"
    (HERE / "plan-accuracy.json").write_text(text, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="rows whose name has all of these words")
    parser.add_argument("--fresh", action="store_true", help="predict and compile anew")
    parser.add_argument("--again", action="store_true", help="predict anew, of rows that stay the programs they are")
    parser.add_argument("--write", action="store_true", help="write docs/measured/plan-accuracy.md")
    args = parser.parse_args()
    rows = [row for row in ROWS if all(word in row.name for word in args.only)]
    known = predictions(rows, fresh=args.fresh, again=args.again)
    for row in rows:
        made, chosen = planned(row)
        request, target = asked(row, made, chosen)

        def tell(text: str, name: str = row.name) -> None:
            print(f"{name}: {text}", file=sys.stderr, flush=True)

        try:
            found = job.answer(request, target, tell=tell, fresh=args.fresh)
        except UserError as error:
            print(f"{row.name}: {error}", file=sys.stderr)
            continue
        said = compare.as_json(compare.predict(made, chosen, target.compiler), found)
        known = read()  # another process may have written its row meanwhile
        known[row.name]["compiled"] = said["compiled"]
        write(known)
        print(line(row, known[row.name]), flush=True)
    if args.write:
        (HERE / "plan-accuracy.md").write_text(page(known), encoding="utf-8")
    return 0


def memory_error(entry: dict[str, Any]) -> float | None:
    """Return predicted over compiled peak memory, less 1; None if the row was not compiled."""
    compiled = entry.get("compiled")
    after = compiled and (compiled["peak_bytes"] or compiled["needs_bytes"])
    return entry["predicted"]["peak_bytes"] / after - 1 if after else None


def line(row: Row, entry: dict[str, Any]) -> str:
    name = f"{row.name}{' (blind)' if row.blind else ''}"
    compiled, says = entry.get("compiled"), f"{entry['predicted']['peak_bytes'] / GIB:.2f}"
    if compiled is None:
        return f"| {name} | {says} | not compiled | - | - | - | - |"
    error = memory_error(entry)
    after = compiled["peak_bytes"] or compiled["needs_bytes"]
    flops = entry["predicted"]["flops"], compiled["flops"]
    before, moved = entry["predicted"]["collective_bytes"], compiled["collective_bytes"]
    traffic = "; ".join(
        f"{axes} {before.get(axes, 0) / GIB:.1f} / {(moved or {}).get(axes, 0) / GIB:.1f}"
        for axes in sorted({*before, *(moved or {})})
    )
    fits = "" if compiled["fits"] else " (does not fit)"
    return (
        f"| {name} | {says} | {after / GIB:.2f}{fits} | "
        f"{100 * error:+.1f} % | {flops[0] / 1e12:.1f} | {flops[1] / 1e12:.1f} | {traffic if moved else 'not told'} |"
        if error is not None and flops[1]
        else f"| {name} | {says} | not told{fits} | - | - | - | - |"
    )


def page(known: dict[str, Any]) -> str:
    """Return the text of docs/measured/plan-accuracy.md."""
    compiled = [(row, known[row.name]) for row in ROWS if "compiled" in known.get(row.name, {})]
    errors = {row.name: error for row, entry in compiled if (error := memory_error(entry)) is not None}
    beyond = [
        (row, errors[row.name]) for row, _ in compiled if row.name in errors and abs(errors[row.name]) > row.bound
    ]
    compilers = sorted({entry["compiled"]["compiler"] for _, entry in compiled})
    text = (HERE / "plan-accuracy.in.md").read_text(encoding="utf-8")
    table = "\n".join(line(row, known[row.name]) for row in ROWS if row.name in known)
    blind = [errors[row.name] for row, _ in compiled if row.blind and row.name in errors]
    summary = (
        f"{len(errors)} rows compiled ({'; '.join(compilers)}): memory {_spread(list(errors.values()))}; of the "
        f"{len(blind)} blind ones {_spread(blind)}. Out of bounds (5 % for the two of 512 in 4, 10 % elsewhere): "
        + ("; ".join(f"{row.name} ({100 * error:+.1f} %)" for row, error in beyond) or "none")
        + "."
    )
    return text.replace("{table}", table).replace("{summary}", summary)


def _spread(errors: list[float]) -> str:
    sizes = [abs(error) for error in errors] or [0.0]
    return f"{100 * statistics.median(sizes):.1f} % off in the middle, {100 * max(sizes):.1f} % at most"


if __name__ == "__main__":
    sys.exit(main())
