"""The part of `Ops` that works on arrays: elementwise functions, reductions, order, indices, shapes, convolutions,
scans and noise.

Rules that hold for every operation here:

- **Axes.** `axis` counts from the front or from the end, but never names the first axis: that one belongs to the batch,
  which is cut into microbatches and over devices. `ops.sum` and `ops.mean` with `over=` reduce it. A parameter or a
  table without a batch takes `x[None]`.
- **Meshes.** An operation that acts along an axis that a mesh cuts (seq over context, heads over tensor) works on the
  whole axis: jax leaves the gathering to XLA, torch gathers it and computes on every process of the axis. Elementwise
  operations act where their operands lie.
- **Precision.** Reductions, cumulative sums and convolutions add in float32. Results have the dtype of x.
- **Parameters** go through `ops.weight` first; `conv` takes its kernel directly.

Legend of shapes: B batch, S positions, L length, H height, W width, C and D channels, K kernel; `...` any axes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from portatrain.model.ops_checks import Array, Axes, Sizes


class ArrayOps(Protocol):
    """See the top of this file; `Ops` inherits from it."""

    # ---- elementwise: any shape, the same shape and dtype out

    def abs(self, x: Array) -> Array:
        """|x|; the derivative at 0 is 0."""
        ...

    def sign(self, x: Array) -> Array:
        """-1, 0 or 1; the derivative is 0."""
        ...

    def floor(self, x: Array) -> Array:
        """The largest whole number that is not above x; the derivative is 0."""
        ...

    def sqrt(self, x: Array) -> Array:
        """Square root: NaN below 0; the derivative at 0 is infinite. For lengths of vectors use `norm`."""
        ...

    def rsqrt(self, x: Array) -> Array:
        """1 / sqrt(x); at 0 value and derivative are infinite."""
        ...

    def sin(self, x: Array) -> Array:
        """Sine, x in radians."""
        ...

    def cos(self, x: Array) -> Array:
        """Cosine, x in radians."""
        ...

    def erf(self, x: Array) -> Array:
        """The error function."""
        ...

    def log1p(self, x: Array) -> Array:
        """log(1 + x), exact for small x."""
        ...

    def expm1(self, x: Array) -> Array:
        """e^x - 1, exact for small x."""
        ...

    def softplus(self, x: Array) -> Array:
        """log(1 + e^x). log(sigmoid(x)) is -softplus(-x)."""
        ...

    def clip(self, x: Array, low: float, high: float) -> Array:
        """x, but at least `low` and at most `high`; the derivative is 1 at both bounds and 0 outside."""
        ...

    def maximum(self, x: Array, y: Array | float) -> Array:
        """The larger of two, elementwise; broadcasts. Where they are equal each has derivative 1/2."""
        ...

    def minimum(self, x: Array, y: Array | float) -> Array:
        """The smaller of two, elementwise; broadcasts. Where they are equal each has derivative 1/2."""
        ...

    # ---- reductions over one's own axes

    def max(self, x: Array, *, axis: Axes = -1, keepdims: bool = False) -> Array:
        """The largest element over one or several axes; equal largest elements share the gradient evenly. NaN wins."""
        ...

    def min(self, x: Array, *, axis: Axes = -1, keepdims: bool = False) -> Array:
        """The smallest element, as `max`."""
        ...

    def argmax(self, x: Array, *, axis: int = -1) -> Array:
        """int32 index of the largest element over one axis, the first of equal ones. A NaN counts as the largest."""
        ...

    def argmin(self, x: Array, *, axis: int = -1) -> Array:
        """int32 index of the smallest element, as `argmax`. A NaN counts as the smallest."""
        ...

    def logsumexp(self, x: Array, *, axis: Axes = -1, keepdims: bool = False) -> Array:
        """log(sum(e^x)) without overflow. Where all elements are -infinity: -infinity, with gradient 0."""
        ...

    def log_softmax(self, x: Array, *, axis: int = -1) -> Array:
        """x - logsumexp(x) over one axis."""
        ...

    def var(self, x: Array, *, axis: Axes = -1, keepdims: bool = False) -> Array:
        """mean((x - mean(x))^2): the variance of the population, divided by n (not n - 1)."""
        ...

    def std(self, x: Array, *, axis: Axes = -1, keepdims: bool = False) -> Array:
        """sqrt(var(x)), of the population; where all elements are equal: 0, with gradient 0."""
        ...

    def norm(self, x: Array, *, axis: Axes = -1, keepdims: bool = False) -> Array:
        """sqrt(sum(x^2)); the gradient of a zero vector is 0. Squares are float32: lengths from 1e-18 to 1e18.

        For example, cosine similarity: `x / ops.maximum(ops.norm(x, keepdims=True), 1e-6)`.
        """
        ...

    def cumsum(self, x: Array, *, axis: int) -> Array:
        """Element i is the sum of elements 0 to i along the axis."""
        ...

    # ---- order and indices

    def sort(self, x: Array, *, axis: int = -1, descending: bool = False) -> Array:
        """x in order along one axis. A NaN counts as the largest."""
        ...

    def argsort(self, x: Array, *, axis: int = -1, descending: bool = False) -> Array:
        """int32 indices that sort x; equal elements stay in their order, in either direction."""
        ...

    def take_along(self, x: Array, index: Array, *, axis: int) -> Array:
        """Elements of x at integer `index` along one axis; x and index have the same other sizes.

        (B, S, E) and index (B, M, 1) over axis 1 give (B, M, E): a size of 1 stands for all. Axis 0 of index is the
        batch. An index outside [0, n) is taken as the nearest end. Rows of a table are `ops.embed`.
        """
        ...

    def scatter_add(self, x: Array, index: Array, value: Array, *, axis: int) -> Array:
        """A copy of x to which `value` is added at integer `index` along one axis, once for every entry.

        index broadcasts to the shape of value, as in `take_along`; an index outside is taken as the nearest end.
        """
        ...

    # ---- shapes

    def transpose(self, x: Array, axes: Sequence[int]) -> Array:
        """x with axis axes[i] as its axis i; the batch axis stays first."""
        ...

    def flip(self, x: Array, *, axis: Axes) -> Array:
        """x backwards along the axes."""
        ...

    def roll(self, x: Array, shift: int, *, axis: int) -> Array:
        """Element i of the result is element (i - shift) mod n."""
        ...

    def pad(self, x: Array, *, axis: int, before: int = 0, after: int = 0, value: float = 0.0) -> Array:
        """x with `before` and `after` elements of `value` around one axis."""
        ...

    def join(self, xs: Sequence[Array], *, axis: int) -> Array:
        """Arrays of one shape along a new axis (numpy.stack; `ops.stack` runs a Stack)."""
        ...

    def split(self, x: Array, parts: int | Sequence[int], *, axis: int = -1) -> tuple[Array, ...]:
        """`parts` equal pieces, or pieces of the given sizes, along one axis."""
        ...

    # ---- convolutions and images

    def conv(
        self, x: Array, kernel: Array, *, stride: Sizes = 1, padding: str = "same", dilation: Sizes = 1, groups: int = 1
    ) -> Array:
        """Cross-correlation, channels last: x (B, L, C) with kernel (K, C/groups, D) gives (B, L', D), and x (B, H, W,
        C) with (K, K', C/groups, D) gives (B, H', W', D). In the compute dtype, added in float32.

        padding: 'valid' none; 'same' zeros, so that L' = ceil(L / stride), an odd one at the end; 'causal' (one
        dimension) all zeros in front, so that no position sees a later one. groups: D/groups outputs see C/groups
        inputs each; groups=C is a depthwise convolution. `ops.bias` adds a bias.

        The axes `patch_rows`, `patch_columns` and `channels` need no mapping: they are whole on every device. An axis
        that you name yourself, such as height, gives a warning until the recipe declares it, compute={"height": ()}.
        The kernel's sums run over all axes but the last: fan_in_axes=3 in two dimensions, 2 in one dimension, as in
        `Param(patch_rows=3, patch_columns=3, channels=16, embed=32, fan_in_axes=3)`.
        """
        ...

    def pool(self, x: Array, size: Sizes, *, kind: str, stride: Sizes | None = None, padding: str = "valid") -> Array:
        """The 'max' or 'mean' of windows of `size` over (B, L, C) or (B, H, W, C); stride: the size unless given.

        padding 'valid' or 'same', as in `conv`; what is padded counts neither for the maximum nor for the mean. Of
        equal largest elements the first one, row by row, has the gradient.
        """
        ...

    def resize(self, x: Array, size: Sizes, *, method: str) -> Array:
        """(B, L, C) or (B, H, W, C) at another size, 'nearest' or 'linear' (bilinear in two dimensions).

        Pixels have centres at (i + 1/2) / n; what lies outside is the edge. No anti-aliasing when shrinking.
        """
        ...

    # ---- scans and noise

    def scan(self, fn: Callable[..., Any], carry: Any, xs: Any) -> tuple[Any, Any]:
        """Run `carry, y = fn(carry, x)` over axis 1 of xs, one position after another: (last carry, ys).

        carry, xs and ys are arrays or trees (tuples, lists, dicts) of arrays; if xs is (B, S, ...), each x is (B, ...).
        The argument `carry` is the carry before the first position. Its shapes and dtypes must be those of the carry
        that `fn` returns. Make it from an array that has them already: `0 * x_BSE[:, 0]` is a start of zeros, and
        `ops.weight(self.start_E) + 0 * x_BSE[:, 0]` a learned start. `fn` must not call `ops.aux` or `ops.tally`.
        Recurrent networks use it.
        """
        ...

    def associative_scan(self, fn: Callable[[Any, Any], Any], xs: Any, *, axis: int = 1) -> Any:
        """Element i is fn(... fn(fn(x_0, x_1), x_2) ..., x_i), for an associative fn, in about 2 log2(n) steps.

        xs is an array or a tree of arrays; fn takes two such trees of any length along the axis and joins them
        elementwise. For linear recurrences: `lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1])`.
        """
        ...

    def noise(self, *shape: int, site: int, kind: str = "normal", draw: int = 0) -> Array:
        """(B, *shape) float32: 'normal' (0, 1) or 'uniform' [0, 1), while training and in evaluation.

        A pure function of seed, step (0 in evaluation), site, layer, sample, draw and the place in `shape`: the same
        on any mesh, for any microbatch, in any framework. `site` is the calling module's (self.site); `draw` tells
        the calls of one module apart. For augmentation, diffusion and exploration.
        """
        ...
