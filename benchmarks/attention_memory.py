"""Compile one layer's attention for TPUs that are absent, and print its memory, traffic and time, kernel by kernel.

Run: python -m benchmarks.attention_memory [--only v5p] [--write]     (libtpu, no TPU: pip install 'portatrain[tpu]')

The layer is that of an 8B model: 32 heads, 8 kv heads of size 128, bf16, packed documents, one sample a device, forward
and backward. With --write the table goes into docs/measured/attention.md; rows that stand there already are kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from portatrain.backends import choose_kernel
from portatrain.backends.kernels import LANES, SCORES_BYTES, Site, chunks, splash_block
from portatrain.model.layout import COMPUTE, Layout, Mesh
from portatrain.plan.clusters.names import parse
from portatrain.plan.compilers import targets

PAGE = Path(__file__).parents[1] / "docs" / "measured" / "attention.md"
HEADS, KV_HEADS, SIZE, WIDTH = 32, 8, 128, 2
CLUSTERS = {"v4": "tpu-v4-8", "v5e": "tpu-v5e-4", "v5p": "tpu-v5p-8", "v6e": "tpu-v6e-4", "7x": "tpu-7x-8"}
KINDS: dict[str, dict[str, Any]] = {"causal": {}, "window 1,024": {"window": 1024}, "soft-cap": {"softcap": 50.0}}
HEAD = (
    "| chip | mesh | tokens | mask | kernel | HBM bytes, GB | of them in the kernel | time at least, ms | "
    "temporary memory, MiB |",
    "|---|---|---|---|---|---|---|---|---|",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A program: a chip, a mesh, tokens of a sample, the kind of mask, and the kernel."""

    chip: str
    mesh: str
    tokens: int
    kind: str
    kernel: str

    @property
    def head(self) -> str:
        return f"| {self.chip} | {self.mesh or '1'} | {self.tokens:,} | {self.kind} | {self.kernel} |"


def programs() -> Iterator[Row]:
    """Yield the programs, the most telling ones first."""
    for tokens in (2048, 8192, 32768):
        for chip in ("v5p", "v6e", "v4", "v5e", "7x"):
            yield from both(chip, "", tokens, "causal")
        for kind in ("window 1,024", "soft-cap"):
            yield from both("v5p", "", tokens, kind)
        for mesh in ("fsdp=4", "tensor=4", "context=4"):
            yield from both("v5p", mesh, tokens, "causal")


