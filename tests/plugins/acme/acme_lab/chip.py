"""The lab's chip, for the planner."""

from portatrain.plan.clusters.chip import chip

CHIP = chip(
    "acme-one",
    vendor="acme",
    kind="single",
    stack="acme",
    backend="acme",
    source="user",
    price_source="user",
    memory_gib=64,
    memory_bw=1000,
    peaks={"bf16": 200, "fp32": 100},
    scale_up=10,
    chips_per_host=4,
)
