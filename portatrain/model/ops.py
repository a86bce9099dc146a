"""The operations that models are written with: `Ops`, a Protocol that every backend implements.

Shape letters: B batch (samples), S query positions, T key positions, E embed, H heads, K kv_heads, D head_dim, V vocab,
N layers; `...` stands for any leading axes.

These rules hold for every operation:

- **Arrays belong to the framework** (jax.Array, torch.Tensor, numpy.ndarray). A model may use arithmetic
  (`+ - * / **`), comparisons, indexing and slices, `.reshape`, `.ndim`, and `.shape` except for the batch axis (write
  -1 instead). Pass a parameter through `ops.weight` before plain arithmetic; operations take parameters directly.
- **Operations act on the global batch and the whole sequence**, however these are sharded. A model never reads the
  batch size, and reduces over batch or seq only through `ops.sum` and `ops.mean` with `over=`.
- **Precision.** Under 'fp32' everything is float32. Under 'bf16' and 'bf16-state' the compute dtype is bfloat16:
  parameters are cast to bfloat16 before use, and contractions take bfloat16, accumulate in float32 and return bfloat16.
  Norms, softmax, rotations, losses and reductions compute in float32. Elementwise operations keep the dtype of x.
- **A Python number must not change from step to step**, since it would be compiled in: `ops.step`, `ops.layer` and
  `ops.sample` are integer arrays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from portatrain.model.ops_arrays import ArrayOps
from portatrain.model.ops_experts import ExpertOps
from portatrain.model.ops_results import REDUCTIONS as REDUCTIONS
from portatrain.model.ops_results import Array as Array
from portatrain.model.ops_results import Aux as Aux
from portatrain.model.ops_results import Loss as Loss
from portatrain.model.ops_results import check_aux as check_aux
from portatrain.model.ops_results import check_layer as check_layer
from portatrain.model.ops_results import check_samples as check_samples
from portatrain.model.ops_structure import StructureOps
from portatrain.model.rope import Scaling


class Ops(ArrayOps, ExpertOps, StructureOps, Protocol):
    """The operations of a model. Each backend implements them in one class.

    `portatrain.backends.reference.ReferenceOps` implements them in NumPy float64; tests compare every backend with it.
    """

    training: bool
    """True while gradients are computed; dropout is active only then."""
    step: Array
    """() int32: the optimizer step, counted from 1."""
    layer: Array
    """() int32: the layer's index in its Stack, from 0 (row-major for nested Stacks); 0 outside a Stack."""
    sample: Array
    """(B, 2) int32: the low and the high word of each sample's index in the run's sequence of samples."""

    # ---- parameters and contractions

    def weight(self, p: Array) -> Array:
        """Return a parameter or a State as a plain array, for use in arithmetic.

        Shape: that of the Param or State. dtype: the compute dtype for a parameter, its own dtype for a State.
        bf16: the parameter is cast to bfloat16. Raises UserError for a weight with LoRA factors.
        Example: `y_BSE = x_BSE * ops.weight(self.gain)`
        """
        ...

    def einsum(self, spec: str, *operands: Array, dtype: str | None = None) -> Array:
        """Contract one to three operands, as `numpy.einsum` does with an explicit output.

        spec: lower-case letters with '->', such as "bse,ehd->bshd". The result has the compute dtype; `dtype='float32'`
        keeps the float32 sum, for values that rounding would harm (router logits). `dtype='exact'` is the same for
        operands that rounding would harm too, such as the inverse of a matrix: they are not cast to the compute dtype.
        bf16: operands are cast to bfloat16, products are summed in float32, the result is bfloat16; with 'exact',
        activations stay float32, which costs several passes of a matrix unit.
        Example: `q_BSHD = ops.einsum("bse,ehd->bshd", x_BSE, self.wq)`
        """
        ...

    def embed(self, table_VE: Array, ids: Array) -> Array:
        """Look up rows of a table.

        table_VE: (V, E); ids: (...) integers in [0, V). Returns (..., E) in the compute dtype.
        bf16: the rows are bfloat16. The gradient adds all rows with the same id.
        Example: `x_BSE = ops.embed(self.table, tokens_BS)`
        """
        ...

    def bias(self, x: Array, p: Array) -> Array:
        """Return x + p, with p broadcast over the leading axes of x.

        x: (B, ..., *p.shape). Returns the shape and dtype of x.
        bf16: the sum is computed in float32 and rounded to bfloat16; the gradient of p is summed in float32.
        Example: `q_BSHD = ops.bias(q_BSHD, self.q_bias)` with q_bias (H, D)
        """
        ...

    # ---- normalisation, position, attention

    def rms_norm(self, x: Array, scale: Array | None = None, *, eps: float = 1e-6) -> Array:
        """Return x / sqrt(mean(x^2) + eps) * scale over the last axis (Zhang and Sennrich 2019, eq. 4).

        x: (..., E); scale: (E,) or None for 1. Returns the shape and dtype of x.
        bf16: computed in float32, rounded once at the end.
        Example: `y_BSE = ops.rms_norm(x_BSE, self.scale)`
        """
        ...

    def layer_norm(
        self, x: Array, scale: Array | None = None, bias: Array | None = None, *, eps: float = 1e-6
    ) -> Array:
        """Return (x - mean) / sqrt(var + eps) * scale + bias over the last axis (Ba, Kiros and Hinton 2016, eq. 4).

        x: (..., E); scale, bias: (E,) or None for 1 and 0; var divides by E. Returns the shape and dtype of x.
        bf16: computed in float32, rounded once at the end.
        Example: `y_BSE = ops.layer_norm(x_BSE, self.scale, self.bias)`
        """
        ...

    def rope_table(
        self, positions: Array, head_dim: int, *, theta: float = 10000.0, scaling: Scaling | None = None
    ) -> tuple[Array, Array]:
        """Return (cos, sin) of the rotary angles positions * theta^(-2i/head_dim), for i below head_dim/2.

        positions: (S,) or (B, S) integers. Returns two arrays of positions.shape + (head_dim/2,), float32.
        The frequencies are computed in float64, stretched by `scaling` if given, and rounded once to float32. A scaling
        that depends on the length of the text takes S; with a key-value cache, give `scaling.at(length)`.
        bf16: the table stays float32. Build it once, outside the Stack, and pass it in as a shared argument.
        Example: `table = ops.rope_table(ops.arange(tokens_BS.shape[1]), 64)`
        """
        ...

    def rope(self, x_BSHD: Array, table: tuple[Array, Array]) -> Array:
        """Rotate queries or keys by their positions (Su et al. 2021, section 3.2.2; half-split layout).

        With x1 and x2 the halves of the last axis, the result is (x1 cos - x2 sin, x2 cos + x1 sin).
        x_BSHD: (B, S, H, D); table: from `rope_table`, for positions (S,) or (B, S). Returns the shape and dtype of x.
        bf16: computed in float32, rounded once at the end.
        Example: `q_BSHD = ops.rope(q_BSHD, table)`
        """
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
        prefix: Array | None = None,
        alibi: bool | Sequence[float] = False,
        softcap: float | None = None,
        sinks: Array | None = None,
        scale: float | None = None,
    ) -> Array:
        """Return softmax(scale q k^T + bias + mask) v, (B, S, H, Dv); query head h uses kv head h // (H/K)
        (Ainslie et al. 2023).

        q_BSHD: (B, S, H, D); k_BTKD: (B, T, K, D); v_BTKD: (B, T, K, Dv), with K a divisor of H. Dv may differ from D.
        causal: a query attends to keys at its own and earlier positions.
        window: a query attends only to the last `window` of these positions, its own included; with causal=False, to
        fewer than `window` positions on either side.
        segment_ids: (B, S) integers, or a pair (B, S) for queries and (B, T) for keys. A query attends only to keys
        with its own id; padding has id 0 and attends to id 0 only.
        positions: a pair (B, S) and (B, T), or (S,) and (T,), of integers; default 0..S-1 and 0..T-1. Key-value caches
        need them.
        prefix: (B, T) booleans or integers, true at the keys of a prefix, which every query sees, also earlier ones and
        those outside of its window, within its segment: bidirectional over a prompt, causal after it. (B,) lengths
        become one by `ops.arange(T)[None, :] < length_B[:, None]`.
        alibi: a bias of -slope_h |position of the query - position of the key| for each head h, after softcap. True:
        the slopes of Press et al. 2022; a sequence: one slope for each of the H heads, constants.
        softcap: scores become softcap * tanh(scores / softcap) before the mask. scale: default D^-0.5.
        sinks: (H,), one learned score a head, to which neither scale nor softcap applies. It is one more term of the
        softmax's denominator, which every query sees, and it has no value: weights are exp(score) / (exp(sink) + sum of
        exp(scores)) (OpenAI 2025, gpt-oss; Xiao et al. 2023).
        A query that may attend to no key gets zeros, also with sinks.
        bf16: contractions take bfloat16 and accumulate in float32; the softmax is float32; the result is bfloat16.
        Example: `out_BSHD = ops.attention(q_BSHD, k_BTKD, v_BTKD, segment_ids=segment_ids_BS)`
        """
        ...

    # ---- elementwise and shape

    def dropout(self, x: Array, rate: float, *, site: int) -> Array:
        """Return x / (1 - rate) at the elements that are kept and 0 at the others.

        x: (B, ...); rate: in [0, 1); site: the calling module's `self.site`. Returns the shape and dtype of x, and x
        itself when not training or if rate is 0. A hash of (seed, step, site, layer, sample index, offset within the
        sample), in wrapping int32 arithmetic, selects the elements. They are therefore the same on any mesh, for any
        microbatch size and in any framework (`portatrain.model.dropout_hash`).
        bf16: the selection is the same as under fp32; the scaled values are bfloat16.
        Example: `x_BSE = ops.dropout(x_BSE, self.rate, site=self.site)`
        """
        ...

    def silu(self, x: Array) -> Array:
        """Return x * sigmoid(x), elementwise, in the shape and dtype of x (bfloat16 under bf16).

        Example: `hidden_BSM = ops.silu(gate_BSM) * up_BSM`
        """
        ...

    def gelu(self, x: Array, *, approximate: bool = False) -> Array:
        """Return x * Phi(x), elementwise, in the shape and dtype of x (Hendrycks and Gimpel 2016).

        approximate: use 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) instead. bf16: the result is bfloat16.
        Example: `hidden_BSM = ops.gelu(up_BSM, approximate=True)`
        """
        ...

    def relu(self, x: Array) -> Array:
        """Return max(x, 0), elementwise, in the shape and dtype of x (bfloat16 under bf16). The derivative at 0 is 0.

        Example: `hidden_BSM = ops.relu(up_BSM)`
        """
        ...

    def sigmoid(self, x: Array) -> Array:
        """Return 1 / (1 + exp(-x)), elementwise, in the shape and dtype of x (bfloat16 under bf16).

        Example: `gate_BSX = ops.sigmoid(logits_BSX)`
        """
        ...

    def tanh(self, x: Array) -> Array:
        """Return the hyperbolic tangent, elementwise, in the shape and dtype of x (bfloat16 under bf16).

        Example: `capped = 30.0 * ops.tanh(scores / 30.0)`
        """
        ...

    def exp(self, x: Array) -> Array:
        """Return e^x, elementwise, in the shape and dtype of x (bfloat16 under bf16).

        Example: `rate_BSH = ops.exp(ops.cast(log_rate_BSH, "float32"))`
        """
        ...

    def log(self, x: Array) -> Array:
        """Return the natural logarithm, elementwise, in the shape and dtype of x (bfloat16 under bf16).

        Example: `entropy_BS = -(p_BSX * ops.log(p_BSX + 1e-9)).sum(-1)`
        """
        ...

    def softmax(self, x: Array, *, axis: int = -1) -> Array:
        """Return the softmax over one axis, in the shape and dtype of x.

        bf16: computed in float32, rounded once at the end.
        Example: `p_BSX = ops.softmax(logits_BSX)`
        """
        ...

    def where(self, condition: Array, x: Array, y: Array) -> Array:
        """Return x where `condition` is true and y elsewhere, elementwise.

        The three broadcast against each other; x or y may be a Python number. bf16: the framework's type promotion
        decides the dtype, so that bfloat16 and a Python number give bfloat16.
        Example: `scores = ops.where(mask, scores, -1e9)`
        """
        ...

    def concat(self, xs: Sequence[Array], *, axis: int) -> Array:
        """Join arrays along an existing axis.

        xs: arrays whose shapes differ along `axis` only. Values and dtype do not change, also under bf16.
        Example: `x_BSE = ops.concat([prefix_BSE, x_BSE], axis=1)`
        """
        ...

    def cast(self, x: Array, dtype: str) -> Array:
        """Return x as 'float32', 'bfloat16', 'int32', 'bool' or 'compute' (the compute dtype), in the same shape.

        bf16: 'compute' is bfloat16. Under fp32 it is float32.
        Example: `logits = ops.cast(logits, "float32")`
        """
        ...

    def arange(self, n: int) -> Array:
        """Return (n,) int32: 0, 1, ..., n-1. bf16 makes no difference.

        Example: `positions_S = ops.arange(tokens_BS.shape[1])`
        """
        ...

    def one_hot(self, ids: Array, n: int) -> Array:
        """Return ids.shape + (n,) float32 with 1 at each id and 0 elsewhere.

        ids: integers; an id outside [0, n) gives zeros. bf16: the result stays float32.
        Example: `chosen_BSX = ops.one_hot(expert_BS, 8)`
        """
        ...

    def top_k(self, x: Array, k: int) -> tuple[Array, Array]:
        """Return the k largest values of the last axis, in descending order, and their indices.

        x: (..., N) with N at least k. Returns (..., k) in the dtype of x and (..., k) int32. Of equal values the lowest
        index comes first; a NaN counts as the largest. bf16: rounding makes more values equal, so cast logits
        to float32 first.
        Example: `values_BSK, experts_BSK = ops.top_k(p_BSX, 2)`
        """
        ...

    def write(self, cache_BT: Array, value: Array, at: Array) -> Array:
        """Return a copy of a cache with `value` written at positions at .. at+S-1 of axis 1.

        cache_BT: (B, T, ...); value: (B, S, ...); at: () integer. Returns the shape and dtype of the cache.
        bf16: `value` is cast to the dtype of the cache.
        Example: `keys_BTKD = ops.write(keys_BTKD, k_BSKD, at)`
        """
        ...

    def sum(self, x: Array, axes: Sequence[str | None], *, over: Sequence[str]) -> Array:
        """Return the float32 sum of x over the named axes, across the global batch and the whole sequence.

        axes: one logical axis (or None) per dimension of x; over: the axes to sum, which must be in `axes`. Returns the
        remaining dimensions, float32. A model may reduce over batch or seq only with this and `mean`.
        bf16: x is summed in float32 and the result is float32.
        Example: `load_X = ops.sum(chosen_BSX, ("batch", "seq", None), over=("batch", "seq"))`
        """
        ...

    def mean(self, x: Array, axes: Sequence[str | None], *, over: Sequence[str]) -> Array:
        """Return `ops.sum(x, axes, over=over)` divided by the global number of elements summed.

        Shapes, dtypes and bf16 as in `sum`: the result is float32.
        Example: `mean_B = ops.mean(x_BS, ("batch", "seq"), over=("seq",))`
        """
        ...

    def stop_gradient(self, x: Array) -> Array:
        """Return x, unchanged in value, shape and dtype (also under bf16), with no gradient through it.

        Example: `target_B = ops.stop_gradient(value_B)`
        """
        ...


Batch = Mapping[str, Array]
