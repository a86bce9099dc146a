"""AWS Trainium, Intel Gaudi, Huawei Ascend, Cerebras, Apple, and the plain CPU."""

from __future__ import annotations

from typing import Any

from portatrain.plan.chip import chip
from portatrain.plan.figures import cite, est

_HALVED = "the published figure is taken as both directions and halved"
_GAUDI: dict[str, Any] = {
    "vendor": "intel",
    "kind": "mesh",
    "stack": "hpu",
    "domain": 8,
    "chips_per_host": 8,
    "source": "gaudi",
}

CHIPS = (
    chip(
        "trn1", vendor="aws", kind="torus", stack="neuron", source="neuron", slice_rule="trn-4x4", memory_gib=32,
        memory_bw=820, peaks={"bf16": 190, "fp8": 190}, links=4,
        link=est(48, "a quarter of the chip's rate", source="derived"),
        scale_up=est(192, _HALVED), domain=16, chips_per_host=16, scale_out=cite(50, "neuron", "trn1n has 100"),
        devices_per_chip=2, die_to_die=est(192, "cores of one chip, taken as the scale-up rate", source="none"),
        prices={"on demand": 1.34, "spot": 0.13}, skus=("trn1.32xlarge", "trn1n.32xlarge"),
    ),
    chip(
        "trn2", vendor="aws", kind="torus", stack="neuron", source="neuron", slice_rule="trn-4x4", memory_gib=96,
        memory_bw=2900, peaks={"bf16": 667, "fp8": 1299}, links=4,
        link=est(128, "a quarter of the chip's rate", source="derived"), scale_up=est(512, _HALVED), domain=16,
        chips_per_host=16, scale_out=200, devices_per_chip=4,
        die_to_die=est(512, "cores of one chip, taken as the scale-up rate", source="none"),
        prices={"spot": 1.44, "capacity block": 2.235}, skus=("trn2.48xlarge",),
    ),
    chip(
        "trn2u", vendor="aws", kind="torus", stack="neuron", source="neuron", slice_rule="trn-4x4x4", memory_gib=96,
        memory_bw=2900, peaks={"bf16": 667, "fp8": 1299}, links=6,
        link=est(128, "a quarter of the chip's rate in its own instance", source="derived"),
        scale_up=est(512, _HALVED), scale_up_z=est(128, "between the four instances; " + _HALVED), domain=64,
        chips_per_host=16, scale_out=200, devices_per_chip=4,
        die_to_die=est(512, "cores of one chip, taken as the scale-up rate", source="none"),
        prices={"spot": 1.44, "capacity block": 2.235}, skus=("trn2u.48xlarge",),
    ),
    chip(
        "trn3", vendor="aws", kind="switched", stack="neuron", source="neuron", memory_gib=144, memory_bw=4900,
        peaks={"bf16": 671, "fp8": 2517}, scale_up=est(1100, _HALVED), domain=144, chips_per_host=4,
        scale_out=cite(200, "neuron", "28,800 Gbit/s for 144 chips"), skus=("trn3 UltraServer",),
        status="the first generation of its UltraServer has 64 chips",
    ),
    chip(
        "gaudi2", **_GAUDI, memory_gb=96, memory_bw=2450, peaks={"bf16": 432, "fp8": cite(865, "gaudi", "835 or 865")},
        link=est(37.5, "3 of 24 ports of 100 Gbit/s to each other chip"), scale_up=est(262.5, "21 of 24 ports"),
        scale_out=est(300, "3 of 24 ports"), power=600,
    ),
    chip(
        "gaudi3", **_GAUDI, memory_gb=128, memory_bw=3700, peaks={"bf16": 1835, "fp8": 1835},
        link=est(75, "3 of 24 ports of 200 Gbit/s to each other chip"), scale_up=est(525, "21 of 24 ports"),
        scale_out=est(600, "3 of 24 ports"), power=900, status="no successor: Falcon Shores was cancelled",
    ),
    chip(
        "ascend910b", vendor="huawei", kind="mesh", stack="cann", source="pages", memory_gb=64, memory_bw=est(1600),
        peaks={"bf16": est(320)}, link=est(28, "a seventh of the chip's rate", source="derived"), scale_up=est(196),
        domain=8, chips_per_host=8, scale_out=est(200), power=est(400),
    ),
    chip(
        "ascend910c", vendor="huawei", kind="switched", stack="cann", source="cloudmatrix", memory_gb=128,
        memory_bw=3200, peaks={"bf16": 752}, scale_up=392, domain=384, chips_per_host=8, scale_out=400,
        devices_per_chip=2, die_to_die=est(392, "taken as the scale-up rate", source="none"),
    ),
    chip(
        "cs3", vendor="cerebras", kind="streaming", stack="cerebras", source="pages", memory_gb=44,
        peaks={"bf16": est(62500, "half of the sparse 125 PFLOP/s", source="derived")}, power=est(23000),
        status="weights stream from outside the wafer: its memory is not what bounds a model, and it is not planned",
    ),
    chip(
        "apple-m2-ultra", vendor="apple", kind="single", stack="mlx", source="pages", aliases=("m2-ultra",),
        memory_gb=192, memory_bw=800, peaks={"bf16": est(27, "the fp32 rate", source="none")},
        scale_up=est(5, "network between machines", source="none"),
    ),
    chip(
        "apple-m4-max", vendor="apple", kind="single", stack="mlx", source="pages", aliases=("m4-max",),
        memory_gb=128, memory_bw=546, peaks={"bf16": est(18, source="none")},
        scale_up=est(10, "network between machines", source="none"),
    ),
    chip(
        "cpu", vendor="cpu", kind="single", stack="cpu", source="none",
        memory_gib=est(4, "per core; replaced by this machine's memory where it can be read"),
        memory_bw=est(10, "per core"), peaks={"fp32": est(0.05, "per core"), "bf16": est(0.05, "as fp32")},
        scale_up=est(5, "through shared memory"), status="one device a core; plan only to compare with a run here",
    ),
)  # fmt: skip
