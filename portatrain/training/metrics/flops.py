"""MFU: the FLOPs of a model by one convention, divided by the peak of the machine.

Convention (Chowdhery et al. 2022, PaLM, appendix B; Kaplan et al. 2020, section 2.1): a multiply and an
add are two FLOPs; a parameter that is contracted with each token costs 2 forward and 4 backward; the
scores and the weighted sum of attention cost 12 x layers x heads x head_dim x seq a token, of which
a causal model needs half. Recomputation, norms, softmax and embedding look-ups do not count, so
MFU compares implementations of one model and cannot exceed 1. The config of a model gives its FLOPs
(``flops_per_sample``); without this method there is no MFU.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The FLOPs a second to which MFU is relative, and the source of the figure."""

    flops_per_s: float
    source: str


@functools.cache
def measured_cpu_peak(*, budget_s: float = 0.5, size: int = 1024) -> Peak:
    """Measure for about ``budget_s`` the fastest float32 matrix product of ``size`` by NumPy on this machine.

    No data sheet gives the sustained rate of a CPU, and its cores may be shared. So this is a measurement of the
    machine at this moment, with the threads of NumPy's BLAS, and the record calls it so. A process measures once:
    all its attempts run on one machine.
    """
    import numpy as np

    a = np.full((size, size), 0.5, np.float32)
    out = np.empty_like(a)
    np.matmul(a, a, out=out)  # starts the threads
    best_s, end_s = float("inf"), time.perf_counter() + budget_s
    while (began_s := time.perf_counter()) < end_s:
        np.matmul(a, a, out=out)
        best_s = min(best_s, time.perf_counter() - began_s)
    return Peak(
        flops_per_s=2.0 * size**3 / best_s,
        source=f"measured at start: NumPy float32 matmul of {size} x {size} on this CPU",
    )


def mfu(*, flops: float | None, seconds: float, peak: Peak | None) -> float | None:
    """Model FLOPs utilisation, a fraction: ``flops`` done in ``seconds``, over the peak; None if either is unknown."""
    if flops is None or peak is None or seconds <= 0:
        return None
    return flops / seconds / peak.flops_per_s
