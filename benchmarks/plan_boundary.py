"""Find the depth at which a recipe stops fitting, by the planner and by the compiler, both by bisection.

    python -m benchmarks.plan_boundary [--within 0.05] [--only CLUSTER...]

Only the number of layers changes: it scales weights and kept activations alike, and a scan compiles as fast at any
depth. The compiler's boundary lies between the deepest program that it compiled and the shallowest that it refused with
RESOURCE_EXHAUSTED; they are brought together until they are within --within of one another. Minutes a program.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

from portatrain.model.layout import Mesh
from portatrain.plan.clusters import names
from portatrain.plan.compilers import job, targets
from portatrain.plan.cost import recipes
from portatrain.plan.cost.tensors import sizes_of
from portatrain.plan.search import plan
from portatrain.recipe import load_recipe
from portatrain.recipe.overrides import override


@dataclass(frozen=True, kw_only=True)
class Case:
    """A recipe on a mesh of a cluster, with the depth left open."""

    recipe: str
    cluster: str
    mesh: str
    batch: int


CASES = (
    Case(recipe="llama3-8b", cluster="tpu-v5p-16", mesh="fsdp=8", batch=8),
    Case(recipe="llama3-8b", cluster="tpu-v6e-8", mesh="fsdp=8", batch=8),
    Case(recipe="llama3-8b", cluster="tpu-7x-8", mesh="fsdp=8", batch=8),
)


def planner_fits(case: Case, layers: int) -> bool:
    """Return whether the planner says that it fits, without a margin, as the compiler is asked the same."""
    recipe = override(load_recipe(case.recipe), [f"model.layers={layers}", f"batch={case.batch}"])
    made = plan(
        recipes.shape_of(recipe),
        names.resolve(case.cluster),
        mesh=sizes_of(Mesh.parse(case.mesh)),
        remats=("block",),
        accumulation=1,
        hints=False,
    )
    return made.chosen is not None


def planner_boundary(case: Case) -> int:
    """Return the deepest model that the planner accepts."""
    low, high = 0, 1
    while planner_fits(case, high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if planner_fits(case, middle) else (low, middle)
    return low


def compiler_fits(case: Case, layers: int) -> bool:
    target = targets.target(names.resolve(case.cluster))
    words = (f"model.layers={layers}", f"batch={case.batch}", "accumulation=1", "remat=block", "precision=bf16")
    asked = job.Request(
        compiler=target.compiler, recipe=case.recipe, overrides=words, mesh=case.mesh, options=target.options
    )
    found = job.answer(asked, target, tell=lambda line: print(f"  {layers} layers: {line}", file=sys.stderr))
    print(f"  {layers} layers: {'compiled' if found.fits else 'RESOURCE_EXHAUSTED'}", flush=True)
    return found.fits


def compiler_boundary(case: Case, start: int, within: float) -> tuple[int, int]:
    """Return (deepest that compiled, shallowest that did not), no further apart than ``within`` of the deeper one."""
    low = high = 0
    step = max(1, round(start * within))
    at = start
    if compiler_fits(case, at):
        low = at
        while not high:
            at = low + step
            low, high = (at, 0) if compiler_fits(case, at) else (low, at)
            step *= 2
    else:
        high = at
        while not low and high > 1:
            at = max(1, high - step)
            low, high = (at, high) if compiler_fits(case, at) else (0, at)
            step *= 2
    while high - low > max(1.0, within * high):
        at = (low + high) // 2
        low, high = (at, high) if compiler_fits(case, at) else (low, at)
    return low, high


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--within", type=float, default=0.05, help="how near the two ends are to be brought")
    parser.add_argument("--only", nargs="+", default=[], help="clusters")
    args = parser.parse_args()
    print("| program | planner: deepest | compiler: deepest, next refused | difference |\n|---|---|---|---|")
    for case in CASES:
        if args.only and case.cluster not in args.only:
            continue
        mine = planner_boundary(case)
        low, high = compiler_boundary(case, mine, args.within)
        middle = (low + high) / 2
        print(
            f"| {case.recipe} on {case.cluster}, {case.mesh}, batch {case.batch}, blocks recomputed | {mine} layers | "
            f"{low}, {high} | {100 * (mine / middle - 1):+.1f} % |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