def both(chip: str, mesh: str, tokens: int, kind: str) -> Iterator[Row]:
    sizes = Mesh.parse(mesh)
    fits = chunks(1, HEADS // sizes.tensor, tokens // sizes.context, tokens) == 1
    for kernel in ("written-out" if fits else "chunked", "splash"):
        yield Row(chip=chip, mesh=mesh, tokens=tokens, kind=kind, kernel=kernel)


# ---- compiling


@functools.cache
def devices_of(chip: str) -> Sequence[Any]:
    import jax

    from portatrain.plan.compilers import xla

    target = targets.target(parse(CLUSTERS[chip]))
    return xla.devices_of({"compiler": target.compiler, "options": target.options}, jax)


def compiled(row: Row, queries: int | None = None) -> Any:
    """Return the compiled program of forward and backward pass; `queries`: of that many queries only."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, SingleDeviceSharding

    from portatrain.backends.base import Context
    from portatrain.backends.jax import JaxBackend
    from portatrain.backends.jax.mesh import device_mesh
    from portatrain.backends.jax.ops import partition_spec

    mesh = Mesh.parse(row.mesh)
    layout, devices = Layout(mesh=mesh, compute=COMPUTE), device_mesh(mesh, devices_of(row.chip))
    alone = SingleDeviceSharding(devices_of(row.chip)[0])
    site = Site(backend="jax", device="tpu", mesh=str(mesh), named=(("attention", row.kernel),))

    def array(dtype: Any, shape: tuple[int, ...], *axes: str | None) -> Any:
        lies = NamedSharding(devices, partition_spec(layout.spec(axes))) if mesh.devices > 1 else alone
        return jax.ShapeDtypeStruct(shape, dtype, sharding=lies)

    def total(q: Any, k: Any, v: Any, of_q: Any, of_k: Any) -> Any:
        ops = dataclasses.replace(JaxBackend._standalone(Context(precision="bf16")), site=site)
        ops = dataclasses.replace(ops, layout=layout, devices=devices if mesh.devices > 1 else None)
        ids = of_q if queries is None else (of_q, of_k)
        # The positions of the last queries, all of whose keys are computed: so is every chunk.
        at = None if queries is None else (jnp.arange(queries) + row.tokens - queries, jnp.arange(row.tokens))
        out = ops.attention(q, k, v, segment_ids=ids, positions=at, **KINDS[row.kind])
        return out.astype(jnp.float32).sum()

    b, t = mesh.over(("replica", "fsdp", "expert")), row.tokens
    s = queries or t
    q = array(jnp.bfloat16, (b, s, HEADS, SIZE), "batch", "seq", "heads", None)
    k = array(jnp.bfloat16, (b, t, KV_HEADS, SIZE), "batch", "seq", "kv_heads", None)
    of_q, of_k = (array(jnp.int32, (b, n), "batch", "seq") for n in (s, t))
    traced = jax.jit(jax.value_and_grad(total, (0, 1, 2))).trace(q, k, k, of_q, of_k)
    (choice,) = choose_kernel.taken()
    assert choice["kernel"] == row.kernel
    return traced.lower(lowering_platforms=("tpu",)).compile()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures:
    """Of one device: bytes through its memory (None: not known), those inside of the kernel, seconds, and bytes of
    temporary memory (None: the program does not fit)."""

    moved: float | None
    inside: float
    seconds: float | None
    temporary: float | None


def measure(row: Row) -> Figures:
    import jax

    try:
        program = compiled(row)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Figures(moved=None, inside=0.0, seconds=None, temporary=None)
    temporary = program.memory_analysis().temp_size_in_bytes
    mesh = Mesh.parse(row.mesh)
    queries, heads = row.tokens // mesh.context, HEADS // mesh.tensor
    if row.kernel == "chunked":
        # XLA counts a loop's body once. So one chunk is compiled alone, and its figures count once for each chunk.
        n = chunks(1, heads, queries, row.tokens)
        one = dataclasses.replace(row, kernel="written-out", mesh="" if mesh.tensor == 1 else row.mesh)
        moved, seconds = cost(compiled(one, queries=queries // n))
        return Figures(moved=n * moved, inside=0.0, seconds=seconds and n * seconds, temporary=temporary)
    moved, seconds = cost(program)
    if row.kernel != "splash":
        return Figures(moved=moved, inside=0.0, seconds=seconds, temporary=temporary)
    inside, once, flops = kernel_bytes(row, queries, heads)
    chip = parse(CLUSTERS[row.chip]).chip
    assert chip.memory_bw is not None
    peak, rate = (x / chip.devices_per_chip for x in (chip.peaks["bf16"].value * 1e12, chip.memory_bw.value * 1e9))
    bound = max(flops / peak, inside / rate)
    # XLA counts the arguments and results of the kernel once, and nothing of what happens inside.
    outside = max(0.0, moved - once)
    return Figures(moved=outside + inside, inside=inside, seconds=outside / rate + bound, temporary=temporary)


def cost(program: Any) -> tuple[float, float | None]:
    found = program.cost_analysis()
    seconds = found.get("optimal_seconds", -1.0)
    return found["bytes accessed"], seconds if seconds > 0 else None


def kernel_bytes(row: Row, queries: int, heads: int) -> tuple[float, float, float]:
    """Return (bytes, bytes if everything moved once, FLOPs) of the three kernels, by their blocks. What no query of
    a block sees is neither read nor computed."""
    from portatrain.backends.jax import splash
    from portatrain.model.context_chunks import dealt

    kv, t, options = max(1, KV_HEADS * heads // HEADS), row.tokens, KINDS[row.kind]
    window = options.get("window")
    shares = dealt(t // queries, t, causal=True, window=window)
    *_, seen = splash._kernel(True, window, queries, t, shares, options.get("softcap"), False, None)
    block_q, block_k = splash_block(queries), splash_block(t)
    pair, row_bytes, lanes = block_k * SIZE * WIDTH, queries * SIZE * WIDTH, 4 * LANES
    ids = 4 * 8 * block_k  # of the keys of a block; those of queries are LANES wide
    each_q = queries * (lanes + lanes)  # positions and segments of queries
    forward = seen * (2 * pair + ids) + 2 * row_bytes + each_q + queries * lanes
    by_queries = seen * (2 * pair + ids) + 3 * row_bytes + each_q + 2 * 4 * queries
    by_keys = seen * (2 * block_q * SIZE * WIDTH + 4 * 8 * 4 * block_q)
    inside = heads * (forward + by_queries + by_keys) + kv * 4 * t * SIZE * WIDTH
    keys = 2 * kv * t * SIZE * WIDTH
    once = heads * ((2 + 3 + 2) * row_bytes + 3 * each_q / heads + queries * (lanes + 2 * 4 + 2 * 4 * 8)) + 4 * keys
    return inside, once, 9 * 2.0 * heads * seen * block_q * block_k * SIZE


def line(row: Row, found: Figures) -> str:
    if found.temporary is None:
        return f"{row.head} - | - | - | does not fit |"
    moved = "-" if found.moved is None else f"{found.moved / 1e9:.2f}"
    inside = f"{found.inside / 1e9:.2f}" if found.inside else ""
    seconds = "-" if found.seconds is None else f"{1e3 * found.seconds:.2f}"
    return f"{row.head} {moved} | {inside} | {seconds} | {found.temporary / 2**20:,.0f} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows that have this text, as in 'v5p | context=4'")
    parser.add_argument("--write", action="store_true", help="write docs/measured/attention.md")
    args = parser.parse_args()
    os.environ.update(targets.TPU_ENV)
    have = PAGE.read_text(encoding="utf-8").splitlines() if args.write and PAGE.exists() else []
    lines = list(HEAD)
    print("\n".join(lines), flush=True)
    for row in programs():
        known = next((text for text in have if text.startswith(row.head)), None)
        if known is None and args.only not in row.head:
            continue
        lines.append(known or line(row, measure(row)))
        print(lines[-1], flush=True)
    if args.write:
        write(lines)
    return 0


def write(lines: Sequence[str]) -> None:
    about = {
        "compiler": ", ".join(f"{name} {metadata.version(name)}" for name in ("libtpu", "jaxlib")),
        "scores": f"{SCORES_BYTES // 2**20} MiB",
        "table": "\n".join(lines),
    }
    text = PAGE.with_name("attention.in.md").read_text(encoding="utf-8")
    for name, value in about.items():
        text = text.replace("{" + name + "}", value)
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
