"""Count what a referee sees of single flipped bits, how long its checks take, and whether it ever gives a false alarm.

    python -m benchmarks.referee curve --write         # a minute: every bit, into docs/run/referee.md
    python -m benchmarks.referee soak --steps 10000    # minutes: checks of as many clean steps, for each way
    python -m benchmarks.referee cost                  # the seconds of a check beside those of a step

`curve` flips one bit at a time of what one of four simulated jax devices computes (`refereed.plant`), or of a sum over
them, and prints the share of flips that each check of the referee sees, by the position of the bit.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import refereed
from portatrain.backends.base import backend_class, simulate_devices
from portatrain.backends.program import make_program
from portatrain.recipe import apply_overrides, load_recipe
from portatrain.runs.events import Kind
from portatrain.runs.run_dir import RunDir
from portatrain.system.processes import run_processes

PAGE = Path(__file__).parents[1] / "docs/run/referee.md"
BEGIN, END = "<!-- curve: python -m benchmarks.referee curve --write -->", "<!-- end of curve -->"
DEVICES, FAULTY, DRAWS = 4, 2, 8
WAYS = (("jax", "devices", "fsdp=4"), ("jax", "backend", ""), ("torch", "cpu", ""), ("torch", "devices", "replica=2"))
"""The ways of `soak`: backend, by, mesh."""


# ---- the curve


def curve(write: bool) -> int:
    """Print the table of shares; with `write`, put it into the page."""
    simulate_devices("jax", DEVICES)
    columns: dict[str, dict[int, float]] = {}
    for precision in ("fp32", "bf16-state"):
        for name, shares in counted(precision):
            columns[f"{name}, {precision.removesuffix('-state')}"] = shares
            print(f"{name}, {precision}: {sum(shares.values()) / len(shares):.0%} of all flips", flush=True)
    text = "\n".join(table(columns))
    print(text)
    if write:
        page = PAGE.read_text(encoding="utf-8")
        before, rest = page.split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")
    return 0


def table(columns: dict[str, dict[int, float]]) -> Iterator[str]:
    """Yield the lines of the page's tables: one for each precision and width of numbers, with a row for each bit."""
    for precision, width in (("fp32", 32), ("bf16", 16), ("bf16", 32)):
        mine = {n.removesuffix(f", {precision}"): s for n, s in columns.items() if n.endswith(precision)}
        mine = {name: shares for name, shares in mine.items() if len(shares) == width}
        yield f"{precision}, numbers of {width} bits: sign {width - 1}, exponent {width - 2} to {width - 9}."
        yield ""
        yield f"| bit | {' | '.join(mine)} |"
        yield f"|---|{'---|' * len(mine)}"
        for bit in reversed(range(width)):
            yield f"| {bit} | {' | '.join(f'{100 * shares[bit]:.0f}' for shares in mine.values())} |"
        yield ""


def counted(precision: str) -> Iterator[tuple[str, dict[int, float]]]:
    """Yield (site and check, bit -> share of the flips that are seen)."""
    from portatrain.training.jury import Jury
    from portatrain.training.referee import unequal_copies

    recipe = refereed.recipe(precision=precision)  # type: ignore[arg-type]
    backend = backend_class("jax")(make_program(recipe, mesh=f"replica={DEVICES}"))
    state, batch = trained(backend, recipe)
    wide = 16 if precision == "bf16-state" else 32
    for site, width in (("weights", wide), ("activations", wide), ("backward", wide), ("gradients", 32)):
        for by in ("devices", "cpu"):
            yield f"{site}: {by}", shares(width, seen_by(by, site, backend, recipe, state, batch))
    yield (
        "weight at rest: copies",
        shares(wide, lambda at, bit: flips_at_rest(backend, state, at, bit, unequal_copies)),
    )
    jury = Jury("cpu", backend, recipe)
    heard = jury.hear(state, batch, 1)
    loss, grads = backend.gradients(state, batch, step=1)
    yield "summed gradient: norm", shares(32, lambda at, bit: of_sum(jury, heard, loss, grads, at, bit))
    norm = norm_of(grads)
    yield (
        "summed loss",
        shares(
            32,
            lambda at, bit: disagrees(
                lambda: jury.compare(heard, (float(refereed.flipped(np.float32([loss]), 0, bit)[0]), norm), 1)
            ),
        ),
    )


