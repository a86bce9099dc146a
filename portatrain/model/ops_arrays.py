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

from portatrain.errors import UserError, choice

Array = Any
Axes = int | Sequence[int]
Sizes = int | tuple[int, ...]
"""One number for all spatial axes, or one for each."""


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

        Pixels have centres at (i + 1/2) / n; what lies outside is the edge. No smoothing where it becomes smaller.
        """
        ...

    # ---- scans and noise

    def scan(self, fn: Callable[..., Any], carry: Any, xs: Any) -> tuple[Any, Any]:
        """Run `carry, y = fn(carry, x)` over axis 1 of xs, one position after another: (last carry, ys).

        carry, xs and ys are arrays or trees (tuples, lists, dicts) of arrays; x is (B, ...) where xs is (B, S, ...).
        The carry keeps shapes and dtypes, so the first one has the batch axis too: zeros of the width of xs are
        `0.0 * x_BSE[:, 0]`, and zeros of n columns are `0.0 * ops.noise(n, site=self.site)`. `fn` calls neither
        `ops.aux` nor `ops.tally`. For recurrent networks.
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


def axis_of(what: str, x: Array, axis: int) -> int:
    """`axis` counted from the front; raise UserError for the batch's axis and for one that x does not have."""
    if not 1 <= (found := axis + x.ndim if axis < 0 else axis) < x.ndim:
        batch = found == 0
        raise UserError(
            f"{what}, axis={axis} of an array with {x.ndim} axes",
            expected="one of its axes but the first, which is the batch's",
            got="the first" if batch else "none of them",
            do="Reduce over samples with ops.sum or ops.mean and over=; give an array without batch as x[None]."
            if batch
            else f"Use an axis from 1 to {x.ndim - 1}, or from -1 to {1 - x.ndim}.",
        )
    return found


def axes_of(what: str, x: Array, axis: Axes, *, some: bool = False) -> tuple[int, ...]:
    """`axis` as distinct axes counted from the front; some: each must have an element."""
    found = tuple(axis_of(what, x, a) for a in ((axis,) if isinstance(axis, int) else axis))
    if len(set(found)) != len(found):
        raise UserError(f"{what}, axis={axis}", expected="every axis once", got=str(axis), do="Name each axis once.")
    if some and any(x.shape[a] == 0 for a in found):
        raise UserError(
            f"{what} of shape {tuple(x.shape)}",
            expected="at least one element along the axis",
            got="none",
            do="Choose among at least one element.",
        )
    return found


def order_of(what: str, x: Array, axes: Sequence[int]) -> tuple[int, ...]:
    """The axes of a transpose."""
    found = tuple(a + x.ndim if a < 0 else a for a in axes)
    if sorted(found) != list(range(x.ndim)) or found[:1] != (0,):
        raise UserError(
            f"{what} of an array with {x.ndim} axes",
            expected="every axis once, the batch's first: 0, ...",
            got=str(tuple(axes)),
            do="Leave axis 0 in its place; give an array without batch as x[None].",
        )
    return found


