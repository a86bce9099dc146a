"""Show why the jax backend selects Eigen's matmul on CPUs: accuracy and time of XLA's two, on a decoder's products.

    python benchmarks/cpu_matmul.py

Prints, per product, the largest error over the scale of the result (against float64), and Eigen's time over
YNNPACK's: the median of paired rounds with its 95 % interval (order statistics).
"""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np

from portatrain.backends.jax.flags import OPTIONS

ROUNDS = 41
PRODUCTS = {
    "activations x weight": ("bse,ef->bsf", (16, 256, 128), (128, 384)),
    "gradient of a weight": ("bse,bsf->ef", (16, 256, 128), (16, 256, 384)),
    "attention scores": ("bshd,bthd->bhst", (16, 256, 4, 32), (16, 256, 4, 32)),
}


def main() -> None:
    rng = np.random.default_rng(0)
    for what, (spec, *shapes) in PRODUCTS.items():
        x, y = (rng.standard_normal(s).astype(np.float32) for s in shapes)
        exact = np.einsum(spec, x.astype(np.float64), y.astype(np.float64), optimize=True)
        default = jax.jit(lambda a, b, spec=spec: jnp.einsum(spec, a, b))
        eigen = jax.jit(lambda a, b, spec=spec: jnp.einsum(spec, a, b), compiler_options=OPTIONS["cpu"])
        errors = [float(np.abs(np.asarray(f(x, y)) - exact).max() / np.abs(exact).max()) for f in (default, eigen)]
        ratios = []
        for _ in range(ROUNDS):
            began = time.perf_counter()
            default(x, y).block_until_ready()
            middle = time.perf_counter()
            eigen(x, y).block_until_ready()
            ratios.append((time.perf_counter() - middle) / (middle - began))
        ratios.sort()
        low, high = ratios[13], ratios[27]  # ranks of the 95 % interval of a median of 41
        print(
            f"{what:22} error: default {errors[0]:.1e}, Eigen {errors[1]:.1e}; "
            f"time of Eigen over default {ratios[20]:.2f} [{low:.2f}, {high:.2f}]"
        )


if __name__ == "__main__":
    main()
