"""Microsoft Maia, Meta MTIA, Moore Threads, MetaX and Hygon: what is published of them.

A figure that no source gives is left out. If a plan needs such a figure, ``unpublished`` names it, and the chip is not
planned. No chip of this page is proposed to a user.
"""

from __future__ import annotations

from typing import Any

from portatrain.plan.clusters.chip import chip
from portatrain.plan.clusters.figures import cite, est

_NETWORK = "the network between chips"
_HALVED = "the published figure is taken as both directions and halved"
_MTHREADS: dict[str, Any] = {"vendor": "moore-threads", "stack": "musa", "kind": "mesh", "offered": False}

CHIPS = (
    chip(
        "maia100",
        vendor="microsoft",
        kind="single",
        stack="maia",
        source="maia100",
        memory_gb=64,
        memory_bw=1800,
        peaks={"bf16": 800},
        scale_out=cite(4800, "maia100", "12 ports of 400 Gbit/s"),
        power=cite(500, "maia100", "as provisioned; it is designed for 700"),
        offered=False,
        status="not for sale, and only inside Azure",
    ),
    chip(
        "maia200",
        vendor="microsoft",
        kind="switched",
        stack="maia",
        source="maia200",
        memory_gb=216,
        memory_bw=7000,
        peaks={"fp8": cite(5000, "maia200", "published as more than 5"), "fp4": cite(10000, "maia200", "more than 10")},
        scale_up=est(1400, _HALVED),
        power=750,
        offered=False,
        unpublished=("its bf16 peak",),
        status="made for inference; not for sale, and only inside Azure",
    ),
    chip(
        "mtia2",
        vendor="meta",
        kind="single",
        stack="mtia",
        source="mtia2",
        aliases=("mtia-v2",),
        memory_gb=128,
        memory_bw=204.8,
        peaks={"bf16": 177, "int8": 354},
        power=90,
        offered=False,
        unpublished=(_NETWORK,),
        status="not for sale, and only inside Meta",
    ),
    chip(
        "mtt-s4000",
        **_MTHREADS,
        source="mthreads",
        memory_gb=48,
        memory_bw=768,
        peaks={"bf16": cite(100, "mthreads", "98 in a later table")},
        link=est(120 / 7, "a seventh of the chip's rate", source="derived"),
        scale_up=est(120, _HALVED),
        domain=8,
        chips_per_host=8,
        power=450,
        status="the network between hosts is not published, so that only one host is planned",
    ),
    chip(
        "mtt-s5000",
        **_MTHREADS,
        source="mthreads domestic",
        memory_gb=80,
        memory_bw=1600,
        peaks={"fp8": cite(1000, "mthreads domestic", "published without a precision; the press reads it as fp8")},
        link=est(56, "a seventh of the chip's rate", source="derived"),
        scale_up=est(392, _HALVED),
        domain=8,
        chips_per_host=8,
        unpublished=("its bf16 peak", "the network between hosts"),
    ),
    chip(
        "metax-c500",
        vendor="metax",
        kind="single",
        stack="maca",
        source="domestic",
        aliases=("c500",),
        memory_gb=64,
        peaks={"bf16": 280, "int8": 560},
        offered=False,
        unpublished=("its memory bandwidth", _NETWORK),
        status="of its successor C550 no figure is published",
    ),
    chip(
        "metax-c600",
        vendor="metax",
        kind="single",
        stack="maca",
        source="surveys",
        aliases=("c600",),
        memory_gb=144,
        peaks={"fp8": est(1000)},
        offered=False,
        unpublished=("its memory bandwidth", "its bf16 peak", _NETWORK),
    ),
    chip(
        "hygon-k100",
        vendor="hygon",
        kind="single",
        stack="dtk",
        source="surveys",
        aliases=("k100-ai",),
        memory_gb=64,
        peaks={},
        offered=False,
        unpublished=("its memory bandwidth", "its bf16 peak", _NETWORK),
    ),
    chip(
        "hygon-bw1000",
        vendor="hygon",
        kind="single",
        stack="dtk",
        source="domestic",
        aliases=("bw1000",),
        memory_gb=64,
        memory_bw=1600,
        peaks={"fp16": est(480, "a cloud's figure; others differ, and Hygon publishes none")},
        power=est(300, "a cloud's figure"),
        offered=False,
        unpublished=("its bf16 peak", _NETWORK),
    ),
)
