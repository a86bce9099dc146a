"""Find which samples of a step are to blame for a spike, with their documents and layers; train on without them.

The run is replayed from its nearest commit before the step: a batch is a pure function of its step, so the samples are
those of the run. Each sample is then measured alone, at the state before the step: its loss, the norm of its gradient,
and its share of the gradient of the batch. It is compared with the samples of the step and those that follow, at least
32 in all, by median and median deviation. The samples that stand out are named with their documents (source, file,
tokens, the beginning of the text), and with the tensors that carry their gradient. If none stands out, that is said.

--without N1:N2 makes a branch: a fork of the run at the last commit before the first of these samples, with `leave_out`
in its recipe. Samples N1 to N2 - 1 are not trained on, those after them move up, and nothing else changes. The branch
is a run of its own beside the run, and is trained here; --no-train only writes it, for `launch resume NEW --cluster`.

Exit codes: 0 no sample stands out, or the branch is trained; 1 some stand out; 2 a user's mistake.

examples:
  portatrain blame tiny-lm --step 412
  portatrain blame tiny-lm --steps 408:415 --json
  portatrain blame s3://bucket/runs/big --step 90210 --replay 500
  portatrain blame tiny-lm --without 3290:3294 --run tiny-lm-clean
  portatrain blame tiny-lm --step 412 --without 3290 --without 3296 --run tiny-lm-clean --no-train
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

from portatrain.commands import fork, options, resume
from portatrain.commands.recorded import recipe_file, recorded_jobs
from portatrain.data.ranges import Ranges, in_words, merged, ranges
from portatrain.errors import UserError
from portatrain.recipe import Recipe, load_recipe
from portatrain.runs import changes
from portatrain.runs.open import find
from portatrain.runs.run_dir import RunDir
from portatrain.system.exit_codes import FOUND, OK

EVERY_S = 2.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_run(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", metavar="N", type=int, help="measure the samples of step N")
    which.add_argument("--steps", metavar="A:B", help="measure the samples of steps A to B, each at its own state")
    parser.add_argument(
        "--without",
        metavar="N1:N2",
        action="append",
        default=[],
        help="train a branch on without samples N1 to N2 - 1, or without the one sample N; may be given several times",
    )
    parser.add_argument("--run", dest="new", metavar="NEW", help="the name of the branch, in --runs")
    parser.add_argument("--no-train", action="store_true", help="write the branch, and do not train it here")
    parser.add_argument("--dry-run", action="store_true", help="print what the branch would be, without writing it")
    parser.add_argument(
        "--replay", metavar="N", type=int, default=50, help="replay at most N steps before the first one (default: 50)"
    )
    parser.add_argument(
        "--width",
        metavar="D",
        type=float,
        default=6.0,
        help="a sample stands out if it is more than D deviations from the median (default: 6)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    options.positive("--replay", args.replay)
    if not 0 < args.width < float("inf"):
        raise UserError(
            "--width", expected="a number of deviations above 0", got=f"{args.width:g}", do="Leave it out for 6."
        )
    steps = _steps(args)
    without = ranges(args.without, "--without")
    if steps is None and not without:
        raise UserError(
            "portatrain blame RUN",
            expected="a step to replay, or samples to leave out",
            got="neither",
            do="Give --step N or --steps A:B; then --without N1:N2 --run NEW for a branch without what was found.",
        )
    if bool(without) != (args.new is not None):
        got = "--without alone" if without else "--run alone"
        raise UserError(
            "portatrain blame --without",
            expected="the samples and the name of the branch",
            got=got,
            do="Give both: --without N1:N2 --run NEW.",
        )
    found = find(args.run, args.runs)
    job = next(iter(reversed(recorded_jobs(found))), None)
    if job is not None:  # the classes of a recipe file are found once it is loaded
        load_recipe(recipe_file(job), cwd=Path(job.cwd or "."))
    code = OK
    shown: dict[str, Any] = {}
    if steps is not None:
        code, shown["blame"] = _blamed(found, *steps, args)
    if without:
        code, shown["branch"] = _branch(found, without, args)
    if args.json:
        print(json.dumps(shown, indent=1))
    return code


def _steps(args: argparse.Namespace) -> tuple[int, int] | None:
    if args.step is not None:
        first = last = args.step
    elif args.steps is not None:
        match = re.fullmatch(r"([0-9]{1,15}):([0-9]{1,15})", args.steps)
        if match is None or int(match[1]) > int(match[2]):
            raise UserError(
                f"--steps {args.steps}",
                expected="two steps, A:B, the first of them not after the last",
                got=repr(args.steps),
                do="Write --steps 408:415; both are measured.",
            )
        first, last = int(match[1]), int(match[2])
    else:
        return None
    if first < 1:
        raise UserError(f"step {first}", expected="a step from 1 on", got=str(first), do="Steps count from 1.")
    return first, last


def _blamed(run: RunDir, first: int, last: int, args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from portatrain.training.blame.run import SHOWN, blame, text_of

    verdict, recipe = blame(run, first, last, most=args.replay, width=args.width, tell=_progress())
    text = text_of(recipe)
    if not args.json:
        print("\n".join(verdict.lines(text, SHOWN)))
        if verdict.blamed and not args.without:
            words = " ".join(f"--without {word}" for word in verdict.words)
            print(f"a branch without: portatrain blame {args.run} {words} --run NEW")
    return FOUND if verdict.blamed else OK, verdict.as_json(text)


def _progress() -> Any:
    """Return a function that prints a line of progress, at most one every EVERY_S seconds."""
    began_s = told_s = time.perf_counter()

    def tell(text: str) -> None:
        nonlocal told_s
        if (now_s := time.perf_counter()) >= told_s + EVERY_S:
            told_s = now_s
            print(f"{now_s - began_s:5.1f} s  {text}", file=sys.stderr, flush=True)

    return tell


# ---- the branch


def _branch(run: RunDir, without: Ranges, args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Fork the run before the first of these samples, and train the fork on without them."""
    step = _step_of(run, without[0][0], args.without[0])
    at = _commit_before(run, step, without)
    left = Recipe.from_json(changes.from_step(run.path, at)).left_out
    words = ",".join(in_words(merged([*left, *without])))
    given = [args.run, "--runs", str(args.runs), "--at", str(at), "--run", args.new, "--set", f"leave_out={words}"]
    given += ["--reason", f"without samples {', '.join(in_words(without))}", *(["--dry-run"] if args.dry_run else [])]
    if not args.json:
        print(f"step {step} trains on the first of samples {words}; the nearest commit before it is of step {at}")
    with _aside(args.json):
        _call(fork, given)
        trains = not (args.dry_run or args.no_train)
        code = _call(resume, [args.new, "--runs", str(args.runs)]) if trains else OK
    about = {"run": args.new, "at": at, "first_step": step, "leave_out": words}
    return code, {**about, "written": not args.dry_run, "trained": trains, "exit_code": code}


