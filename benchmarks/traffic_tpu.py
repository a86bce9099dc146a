"""Compare the bytes between TPU chips in one step of the compiled jax program, by mesh axis, with the planner's.

Run: python -m benchmarks.traffic_tpu [--write]     (libtpu, no TPU: pip install 'portatrain[tpu]'; a minute a mesh)

It counts the gathered array of every collective of the optimised program, an all-reduce twice, and loops as often as
they run. With --write the result goes into docs/measured/traffic-tpu.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "measured" / "traffic-tpu.md"
SIZES = (
    "model.layers=4",
    "model.embed=512",
    "model.mlp=1536",
    "model.heads=8",
    "model.kv_heads=4",
    "model.head_dim=64",
    "model.vocab=32768",
    "data.vocab=32768",
    "data.separator=0",
)
SEQ, BATCH = 2048, 16
PROGRAMS = (
    *(
        ("tpu-v5p-8", mesh, ())
        for mesh in (
            "fsdp=4",
            "replica=2,fsdp=2",
            "tensor=4",
            "fsdp=2,tensor=2",
            "fsdp=2,context=2",
            "context=2,tensor=2",
            "replica=2,tensor=2",
        )
    ),
    ("tpu-v5p-32", "fsdp=16", ()),
    ("tpu-v5p-32", "replica=2,fsdp=8", ()),
    ("tpu-v5p-32", "replica=2,fsdp=8", ("model.embed=1024",)),
    ("tpu-v6e-16", "fsdp=16", ()),
)


def compiled(cluster: str, mesh: str, more: tuple[str, ...]) -> dict[str, Any]:
    words = ["plan", "llama3-1b", "--cluster", cluster, "--mesh", mesh, "--batch", str(BATCH), "--seq-len", str(SEQ)]
    words += [w for size in (*SIZES, *more) for w in ("--set", size)]
    command = [sys.executable, "-m", "portatrain", *words, "--remat", "block", "--compile", "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    (found,) = json.loads(done.stdout)
    return found


def rows(cluster: str, mesh: str, found: dict[str, Any]) -> list[str]:
    implied, moved = found["predicted"]["collective_bytes"], found["compiled"]["collective_bytes"] or {}
    lines = []
    for axes in sorted({*implied, *moved}):
        a, b = implied.get(axes, 0.0), moved.get(axes, 0.0)
        lines.append(f"| {cluster} | {mesh} | {axes} | {b:,.0f} | {a:,.0f} | {f'{b / a:.3f}' if a else ''} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/measured/traffic-tpu.md")
    args = parser.parse_args()
    lines = ["| slice | mesh | axes | bytes that move | implied | ratio |", "|---|---|---|---|---|---|"]
    print("\n".join(lines), flush=True)
    compiler = ""
    for cluster, mesh, more in PROGRAMS:
        found = compiled(cluster, mesh, more)
        compiler = found["compiled"]["compiler"]
        lines += (new := rows(cluster, ", ".join((mesh, *more)), found))
        print("\n".join(new), flush=True)
    if args.write:
        text = (PAGE.with_name("traffic-tpu.in.md")).read_text(encoding="utf-8")
        about = {"compiler": compiler, "sizes": ", ".join(SIZES), "tokens": f"{BATCH} x {SEQ}"}
        for name, value in about.items():
            text = text.replace("{" + name + "}", value)
        PAGE.write_text(text.replace("{table}", "\n".join(lines)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