def trained(backend: Any, recipe: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """Return the state after three steps, and the next batch."""
    state = backend.init_state()
    for step in range(4):
        rows = [recipe.data.sample(n) for n in range(step * recipe.batch, (step + 1) * recipe.batch)]
        batch = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
        batch |= {"mask": np.ones(recipe.batch, np.float32), "sample": np.arange(recipe.batch)}
        batch = recipe.microbatches(batch)
        if step < 3:
            state, _ = backend.step(state, batch, step=step + 1, scale=1.0)
    return state, batch


def shares(width: int, seen: Callable[[int, int], bool]) -> dict[int, float]:
    """Return bit -> the share of DRAWS elements of which the flipped bit is seen."""
    draw = np.random.default_rng(0)
    places = draw.integers(0, 2**31, DRAWS).tolist()
    return {bit: sum(seen(at, bit) for at in places) / DRAWS for bit in range(width)}


def disagrees(check: Callable[[], object]) -> bool:
    from portatrain.training.jury import Disagreement

    try:
        check()
    except Disagreement:
        return True
    return False


def seen_by(by: str, site: str, backend: Any, recipe: Any, state: Any, batch: Any) -> Callable[[int, int], bool]:
    """Return a function that flips a bit of `site` on the device FAULTY; True if the jury sees it, and names it."""
    from portatrain.training.jury import Disagreement, Jury

    jury = Jury(by, backend, recipe)
    place: list[tuple[int, int]] = []
    jury._alone = dict(jury._made.alone(backend))
    refereed.plant(jury._alone[FAULTY], site, lambda step: place[0] if place else None)

    def seen(at: int, bit: int) -> bool:
        place[:] = [(at, bit)]
        jury._checks = FAULTY  # of the devices in turn, the turn of this one
        try:
            jury.hear(state, batch, 1)
        except Disagreement as found:
            assert found.devices == {FAULTY}, f"{site}, bit {bit}: {found.devices} named in place of {FAULTY}"
            return True
        finally:
            place.clear()
        return False

    return seen


def flips_at_rest(backend: Any, state: Any, at: int, bit: int, check: Callable[[Any, Any], Any]) -> bool:
    """Flip a bit in the copy of a parameter on the device FAULTY; return whether the copies are found unequal."""
    wrong = refereed.flipped_at_rest(backend, state, FAULTY, at, bit)
    found = check(backend, wrong)
    assert found is None or found.devices == {FAULTY}
    return found is not None


def of_sum(jury: Any, heard: Any, loss: float, grads: Any, at: int, bit: int) -> bool:
    wrong = {**grads, "up": refereed.flipped(grads["up"], at, bit)}
    return disagrees(lambda: jury.compare(heard, (loss, norm_of(wrong)), 1))


def norm_of(grads: Any) -> float:
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.sqrt(sum(np.sum(np.square(g.astype(np.float64))) for g in grads.values())))


# ---- false alarms, and the cost


def soak(steps: int) -> int:
    """Check every step of long clean runs; print how many checks agreed. Return 1 if one did not."""
    wrong = 0
    for backend, by, mesh in WAYS:
        with tempfile.TemporaryDirectory() as folder:
            began_s = time.perf_counter()
            given = {"backend": backend, "by": by, "mesh": mesh, "steps": steps, "folder": folder}
            processes = 2 if backend == "torch" and mesh else 1
            code = run_processes(processes, "benchmarks.referee:one_soak", given)
            run = RunDir(Path(folder) / "run")
            agreed, not_agreed = len(run.events(Kind.AGREED)), len(run.events(Kind.DISAGREED))
            wrong += not_agreed + (code != 0) + (agreed != steps)
            took_s = time.perf_counter() - began_s
            print(
                f"{backend} {mesh or 'one device'} by {by}: {agreed} of {steps} agreed, {not_agreed} false alarms, "
                f"{took_s:.0f} s",
                flush=True,
            )
    return int(wrong > 0)


def one_soak(args: argparse.Namespace) -> int:
    """One process of a run of `soak`."""
    from portatrain.training.trainer import train

    if args.backend == "jax":
        simulate_devices("jax", 4 if args.mesh else 1)
    recipe = refereed.recipe(args.by, every=1, steps=args.steps, checkpoint_every=None)
    return train(recipe, RunDir(Path(args.folder) / "run"), backend=args.backend, mesh=args.mesh or None)


def cost() -> int:
    """Print the median seconds of a step and of a check of tiny-lm on two simulated devices."""
    simulate_devices("jax", 2)
    from portatrain.training.trainer import train

    small = ["steps=40", "eval_every=none", "hooks=()", "checkpoint_every=none"]
    for by in ("devices", "cpu"):
        recipe = apply_overrides(
            load_recipe("tiny-lm"), [*small, "referee=Referee", "referee.every=2", f"referee.by={by}"]
        )
        with tempfile.TemporaryDirectory() as folder:
            run = RunDir(Path(folder) / "run")
            train(recipe, run, backend="jax", mesh="fsdp=2")
            plain_s = statistics.median(row["step_s"] for row in run.curve()[3:] if row["step"] % 2)
            checks = [event["seconds"] for event in run.events(Kind.AGREED)][2:]
            check_s = statistics.median(checks)
            print(
                f"by {by}: a step {plain_s:.3f} s, a check {check_s:.3f} s, {check_s / plain_s:.2f} steps", flush=True
            )
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    parts.add_parser("curve", help="the shares of flips that are seen").add_argument("--write", action="store_true")
    parts.add_parser("soak", help="count false alarms").add_argument("--steps", type=int, default=10_000)
    parts.add_parser("cost", help="time a check")
    args = parser.parse_args()
    if args.part == "curve":
        return curve(args.write)
    return soak(args.steps) if args.part == "soak" else cost()


if __name__ == "__main__":
    raise SystemExit(main())
