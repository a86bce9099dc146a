"""List published training speeds, with all that their publishers tell of each configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from portatrain.plan.clusters import names
from portatrain.plan.clusters.cluster import Cluster
from portatrain.plan.clusters.figures import figure
from portatrain.plan.cost.policy import REMATS, Remat
from portatrain.plan.cost.shapes import PRESETS, ModelShape
from portatrain.plan.cost.tensors import Sizes


@cache
def _cluster(name: str) -> Cluster:
    return names.parse(name)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One published figure. ``tokens``: per second and chip. ``utilisation``: as published, by its own
    convention.

    ``mesh``, ``rows`` (samples of a microbatch on each data-parallel device), ``accumulation`` and ``remat`` are the
    publisher's. ``mesh`` is None if the publisher used pipeline stages, which the planner does not plan; then the
    planner's own best mesh replaces it. ``counted``: the number of chips was published with the figure; else it is the
    number of the publisher's configuration. ``seq_len``: the length of a sample, if not the preset's. ``sizes``:
    those of a model without a preset. ``block``: queries or keys, whichever are more, in a block of its
    attention kernel. ``gathers``: the entry of SORTING for experts that sort their tokens. ``part`` names
    a chip that differs from the catalog's, ``changes`` how.
    """

    model: str
    cluster: str
    precision: str
    tokens: float
    who: str
    utilisation: str = ""
    mesh: Sizes | None = None
    rows: int = 1
    accumulation: int = 1
    remat: Remat | None = None
    capacity: float = 1.0
    block: int = 1
    gathers: str = "core"
    seq_len: int | None = None
    sizes: ModelShape | None = None
    counted: bool = True
    part: str = ""
    changes: Mapping[str, tuple[float, str]] = field(default_factory=dict)
    note: str = ""

    def __hash__(self) -> int:
        return hash((self.model, self.cluster, self.tokens))

    @property
    def shape(self) -> ModelShape:
        """Return the sizes of the model, with the publisher's length of a sample."""
        preset = self.sizes or PRESETS[self.model]
        return replace(preset, seq_len=self.seq_len or preset.seq_len)

    @property
    def on(self) -> Cluster:
        """Return the cluster, with the publisher's part in place of the catalog's if they differ."""
        made = _cluster(self.cluster)
        other: dict[str, Any] = {name: figure(value, unit, "pages") for name, (value, unit) in self.changes.items()}
        return replace(made, chip=replace(made.chip, **other)) if other else made

    @property
    def chip(self) -> str:
        return self.part or _cluster(self.cluster).chip.name

    @property
    def vendor(self) -> str:
        return _cluster(self.cluster).chip.vendor


_H100_500W: dict[str, Any] = {
    "part": "h100-sxm of 500 W",
    "changes": {"memory": (96.0, "GB"), "memory_bw": (2400.0, "GB/s"), "power": (500.0, "W")},
}

