"""The part of `portatrain eval` that runs tasks of lm-evaluation-harness."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

from portatrain.commands import options, trained_model
from portatrain.errors import UserError
from portatrain.system import json_files
from portatrain.system.urls import is_remote

if TYPE_CHECKING:
    from portatrain.runs.run_dir import RunDir


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tasks", metavar="A,B", help="evaluate on these tasks of lm-evaluation-harness")
    parser.add_argument("--task-folder", metavar="DIR", help="the folder with the definitions of the tasks")
    parser.add_argument("--fewshot", metavar="N", type=int, help="examples before each question of a task")
    parser.add_argument(
        "--limit", metavar="N", type=int, help="the first N documents of each task; nothing is recorded"
    )
    parser.add_argument("--max-length", metavar="N", type=int, help="longest text in tokens (default: of the training)")
    parser.add_argument("--open-texts", action="store_true", help="put the id that opens a document before every text")


GIVEN = ("task_folder", "fewshot", "limit", "max_length", "open_texts")


def check(args: argparse.Namespace) -> None:
    """Raise UserError for options that say nothing together."""
    words = {name: f"--{name.replace('_', '-')}" for name in (*GIVEN, "split", "batches")}
    wrong = ("split", "batches") if args.tasks is not None else GIVEN
    given = [words[name] for name in wrong if getattr(args, name) not in (None, False)]
    given += ["--set"] if args.tasks is not None and args.overrides else []
    if given:
        got = ", ".join(given)
        if args.tasks is None:
            raise UserError(got, expected="--tasks", got="none", do="Name tasks, or leave it out.")
        raise UserError(got, expected="no other data with --tasks", got=f"--tasks {args.tasks}", do="Leave one out.")
    for name in ("limit", "max_length"):
        options.positive(words[name], getattr(args, name))


def run(args: argparse.Namespace) -> int:
    from portatrain.runs.tasks import TaskResult, record
    from portatrain.training.harness import evaluate_tasks

    path = trained_model.where(args)
    model = trained_model.loaded(args, path)
    told, began_s = trained_model.Told(), time.perf_counter()
    found = evaluate_tasks(
        model,
        [name.strip() for name in args.tasks.split(",") if name.strip()],
        folder=args.task_folder,
        fewshot=args.fewshot,
        limit=args.limit,
        rows=args.batch or 8,
        max_length=args.max_length,
        opened=args.open_texts or None,
        tell=lambda kind, done, total: told(lambda: f"{done} of {total} {kind}"),
    )
    results = [
        TaskResult(
            task=task,
            step=model.step,
            metrics=metrics,
            samples=found.samples.get(task),
            shots=found.shots.get(task),
            ema=args.ema,
            backend=model.backend,
            version=found.versions.get(task, ""),
            release=f"lm_eval {found.release}",
            unix_s=time.time(),
        )
        for task, metrics in found.metrics.items()
        if metrics
    ]
    there = None if args.limit else _run_at(path)
    if there is not None:
        for result in results:
            record(there, result)
    if args.json:
        said = {
            "tasks": {task: dict(metrics) for task, metrics in found.metrics.items()},
            "samples": dict(found.samples),
            "versions": dict(found.versions),
            "shots": dict(found.shots),
            "step": model.step,
            "backend": model.backend,
            "harness": f"lm_eval {found.release}",
            "recorded": None if there is None else there.where,
            "seconds": round(time.perf_counter() - began_s, 3),
        }
        print(json.dumps(json_files.strict(said)))
        return 0
    print(found.table)
    if there is not None:
        print(f"recorded at step {model.step} of {there.where}")
    return 0


def _run_at(path: str) -> RunDir | None:
    """Return the run whose checkpoint is at `path`; None for an export and for a folder of transformers."""
    from portatrain.runs.open import open_run

    if is_remote(path):
        found = open_run(path)
        return found if "run.json" in (found.entries() or ()) else None
    near = Path(path).absolute()
    there = next((folder for folder in (near, *near.parents[:2]) if (folder / "run.json").is_file()), None)
    return None if there is None else open_run(there)
