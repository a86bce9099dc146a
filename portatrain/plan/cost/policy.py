"""Define the choices of a plan besides the mesh, and the constants of each software stack.

The constants come from the documented behaviour of each part, before any comparison; none is fitted. The only fitted
number is the efficiency factor (``portatrain.plan.cost.efficiency``).
"""

from __future__ import annotations

from dataclasses import dataclass

from portatrain.model.remat import POLICIES


@dataclass(frozen=True, kw_only=True)
class Remat:
    """Say what a layer keeps from forward to backward besides its input, as shares from 0 to 1. All else is recomputed.

    ``normed``: the inputs of attention and feed-forward after their norms. ``qkv``: queries, keys and values.
    ``attention``: the result of attention. ``projected``: its output projection. ``hidden``: gate and up. ``product``:
    their product. ``offload``: the share of all kept values that is in host memory (its traffic is assumed hidden).
    ``everything``: nothing is recomputed, and a layer keeps whatever its framework needs for the backward pass, which
    is more. ``matmuls``: values are chosen by kind of operation: the results of all matmuls of weights.
    """

    name: str
    normed: float = 0.0
    qkv: float = 0.0
    attention: float = 0.0
    projected: float = 0.0
    hidden: float = 0.0
    product: float = 0.0
    offload: float = 0.0
    everything: bool = False
    matmuls: bool = False


REMATS = {
    p.name: Remat(name=p.name, everything=p.keeps_all, matmuls=p.dots, **dict.fromkeys(p.names, 1.0))
    for p in POLICIES.values()
}
"""The policies of `portatrain.model.remat`. The last projection of a block is never recomputed, because nothing in the
backward pass needs its result."""


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Bytes per number. ``peak``: the matmul precision in the catalog. ``slots``: a factor on fp32 optimizer
    state."""

    name: str
    peak: str
    param: float
    compute: float
    grad: float
    slots: float = 1.0


PRECISIONS = {
    p.name: p
    for p in (
        Precision(name="fp32", peak="fp32", param=4, compute=4, grad=4),
        Precision(name="bf16", peak="bf16", param=4, compute=2, grad=4),
        # Weights and moments in bf16; gradients are summed in fp32.
        Precision(name="bf16-state", peak="bf16", param=2, compute=2, grad=4, slots=0.5),
        # As others publish it: bf16 weights with fp32 Adam, 10 bytes per parameter, and bf16 gradients.
        Precision(name="bf16-weights", peak="bf16", param=2, compute=2, grad=2),
        # Matmuls in fp8; weights, moments and everything that is kept as with bf16.
        Precision(name="fp8", peak="fp8", param=4, compute=2, grad=4),
    )
}

FP32_SHARE = {"nvidia": 0.5, "google": 1 / 6, "amd": 0.125}
"""The fp32 matmul rate over the bf16 rate for chips without an entry in the catalog: TF32 on NVIDIA, six bf16 passes
on TPUs, fp32 matrix cores on AMD. Estimates."""


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How a software stack uses time and memory.

    ``hide_*``: the largest share of a collective that runs behind computation. ``runtime_bytes``: memory of the runtime
    on a device before the first tensor. ``keeps_ends``: the gathered embedding and output projection live through the
    whole step (FSDP2's root group). ``twice_grads``: with accumulation, a microbatch's gradients exist beside their sum
    (XLA) and are not added in place (torch).
    ``static``: XLA plans memory ahead. It casts weights once for all layers, makes gradients of layers only after the
    loss, runs attention in chunks of queries, and gathers only the output projection outside of layers.
    ``backend``, ``device``: where operations run, as the table of kernels names it.
    ``scores``: where attention's scores lie ('on-chip', 'chunk' or 'whole'); ``mask``: it reads a mask of numbers;
    ``skips_masked``: it skips what a causal mask hides, in whole blocks of ``block`` queries. ``balances``: over
    context, every device exchanges half of its queries (``model/context_chunks.py``), and leaves out the keys that
    no query of a chunk sees. `portatrain.plan.attending` takes these five from the kernel that runs.
    ``whole_rows``: rows travel to experts with all their features, between devices of equal index along tensor, and
    what tensor sums is a row for each token, not for each pair of a token and an expert; what travelled is not kept by
    any policy but ``none``. ``room``: shapes are static, so buffers of experts have room for the rows of all devices of
    the expert axis. `portatrain.plan.attending` sets both, as the backends of portatrain do it.
    ``boundary``: rows that a grouped matmul multiplies in vain for each expert: where one expert's rows end inside of a
    tile, the tile is computed for both of its experts. ``all_experts``: a grouped matmul multiplies every row of its
    buffer with every expert of the device, and keeps one of the products (XLA on GPUs, of ``ragged_dot``).
    ``sorting``: how often the copies of tokens that experts get would go through memory, forward, in the time that it
    takes to sort them and to bring them back (see `SORTING`).
    ``scores_passes``: how often scores that are not on the chip go through its memory, forward and backward.
    """

    hide_fsdp: float = 0.9
    hide_replica: float = 0.9
    hide_tensor: float = 0.0
    hide_context: float = 0.5
    hide_expert: float = 0.0
    runtime_bytes: float = 1.5 * 2**30
    keeps_ends: bool = True
    twice_grads: bool = False
    backend: str = "torch"
    device: str = "cuda"
    scores: str = "on-chip"
    mask: bool = False
    skips_masked: bool = True
    block: int = 1
    balances: bool = True
    whole_rows: bool = False
    room: bool = False
    scores_passes: tuple[float, float] = (4.0, 7.0)
    static: bool = False
    fragmentation: float = 0.03
    boundary: int = 64
    all_experts: bool = False
    sorting: float = 4.0


