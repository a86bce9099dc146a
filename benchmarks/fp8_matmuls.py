"""Compile a training step in precision fp8 for chips that are absent, and print how many of its matmuls are of 8 bits.

Run: python -m benchmarks.fp8_matmuls [--only h100] [--write]

No accelerator is needed: pip install 'portatrain[cuda]' for NVIDIA, 'portatrain[rocm-compile]' for AMD and
'portatrain[tpu]' for TPUs. The step is that of two layers of Llama 3 8B at an eighth of its width, on eight devices.
With --write the rows go into docs/measured/fp8.md; rows of other chips stay.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from portatrain.backends.choose_kernel import first
from portatrain.backends.kernels import Case, Site
from portatrain.errors import UserError
from portatrain.plan.attending import formats_of
from portatrain.plan.clusters.names import parse
from portatrain.plan.compilers import job, targets

PAGE = Path(__file__).parents[1] / "docs" / "measured" / "fp8.md"
CLUSTERS = {"H100": "h100-8", "B200": "b200-8", "MI300X": "mi300x-8", "MI355X": "mi355x-8", "TPU 7x": "tpu-7x-8"}
LIBRARIES = "--xla_gpu_enable_triton_gemm=false"
"""XLA's own kernels are left out: which tile of them would run is found by timing them on a chip."""
STEP = (
    *("precision=fp8", "batch=8", "accumulation=1", "remat=block"),
    *("data.seq_len=512", "data.vocab=32768", "data.separator=0"),
    *("model.layers=2", "model.embed=512", "model.mlp=1536", "model.heads=8", "model.head_dim=64", "model.vocab=32768"),
)
MESHES = ("fsdp=8", "fsdp=4,tensor=2")
HEAD = (
    "| chip | formats | mesh | scales | 8-bit FLOPs of the program | in the compiled one | matmuls of 8 bits | of all "
    "| compiler |",
    "|---|---|---|---|---|---|---|---|---|",
)


def row(chip: str, mesh: str, scaling: str) -> str:
    """Compile one program; return its row of the table."""
    cluster = parse(CLUSTERS[chip])
    target = targets.target(cluster)
    if gpu := target.compiler in targets.GPU_COMPILERS:
        flags = f"{target.env['XLA_FLAGS']} {LIBRARIES}"
        target = dataclasses.replace(target, env={**target.env, "XLA_FLAGS": flags})
    formats = formats_of(cluster.chip)
    site = Site(backend="jax", device="gpu" if gpu else target.compiler, formats=formats)
    assert first("fp8_matmul", Case(site=site, dtype="bfloat16", shape=(1, 1, 1))).name == "float8"
    asked = job.Request(
        compiler=target.compiler,
        recipe="llama3-8b",
        overrides=(*STEP, f"fp8_scaling={scaling}"),
        mesh=mesh,
        options=target.options,
    )

    def tell(line: str) -> None:
        print(f"{chip}: {line}", file=sys.stderr, flush=True)

    found = job.answer(asked, target, tell=tell, fresh=gpu).raw  # the flags are not part of the request
    eight = sum(n for kinds, n in found["dots"].items() if all(kind.startswith("f8") for kind in kinds.split(" x ")))
    share = found["flops_fp8"] / found["traced_flops_fp8"]
    return (
        f"{_key(chip, mesh, scaling)} {found['traced_flops_fp8']:.4g} | {100 * share:.1f} % | {eight:g} | "
        f"{sum(found['dots'].values()):g} | {found['compiler']} |"
    )


def _key(chip: str, mesh: str, scaling: str) -> str:
    return f"| {chip} | {formats_of(parse(CLUSTERS[chip]).chip)} | {mesh} | {scaling} |"


def programs() -> Iterator[tuple[str, str, str]]:
    """Yield (chip, mesh, what shares a scale)."""
    for chip in CLUSTERS:
        yield chip, MESHES[1], "row"
        yield chip, MESHES[0], "tensor"


def write(rows: Sequence[str]) -> None:
    """Put rows into the page, in the order of `programs`; rows of other programs stay."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, after = text.partition(f"{HEAD[1]}\n")
    table, _, rest = after.partition("\n\n") if after.startswith("|") else ("", "", after.lstrip("\n"))
    old = table.splitlines()
    keep = []
    for program in programs():
        key = _key(*program)
        keep += [line for line in rows if line.startswith(key)] or [line for line in old if line.startswith(key)]
    PAGE.write_text(f"{before}{HEAD[1]}\n" + "\n".join(keep) + f"\n\n{rest}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="TEXT", default="", help="the chips whose name has this text")
    parser.add_argument("--write", action="store_true", help="put the rows into docs/measured/fp8.md")
    args = parser.parse_args()
    print("\n".join(HEAD), flush=True)
    rows = []
    for program in programs():
        if args.only.lower() not in program[0].lower():
            continue
        try:
            rows.append(row(*program))
        except UserError as error:
            print(error, file=sys.stderr)
            return error.code
        print(rows[-1], flush=True)
        if args.write:
            write(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
