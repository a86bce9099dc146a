"""XLA options by platform, as data: what each is for, and what was measured.

They are passed to the compilation of our own programs, so nothing changes for other JAX code of the process.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

OPTIONS: dict[str, dict[str, str]] = {
    # XLA's default matmul on CPUs (YNNPACK) adds products one after another: over 4096 tokens a weight's gradient is
    # off by 1.4e-6 of its scale. Eigen, which this selects, adds in blocks: 2.8e-7, in 1.05 to 1.10 of the time for
    # such products and 0.57 to 0.99 for the other ones of a decoder (benchmarks/cpu_matmul.py; 2-core x86-64 VM).
    "cpu": {"xla_cpu_experimental_ynn_fusion_type": ""},
    # No option is set for accelerators: none has been measured there.
    "gpu": {},
    "tpu": {},
}


@functools.cache
def compiler_options(platform: str) -> dict[str, str]:
    """The options of `platform` that this version of XLA knows."""
    known = {}
    for name, value in OPTIONS.get(platform, {}).items():
        try:
            jax.jit(lambda x: x, compiler_options={name: value}).lower(jnp.float32(0)).compile()
        except Exception:  # an option of another version: XLA raises its own kinds of error
            continue
        known[name] = value
    return known
