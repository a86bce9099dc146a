"""AMD Instinct. A full mesh of point-to-point links: two chips of a group have one link, eight have seven each."""

from __future__ import annotations

from typing import Any

from portatrain.plan.clusters.chip import chip
from portatrain.plan.clusters.figures import cite, est

_OAM: dict[str, Any] = {
    "vendor": "amd",
    "kind": "mesh",
    "stack": "torch-rocm",
    "domain": 8,
    "chips_per_host": 8,
    "links": 7,
}

CHIPS = (
    chip(
        "mi250x",
        vendor="amd",
        kind="mesh",
        stack="torch-rocm",
        source="none",
        memory_gb=est(128),
        memory_bw=est(3277),
        peaks={"bf16": est(383, "the MI250, without X, has 362")},
        link=cite(50, "rocm"),
        scale_up=est(350, "a partial mesh, planned as a full one"),
        domain=est(4),
        chips_per_host=est(4),
        scale_out=est(200),
        power=cite(560, "pages"),
        devices_per_chip=2,
        die_to_die=est(200, "two dies in a package", source="none"),
    ),
    chip(
        "mi300x",
        **_OAM,
        source="primus",
        memory_gb=192,
        memory_bw=5300,
        peaks={"bf16": 1307, "fp8": 2614},
        link=64,
        scale_up=448,
        scale_out=400,
        power=cite(750, "primus semianalysis"),
        prices={"OCI": 6.0},
        skus=("Standard_ND96isr_MI300X_v5", "BM.GPU.MI300X.8"),
    ),
    chip(
        "mi325x",
        **_OAM,
        source="primus rocm",
        memory_gb=256,
        memory_bw=6000,
        peaks={"bf16": 1307, "fp8": 2614},
        link=64,
        scale_up=448,
        scale_out=400,
        power=est(1000),
    ),
    chip(
        "mi350x",
        **_OAM,
        source="primus pages",
        memory_gb=288,
        memory_bw=8000,
        peaks={"bf16": cite(2300, "pages", "8 % below MI355X"), "fp8": 4600, "fp4": 9200},
        link=76.8,
        scale_up=537.6,
        scale_out=400,
        power=1000,
    ),
    chip(
        "mi355x",
        **_OAM,
        source="surveys primus",
        memory_gb=288,
        memory_bw=8000,
        peaks={"bf16": 2500, "fp8": 5000, "fp4": 10100},
        link=76.8,
        scale_up=537.6,
        scale_out=400,
        power=1400,
        prices={"OCI": 8.60},
        skus=("BM.GPU.MI355X.8",),
    ),
)
