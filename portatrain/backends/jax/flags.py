"""List XLA options by platform, with the purpose and the measurement of each.

The backend passes them when it compiles its own programs, so other JAX code in the process is not affected.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

OPTIONS: dict[str, dict[str, str]] = {
    # XLA's default matmul on CPUs (YNNPACK) adds products one after another: over 4096 tokens the gradient of a weight
    # is off by 1.4e-6 of its scale. This option selects Eigen, which adds in blocks: 2.8e-7, in 1.05 to 1.10 of the
    # time for such products and 0.57 to 0.99 for the others of a decoder (benchmarks/cpu_matmul.py; 2-core x86-64 VM).
    "cpu": {"xla_cpu_experimental_ynn_fusion_type": ""},
    # No option is set for accelerators: none has been measured there.
    "gpu": {},
    "tpu": {},
}


@functools.cache
def compiler_options(platform: str) -> dict[str, str]:
    """Return the options of `platform` that this version of XLA knows."""
    known = {}
    for name, value in OPTIONS.get(platform, {}).items():
        try:
            jax.jit(lambda x: x, compiler_options={name: value}).lower(jnp.float32(0)).compile()
        except Exception:  # an option of another version: XLA raises its own kinds of error
            continue
        known[name] = value
    return known
