"""Check recipes that `launch` has not seen, name them to `portatrain train`, and remember those that passed.

A recipe of portatrain's own classes alone counts as seen, because the tests check these. Any other one is remembered in
the user's cache by what the check depends on: its model, data, rule and mappings, its code, and the frameworks.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from portatrain.errors import UserError
from portatrain.recipe import Recipe
from portatrain.system import environment, json_files
from portatrain.system.exit_codes import FOUND, INTERRUPTED, OK
from portatrain.system.paths import cache_folder
from portatrain.system.text import counted
from portatrain.training.start_times import StartTimes

WITHOUT_EFFECT = (
    *("name", "steps", "batch", "batch_start", "batch_ramp", "accumulation", "seed", "schedule", "hooks", "spikes"),
)
"""Fields of a recipe that the check does not depend on, besides those below."""
PREFIXES = ("eval_", "checkpoint_", "probe_", "max_skips")
OURS = ("portatrain", "recipes")
TIMEOUT_S = 600.0


def check_unseen(recipe: Recipe, args: argparse.Namespace) -> None:
    """Run `portatrain check` in a process of its own, unless the recipe has been seen or the user says not to.

    Raises:
        UserError: something was found that would change the numbers of the run.
    """
    if args.no_check or seen(recipe, args):
        return
    memory = memory_of(recipe, args)
    print(
        f"{recipe.name} has not been checked yet; running `portatrain check` first (about a minute; --no-check skips "
        "it)",
        flush=True,
    )
    began_s = time.perf_counter()
    report = _checked(args)
    StartTimes.spent("check", time.perf_counter() - began_s)
    if report is None:
        return
    found = report["found"]
    for finding in found:
        print(f"{finding['check']}: {finding['what']}: {finding['said']}. {finding['do']}", file=sys.stderr)
    refusing = [finding for finding in found if finding["numbers"]]
    if refusing:
        raise UserError(
            f"recipe {recipe.name}",
            expected="a model that learns what it is given, alike on every framework and mesh",
            got=f"{counted(len(refusing), 'findings')}, first {refusing[0]['what']}",
            do=f"Correct what stands above; `portatrain check {args.recipe}` says more, and --no-check launches it "
            "as it is.",
        )
    remember(memory, report)


def seen(recipe: Recipe, args: argparse.Namespace) -> bool:
    """Return whether the recipe needs no check: it has been checked, or is portatrain's own, or checks are off."""
    return not environment.CHECK.get() or only_ours(recipe) or memory_of(recipe, args).is_file()


def remember(memory: Path, report: Mapping[str, Any]) -> None:
    """Write the report of a check into `memory` (`memory_of`), unless it found what changes the numbers of a run, or
    failed on the way, which says nothing."""
    if any(finding["numbers"] or finding["failed"] for finding in report["found"]):
        return
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        json_files.write_json(memory, report)
    except OSError:
        return  # the next launch checks it again


def suggest(recipe: Recipe, args: argparse.Namespace) -> None:
    """Say in one line that `portatrain check` exists, if the recipe has not been seen. `launch` checks by itself.

    Raises:
        UserError: the recipe accumulates, and a loss depends on the other samples of a microbatch.
    """
    if not environment.CLUSTER.get() and not seen(recipe, args):
        if recipe.accumulation > 1:
            _refuse_across_samples(recipe)
        words = ["portatrain", "check", args.recipe, *(w for given in args.overrides for w in ("--set", given))]
        said = f"{recipe.name} has not been checked on this machine. To check it first: {shlex.join(words)}"
        print(said, file=sys.stderr)


def _refuse_across_samples(recipe: Recipe) -> None:
    """Microbatches know nothing of each other, so such a loss would be another one without a word."""
    from portatrain.testing.recipe_check.run import samples_alone

    try:
        found = samples_alone(recipe)
    except Exception:
        return  # training says what is wrong with the model
    if found:
        raise UserError(
            f"recipe {recipe.name}, accumulation={recipe.accumulation}: {found[0].what}",
            expected="samples whose losses do not depend on each other, because each microbatch has a part of them",
            got=found[0].said,
            do=f"{found[0].do} With accumulation=1 the loss is that of the whole batch; {environment.CHECK.name}=0 "
            "trains it as it is.",
        )