def _step_of(run: RunDir, number: int, word: str) -> int:
    """Return the step that trains on sample `number`, or the first one after it if that is left out.

    Raises:
        UserError: the run never reaches it.
    """
    edges = sorted({0, *(change.step for change in changes.of(run.path))})
    recipe = Recipe.from_json(changes.current(run.path))
    for edge, end in zip(edges, [*edges[1:], recipe.steps], strict=True):
        recipe = Recipe.from_json(changes.from_step(run.path, edge))
        for step in range(edge + 1, end + 1):
            if recipe.numbers_of(step)[1] > number:
                return step
    raise UserError(
        f"--without {word}",
        expected=f"a sample that the run trains on: up to {recipe.numbers_of(recipe.steps)[1] - 1}",
        got=f"sample {number}",
        do="`portatrain blame RUN --step N` names the samples of a step.",
    )


def _commit_before(run: RunDir, step: int, without: Ranges) -> int:
    from portatrain.training.blame.replayed import commits

    there, parent = commits(run), changes.parent_of(run.run_info())
    if (at := max((commit for commit in there if commit < step), default=None)) is not None:
        return at
    if parent is not None and step <= int(parent.get("step") or 0):
        do = f"Step {step} is one of its parent: portatrain blame {parent.get('run')} --without ... --run NEW."
    else:
        words = ",".join(in_words(without))
        do = (
            "Train a new run without them from the start: portatrain train RECIPE --run-dir NEW "
            f"--set leave_out={words}. Next time keep more commits: checkpoint_every, checkpoint_keep_every."
        )
    raise UserError(
        f"a branch of {run.path.name} without samples {', '.join(in_words(without))}",
        expected=f"a commit before step {step}, the first that trains on one of them",
        got=f"commits of steps {', '.join(map(str, there))}" if there else "no commit",
        do=do,
    )


def _call(command: Any, words: list[str]) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    code: int = command.run(parser.parse_args(words))
    return code


def _aside(quiet: bool) -> contextlib.AbstractContextManager[Any]:
    """Send what is printed to standard error, so that standard output has one JSON object."""
    return contextlib.redirect_stdout(sys.stderr) if quiet else contextlib.nullcontext()
