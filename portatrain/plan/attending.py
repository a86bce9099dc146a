"""Name the kernels that run, price that of attention, and say on which chips precision fp8 has one: ask the table of
kernels that the backends ask."""

from __future__ import annotations

from dataclasses import replace

from portatrain.backends import fp8_chips
from portatrain.backends.choose_kernel import first, fp8_refusal
from portatrain.backends.kernels import Case, Kernel, Site
from portatrain.errors import UserError
from portatrain.model.attention_rules import head_share
from portatrain.plan.clusters.chip import Chip
from portatrain.plan.clusters.gpu_devices import AMD_DEVICES, DEVICES
from portatrain.plan.cost.policy import Precision, Tuning
from portatrain.plan.cost.shapes import ModelShape
from portatrain.plan.cost.tensors import Sizes
from portatrain.plan.cost.workload import CONTEXT, EXPERT, TENSOR


def kernel_of(shape: ModelShape, mesh: Sizes, rows: int, precision: Precision, tuning: Tuning) -> Kernel | None:
    """Return the kernel that runs attention in a microbatch of `rows` samples a device; None without attention."""
    if not shape.heads:
        return None
    key = ("kernel", mesh[CONTEXT], mesh[TENSOR], rows, precision.compute, tuning.backend, tuning.device)
    if key not in shape.memo:
        shape.memo[key] = first("attention", _case(shape, mesh, rows, precision, tuning))
    found: Kernel = shape.memo[key]
    return found


def name_of(shape: ModelShape, mesh: Sizes, rows: int, precision: Precision, tuning: Tuning) -> str:
    """Return the name of `kernel_of`; an empty text without attention."""
    kernel = kernel_of(shape, mesh, rows, precision, tuning)
    return kernel.name if kernel else ""


def grouped_name_of(shape: ModelShape, mesh: Sizes, rows: int, precision: Precision, tuning: Tuning) -> str:
    """Return the name of the kernel that runs the grouped matmuls of experts, in a microbatch of `rows` samples a
    device, as many rows as there are on average; an empty text without experts."""
    if not shape.experts:
        return ""
    key = ("grouped", mesh, rows, precision.compute, tuning.backend, tuning.device)
    if key not in shape.memo:
        tokens = rows * -(-shape.seq_len // mesh[CONTEXT])
        experts, hidden = max(1, shape.experts // mesh[EXPERT]), max(1, shape.mlp // mesh[TENSOR])
        site = Site(backend=tuning.backend, device=tuning.device)
        sizes = (tokens * shape.experts_per_token, shape.embed, hidden, experts)
        shape.memo[key] = first("grouped_matmul", Case(site=site, dtype=_dtype(precision), shape=sizes)).name
    found: str = shape.memo[key]
    return found


def formats_of(chip: Chip) -> str:
    """Return the formats of a chip's 8-bit matmuls, a word of `fp8_chips`; '' if it has none.

    A chip that is neither a TPU nor in the list of GPUs has those of `model/fp8.py` if its rate is higher for fp8 than
    for bf16.
    """
    if chip.jax_kind:
        return fp8_chips.of_tpu(chip.jax_kind)
    if chip.name in DEVICES:
        major, minor = DEVICES[chip.name].capability
        return fp8_chips.of_nvidia(f"{major}.{minor}")
    if chip.name in AMD_DEVICES:
        return fp8_chips.of_amd(AMD_DEVICES[chip.name].isa)
    faster = {"fp8", "bf16"} <= chip.peaks.keys() and chip.peaks["fp8"].value > chip.peaks["bf16"].value
    return fp8_chips.OCP if faster else ""


def refusal(chip: Chip, precision: Precision, tuning: Tuning) -> UserError | None:
    """Return the error if no kernel on the chip computes the matmuls of a precision, else None."""
    if precision.peak != "fp8":
        return None
    return fp8_refusal(Site(backend=tuning.backend, device=tuning.device, formats=formats_of(chip)), chip.name)


def _dtype(precision: Precision) -> str:
    return "float32" if precision.compute == 4 else "bfloat16"


def priced(tuning: Tuning, shape: ModelShape, mesh: Sizes, rows: int, precision: Precision) -> Tuning:
    """Return `tuning` with what the kernel of attention does with its scores, and with how rows travel to experts."""
    if shape.experts:
        tuning = replace(tuning, whole_rows=True, room=tuning.backend == "jax")
    kernel = kernel_of(shape, mesh, rows, precision, tuning)
    if kernel is None:
        return tuning
    does = kernel.scores
    # On jax, queries are exchanged for kernels that compute on the arrays of one device: plain operations compute all
    # pairs on every device. torch-xla never exchanges them.
    balances = tuning.backend == "torch" or kernel.per_device
    block = does.block(-(-shape.seq_len // mesh[CONTEXT]))
    return replace(tuning, scores=does.kept, mask=does.mask, skips_masked=does.skips, block=block, balances=balances)


def _case(shape: ModelShape, mesh: Sizes, rows: int, precision: Precision, tuning: Tuning) -> Case:
    tensor, context = mesh[TENSOR], mesh[CONTEXT]
    kv = shape.kv_heads if shape.mla is None else shape.heads
    share = head_share(shape.heads, kv, tensor)
    queries, odd = divmod(shape.seq_len, context)
    sizes = (rows, queries + bool(odd), shape.seq_len, max(1, shape.heads // tensor), share or kv, shape.key_size)
    uneven = {"uneven": odd, "uneven-heads": tuning.backend == "jax" and not share}
    traits = shape.attention | {trait for trait, there in uneven.items() if there}
    site = Site(backend=tuning.backend, device=tuning.device)
    return Case(site=site, dtype=_dtype(precision), shape=sizes, traits=traits)
