"""List published speeds that nothing was ever fitted to, with the configurations of their publishers.

``python -m benchmarks.plan_blind --freeze`` predicts a row once, before anyone can adjust the planner to it, and keeps
the prediction in docs/measured/plan-blind.json. New published figures come here, never into ``plan_published_rows``.
"""

from __future__ import annotations

from benchmarks.plan_published_rows import Row
from portatrain.plan.cost.policy import Remat

_QKV = Remat(name="keeps q, k, v", qkv=1, offload=1)
_QKV_PROJECTION = Remat(name="keeps q, k, v, projection", qkv=1, projected=1, offload=1)
_BLOCK = Remat(name="block, offloaded", offload=1)

HELD_OUT = (
    Row(
        model="deepseek-v3",
        cluster="tpu-7x-512",
        precision="bf16",
        tokens=2446.25,
        who="tpu-recipes",
        mesh=(1, 512, 1, 1, 1),
        rows=8,
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
        remat=_QKV_PROJECTION,
    ),
)
"""Sources, all in the repository AI-Hypercomputer/tpu-recipes: training/ironwood/README.md and the k8s manifests beside
it, and the READMEs and run scripts under training/v5p and training/trillium. v5p-1024 is 512 chips there as here."""