def pieces_of(what: str, x: Array, parts: int | Sequence[int], axis: int) -> list[int]:
    """The sizes of the pieces of a split."""
    n = x.shape[axis]
    sizes = list(parts) if not isinstance(parts, int) else [n // parts] * parts if parts > 0 else []
    if not sizes or sum(sizes) != n or min(sizes) < 0:
        raise UserError(
            f"{what} of {n} elements",
            expected="a number of parts that divides them, or sizes that add up to them",
            got=str(parts),
            do="Give other parts.",
        )
    return sizes


def windows(
    what: str, x: Array, size: Sizes, stride: Sizes | None, padding: str, dilation: Sizes = 1
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[tuple[int, int], ...]]:
    """(sizes, strides, dilations, zeros before and after) for each of the one or two spatial axes of x."""
    rank = x.ndim - 2
    if rank not in (1, 2):
        raise UserError(
            what,
            expected="an array (B, L, C) or (B, H, W, C)",
            got=f"{x.ndim} axes",
            do="Reshape it: channels come last.",
        )
    kinds = ("same", "valid", "causal") if what == "ops.conv" and rank == 1 else ("same", "valid")
    if padding not in kinds:
        raise choice(f"{what}, padding", padding, kinds)

    def each(value: Sizes | None) -> tuple[int, ...]:
        found = value if isinstance(value, tuple) else (value,) * rank
        if len(found) != rank or not all(isinstance(n, int) and n >= 1 for n in found):
            raise UserError(
                what, expected=f"a whole number of at least 1, or {rank} of them", got=repr(value), do="Give those."
            )
        return found

    sizes, dilations = each(size), each(dilation)
    strides = sizes if stride is None else each(stride)
    pads = []
    for n, k, s, d in zip(x.shape[1:-1], sizes, strides, dilations, strict=True):
        reach = (k - 1) * d
        if padding == "same":
            zeros = max(0, (-(-n // s) - 1) * s + reach + 1 - n)
            pads.append((zeros // 2, zeros - zeros // 2))
        else:
            pads.append((reach, 0) if padding == "causal" else (0, 0))
        if n + sum(pads[-1]) <= reach:
            raise UserError(
                f"{what} of shape {tuple(x.shape)}",
                expected=f"at least {reach + 1} elements along each axis of the window",
                got=str(n),
                do="Use a smaller window, or padding='same'.",
            )
    return sizes, strides, dilations, tuple(pads)


def check_kernel(x: Array, kernel: Array, groups: int) -> None:
    """Raise UserError unless a kernel fits the channels."""
    channels, into, out = x.shape[-1], kernel.shape[-2], kernel.shape[-1]
    if kernel.ndim != x.ndim or groups < 1 or into * groups != channels or out % groups:
        raise UserError(
            f"ops.conv of {tuple(x.shape)} with groups={groups}",
            expected=f"a kernel of {x.ndim} axes that ends in ({channels}/groups, D), D a multiple of groups",
            got=str(tuple(kernel.shape)),
            do="Give the kernel as (K, C/groups, D) or (K, K', C/groups, D).",
        )


def taps(n: int, m: int, method: str) -> tuple[list[int], list[int], list[float]]:
    """Resizing n elements to m: (lower neighbours, upper neighbours, weights of the upper), for each of the m."""
    if method not in ("nearest", "linear"):
        raise choice("ops.resize, method", method, ("nearest", "linear"))
    if method == "nearest":
        at = [min((2 * i + 1) * n // (2 * m), n - 1) for i in range(m)]
        return at, at, [0.0] * m
    low, high, weights = [], [], []
    for i in range(m):
        centre = min(max((i + 0.5) * n / m - 0.5, 0.0), n - 1.0)
        low.append(int(centre))
        high.append(min(int(centre) + 1, n - 1))
        weights.append(centre - int(centre))
    return low, high, weights


def recorded(ops: Any) -> list[Any]:
    """What a model has recorded so far, for `check_quiet`."""
    return [*ops.auxes.values(), *ops.tallies.values()]


def check_quiet(ops: Any, before: list[Any]) -> None:
    """Raise UserError if something was recorded since: what a scan's function records cannot leave the scan."""
    after = recorded(ops)
    if len(after) != len(before) or any(a is not b for a, b in zip(after, before, strict=True)):
        raise UserError(
            "ops.scan",
            expected="a function that records nothing",
            got="a call of ops.aux or ops.tally inside",
            do="Return the value as part of y and record it after the scan.",
        )


def check_kind(what: str, kind: str, kinds: Sequence[str]) -> None:
    if kind not in kinds:
        raise choice(what, kind, kinds)


def one_length(what: str, sizes: set[int]) -> int:
    """The one length of arrays that are scanned; raise UserError where they differ."""
    if len(sizes) != 1 or 0 in sizes:
        raise UserError(
            what,
            expected="arrays of one length, at least 1, along the axis",
            got=", ".join(map(str, sorted(sizes))) or "no arrays",
            do="Give xs of equal length.",
        )
    return next(iter(sizes))
