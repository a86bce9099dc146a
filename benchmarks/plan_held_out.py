"""List published speeds that nothing was ever fitted to, with the configurations of their publishers.

``python -m benchmarks.plan_blind --freeze`` predicts a row once, before anyone can adjust the planner to it, and keeps
the prediction in docs/measured/plan-blind.json. New published figures come here, never into ``plan_published_rows``.
"""

from __future__ import annotations

from benchmarks.plan_published_rows import Row
from portatrain.plan.cost.policy import Remat
from portatrain.plan.cost.shapes import ModelShape

_QKV = Remat(name="keeps q, k, v", qkv=1, offload=1)
_QKV_PROJECTION = Remat(name="keeps q, k, v, projection", qkv=1, projected=1, offload=1)
_BLOCK = Remat(name="block, offloaded", offload=1)

_QWEN3 = ModelShape(
    name="qwen3-235b",
    layers=94,
    embed=4096,
    heads=64,
    kv_heads=4,
    head_dim=128,
    mlp=1536,
    vocab=151_936,
    experts=128,
    experts_per_token=8,
    seq_len=4096,
    batch=8192,
    source="Qwen3-235B-A22B model card",
)
_MIXTRAL_22B = ModelShape(
    name="mixtral-8x22b",
    layers=56,
    embed=6144,
    heads=48,
    kv_heads=8,
    head_dim=128,
    mlp=16_384,
    vocab=32_768,
    experts=8,
    experts_per_token=2,
    seq_len=4096,
    batch=2048,
    source="Mixtral 8x22B model card",
)

EIGHT = (
    Row(
        model="deepseek-v3",
        cluster="tpu-7x-512",
        precision="bf16",
        tokens=2446.25,
        who="tpu-recipes",
        mesh=(1, 512, 1, 1, 1),
        rows=8,
        block=2048,
        gathers="sparsecore",
        remat=_BLOCK,
        note="weights sharded 256 x 2 ways",
    ),
    Row(
        model="deepseek-v3",
        cluster="tpu-7x-256",
        precision="bf16",
        tokens=2425.75,
        who="tpu-recipes",
        mesh=(1, 256, 1, 1, 1),
        rows=8,
        block=2048,
        gathers="sparsecore",
        remat=_BLOCK,
        note="weights sharded by expert",
    ),
    Row(
        model="deepseek-v3",
        cluster="tpu-v5p-1024",
        precision="bf16",
        seq_len=8192,
        tokens=542.108,
        utilisation="33 %",
        who="MaxText",
        mesh=(1, 512, 1, 1, 1),
        rows=6,
        block=2048,
        remat=Remat(name="keeps projection", projected=1, offload=1),
    ),
    Row(
        model="llama3-70b",
        cluster="tpu-7x-512",
        precision="bf16",
        tokens=2670.55,
        who="tpu-recipes",
        mesh=(1, 512, 1, 1, 1),
        rows=2,
        block=2048,
        gathers="sparsecore",
        remat=Remat(name="keeps q, k, v, attention", qkv=1, attention=1),
    ),
    Row(
        model="llama3-405b",
        cluster="tpu-v5p-1024",
        precision="bf16",
        tokens=124.618,
        utilisation="69 %, attention not causal",
        who="MaxText",
        mesh=(1, 512, 1, 1, 1),
        rows=2,
        block=2048,
        remat=Remat(name="attention, offloaded", attention=1, offload=1),
    ),
    Row(
        model="llama3-70b",
        cluster="tpu-v6e-128",
        precision="bf16",
        tokens=941.976,
        who="MaxText",
        mesh=(1, 128, 1, 1, 1),
        rows=4,
        block=2048,
        remat=_QKV,
    ),
    Row(
        model="llama3-8b",
        cluster="tpu-v6e-64",
        precision="bf16",
        tokens=7247.111,
        who="MaxText",
        mesh=(1, 64, 1, 1, 1),
        rows=5,
        block=2048,
        remat=_QKV_PROJECTION,
    ),
    Row(
        model="llama3-8b",
        cluster="tpu-v6e-8",
        precision="bf16",
        tokens=7138.890,
        who="MaxText",
        mesh=(1, 8, 1, 1, 1),
        rows=3,
        block=2048,
        remat=_QKV_PROJECTION,
    ),
)
"""The dense models and DeepSeek-V3."""

ENTERED = (
    Row(
        model="qwen3-235b",
        sizes=_QWEN3,
        cluster="tpu-7x-512",
        precision="bf16",
        tokens=4245.89,
        who="tpu-recipes",
        mesh=(1, 512, 1, 1, 1),
        rows=16,
        block=2048,
        gathers="sparsecore",
        remat=_BLOCK,
    ),
    Row(
        model="mixtral-8x22b",
        sizes=_MIXTRAL_22B,
        cluster="tpu-v6e-256",
        precision="bf16-weights",
        tokens=1326.307,
        utilisation="36 %",
        who="MaxText",
        mesh=(1, 64, 4, 1, 1),
        rows=8,
        capacity=1.25,
        block=2048,
        remat=_QKV_PROJECTION,
        note="capacity factor 1.25",
    ),
    Row(
        model="deepseek-v3",
        cluster="tpu-v5p-512",
        precision="bf16",
        seq_len=8192,
        tokens=477.1,
        utilisation="29 %",
        who="another operator, MaxText's recipe",
        mesh=(1, 256, 1, 1, 1),
        rows=4,
        block=2048,
        remat=Remat(name="keeps projection", projected=1, offload=1),
    ),
)
"""More mixtures of experts. Once their predictions were kept, they entered the fit."""

HELD_OUT = (*EIGHT, *ENTERED)
"""Sources, all in the repository AI-Hypercomputer/tpu-recipes: training/ironwood/README.md and the k8s manifests beside
it, and the READMEs and run scripts under training/v5p and training/trillium. v5p-1024 is 512 chips there as here.
The last of ENTERED is from the README of a copy of that repository (DeepSeek3-671B, 256 chips, 2026-07-27), which also
says that 6 samples a device needed 112.37 GiB to compile, and that 5 did not run."""
