"""The table of kernels: the implementations of an operation, such as attention, and the cases that each covers.

An operation has one meaning (`model/ops.py`) and several implementations, its kernels. `choose_kernel.py` reads this
table from the top. A case consists of the backend, the kind of device, the dtype, the sizes on one device, the traits
of the call (mostly its mask) and the mesh. The last row of a backend is the operation written out, which covers every
case.

Another package adds rows by the entry-point group `portatrain.kernels`; they come before ours. No framework is imported
here: `Kernel.load` imports the implementation when it runs.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from portatrain.backends import fp8_chips
from portatrain.errors import UserError, choice
from portatrain.system.plugins import Registry

GROUP = "portatrain.kernels"
"""The entry-point group in which other packages register rows: each entry is a `Kernel` or a sequence of them."""
KERNELS_OF_OTHERS = Registry(kind="kernel", group=GROUP, ours={})
OPERATIONS = ("attention", "grouped_matmul", "fp8_matmul")
"""The operations with more than one implementation."""
TRIED = ("attention", "grouped_matmul")
"""The operations that the kernel court tries. Those of `fp8_matmul` have no gradients of their own:
`tests/contract/test_fp8.py` compares them with the oracle."""
SCORES_BYTES = 256 << 20
"""The largest size of the float32 scores of attention on a device at one time, on jax."""

FLEX_DEVICES = ("cuda", "xpu")
"""The kinds of devices for which torch compiles FlexAttention, by torch's names. A ROCm build says 'cuda' too."""

Named = tuple[tuple[str, str], ...]
"""(operation, kernel) of the kernels that were named explicitly."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where operations run. backend: 'jax', 'torch' (DeepSpeed too) or 'torch-xla'. device: the framework's
    name of the kind of device. mesh: the mesh as text, in the form that `Mesh` prints. formats: those of the chip's
    8-bit matmuls, a word of `fp8_chips`; '' if it has none."""

    backend: str
    device: str = "cpu"
    mesh: str = "1"
    formats: str = ""
    named: Named = ()

    @classmethod
    def of(cls, program: Any, *, backend: str, device: str, formats: str = "") -> Site:
        """Return the site of `program`; raise UserError if it names a kernel that `backend` does not have."""
        for operation, name in program.kernels:
            rows(operation, backend, name)
        mesh, named = str(program.layout.mesh), tuple(program.kernels)
        return cls(backend=backend, device=device, mesh=mesh, formats=formats, named=named)


@dataclass(frozen=True, kw_only=True)
class Case:
    """Everything that decides which kernel runs.

    shape: the sizes on one device; for attention (B, S, T, H, K, D), as `Ops.attention` names them; for a grouped
    matmul (N, E, F, X), for N rows and X experts; for an fp8 matmul (M, K, N), on jax those over all devices. traits:
    for a grouped matmul 'compiled', in a block that torch compiles; for an fp8 matmul 'row-scales' or 'tensor-scales';
    for attention, those of 'causal', 'window', 'segments', 'segment-pair' (queries and keys have segments of their
    own), 'positions', 'prefix', 'alibi',
    'softcap' and 'sinks' that the call has, 'value-size' if value heads are not of size D, and 'uneven' if the queries
    do not divide over the devices that hold them; on jax also 'cross' if there are not as many keys as queries,
    'uneven-batch' and 'uneven-heads'. A kernel that returns the log-sum-exp of the scores covers sinks by
    `out * sigmoid(lse - sinks)`.
    """

    site: Site
    dtype: str
    shape: tuple[int, ...]
    traits: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What becomes of the scores of attention, for the planner's price of a kernel.

    kept: 'on-chip' if the device's memory never holds them; 'chunk' if it holds those of some queries at a time (see
    `chunks`), 'whole' if it holds all. mask: whether the kernel reads a mask of as many numbers as there are scores of
    one head. skips: whether it leaves out what a causal mask hides. block: returns, for so many queries on a device,
    those of a block, if the kernel leaves out whole blocks only.
    """

    kept: str = "on-chip"
    mask: bool = False
    skips: bool = True
    block: Callable[[int], int] = lambda queries: 1


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A row of the table: an implementation of an operation, and the cases that it covers.

    scores: for attention, what the planner prices; by default a fused kernel that skips what is hidden.

    refuses: returns the reason why the implementation does not cover a case, or None if it covers it. where:
    'module:function' of the implementation. The function takes the arguments of the operation and, by keyword, those
    that the backend adds: `precision`, `shards` and `may_be_blind` on jax, `kept` on torch and torch-xla.
    per_device: the function, on jax, computes attention on the arrays of one device and runs under `jax.shard_map`. It
    gets `segment_ids` as a pair or None, and by keyword `precision`, `device`, `part` and `kept` (see
    `backends/jax/splash.py`).

    grouped_matmul: function(x_NE, w_XEF, *, sizes_X) returns (N, F). The rows of x are sorted by expert: sizes_X[i] of
    them, integers of 0 or more, are multiplied by w_XEF[i]. Rows past the sum of the sizes give zeros, and their
    gradient is zero, no matter what they hold. A sum in float32; the result has the dtype of x. The backend adds
    `precision` on jax, and nothing on torch.

    fp8_matmul: function(product, a, b, *, formats, dtype) returns the einsum of `product` (`model.fp8.Product`). a, b:
    pairs of float32 arrays: values over their scales, not rounded yet, with the axes of `product.a.term`, and
    scales, powers of two, with the axes of `product.a.left`. The values are rounded to `product.a.kind`, multiplied,
    added in float32, and multiplied by both scales; the result has the dtype `dtype`. formats: see `Site`.

    `python -m portatrain.testing.kernels NAME` tests an implementation.
    """

    operation: str
    name: str
    backends: tuple[str, ...]
    where: str
    refuses: Callable[[Case], str | None] = lambda case: None
    scores: Scores = Scores()
    per_device: bool = False

    def load(self) -> Callable[..., Any]:
        """Import and return the implementation."""
        return _loaded(self.where)


