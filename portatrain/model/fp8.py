"""Precision fp8: chosen matmuls are computed from 8-bit operands; everything else is as with precision bf16.

    y[m, n] = sum_k x[m, k] w[k, n]     x: an activation, w: a parameter

Before the product, each row of x and each column of w is divided by a scale of its own and rounded to `E4M3`. The
products are added in float32, multiplied by both scales and rounded to bfloat16. The gradient of x is such a product
too: the gradient of y, per row in `E5M2`, with w in `E4M3`, with scales over n in place of k. The gradient of w is
computed from bfloat16 operands and added in float32, because scales over rows would depend on the microbatch.

A scale is the smallest power of two, at least 2^-126, for which the largest absolute value of the row, divided by it,
is a number of the format: dividing is exact, so every framework divides alike. It is 1 for a row of zeros.
For a row that holds a number that is not finite it is NaN, and so are the products of the row: such a number does not
vanish in a format without infinities. Numbers below 2^-126 count as zero, since some devices do not have them.

In an einsum of several axes, the contracted axes together are k, the other axes of the parameter n, those of the
activation m, and axes in all three terms (experts) count independent products. A scale is a function of one row, so it
depends neither on the microbatch nor on the mesh. This is the rowwise recipe of torchao (`rowwise_with_gw_hp`).

That is `fp8_scaling="row"`. With "tensor" all values of a tensor share a scale: those of a weight in one layer (and of
one expert), and those of an activation or a gradient in one sample, which is the first axis of x. The scale is over the
whole tensor, however a mesh cuts it. A sample and not a microbatch, because a step must not depend on how its samples
are dealt out to microbatches. An einsum whose first axis of x is no axis of samples, because it is contracted or the
parameter has it too (experts), has a scale for each row.

`quantise` replaces each chosen `Param` by a module that has its name, as LoRA does. Layouts, patterns over names,
optimizers and checkpoints see the parameter alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from portatrain.errors import UserError, no_match
from portatrain.model.module import Definition, Module, Param, TensorInfo, describe
from portatrain.model.replacing import replace_held

KERNEL_AXES = frozenset({"height", "width", "length", "patch_rows", "patch_columns"})
"""Axes of the kernels of convolutions: their weights stay in bfloat16."""
FACTORS = ("lora_a", "lora_b")
"""The last part of the name of a LoRA factor."""


@dataclass(frozen=True)
class Format:
    """A format of 8 bits: its name in ml_dtypes and jax, the digits after the point of a number in [1, 2), the exponent
    of the smallest normal number, and that of the largest number, which is 1.75 times a power of two."""

    name: str
    digits: int
    least: int
    most: int

    @property
    def largest(self) -> float:
        """The largest number."""
        return 1.75 * 2.0**self.most


E4M3 = Format("float8_e4m3fn", digits=3, least=-6, most=8)
"""For values: up to 448, no infinities."""
E5M2 = Format("float8_e5m2", digits=2, least=-14, most=15)
"""For gradients: up to 57344."""


SCALINGS = ("row", "tensor")
"""What shares a scale."""


@dataclass(frozen=True)
class Side:
    """An operand of a product: its term, its format, and the letters of the axes whose values share a scale."""

    term: str
    kind: Format
    shared: str

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes whose values share a scale."""
        return axes_of(self.shared, self.term)

    @property
    def left(self) -> str:
        """The letters of the axes that its scales have."""
        return "".join(c for c in self.term if c not in self.shared)


@dataclass(frozen=True)
class Product:
    """An einsum of two operands of 8 bits, over the letters `over`."""

    a: Side
    b: Side
    out: str
    over: str

    @property
    def spec(self) -> str:
        return f"{self.a.term},{self.b.term}->{self.out}"


@dataclass(frozen=True)
class Form:
    """An einsum of an activation and a parameter, in this order, as a product of matrices: its terms, the letters that
    are contracted (k), and what shares a scale, one of `SCALINGS`."""

    x: str
    w: str
    out: str
    k: str
    scaling: str = "row"

    @property
    def n(self) -> str:
        """The letters of the parameter that are in the result alone."""
        return "".join(c for c in self.w if c not in self.x)

    @property
    def forward(self) -> Product:
        """The product, from the activation and the parameter."""
        return Product(Side(self.x, E4M3, self._of_values(self.x, self.k)), self._weight(self.k), self.out, self.k)

    @property
    def of_x(self) -> Product:
        """The gradient of the activation, from the gradient of the result and the parameter."""
        return Product(Side(self.out, E5M2, self._of_values(self.out, self.n)), self._weight(self.n), self.x, self.n)

    @property
    def of_w(self) -> str:
        """The spec of the gradient of the parameter, from the activation and the gradient of the result."""
        return f"{self.x},{self.out}->{self.w}"

    def sizes(self, x: Sequence[int], w: Sequence[int]) -> tuple[int, int, int]:
        """Return (m, k, n) of the product of arrays of these shapes; independent products count in m."""
        of = dict(zip(self.x + self.w, (*x, *w), strict=True))
        # Lists: torch.compile takes no generators here.
        m = math.prod([of[c] for c in self.x if c not in self.k])
        return m, math.prod([of[c] for c in self.k]), math.prod([of[c] for c in self.n])

    @property
    def _whole(self) -> bool:
        return self.scaling == "tensor" and self.x[0] in self.out and self.x[0] not in self.w

    def _of_values(self, term: str, over: str) -> str:
        return "".join(c for c in term if c != self.x[0]) if self._whole else over

    def _weight(self, over: str) -> Side:
        return Side(self.w, E4M3, "".join(c for c in self.w if c in self.k + self.n) if self._whole else over)


