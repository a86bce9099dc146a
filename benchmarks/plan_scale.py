"""Measure how fast plans are made, and the arithmetic of mixtures, for docs/understand/planning.md, "Speed".

Run: python -m benchmarks.plan_scale

Every row is a process of its own; its seconds are wall clock from start to end, Python's own start and imports
included. A row also says which frameworks the process had imported at its end, which should be none.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

FRAMEWORKS = ("jax", "jaxlib", "flax", "optax", "torch", "numpy", "orbax")
RECIPES = ("llama3-1b", "llama3-8b", "llama3-70b", "llama3-405b")
HUGE = ("tpu-v5p-12288", "36*tpu-7x-512", "h100-100000", "gb200-100800")
MIXTURES = {
    # All parameters, and the parameters that a token meets, in 10^9, as the models' makers publish them.
    "mixtral-8x7b": (46.7, 12.9, "Jiang et al. 2024, Mixtral of Experts"),
    "deepseek-v3": (671.0, 37.0, "DeepSeek-AI 2024, DeepSeek-V3 Technical Report"),
}
MIXTURE_CLUSTERS = ("tpu-v5p-2048", "h100-2048", "gb200-2016")


def child(names: list[str], clusters: list[str]) -> None:
    """Plan every one of `names` on every one of `clusters`; print the results as JSON."""
    from pathlib import Path

    from portatrain.plan.clusters import names as cluster_names
    from portatrain.plan.cost import recipes
    from portatrain.plan.cost.shapes import PRESETS
    from portatrain.plan.search import plan

    where = clusters or list(cluster_names.EXAMPLES)
    rows = []
    for name in names:
        # A mixture without the module of a further token, which its makers do not count.
        shape = PRESETS[name] if name in MIXTURES else recipes.shape_of(recipes.find(name, cwd=Path.cwd()))
        for cluster in where:
            made = plan(shape, cluster_names.resolve(cluster))
            best = made.chosen
            rows.append(
                {
                    "recipe": name,
                    "cluster": cluster,
                    "chips": made.cluster.chips,
                    "meshes": made.counts.meshes,
                    "parameters": shape.parameters,
                    "active": shape.active,
                    "flops_per_token": shape.model_flops,
                    "mesh": best.mesh_text if best else None,
                    "step_s": best.step_s if best else None,
                    "mfu": made.mfu if best else None,
                }
            )
    loaded = [name for name in FRAMEWORKS if name in sys.modules]
    print(json.dumps({"rows": rows, "loaded": loaded}))


def planned(names: tuple[str, ...], clusters: tuple[str, ...] = ()) -> tuple[float, dict]:
    """Return (seconds of the whole process, its output)."""
    began_s = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.plan_scale", "--recipes", ",".join(names), "--clusters", ",".join(clusters)],
        check=True,
        capture_output=True,
        text=True,
    )
    return time.perf_counter() - began_s, json.loads(done.stdout)


def way(row: dict) -> str:
    """Return a plan as a cell: its cluster, mesh, seconds per step and MFU."""
    if not row["mesh"]:
        return f"{row['cluster']}: does not fit"
    return f"{row['cluster']}: {row['mesh']}, {row['step_s']:.3g}, {100 * row['mfu']:.0f} %"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", help="plan these in this process and print JSON (how the rows are made)")
    parser.add_argument("--clusters", default="")
    args = parser.parse_args()
    if args.recipes:
        child(args.recipes.split(","), [name for name in args.clusters.split(",") if name])
        return 0
    print("| recipes | clusters | chips at most | fit | meshes tried | s in all | frameworks imported |")
    print("|---|---|---|---|---|---|---|")
    jobs = [(RECIPES, ())] + [(("llama3-405b",), (cluster,)) for cluster in HUGE]
    for names, clusters in jobs:
        took_s, found = planned(names, clusters)
        rows = found["rows"]
        print(
            f"| {', '.join(names)} | {clusters[0] if clusters else len(rows) // len(names)} | "
            f"{max(row['chips'] for row in rows):,} | {sum(row['mesh'] is not None for row in rows)} of {len(rows)} | "
            f"{sum(row['meshes'] for row in rows):,} | {took_s:.2f} | {', '.join(found['loaded']) or 'none'} |",
            flush=True,
        )
    print(
        "\n| mixture | parameters, 10^9 | published | multiplied with a token, 10^9 | published | GFLOP a token |",
        end="",
    )
    print(" best mesh, step s, MFU | source |\n|---|---|---|---|---|---|---|---|")
    for name, (parameters, active, source) in MIXTURES.items():
        _, found = planned((name,), MIXTURE_CLUSTERS)
        first = found["rows"][0]
        ways = "; ".join(way(row) for row in found["rows"])
        print(
            f"| {name} | {first['parameters'] / 1e9:.1f} | {parameters} | {first['active'] / 1e9:.1f} | {active} | "
            f"{first['flops_per_token'] / 1e9:.1f} | {ways} | {source} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