# ---- reasons


def chunks(rows: int, heads: int, queries: int, keys: int) -> int:
    """Return the number of chunks into which jax cuts the queries of attention. Sizes are those on one device. The
    number is the smallest that divides the queries and keeps the scores of a chunk within `SCORES_BYTES`."""
    for n in range(1, queries):
        if queries % n == 0 and 4 * rows * heads * (queries // n) * keys <= SCORES_BYTES:
            return n
    return max(queries, 1)


def _chunked_refuses(case: Case) -> str | None:
    b, s, t, h, _, _ = case.shape
    if "uneven" in case.traits:
        return "the queries do not divide over the devices that hold them"
    if chunks(b, h, s, t) == 1:
        return f"the scores of all queries fit in {SCORES_BYTES / 2**20:g} MiB"
    return None


LANES = 128
"""The width of a TPU's vector registers: splash attention pads head sizes and blocks to a multiple of it."""
SPLASH_BLOCK = 512
"""The largest number of queries, and of keys, in a block of splash attention. It is the size that MaxText takes by
default; no other was measured on a chip."""


def splash_block(n: int) -> int:
    """Return the number of positions in a block of `n`: the largest for which padding adds at most an eighth."""
    sizes = [size for size in range(SPLASH_BLOCK, 0, -LANES) if -n % size <= n // 8]
    return sizes[0] if sizes else LANES


_SPLASH_KNOWS = frozenset({"causal", "window", "segments", "softcap", "sinks", "value-size", "cross"})
_UNEVEN = {"uneven": "queries", "uneven-batch": "samples", "uneven-heads": "heads"}


def _splash_refuses(case: Case) -> str | None:
    _, s, t, _, _, d = case.shape
    if case.site.device != "tpu" and ("attention", "splash") not in case.site.named:
        return "it is a kernel for TPUs; elsewhere it must be named, and is interpreted, slowly"
    if case.dtype not in ("float32", "bfloat16"):
        return f"it computes in float32 and bfloat16, not in {case.dtype}"
    for trait, what in _UNEVEN.items():
        if trait in case.traits:
            return f"the {what} do not divide over the devices that hold them"
    if "segment-pair" in case.traits:
        return "a query may see no key if queries and keys have segments of their own"
    if more := case.traits - _SPLASH_KNOWS:
        return f"its mask knows no {' or '.join(sorted(more))}"
    if {"window", "cross"} <= case.traits:
        return "a query may see no key if queries and keys differ in number and there is a window"
    if min(s, t) < LANES:
        return f"{s} queries and {t} keys a device are fewer than a block of {LANES}"
    if d > (most := 256 if case.dtype == "float32" else 512):
        return f"blocks of head size {d} do not fit in a core's memory: at most {most} in {case.dtype}"
    return None


def _sdpa_refuses(case: Case) -> str | None:
    if "softcap" in case.traits:
        return "torch's kernels cannot soft-cap the scores"
    return "torch's kernels have no sinks" if "sinks" in case.traits else None


def _unmasked_refuses(case: Case) -> str | None:
    """Return why torch has no fused kernel of a call without a mask of numbers; it would compute all scores."""
    _, _, _, h, k, d = case.shape
    if case.site.device not in FLEX_DEVICES:
        return None
    if "value-size" in case.traits:
        return "torch's fused kernels take values of the size of keys"
    if d > 256:
        return f"torch's fused kernels take heads of at most 256, not {d}"
    if case.dtype == "float32" and h != k:
        return f"torch's fused kernel of float32 takes one head of keys for each head, not {k} for {h}"
    if case.dtype == "float32" and d % 4:
        return f"torch's fused kernel of float32 takes heads of a multiple of 4, not {d}"
    return None


def _sdpa_masked_refuses(case: Case) -> str | None:
    if reason := _sdpa_refuses(case):
        return reason
    if "alibi" in case.traits and case.dtype != "float32":
        return f"the bias of ALiBi would be rounded to {case.dtype}"
    if case.site.device in FLEX_DEVICES and case.shape[1] > 1:
        if case.traits - {"value-size"}:
            return f"its mask of numbers has {case.shape[1]} x {case.shape[2]} elements"
        return _unmasked_refuses(case)
    return None


def _sdpa_causal_refuses(case: Case) -> str | None:
    if reason := _sdpa_refuses(case):
        return reason
    if "causal" not in case.traits:
        return "the mask is not causal"
    if more := case.traits - {"causal", "value-size"}:
        return f"its mask is causal and knows no {' or '.join(sorted(more))}"
    if case.shape[1] != case.shape[2]:
        return f"{case.shape[1]} queries and {case.shape[2]} keys are not the same positions"
    return _unmasked_refuses(case)


def _flex_refuses(case: Case) -> str | None:
    if case.site.device == "cpu":
        return "FlexAttention has no backward pass on a CPU"
    if case.site.device not in FLEX_DEVICES:
        return f"it runs on {' and '.join(FLEX_DEVICES)}, not on {case.site.device}"
    if case.shape[1] == 1:
        return "one query needs no mask of blocks"
    if case.shape[5] < 16:
        return f"it takes heads of at least 16, not {case.shape[5]}"
    return None if case.shape[0] else "there are no rows"


def _grouped_mm_refuses(case: Case) -> str | None:
    _, e, f, x = case.shape
    if case.dtype == "float64":  # in which the gradients are computed that others are held to
        return "torch's kernel does not cover float64"
    if "compiled" in case.traits and case.dtype != "bfloat16":
        return "torch.compile traces torch's kernel in bfloat16 only"
    each = 16 // (4 if case.dtype == "float32" else 2)
    if e % each or f % each:
        return f"torch's kernel needs rows of a multiple of 16 bytes: {e} and {f} are not multiples of {each}"
    return None if case.shape[0] and x else "there are no rows"


def _8_bit_refuses(case: Case) -> str | None:
    return fp8_chips.refuses_8_bit(case.site.device, case.site.formats)


def _emulated_refuses(case: Case) -> str | None:
    return fp8_chips.refuses_emulation(case.site.device, ("fp8_matmul", "emulated") in case.site.named)


# ---- the table

TABLE: tuple[Kernel, ...] = (
    Kernel(
        operation="attention",
        name="splash",
        backends=("jax",),
        where="portatrain.backends.jax.splash:splash",
        refuses=_splash_refuses,
        scores=Scores(block=splash_block),
        per_device=True,
    ),
    Kernel(
        operation="attention",
        name="chunked",
        backends=("jax",),
        where="portatrain.backends.jax.attention:chunked",
        refuses=_chunked_refuses,
        scores=Scores(kept="chunk", skips=False),
    ),
    Kernel(
        operation="attention",
        name="sdpa-causal",
        backends=("torch",),
        where="portatrain.backends.torch.attention:sdpa_causal",
        refuses=_sdpa_causal_refuses,
    ),
    Kernel(
        operation="attention",
        name="sdpa-masked",
        backends=("torch",),
        where="portatrain.backends.torch.attention:sdpa_masked",
        refuses=_sdpa_masked_refuses,
        scores=Scores(mask=True, skips=False),
    ),
    Kernel(
        operation="attention",
        name="flex",
        backends=("torch",),
        where="portatrain.backends.torch.flex:flex",
        refuses=_flex_refuses,
    ),
    Kernel(
        operation="attention",
        name="written-out",
        backends=("jax",),
        where="portatrain.backends.jax.attention:written_out",
        scores=Scores(kept="whole", skips=False),
    ),
    Kernel(
        operation="attention",
        name="written-out",
        backends=("torch",),
        where="portatrain.backends.torch.attention:written_out",
        scores=Scores(kept="whole", mask=True, skips=False),
    ),
    Kernel(
        operation="attention",
        name="written-out",
        backends=("torch-xla",),
        where="portatrain.backends.torch_xla.attention:written_out",
        scores=Scores(kept="whole", mask=True, skips=False),
    ),
    Kernel(
        operation="grouped_matmul",
        name="ragged_dot",
        backends=("jax",),
        where="portatrain.backends.jax.grouped_matmul:ragged_dot",
    ),
    Kernel(
        operation="grouped_matmul",
        name="grouped_mm",
        backends=("torch",),
        where="portatrain.backends.torch.grouped_matmul:grouped_mm",
        refuses=_grouped_mm_refuses,
    ),
    Kernel(
        operation="grouped_matmul",
        name="written-out",
        backends=("jax",),
        where="portatrain.backends.jax.grouped_matmul:written_out",
    ),
    Kernel(
        operation="grouped_matmul",
        name="written-out",
        backends=("torch", "torch-xla"),
        where="portatrain.backends.torch.grouped_matmul:written_out",
    ),
    Kernel(
        operation="fp8_matmul",
        name="float8",
        backends=("jax",),
        where="portatrain.backends.jax.fp8:float8",
        refuses=_8_bit_refuses,
    ),
    Kernel(
        operation="fp8_matmul",
        name="scaled_mm",
        backends=("torch",),
        where="portatrain.backends.torch.fp8:scaled_mm",
        refuses=_8_bit_refuses,
    ),
    Kernel(
        operation="fp8_matmul",
        name="emulated",
        backends=("jax",),
        where="portatrain.backends.jax.fp8:emulated",
        refuses=_emulated_refuses,
    ),
    Kernel(
        operation="fp8_matmul",
        name="emulated",
        backends=("torch",),
        where="portatrain.backends.torch.fp8:emulated",
        refuses=_emulated_refuses,
    ),
)


@functools.cache
def _loaded(where: str) -> Callable[..., Any]:
    module, _, name = where.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


@functools.cache
def others() -> tuple[Kernel, ...]:
    """Return the rows that other packages register."""
    found: list[Kernel] = []
    for name in KERNELS_OF_OTHERS.names():
        made = KERNELS_OF_OTHERS.load(name)
        mine = tuple(made) if isinstance(made, Sequence) else (made,)
        for kernel in mine:
            if not isinstance(kernel, Kernel) or kernel.operation not in OPERATIONS:
                raise UserError(
                    f"kernel {name}",
                    expected=f"a portatrain.backends.kernels.Kernel of {', '.join(OPERATIONS)}",
                    got=repr(kernel)[:80],
                    do=f"Fix or remove the package that registers it under {GROUP}.",
                )
        found += mine
    return tuple(found)


def rows(operation: str, backend: str, name: str | None = None) -> tuple[Kernel, ...]:
    """Return the rows of `operation` on `backend`, in the order of the table; those called `name`, if it is given.
    Raises UserError if there are none."""
    if operation not in OPERATIONS:
        raise choice("operation of a kernel", operation, OPERATIONS)
    found = tuple(k for k in (*others(), *TABLE) if k.operation == operation and backend in k.backends)
    if name is None:
        return found
    named = tuple(k for k in found if k.name == name)
    if not named:
        raise choice(f"kernel of {operation} on {backend}", name, [k.name for k in found])
    return named
