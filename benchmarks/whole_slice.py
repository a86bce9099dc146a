"""Show how libtpu compiles a gather and a scatter, by slice and group: the table of docs/measured/traffic-tpu.md.

Run: python -m benchmarks.whole_slice     (libtpu, no TPU: pip install 'portatrain[tpu]'; some minutes)

Each program is one collective alone: the gather of a bf16 array of 4096 x 14336, split along its rows over a group of
chips, or the scatter of a float32 array of that size. A group is the whole slice, or one of several of equal size.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

import numpy as np

from portatrain.plan.compilers import hlo, hlo_text

SHAPE = (4096, 14336)
SLICES = ("v5p:2x2x1", "v5p:2x2x4", "v5p:4x4x4", "v5p:4x4x8", "v4:4x4x4", "v5e:8x8", "v6e:4x4", "v6e:16x16")


def compiled(slice_: str, group: int) -> dict[str, str]:
    """Return the collectives that the compiler wrote, for 'gather' and 'scatter', over groups of that many
    neighbours."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import NamedSharding, PartitionSpec

    more = {"chip_config_name": "megacore"} if slice_.startswith("v4") else {}
    devices = topologies.get_topology_desc(platform="tpu", topology_name=slice_, **more).devices
    mesh = jax.sharding.Mesh(np.array(devices).reshape(-1, group), ("others", "group"))

    def text(function: Any, shape: tuple[int, ...], dtype: Any, spec: Any) -> str:
        argument = jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        return jax.jit(function).lower(argument).compile().as_text() or ""

    def gather(x: Any) -> Any:
        return jax.lax.with_sharding_constraint(2 * x, NamedSharding(mesh, PartitionSpec()))

    def mine(part: Any) -> Any:
        return jax.lax.psum_scatter(part.reshape(SHAPE), "group", scatter_dimension=0, tiled=True)

    axes = PartitionSpec("others", "group")
    scatter = jax.shard_map(mine, mesh=mesh, in_specs=axes, out_specs=PartitionSpec("group"), check_vma=False)
    found = {
        "gather": text(gather, SHAPE, jnp.bfloat16, PartitionSpec("group")),
        "scatter": text(scatter, (*mesh.devices.shape, *SHAPE), jnp.float32, axes),
    }
    return {name: ", ".join(sorted(set(collectives(module)))) for name, module in found.items()}


def collectives(module: str) -> list[str]:
    """Return the collectives of a compiled module; a scatter may be an all-reduce fused with the slice that is kept."""
    found = []
    for name, one in hlo_text.read(module).items():
        for line in one.lines:
            kind = line.opcode.removesuffix("-start")
            if kind in hlo.COLLECTIVES:
                fused = name.startswith("all-reduce-scatter") and kind == "all-reduce"
                found.append("reduce-scatter" if fused else kind)
    return found


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    from portatrain.plan.compilers.targets import TPU_ENV

    os.environ.update(TPU_ENV)
    print("| slice | chips | group | gather | scatter |\n|---|---|---|---|---|")
    for slice_ in SLICES:
        chips = int(np.prod([int(n) for n in slice_.partition(":")[2].split("x")]))
        for group in (chips, chips // 2):
            ops = compiled(slice_, group)
            what = "whole slice" if group == chips else f"{group}"
            print(f"| {slice_} | {chips} | {what} | {ops['gather']} | {ops['scatter']} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
