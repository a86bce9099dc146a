"""Google TPUs. ``scale_up`` is the sum over a chip's links, one way; ``link`` is one of them.

Suffixes of v2 to v5p and of 7x count two per chip (TensorCores, devices); v5e and v6e count chips.
"""

from __future__ import annotations

from portatrain.plan.chip import chip
from portatrain.plan.figures import cite, est

CHIPS = (
    chip(
        "tpu-v4", vendor="google", kind="torus", stack="jax-tpu", source="tpu-docs scaling-book maxtext",
        aliases=("v4",), slice_rule="3d", memory_gib=32, memory_bw=1200, peaks={"bf16": 275, "int8": 275},
        links=6, link=45, scale_up=270, domain=4096, chips_per_host=4,
        scale_out=cite(50, "scaling-book", "25 GB/s per host of 4"), power=cite(192, "tpu-docs", "maximum measured"),
        prices={"on demand": 3.22}, skus=("ct4p-hightpu-4t",), jax_kind="TPU v4", aot="v4:{topology}",
    ),
    chip(
        "tpu-v5e", vendor="google", kind="torus", stack="jax-tpu", source="tpu-docs scaling-book maxtext",
        aliases=("v5e", "v5litepod", "tpu-v5litepod"), slice_rule="2d", memory_gib=16, memory_bw=819,
        peaks={"bf16": 197, "int8": 393}, links=4, link=45, scale_up=200, domain=256, chips_per_host=4,
        scale_out=cite(25, "tpu-docs", "6.4 Tbit/s for a pod of 256"), prices={"on demand": 1.20, "flex": 0.60},
        skus=("ct5lp-hightpu-4t",), jax_kind="TPU v5 lite", aot="v5e:{topology}",
    ),
    chip(
        "tpu-v5p", vendor="google", kind="torus", stack="jax-tpu", source="tpu-docs",
        aliases=("v5p",), slice_rule="3d", memory_gib=95,
        memory_bw=cite(2765, "tpu-docs", "jax tpu_info.py has 2460, the scaling book 2800"),
        peaks={"bf16": 459, "fp8": 459, "int8": 918}, links=6,
        link=cite(90, "scaling-book", "Google's 1200 GB/s both ways over 6 links gives 100"), scale_up=600,
        domain=8960, chips_per_host=4, scale_out=50,
        prices={"on demand": 4.20, "spot": 0.84, "flex": 2.10}, skus=("ct5p-hightpu-4t",),
        jax_kind="TPU v5", aot="v5p:{topology}",
    ),
    chip(
        "tpu-v6e", vendor="google", kind="torus", stack="jax-tpu", source="tpu-docs",
        aliases=("v6e",), slice_rule="2d", memory_gib=32, memory_bw=1638,
        peaks={"bf16": 918, "fp8": 918, "int8": 1836}, links=4, link=90, scale_up=400, domain=256,
        chips_per_host=4, scale_out=100, prices={"on demand": 2.70, "spot": 0.54, "flex": 1.35},
        skus=("ct6e-standard-4t",), jax_kind="TPU v6 lite", aot="v6e:{topology}",
    ),
    chip(
        "tpu-7x", vendor="google", kind="torus", stack="jax-tpu", source="tpu-docs",
        aliases=("tpu7x", "7x"), slice_rule="3d", memory_gib=192, memory_bw=7380, peaks={"bf16": 2307, "fp8": 4614},
        links=6, link=cite(100, "derived", "1200 GB/s both ways over 6 links"), scale_up=600, domain=9216,
        chips_per_host=4, scale_out=100, prices={"on demand": 12.00, "flex": 6.00}, skus=("tpu7x-standard-4t",),
        jax_kind="TPU7x", aot="tpu7x:{topology}", devices_per_chip=2,
        die_to_die=est(600, "two dies in a package; taken as the rate of all six links", source="none"),
    ),
    chip(
        "tpu-8t", vendor="google", kind="torus", stack="jax-tpu", source="tpu8",
        aliases=("8t",), slice_rule="3d", memory_gb=216, memory_bw=6528,
        peaks={
            "bf16": cite(996, "tpu-info", "only in jax, not in Google's specification"),
            "fp8": cite(5977, "tpu-info", "only in jax, not in Google's specification"), "fp4": 12600,
        },
        links=6, link=200, scale_up=1200, domain=9600, scale_out=400, jax_kind="TPU8t",
        chips_per_host=est(4, "as on earlier generations", source="none"),
        offered=False,
        status="announced 2026-04-22; its legal slices are not published, those of the older 3D kinds are assumed",
    ),
    chip(
        "tpu-8i", vendor="google", kind="switched", stack="jax-tpu", source="tpu8 tpu-info",
        aliases=("8i",), memory_gb=288, memory_bw=8601, peaks={"bf16": 1101, "fp8": 8808, "fp4": 10100},
        scale_up=1200, domain=1152, chips_per_host=est(4, "as on earlier generations", source="none"),
        offered=False, status="a part for inference; its network between domains is not published",
    ),
)  # fmt: skip
