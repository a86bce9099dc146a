"""Find where two runs part, or two settings of one recipe: the first step that differs by more than rounding, and in it
the first operation, tensor or rule that is not what the float64 oracle computes from the same numbers.

A and B are runs. First their records are compared: recipes field by field, versions of packages, curves, and the
probes of checkpoints. Then the step is replayed from the last checkpoint that both have, on the backend and mesh of
each run: a batch is a pure function of its step. --records leaves the replay out.

Without B, A is a recipe, and --a and --b are two settings of it: backend=NAME, mesh=AXES, kernel=OPERATION=KERNEL, or
any field of the recipe. The first steps are then replayed at small size with drawn tokens, as in `portatrain check`.

--python-a and --python-b name a Python of another environment, whose packages then run that side: the code is the one
here, and the packages that differ are listed.

A replay runs on the CPU. It takes both sides from one state through a step, and judges each by the oracle: the restored
state, every operation forward, then backward, the sum of the gradients, clipping, the rule. So the answer says whose
side is wrong. The exit code is 0 if all differences are rounding, else 1.

examples:
  portatrain bisect first second
  portatrain bisect runs/first runs/second --records --json
  portatrain bisect tiny-lm --a backend=jax --b backend=torch
  portatrain bisect my_recipe.py --a backend=jax --b backend=jax --b mesh=fsdp=2
  portatrain bisect tiny-lm --a backend=torch --b backend=torch --b precision=bf16
  portatrain bisect tiny-lm --a backend=torch --b backend=torch --b mesh=fsdp=2
  portatrain bisect tiny-lm --a backend=torch --b backend=torch --b kernel=attention=written-out
  portatrain bisect tiny-lm --a backend=torch --b backend=torch --python-b other/bin/python
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portatrain.commands import options
from portatrain.commands.recorded import recipe_file, recorded_jobs
from portatrain.errors import UserError
from portatrain.recipe import Recipe, apply_overrides, load_recipe
from portatrain.runs import changes
from portatrain.runs.open import find
from portatrain.runs.run_dir import RunDir, code_sha256
from portatrain.system import json_files
from portatrain.system.exit_codes import FOUND, OK
from portatrain.system.paths import place

if TYPE_CHECKING:
    from portatrain.testing.bisect.report import Replay
    from portatrain.testing.bisect.sides import Side
    from portatrain.training.two_runs import Records

SIGNS = 6
"""Differences of records that are printed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("one", metavar="A", type=place, help="a run, or with --a and --b a recipe")
    parser.add_argument("other", metavar="B", type=place, nargs="?", help="another run")
    options.add_runs(parser)
    for name in ("a", "b"):
        parser.add_argument(
            f"--{name}",
            metavar="FIELD=VALUE",
            action="append",
            default=[],
            help=f"one setting of side {name.upper()}: backend=torch, mesh=fsdp=2, kernel=attention=flex, or a "
            "field of the recipe",
        )
    for name in ("a", "b"):
        parser.add_argument(
            f"--python-{name}",
            metavar="PATH",
            type=place,
            help=f"the Python that runs side {name.upper()} (default: this one)",
        )
    parser.add_argument("--records", action="store_true", help="compare the records alone, without a replay")
    parser.add_argument(
        "--steps", metavar="N", type=int, default=20, help="replay at most N steps of two runs (default: 20)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    options.positive("--steps", args.steps)
    began_s = time.perf_counter()
    if args.other is None:
        return _settings(args, began_s)
    if args.a or args.b:
        raise UserError(
            "portatrain bisect A B",
            expected="two runs, or one recipe with --a and --b",
            got="two names with settings",
            do="Leave --a and --b out: the record of a run has its backend and mesh.",
        )
    return _runs(args, began_s)


def _progress(began_s: float) -> Any:
    return lambda text: print(f"{time.perf_counter() - began_s:5.1f} s  {text}", file=sys.stderr, flush=True)


# ---- one recipe on two settings


def _settings(args: argparse.Namespace, began_s: float) -> int:
    if not args.a or not args.b:
        raise UserError(
            "portatrain bisect A",
            expected="another run, or two settings of a recipe",
            got="one name",
            do="Give a second run, or --a backend=jax --b backend=torch.",
        )
    from portatrain.testing.recipe_check.run import on_cpu

    on_cpu()  # before the recipe's file, which may import a framework
    recipe = load_recipe(args.one, cwd=Path.cwd())
    a, b = _side(recipe, "--a", args.a), _side(recipe, "--b", args.b)
    sides = _named(*(_elsewhere(s, p, args.one) for s, p in ((a, args.python_a), (b, args.python_b))))
    from portatrain.testing.bisect.sized import replay_small

    replay = replay_small(sides, progress=_progress(began_s))
    if args.json:
        print(json.dumps(replay.as_json(), indent=1))
    else:
        print(f"{recipe.name}, replayed at {replay.sizes}")
        _print_replay(replay)
    return OK if replay.good else FOUND


def _side(recipe: Recipe, option: str, words: Sequence[str]) -> Side:
    from portatrain.backends.choose_kernel import parse
    from portatrain.testing.bisect.sides import Side

    given = {"backend": "", "mesh": ""}
    fields: list[str] = []
    kernels: list[str] = []
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise UserError(
                f"{option} {word}", expected="FIELD=VALUE", got="no '='", do=f"Write {option} backend=torch, say."
            )
        if name in given:
            given[name] = value
        elif name == "kernel":
            kernels.append(value)
        else:
            fields.append(word)
    backend = options.resolved_backend(given["backend"] or None)
    mesh = _mesh(given["mesh"], backend, option)
    name = ", ".join([backend + (f" on {mesh}" if mesh else ""), *kernels, *fields])
    made = apply_overrides(recipe, fields)
    return Side(name=name, recipe=made, backend=backend, mesh=mesh, kernels=parse(kernels))


def _elsewhere(side: Side, python: str | None, source: str) -> Side:
    """Return the side with the Python that runs it, if one is named, and the recipe's file or name."""
    name = f"{side.name}, python={python}" if python else side.name
    return replace(side, name=name, python=python or "", source=source)


def _mesh(mesh: str, backend: str, option: str) -> str:
    """Return the mesh, '' for one device; UserError for one that a replay cannot have."""
    from portatrain.model.layout import Mesh
    from portatrain.testing.recipe_check.processes import DEVICES

    devices = Mesh.parse("" if mesh == "1" else mesh).devices
    if devices > DEVICES:
        raise UserError(
            f"{option} mesh={mesh}",
            expected=f"at most {DEVICES} simulated devices",
            got=str(devices),
            do="Use two devices along the same axes.",
        )
    return mesh if devices > 1 else ""


def _named(a: Side, b: Side) -> tuple[Side, Side]:
    if a.name != b.name:
        return a, b
    return replace(a, name=f"A ({a.name})"), replace(b, name=f"B ({b.name})")


# ---- two runs


def _runs(args: argparse.Namespace, began_s: float) -> int:
    if not args.records:
        from portatrain.testing.recipe_check.run import on_cpu

        on_cpu()
    runs = (find(args.one, args.runs), find(args.other, args.runs))
    recipes = (_recipe(runs[0], None), _recipe(runs[1], None))
    from portatrain.training.two_runs import compare_records

    records = compare_records(runs, recipes)
    if not args.json:
        _print_records(records)
    replay, why = None, ""
    if args.records:
        why = "--records"
    elif records.first is None:
        why = "no step of the records differs by more than rounding"
    else:
        replay = _replayed(runs, records, args, began_s)
    if args.json:
        found = {
            "records": records.as_json(),
            "replay": None if replay is None else replay.as_json(),
            "not_replayed": why,
        }
        print(json.dumps(json_files.strict(found), indent=1))
    elif replay is not None:
        _print_replay(replay)
    elif why != "--records":
        print(f"not replayed: {why}")
    bad = not replay.good if replay is not None else records.first is not None
    return FOUND if bad else OK


def _recipe(run: RunDir, step: int | None) -> Recipe:
    """Return the recipe of a run from `step` + 1 on, by default the present one."""
    job = next(iter(reversed(recorded_jobs(run))), None)
    if job is not None:  # the classes of a recipe file are found once it is loaded
        load_recipe(recipe_file(job), cwd=Path(job.cwd or "."))
    return Recipe.from_json(changes.current(run.path) if step is None else changes.from_step(run.path, step))


def _replayed(runs: tuple[RunDir, RunDir], records: Records, args: argparse.Namespace, began_s: float) -> Replay:
    import numpy as np

    from portatrain.backends.program import make_program
    from portatrain.testing.bisect.step import replay
    from portatrain.testing.recipe_check.small import too_large
    from portatrain.training.open_data import data_of
    from portatrain.training.two_runs import not_reproduced

    assert records.first is not None
    sign, progress, most = records.first, _progress(began_s), args.steps
    # A checkpoint's record is of the state after its step, and of the step that follows. A loss is computed from the
    # state that the step before has left.
    last = min(sign.step + 1 if sign.saved else sign.step, records.steps[1])
    start = max((step for step in records.checkpoints if step < (sign.step if sign.saved else last - 1)), default=0)
    if last - start > most:
        raise _gone(runs, records, last, start, most)
    recipes = (_recipe(runs[0], start), _recipe(runs[1], start))
    for recipe in recipes:
        if (error := too_large(recipe, make_program(recipe).definition)) is not None:
            raise UserError(
                "the replay",
                expected=error.expected,
                got=error.got,
                do="The records above name the step, and tensors if there are probes. Replay the recipe small: "
                "portatrain bisect RECIPE --a ... --b ... takes the same settings.",
            )
    notes = list(records.notes)
    sides = tuple(
        _elsewhere(_side_of(run, recipe, name, last, notes), python, _source(run))
        for run, recipe, name, python in zip(runs, recipes, records.names, (args.python_a, args.python_b), strict=True)
    )
    for run, recipe, name in zip(runs, recipes, records.names, strict=True):
        if run.run_info().get("code_sha256") != code_sha256(recipe):
            notes.append(f"{name} began with other code than is here; the replay runs the code here")
    progress("opening the data")
    data = [data_of(recipe, recipe.describe(), run.data()) for run, recipe in zip(runs, recipes, strict=True)]
    batches: list[Any] = []
    for step in range(start + 1, last + 1):
        rows = [d.train.batch(r.samples_after(step - 1), r.batch_at(step)) for d, r in zip(data, recipes, strict=True)]
        batches.append((rows[0], rows[1]))
    states = None
    if start:
        progress(f"reading the checkpoints of step {start}")
        held = [_tensors(run, start) for run in runs]
        other = [n for n in held[0] if n not in held[1] or not np.array_equal(held[0][n], held[1][n], equal_nan=False)]
        if other:
            notes.append(
                f"at step {start} {len(other)} of {len(held[0])} tensors have other bits in {records.names[1]}; both "
                f"sides are replayed from the state of {records.names[0]}"
            )
        states = (held[0], held[0])
    found = replay(sides, batches, first=start + 1, start=states, notes=notes, progress=progress)  # type: ignore[arg-type]
    again = [(row.step, row.losses) for row in found.rows]
    return replace(found, elsewhere=not_reproduced(records.names, [run.curve() for run in runs], recipes, again))


def _side_of(run: RunDir, recipe: Recipe, name: str, step: int, notes: list[str]) -> Side:
    """Return the setting of the attempt of `run` that trained `step`; one device if a replay cannot have its mesh."""
    from portatrain.testing.bisect.sides import Side

    curve = {row["step"]: row for row in run.curve()}
    row = curve.get(step) or curve[max(curve)]
    about = json_files.read_object(run.path / "attempts" / str(row["attempt"]) / "attempt.json")
    backend = options.resolved_backend(str(about.get("backend") or "") or None)
    given = str(about.get("mesh") or "")
    try:
        mesh = _mesh(given, backend, "--a")
    except UserError as error:
        notes.append(f"{name} is replayed on one device and not on {given}: expected {error.expected}")
        mesh = ""
    return Side(name=name, recipe=recipe, backend=backend, mesh=mesh)


def _source(run: RunDir) -> str:
    job = next(iter(reversed(recorded_jobs(run))), None)
    if job is None:
        return ""
    path = Path(job.cwd or ".", recipe_file(job))
    return str(path) if path.exists() else recipe_file(job)


def _tensors(run: RunDir, step: int) -> dict[str, Any]:
    from portatrain.runs.find_checkpoints import opened

    with opened(run.path, step) as reader:
        return {name: reader.read(name) for name in reader.names}


def _gone(runs: tuple[RunDir, RunDir], records: Records, last: int, start: int, most: int) -> UserError:
    kept = ", ".join(map(str, records.checkpoints)) or "none"
    near = f"step {start}" if start else "step 0, the initial weights"
    return UserError(
        f"the replay of step {last}",
        expected=f"a checkpoint in both runs at most {most} steps before it",
        got=f"{near} as the nearest (common checkpoints: {kept}): those between are gone or were not saved",
        do=f"--steps {last - start} replays all steps from there. Next time keep more: checkpoint_every, and "
        "checkpoint_keep_every=1 for those that stay.",
    )


# ---- what is printed


def _print_records(records: Records) -> None:
    a, b = records.names
    first, last = records.steps
    print(f"{a} and {b}: steps {first} to {last} in both, checkpoints of {len(records.checkpoints)} steps in both")
    for title, pairs in (("recipe", records.fields), ("setting", records.settings), ("package", records.packages)):
        for name, (was, now) in pairs.items():
            print(f"  {title:<8} {name}: {was!r} in {a}, {now!r} in {b}")
    if records.first is None:
        print("  records  no difference that rounding does not explain")
    for sign in records.signs[:SIGNS]:
        print(f"  records  {sign}")
    if len(records.signs) > SIGNS:
        print(f"  records  and {len(records.signs) - SIGNS} more (--json has all)")
    for note in records.notes:
        print(f"  note     {note}")


def _print_replay(replay: Replay) -> None:
    a, b = replay.names
    for row in replay.rows:
        print(
            f"step {row.step}: loss {row.losses[0]:.8g} ({a}) and {row.losses[1]:.8g} ({b}); gradients apart "
            f"{row.difference:.2g} ({row.tensor}), bound {row.bound:.2g}"
        )
    for note in replay.notes:
        print(f"note: {note}")
    if replay.fault is not None:
        print("\n" + "\n".join(replay.fault.lines(replay.names)))
    else:
        print(f"\n{replay.sentence}")