SORTING = {"core": 45.4, "sparsecore": 15.3}
"""`Tuning.sorting` on a TPU, by the cores that gather rows, both fitted by `benchmarks.plan_published`. libtpu 0.0.52
gathers on SparseCores; its programs alone would be 7 to 8, if they moved bytes as fast as other operations do."""

TUNING = {
    # XLA splits a matmul so that its collective runs beside it ("collective matmul"), and allocates statically.
    "jax-tpu": Tuning(
        backend="jax",
        device="tpu",
        hide_tensor=0.5,
        hide_expert=0.3,
        runtime_bytes=0.0,
        keeps_ends=False,
        twice_grads=True,
        static=True,
        fragmentation=0.0,
        boundary=512,
        sorting=SORTING["sparsecore"],
    ),
    "torch-cuda": Tuning(),
    # The jax backend on NVIDIA and AMD, as XLA compiles it; a plan does not choose it there.
    "jax-gpu": Tuning(
        backend="jax",
        keeps_ends=False,
        runtime_bytes=0.0,
        twice_grads=True,
        static=True,
        fragmentation=0.0,
        all_experts=True,
    ),
    "torch-rocm": Tuning(),
    "neuron": Tuning(
        backend="torch-xla",
        device="neuron",
        runtime_bytes=1.0 * 2**30,
        keeps_ends=False,
        twice_grads=True,
        static=True,
        fragmentation=0.0,
    ),
    "hpu": Tuning(device="hpu"),
    "cann": Tuning(device="npu"),
    "mlx": Tuning(device="mps", runtime_bytes=8.0 * 2**30),
    "cpu": Tuning(
        backend="jax",
        device="cpu",
        scores_passes=(0.0, 0.0),  # most stay in its caches; its efficiency factor was measured with the others
        hide_fsdp=0.0,
        hide_replica=0.0,
        hide_context=0.0,
        runtime_bytes=0.3 * 2**30,
        keeps_ends=False,
        twice_grads=True,
        static=True,
        fragmentation=0.0,
    ),
}

ATTENTION_SHARE = 0.75
"""The rate of a fused attention kernel over the rate of matmuls."""

ATTENTION_BACKWARD = 2.5
"""FLOPs of attention's backward pass over its forward pass: five matmuls (scores again) against two."""

EXACT_PASSES = 6.0
"""Passes of a matrix unit for a product of float32 operands under bf16, as XLA computes it on TPUs. GPUs without TF32
take more; an estimate there."""

MEMORY_SHARE = 0.85
"""The share of the nominal memory bandwidth that streaming kernels reach."""

LOGITS_CHUNK_BYTES = 64 * 2**20
"""The largest size of a chunk of fp32 logits in the loss."""

SCORES_CHUNK_BYTES = 256 * 2**20
"""The largest size of a chunk of fp32 scores in XLA's attention."""

SCORES_COPIES = 3.5
"""Copies of the scores that exist at once in a chunk's backward pass: scores, weights (also in bf16), gradient."""

LOGITS_COPIES = 3
"""Copies of the logits that exist at once: logits, their exponentials, their gradient."""

STATIC_LOGITS_COPIES = 2
"""Copies of the logits that exist at once if XLA fuses the exponentials into their uses."""

LOGITS_PASSES = 6
"""The number of times that an fp32 logit is read or written."""


def tuning_of(stack: str) -> Tuning:
    """Return how a software stack runs a step; the defaults for the stack of a chip from another package."""
    return TUNING.get(stack, Tuning())