ROWS = (
    Row(
        model="llama3-8b",
        cluster="tpu-v6e-256",
        precision="bf16",
        tokens=7207,
        utilisation="45 %",
        who="MaxText",
        mesh=(1, 256, 1, 1, 1),
        rows=4,
        block=2048,
        remat=Remat(name="keeps q, k, v, projection", qkv=1, projected=1, offload=1),
    ),
    Row(
        model="llama3-70b",
        cluster="tpu-v6e-256",
        precision="bf16",
        tokens=960,
        utilisation="50 %",
        who="MaxText",
        mesh=(1, 256, 1, 1, 1),
        rows=5,
        block=2048,
        remat=Remat(name="keeps q, k, v", qkv=1, offload=1),
    ),
    Row(
        model="mixtral-8x7b",
        cluster="tpu-v6e-256",
        precision="bf16",
        tokens=3899,
        utilisation="35 %",
        who="MaxText",
        mesh=(1, 256, 1, 1, 1),
        rows=12,
        capacity=1.25,
        block=2048,
        remat=Remat(name="keeps q, k, v, projection", qkv=1, projected=1, offload=1),
        note="capacity factor 1.25",
        counted=False,
    ),
    Row(
        model="llama2-70b",
        cluster="tpu-v5p-512",
        precision="bf16",
        tokens=692,
        who="MaxText",
        utilisation="65 %, attention not causal",
        mesh=(1, 256, 1, 1, 1),
        rows=4,
        remat=Remat(name="dots but gate and up", qkv=1, projected=1),
        note="512 in the name: 256 chips",
    ),
    Row(
        model="mixtral-8x7b",
        cluster="tpu-v5p-128",
        precision="bf16-weights",
        tokens=2909,
        utilisation="53 %",
        who="MaxText",
        mesh=(1, 64, 1, 1, 1),
        rows=36,
        counted=False,
        remat=REMATS["block"],
    ),
    Row(
        model="llama3-70b",
        cluster="tpu-7x-128",
        precision="bf16",
        tokens=2687,
        utilisation="52 %",
        who="tpu-recipes",
        mesh=(1, 128, 1, 1, 1),
        rows=2,
        block=2048,
        remat=Remat(name="keeps q, k, v, attention", qkv=1, attention=1),
    ),
    Row(
        model="llama3-405b",
        cluster="tpu-7x-512",
        precision="bf16",
        tokens=500,
        utilisation="55 %",
        who="tpu-recipes",
        mesh=(1, 512, 1, 1, 1),
        rows=3,
        counted=False,
        block=2048,
        remat=Remat(name="block, offloaded", offload=1),
    ),
    Row(
        model="llama3-8b",
        cluster="h100-8",
        precision="bf16",
        tokens=6667,
        utilisation="39 %",
        who="torchtitan",
        mesh=(1, 8, 1, 1, 1),
        rows=2,
        note="compiled",
        **_H100_500W,
        remat=Remat(name="every second matmul", qkv=0.8, attention=1, hidden=0.5),
    ),
    Row(
        model="llama3-8b",
        cluster="h100-8",
        precision="bf16",
        tokens=5762,
        utilisation="33 %",
        who="torchtitan",
        mesh=(1, 8, 1, 1, 1),
        rows=2,
        note="eager",
        **_H100_500W,
        remat=Remat(name="every second matmul", qkv=0.8, attention=1, hidden=0.5),
    ),
    Row(
        model="llama3-70b",
        cluster="h100-256",
        precision="bf16",
        tokens=652,
        who="torchtitan",
        mesh=(1, 32, 1, 1, 8),
        rows=16,
        remat=REMATS["block"],
        **_H100_500W,
    ),
    Row(
        model="llama3-70b",
        cluster="h100-64",
        precision="fp8",
        tokens=1664,
        utilisation="37 %",
        who="Megatron-Bridge",
        note="4 ways tensor, 8 pipeline stages",
    ),
    Row(
        model="llama3-405b",
        cluster="h100-1024",
        precision="fp8",
        tokens=326,
        who="Megatron-Bridge",
        note="8 ways tensor, 8 pipeline stages, 2 ways context",
        counted=False,
    ),
    Row(
        model="llama3-70b",
        cluster="gb200-64",
        precision="fp8",
        tokens=4224,
        who="Megatron-Bridge",
        mesh=(1, 64, 1, 1, 1),
        rows=2,
        accumulation=2,
        remat=Remat(
            name="none, half offloaded", normed=1, qkv=1, attention=1, projected=1, hidden=1, product=1, offload=0.5
        ),
    ),
    Row(
        model="llama3-70b",
        cluster="gb300-64",
        precision="fp8",
        tokens=5248,
        who="Megatron-Bridge",
        mesh=(1, 64, 1, 1, 1),
        rows=2,
        accumulation=2,
        remat=Remat(
            name="none, a quarter offloaded",
            normed=1,
            qkv=1,
            attention=1,
            projected=1,
            hidden=1,
            product=1,
            offload=0.25,
        ),
    ),
)