def memory_of(recipe: Recipe, args: argparse.Namespace) -> Path:
    """Return the file of a check that found nothing."""
    return _folder() / f"{key_of(recipe, args.recipe)}.json"


def only_ours(recipe: Recipe) -> bool:
    """Return whether all that the check depends on is of portatrain's classes alone, without mappings of its own."""
    packages = {name.partition(".")[0] for name in _modules(_kept(recipe))}
    return packages <= set(OURS) and recipe.compute is None and recipe.params is None


def _kept(recipe: Recipe) -> dict[str, Any]:
    """Return the fields of a recipe, as JSON, that the result of a check depends on."""
    data = recipe.to_json()
    return {k: v for k, v in data.items() if k not in WITHOUT_EFFECT and not k.startswith(PREFIXES)}


def _modules(data: Any) -> Iterator[str]:
    """Yield the modules of the classes that a recipe's JSON names."""
    if isinstance(data, Mapping):
        for key, value in data.items():
            if key in ("class", "named") and isinstance(value, str):
                yield value.partition(":")[0]
            else:
                yield from _modules(value)
    elif isinstance(data, list):
        for item in data:
            yield from _modules(item)


def key_of(recipe: Recipe, source: str) -> str:
    """Return a hash of all that the result of a check depends on."""
    from portatrain.runs import code_snapshot

    code = code_snapshot.where(Path(), source)[0].name
    versions: dict[str, str] = {}
    for name in code_snapshot.WATCHED:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = ""
    text = json.dumps([_kept(recipe), code, _packages(recipe), versions, sys.version_info[:2]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _packages(recipe: Recipe) -> dict[str, str]:
    """Return module -> hash of its file, for the loaded modules of the packages that the recipe's classes come from.

    The packages of portatrain are left out: the code of the run has them.
    """
    from portatrain.runs import code_snapshot

    names = set(_modules(_kept(recipe)))
    with suppress(UserError):  # the check says what is wrong
        names |= {one.__module__ for held in recipe.describe().modules.values() for one in type(held).__mro__}
    packages = {name.partition(".")[0] for name in names} - {*code_snapshot.PACKAGES, "builtins"}
    found = {}
    for name, module in sorted(sys.modules.items()):
        file = str(getattr(module, "__file__", None) or "")
        if name.partition(".")[0] in packages and file.endswith(".py"):
            with suppress(OSError):
                found[name] = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    return found


def _checked(args: argparse.Namespace) -> dict[str, Any] | None:
    """Return the report of a check in a process of its own, or None if it does not end as it should."""
    words = [sys.executable, "-m", "portatrain", "check", args.recipe, "--json"]
    words += [word for given in args.overrides for word in ("--set", given)]
    env = {**os.environ, "PYTHONSAFEPATH": "1"}  # as in jobs: no module of the working directory comes before others
    try:
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT_S, check=False, env=env)
    except subprocess.TimeoutExpired:
        print(f"warning: the check has not ended in {TIMEOUT_S:.0f} s; going on without it", file=sys.stderr)
        return None
    if done.returncode == INTERRUPTED:
        raise KeyboardInterrupt
    try:
        found: dict[str, Any] = json_files.loads(done.stdout)
        found["found"]  # raises
    except (ValueError, KeyError):
        found = {}
    if done.returncode not in (OK, FOUND) or not found:
        print(f"warning: the check ended with exit code {done.returncode}; going on without it", file=sys.stderr)
        return None
    return found


def _folder() -> Path:
    """Return $XDG_CACHE_HOME/portatrain/checked, else ~/.cache/portatrain/checked."""
    return cache_folder() / "checked"