def axes_of(letters: str, term: str) -> tuple[int, ...]:
    """Return the positions of `letters` in `term`."""
    return tuple(i for i, c in enumerate(term) if c in letters)


def aligned(left: str, out: str) -> tuple[tuple[int, ...], tuple[int | None, ...]]:
    """Return (a permutation, the index that then adds axes of size 1), with which scales that have the axes `left`
    broadcast over a result with the axes `out`."""
    order = tuple(left.index(c) for c in out if c in left)
    return order, tuple(slice(None) if c in left else None for c in out)  # type: ignore[misc]


def form_of(spec: str, parameter: int, scaling: str = "row") -> Form | None:
    """Return the form of the einsum `spec`, of which the operand at `parameter` (0 or 1) is the parameter; None if it
    is no product of matrices: it contracts nothing, a letter is in one term alone or twice in one, or one of the two
    operands has no axis of its own in the result."""
    inputs, _, out = spec.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(terms) != 2 or "->" not in spec or "." in spec:
        return None
    w, x = terms[parameter], terms[1 - parameter]
    if any(len(set(term)) < len(term) for term in (x, w, out)):
        return None
    if not (set(out) <= set(x) | set(w)) or not (set(x) ^ set(w) <= set(out)):
        return None
    k = "".join(c for c in x if c in w and c not in out)
    return Form(x, w, out, k, scaling) if k and set(w) - set(x) and set(x) - set(w) else None


class Quantised(Module):
    """A weight of which the matmuls are computed from 8-bit operands; it replaces the weight in the model."""

    unnamed: ClassVar[tuple[str, ...]] = ("base",)

    def __init__(self, base: Param, scaling: str = "row") -> None:
        self.base = base
        self.scaling = scaling


def unquantised(p: Any) -> Any:
    """Return the parameter in `p` if it is a `Quantised` weight, else `p`."""
    return p.base if isinstance(p, Quantised) else p


def with_fp8(ops: Any, einsum: Callable[..., Any], spec: str, operands: Sequence[Any], dtype: str | None) -> Any:
    """Return `einsum(ops, spec, *operands)`, from 8-bit operands if one of two operands is a `Quantised` weight.

    An einsum with another form, or with a `dtype` of its own, takes the weight as it is. `ops.einsum_fp8` computes the
    product.
    """
    plain = [unquantised(x) for x in operands]
    chosen = [i for i, x in enumerate(operands) if isinstance(x, Quantised)]
    if len(chosen) != 1 or len(plain) != 2 or dtype is not None:
        return einsum(ops, spec, *plain, dtype=dtype)
    form = form_of(spec, chosen[0], operands[chosen[0]].scaling)
    if form is None:
        return einsum(ops, spec, *plain, dtype=dtype)
    return ops.einsum_fp8(form, plain[1 - chosen[0]], plain[chosen[0]])


def can_quantise(info: TensorInfo) -> bool:
    """Return whether the rule takes this parameter: a weight in a Stack that is a matrix (it contracts axes, and has
    others). Tables over the vocabulary, routers (an output for each expert), kernels of convolutions and LoRA factors
    are left out."""
    inner = info.axes[info.batch_dims :]
    return (
        info.stack_dims > 0
        and 0 < info.fan_in_axes < len(inner)
        and info.name.rpartition("/")[2] not in FACTORS
        and not {"vocab", "experts", *KERNEL_AXES} & set(inner)
    )


def chosen(params: Iterable[TensorInfo], patterns: Sequence[str] | None) -> frozenset[str]:
    """Return the names of the weights whose matmuls are in fp8: of those that the rule takes, the ones that a pattern
    matches. None: all of them.

    Raises:
        UserError: a pattern matches none of them, or there are none.
    """
    able = [info.name for info in params if can_quantise(info)]
    for pattern in patterns or ():
        if not any(fnmatchcase(name, pattern) for name in able):
            raise no_match("fp8_matmuls", pattern, able)
    names = frozenset(n for n in able if patterns is None or any(fnmatchcase(n, pattern) for pattern in patterns))
    if not names:
        raise UserError(
            "precision fp8",
            expected="a weight in a Stack that contracts axes and is used by ops.einsum",
            got="none" if not able else f"none of {len(able)}, since fp8_matmuls names none",
            do="Use precision=bf16.",
        )
    return names


def quantise(model: Module, patterns: Sequence[str] | None = None, scaling: str = "row") -> Definition:
    """Replace the chosen weights of `model` by `Quantised` ones, in place, and return the definition of the model.
    `scaling`: what shares a scale, one of `SCALINGS`.

    The tensors and their names stay as they are.
    """
    found = describe(model)
    names = chosen(found.params.values(), patterns)
    made: dict[int, Quantised] = {}

    def held(value: Any) -> Any:
        if isinstance(value, Param):
            return made.setdefault(id(value), Quantised(value, scaling)) if found.owners[id(value)] in names else value
        items = list(value.values()) if isinstance(value, dict) else value
        if not isinstance(items, (list, tuple)) or not any(isinstance(item, Param) for item in items):
            return value
        new = [held(item) for item in items]
        if len({isinstance(item, Quantised) for item in new}) > 1:
            return value  # a native list holds parameters or modules, not both: it stays in bfloat16
        return dict(zip(value, new, strict=True)) if isinstance(value, dict) else type(value)(new)

    replace_held(model, lambda _, value: held(value), stop=lambda module: isinstance(module, Quantised))
    return describe(model)


def quantised_names(definition: Definition) -> frozenset[str]:
    """Return the names of the parameters of which matmuls are in fp8."""
    modules = (module for module in definition.modules.values() if isinstance(module, Quantised))
    return frozenset(definition.owners[id(module.base)] for module in modules)
