"""NVIDIA GPUs. ``scale_up`` is NVLink, one way; ``scale_out`` the network card's share of one GPU."""

from __future__ import annotations

from typing import Any

from portatrain.plan.chip import chip
from portatrain.plan.figures import cite, est

_HGX: dict[str, Any] = {
    "vendor": "nvidia",
    "kind": "switched",
    "stack": "torch-cuda",
    "domain": 8,
    "chips_per_host": 8,
}
_NVL72: dict[str, Any] = {
    "vendor": "nvidia",
    "kind": "switched",
    "stack": "torch-cuda",
    "domain": 72,
    "chips_per_host": 4,
}
_MEASURED = cite(370, "scaling-book", "what collectives reach of the nominal 450")

CHIPS = (
    chip(
        "a100-40", **_HGX, source="pages", memory_gb=40, memory_bw=1555, peaks={"bf16": 312}, scale_up=300,
        scale_out=cite(50, "pages", "400 Gbit/s per 8 on p4d"), power=400, prices={"on demand": 2.74, "spot": 1.02},
        skus=("p4d.24xlarge", "a2-highgpu-8g", "Standard_ND96asr_v4"),
    ),
    chip(
        "a100-80", **_HGX, source="pages", aliases=("a100",), memory_gb=80, memory_bw=2039, peaks={"bf16": 312},
        scale_up=300, scale_out=cite(50, "pages", "ND A100 v4 is said to have 200 (not confirmed)"), power=400,
        prices={"on demand": 3.43, "spot": 1.38},
        skus=("p4de.24xlarge", "Standard_ND96amsr_A100_v4", "BM.GPU.A100-v2.8"),
    ),
    chip(
        "h100-sxm", **_HGX, source="surveys scaling-book", aliases=("h100",), memory_gb=80, memory_bw=3350,
        peaks={"bf16": 989.5, "fp8": 1979}, scale_up=450, scale_up_measured=_MEASURED, scale_out=400, power=700,
        prices={"on demand": 6.88, "spot": 1.28, "OCI": 10.0, "Nebius": 2.95},
        skus=("p5.48xlarge", "a3-highgpu-8g", "a3-megagpu-8g", "Standard_ND96isr_H100_v5", "BM.GPU.H100.8"),
    ),
    chip(
        "h200", **_HGX, source="surveys scaling-book", memory_gb=141, memory_bw=4800,
        peaks={"bf16": 989.5, "fp8": 1979}, scale_up=450, scale_up_measured=_MEASURED, scale_out=400, power=700,
        prices={"OCI": 10.0, "Nebius": 3.50},
        skus=("p5e.48xlarge", "p5en.48xlarge", "a3-ultragpu-8g", "Standard_ND96isr_H200_v5", "BM.GPU.H200.8"),
    ),
    chip(
        "b200", **_HGX, source="surveys scaling-book", memory_gb=180, memory_bw=8000,
        peaks={"bf16": 2250, "fp8": 4500, "fp4": 9000}, scale_up=900, scale_out=400,
        power=est(1000, "low confidence"), prices={"OCI": 14.0, "Nebius": 5.50},
        skus=("p6-b200.48xlarge", "a4-highgpu-8g", "BM.GPU.B200.8"),
    ),
    chip(
        "gb200", **_NVL72, source="surveys nvidia-press", memory_gb=186, memory_bw=8000,
        peaks={"bf16": 2500, "fp8": 5000, "fp4": 10000}, scale_up=900, domain_egress=3600, scale_out=400, power=1200,
        prices={"OCI": 16.0},
        skus=(
            "p6e-gb200.36xlarge", "u-p6e-gb200x72", "a4x-highgpu-4g", "Standard_ND128isr_NDR_GB200_v6",
            "BM.GPU.GB200.4",
        ),
        status="arm64 hosts",
    ),
    chip(
        "b300", **_HGX, source="surveys", memory_gb=270, memory_bw=8000,
        peaks={"bf16": 2250, "fp8": 4500, "fp4": 13500}, scale_up=900, scale_out=est(800, "ConnectX-8, not confirmed"),
        power=est(1100, "low confidence"), prices={"OCI": 15.0}, skus=("p6-b300.48xlarge", "BM.GPU.B300.8"),
    ),
    chip(
        "gb300", **_NVL72, source="surveys nvidia-press", memory_gb=279, memory_bw=8000,
        peaks={"bf16": est(2500), "fp8": est(5000), "fp4": 15000}, scale_up=900, scale_out=800, power=est(1400),
        prices={"OCI": 18.0}, skus=("BM.GPU.GB300.4", "a4x-maxgpu-4g-metal"), status="arm64 hosts",
    ),
    chip(
        "rubin", **_NVL72, source="surveys", memory_gb=288,
        memory_bw=est(22000, "NVIDIA's pages conflict: 22 or 19.2 TB/s"),
        peaks={"bf16": 4000, "fp8": 17500, "fp4": 35000},
        scale_up=est(1800, "NVIDIA's pages conflict: 3.6 or 3.0 TB/s both ways"), scale_out=est(1600),
        offered=False, status="ramping in the second half of 2026",
    ),
)  # fmt: skip
