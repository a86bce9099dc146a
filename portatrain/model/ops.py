"""The vocabulary in which models are written: `Ops`, a Protocol that every backend implements.

Legend of shapes: B batch (samples), S query positions, T key positions, E embed, H heads, K kv_heads, D head_dim,
V vocab, N layers; `...` any leading axes.

Rules that hold for every operation:

- **Arrays are the framework's own.** Arithmetic (`+ - * / **`), comparisons, indexing and slices, `.reshape`,
  `.shape` (not of the batch axis: use -1), and `.ndim` are used as they are. A parameter that enters plain
  arithmetic goes through `ops.weight` first; operations take parameters directly.
- **Semantics are global, storage is not.** An operation means what it says on the whole batch and the whole
  sequence, wherever they lie. A model never reads the batch size and never reduces over batch or seq but through
  `ops.sum` and `ops.mean` with `over=`.
- **Precision.** Under 'fp32' all is float32. Under 'bf16' parameters enter as bfloat16, contractions take bfloat16 and
  accumulate in float32, results are bfloat16; norms, softmax, rotations, losses and reductions compute in float32.
- **No Python number that changes from step to step**: `ops.step`, `ops.layer` and `ops.sample` are integer arrays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from portatrain.errors import UserError
from portatrain.model.ops_arrays import ArrayOps
from portatrain.model.rope import RopeScaling

Array = Any
"""A jax.Array, a torch.Tensor or a numpy.ndarray, according to the backend."""

REDUCTIONS = ("mean", "sum", "max")


@dataclass(frozen=True)
class Loss:
    """What a model returns: `sum` is differentiable, the rest describes it.

    sum: () float32, the loss summed over all that it covers. The trainer divides by the summed weight of the
    global batch, so neither data parallelism nor accumulation changes the result.
    weight_B: (B,) float32, what each sample counts (its number of targets). loss_B: (B,) float32, each sample's
    share of `sum`, without gradient.
    """

    sum: Array
    weight_B: Array
    loss_B: Array


@dataclass(frozen=True)
class Aux:
    """A value recorded by `ops.aux`: `value_B` combined over `count` contributions (layers, calls)."""

    value_B: Array
    count: int
    reduce: str
    loss: float

    def join(self, name: str, other: Aux, maximum: Any) -> Aux:
        if (self.reduce, self.loss) != (other.reduce, other.loss):
            raise UserError(
                f"ops.aux({name!r})",
                expected=f"the same reduce and loss in every call: {self.reduce!r}, {self.loss}",
                got=f"{other.reduce!r}, {other.loss}",
                do="Use another name.",
            )
        both = maximum if self.reduce == "max" else (lambda a, b: a + b)
        return Aux(both(self.value_B, other.value_B), self.count + other.count, self.reduce, self.loss)


class Ops(ArrayOps, Protocol):
    """The operations. Each backend is one small class of them; `backends/reference` in NumPy float64 is the oracle."""

    training: bool
    """True while gradients are wanted: dropout is active."""
    step: Array
    """() int32: the optimizer step, from 1."""
    layer: Array
    """() int32: the index in the Stack (nested: row-major over all of them), 0 outside."""
    sample: Array
    """(B, 2) int32: low and high word of each sample's index n in the fixed sequence of samples."""

    # ---- parameters and contractions

    def weight(self, p: Array) -> Array:
        """A parameter or State as a plain array: parameters in the compute dtype, States as they are."""
        ...

    def einsum(self, spec: str, *operands: Array, dtype: str | None = None) -> Array:
        """`numpy.einsum` of one to three operands, explicit form ("bse,ehd->bshd"), lower-case letters.

        Operands are taken in the compute dtype and accumulated in float32. The result has the compute dtype, or
        `dtype='float32'` where rounding it would hurt (router logits).
        """
        ...

    def embed(self, table_VE: Array, ids: Array) -> Array:
        """Rows of a table: (..., E) for ids of shape (...), integers in [0, V)."""
        ...

    def bias(self, x: Array, p: Array) -> Array:
        """x + p, p having the last axes of x: (B, S, H, D) and (H, D). In x's dtype; the gradient of p, a sum over
        many rows, is made in float32."""
        ...

    # ---- normalisation, position, attention

    def rms_norm(self, x: Array, scale: Array | None = None, *, eps: float = 1e-6) -> Array:
        """x / sqrt(mean(x^2) + eps) * scale over the last axis, in float32, result in x's dtype
        (Zhang and Sennrich 2019, eq. 4)."""
        ...

    def layer_norm(
        self, x: Array, scale: Array | None = None, bias: Array | None = None, *, eps: float = 1e-6
    ) -> Array:
        """(x - mean) / sqrt(var + eps) * scale + bias over the last axis, biased variance, in float32
        (Ba, Kiros and Hinton 2016, eq. 4)."""
        ...

    def rope_table(
        self, positions: Array, head_dim: int, *, theta: float = 10000.0, scaling: RopeScaling | None = None
    ) -> tuple[Array, Array]:
        """(cos, sin), each positions.shape + (head_dim/2,), float32: angles positions * theta^(-2i/head_dim).

        The frequencies, stretched by `scaling` where it is given, are computed in float64 and rounded once; the product
        is float32. Make the table once, outside the Stack, and pass it in as a shared argument.
        """
        ...

    def rope(self, x_BSHD: Array, table: tuple[Array, Array]) -> Array:
        """Rotary position embedding (Su et al. 2021, section 3.2.2) in the half-split layout: with x1, x2 the halves
        of the last axis, (x1 cos - x2 sin, x2 cos + x1 sin). `table` is for positions (S,) or (B, S)."""
        ...

    def attention(
        self,
        q_BSHD: Array,
        k_BTKD: Array,
        v_BTKD: Array,
        *,
        causal: bool = True,
        window: int | None = None,
        segment_ids: Array | tuple[Array, Array] | None = None,
        positions: tuple[Array, Array] | None = None,
        softcap: float | None = None,
        scale: float | None = None,
    ) -> Array:
        """softmax(scale q k^T + mask) v, (B, S, H, D); head h reads kv head h // (H/K) (Ainslie et al. 2023).

        causal: a query sees keys at its own and earlier positions; window: of those, only the last `window`
        (itself counted; with causal=False, `window` to either side, itself counted). segment_ids: (B, S) integers,
        or a pair for queries (B, S) and keys (B, T): only equal ids see each other, and id 0 (padding) sees and is
        seen by id 0 alone. positions: a pair of (B, S) and (B, T) integers, or (S,) and (T,), in place of 0..S-1 and
        0..T-1 (key-value caches). softcap: scores become softcap * tanh(scores / softcap) before the mask. scale:
        D^-0.5 unless given. Softmax in float32. A query that may see nothing gets zeros.
        """
        ...

    # ---- elementwise and shape

    def dropout(self, x: Array, rate: float, *, site: int) -> Array:
        """x / (1 - rate) where kept, 0 elsewhere; x unchanged when not training or rate == 0. x is (B, ...).

        Kept or not is a hash in wrapping int32 arithmetic of (seed, step, site, layer, sample index, offset within
        the sample), so it is the same on any mesh, for any microbatch and in any framework (dropout_hash.py).
        `site` is the calling module's: `ops.dropout(x, self.rate, site=self.site)`.
        """
        ...

    def silu(self, x: Array) -> Array:
        """x * sigmoid(x)."""
        ...

    def gelu(self, x: Array, *, approximate: bool = False) -> Array:
        """x * Phi(x); with approximate the tanh form (Hendrycks and Gimpel 2016)."""
        ...

    def relu(self, x: Array) -> Array:
        """max(x, 0); the derivative at 0 is 0."""
        ...

    def sigmoid(self, x: Array) -> Array:
        """1 / (1 + exp(-x))."""
        ...

    def tanh(self, x: Array) -> Array:
        """Hyperbolic tangent."""
        ...

    def exp(self, x: Array) -> Array:
        """e^x."""
        ...

    def log(self, x: Array) -> Array:
        """Natural logarithm."""
        ...

    def softmax(self, x: Array, *, axis: int = -1) -> Array:
        """Softmax over one axis, computed in float32, result in x's dtype."""
        ...

    def where(self, condition: Array, x: Array, y: Array) -> Array:
        """x where condition holds, else y; broadcasts; x or y may be a Python number."""
        ...

    def concat(self, xs: Sequence[Array], *, axis: int) -> Array:
        """Join along an existing axis."""
        ...

    def cast(self, x: Array, dtype: str) -> Array:
        """x as 'float32', 'bfloat16', 'int32', 'bool' or 'compute' (the compute dtype)."""
        ...

    def arange(self, n: int) -> Array:
        """(n,) int32: 0, 1, ..., n-1."""
        ...

    def one_hot(self, ids: Array, n: int) -> Array:
        """ids.shape + (n,) float32: 1 at each id, 0 elsewhere. An id outside [0, n) gives zeros."""
        ...

    def top_k(self, x: Array, k: int) -> tuple[Array, Array]:
        """The k largest values over the last axis, descending, and their int32 indices; ties: lowest index first.
        A NaN counts as the largest."""
        ...

    def write(self, cache_BT: Array, value: Array, at: Array) -> Array:
        """A copy of a (B, T, ...) array with `value` (B, S, ...) written at positions at .. at+S-1 of axis 1;
        `at` is a () integer array. For key-value caches."""
        ...

    def sum(self, x: Array, axes: Sequence[str | None], *, over: Sequence[str]) -> Array:
        """Sum of x, whose dimensions have logical `axes`, over the axes named in `over`, in float32, over the whole
        global batch and sequence. The only reduction over batch or seq that a model may use."""
        ...

    def mean(self, x: Array, axes: Sequence[str | None], *, over: Sequence[str]) -> Array:
        """As `sum`, divided by the global number of elements reduced."""
        ...

    def stop_gradient(self, x: Array) -> Array:
        """x, with no gradient through it."""
        ...

    # ---- losses

    def cross_entropy(
        self,
        x: Array,
        table_VE: Array,
        targets: Array,
        *,
        mask: Array | None = None,
        z_loss: float = 0.0,
        softcap: float | None = None,
    ) -> Loss:
        """Softmax cross-entropy of logits x . table^T against integer targets, with no full array of logits.

        x: (B, E) or (B, S, E); table: (V, E) (an embedding's own table when tied); targets: (B,) or (B, S);
        mask: float, same shape, what each target counts. Per target: logsumexp(z) - z[target] + z_loss *
        logsumexp(z)^2 (Chowdhery et al. 2022, section 5), in float32, with z softcapped first if asked. Logits
        exist for one chunk of tokens at a time; the gradient is formed in the same pass, so nothing is computed twice.
        mask is given, not learned: no gradient flows into it.
        """
        ...

    def loss(self, loss_B: Array, weight_B: Array) -> Loss:
        """A `Loss` of your own from per-sample losses (B,), differentiable, and per-sample weights (B,)."""
        ...

    # ---- structure

    def shard(self, x: Array, *axes: str | None) -> Array:
        """x, laid out as the layout says for these logical axes (one per dimension, None: not split)."""
        ...

    def stack(self, stack: Any, carry: Any, shared: Sequence[Any], per_layer: Any) -> tuple[Any, Any]:
        """Run a `Stack`; see there. Models call the Stack itself."""
        ...

    def name(self, x: Array, name: str) -> Array:
        """x, named for remat policies that keep or recompute named activations."""
        ...

    def aux(self, name: str, value_B: Array, *, reduce: str = "mean", loss: float = 0.0) -> None:
        """Record a per-sample value (B,): a statistic in the step's metrics and, with `loss`, an auxiliary loss.

        Calls under one name (layers, sites) combine, and then samples of the global batch: 'mean' of all, 'sum' of
        all, or 'max'. With loss=c the training loss grows by c * (sum over calls of value_B), each sample weighted by
        its loss weight. Counted once where activations are recomputed.
        """
        ...

    def tally(self, module: Any, **values: Array) -> None:
        """Add to States of `module`, over all microbatches of a step: `ops.tally(self, load=counts_X)`. The values must
        be global already (through `ops.sum` with `over=`); no gradient flows. Only while training."""
        ...

    def update(self, module: Any, **values: Array) -> None:
        """In `after_step`: set States of `module`: `ops.update(self, bias=new_bias)`."""
        ...


def check_aux(name: str, value_B: Array, reduce: str) -> None:
    """Raise UserError unless an `ops.aux` call has the right form."""
    if reduce not in REDUCTIONS:
        raise UserError(
            f"ops.aux({name!r})", expected=f"reduce in {REDUCTIONS}", got=repr(reduce), do="Use one of those."
        )
    if getattr(value_B, "ndim", 0) != 1:
        raise UserError(
            f"ops.aux({name!r})",
            expected="one value a sample, shape (B,)",
            got=f"shape {tuple(getattr(value_B, 'shape', ()))}",
            do="Reduce over all axes but the batch, with x.mean(-1) on unsharded axes or ops.mean(..., over=('seq',)).",
        )


Batch = Mapping[str, Array]
