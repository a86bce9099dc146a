"""LoRA, low-rank adaptation (Hu et al. 2021, arXiv:2106.09685): the weight W is frozen, and a product A B is trained.

With `lora=LoRA(rank=8)` in a recipe, `adapt` replaces the targeted weights of the built model. W keeps its name. Its
factors are named 'blocks/attn/wq/lora_a' and 'blocks/attn/wq/lora_b' and have W's logical axes, so the mesh axes that
shard W shard them too. Models and layers need no change: given an adapted weight, `ops.einsum` and
`ops.grouped_matmul` contract with W, and with A and then B.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from portatrain.config import check_types
from portatrain.errors import UserError, no_match
from portatrain.errors.einsum import check_spec
from portatrain.model.fp8 import FACTORS, unquantised, with_fp8
from portatrain.model.module import BATCH_AXES, Module, Param, describe
from portatrain.model.replacing import replace_held
from portatrain.model.scaled import Scaled, unscaled

RANK_AXIS = "lora_rank"


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Low-rank adaptation: keep every matrix W fixed and add two small factors, y = x W + alpha / rank * (x A) B.

    A has the default initial values of a weight and B starts at zero, so the model starts as it was. Only the factors
    are trained, unless the recipe sets `trainable`.

    Raises:
        UserError: rank or alpha is not above 0, or a field has the wrong type.
    """

    rank: int = 8
    """Size of the axis between A and B."""
    alpha: float = 16.0
    """Scale of the product: it is multiplied by alpha / rank."""
    targets: tuple[str, ...] = ("*",)
    """Shell patterns over whole parameter names. Weights that contract an axis (`fan_in_axes` of at least 1) and have
    no `vocab` axis are adapted if their name matches. ("*",): all of them."""

    def __post_init__(self) -> None:
        check_types(self)
        for name, good in (("rank", self.rank >= 1), ("alpha", self.alpha > 0)):
            if not good:
                raise UserError(
                    f"LoRA.{name}",
                    expected="a number above 0",
                    got=repr(getattr(self, name)),
                    do="A usual choice is rank=8, alpha=16.",
                )


def is_factor(name: str) -> bool:
    """Return True if the parameter `name` is a factor of an adapted weight."""
    return name.rpartition("/")[2] in FACTORS


class Adapted(Module):
    """A weight with its two factors; it replaces the weight in the model."""

    unnamed: ClassVar[tuple[str, ...]] = ("base",)

    def __init__(self, base: Param, lora: LoRA) -> None:
        names = list(base.axes)
        batch = next((i for i, axis in enumerate(names) if axis not in BATCH_AXES), len(names))
        split = batch + base.fan_in_axes
        lead = {axis: base.axes[axis] for axis in names[:batch]}
        taken = {axis: base.axes[axis] for axis in names[batch:split]}
        made = {axis: base.axes[axis] for axis in names[split:]}
        self.base = base
        self.lora_a = Param(**lead, **taken, **{RANK_AXIS: lora.rank}, fan_in_axes=base.fan_in_axes)
        self.lora_b = Param(**lead, **{RANK_AXIS: lora.rank}, **made, init="zeros")
        self.scale = lora.alpha / lora.rank
        self.batch, self.split = batch, split

    def contracted(self, einsum: Callable[..., Any], spec: str, operands: tuple[Any, ...], dtype: str | None) -> Any:
        """Return `einsum(spec, *operands)` with this weight, one of the operands, adapted.

        Raises:
            UserError: the spec does not contract exactly the `fan_in_axes` of the weight.
        """
        inputs, _, out = spec.replace(" ", "").partition("->")
        letters = inputs.split(",")
        at = next(i for i, x in enumerate(operands) if x is self)
        plain = list(operands)
        plain[at] = self.base
        y = einsum(spec, *plain, dtype=dtype)
        mine = letters[at]
        lead, taken, made = mine[: self.batch], mine[self.batch : self.split], mine[self.split :]
        others = "".join(letters[:at] + letters[at + 1 :])
        if (
            set(taken) & set(out)
            or not set(made) <= set(out)
            or not set(taken) <= set(others)
            or set(made) & set(others)
        ):
            raise UserError(
                f"LoRA on {self.path}",
                expected=f"an einsum that contracts its first {len(taken)} axes (fan_in_axes) after {self.batch} batch "
                "axes",
                got=f"einsum {spec!r}",
                do="Exclude it from LoRA.targets.",
            )
        r = next(c for c in "zyxwvutsrqponmlkjihgfedcba" if c not in spec)
        middle = "".join(c for c in out if c not in made) + r
        inner = letters.copy()
        inner[at] = lead + taken + r
        plain[at] = self.lora_a
        low = einsum(f"{','.join(inner)}->{middle}", *plain) * self.scale
        return y + einsum(f"{middle},{lead}{r}{made}->{out}", low, self.lora_b, dtype=dtype)


def adapts(einsum: Callable[..., Any]) -> Callable[..., Any]:
    """Return the method `einsum` of an `Ops` class, extended to adapted weights, to parameters with a multiplier and to
    weights whose matmuls are in fp8."""

    @functools.wraps(einsum)
    def through(self: Any, spec: str, *operands: Any, dtype: str | None = None) -> Any:
        check_spec(spec)
        for operand in operands:
            if isinstance(operand, (Adapted, Scaled)):
                return operand.contracted(self.einsum, spec, operands, dtype)
        return with_fp8(self, einsum, spec, operands, dtype)

    return through


@dataclass(frozen=True)
class Factored:
    """A weight of experts and its factors, which a body of `ops.experts` hands to `ops.grouped_matmul`.

    weight: (X, E, F). a: (X, E, rank). b: (X, rank, F). scale: of the product of a and b.
    """

    weight: Any
    a: Any
    b: Any
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    def multiplied(self, grouped_matmul: Callable[[Any, Any], Any], x_NE: Any) -> Any:
        """Return `grouped_matmul` of the rows with the adapted weight, (N, F)."""
        low_NR = grouped_matmul(x_NE, self.a) * self.scale
        return grouped_matmul(x_NE, self.weight) + grouped_matmul(low_NR, self.b)


def factored(body: Callable[..., Any], params: tuple[Any, ...]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Return a body of `ops.experts` and its params with each adapted weight as three: the weight and its factors. The
    given body gets a `Factored` of them."""
    adapted = [isinstance(p, Adapted) for p in params]
    flat: list[Any] = []
    for p in params:
        flat += [not_adapted(q) for q in ((p.base, p.lora_a, p.lora_b) if isinstance(p, Adapted) else (p,))]
    if not any(adapted):
        return body, tuple(flat)

    def run(ops: Any, x_NE: Any, *held: Any) -> Any:
        given: list[Any] = []
        at = 0
        for p, is_adapted in zip(params, adapted, strict=True):
            if is_adapted:
                weight, a, b = held[at : at + 3]
                given.append(Factored(weight, a, b, p.scale))
            else:
                given.append(held[at])
            at += 3 if is_adapted else 1
        return body(ops, x_NE, *given)

    return run, tuple(flat)


def not_adapted(p: Any) -> Any:
    """Return `p`, which an operation uses that takes no adapted weight; of a weight with matmuls in fp8 and of a table
    with a multiplier, the parameter.

    Raises:
        UserError: `p` is an adapted weight, or an output weight with a multiplier.
    """
    if isinstance(p, (Adapted, Factored)):
        raise UserError(
            f"LoRA on {p.path}" if isinstance(p, Adapted) else "LoRA on a weight of experts",
            expected="a weight that only ops.einsum and ops.grouped_matmul use",
            got="a use in another operation",
            do="Exclude it from LoRA.targets.",
        )
    return unquantised(unscaled(p))


def adapt(model: Module, lora: LoRA) -> Module:
    """Replace the weights of `model` that `lora` targets, in place, and return the model.

    Raises:
        UserError: a pattern that matches no weight which can be adapted, or only some weights of a list.
    """
    found = describe(model)
    able = [n for n, t in found.params.items() if t.fan_in_axes and "vocab" not in t.axes]
    for pattern in lora.targets:
        if not any(fnmatchcase(name, pattern) for name in able):
            raise no_match("LoRA.targets", pattern, able)
    chosen = {n for n in able if any(fnmatchcase(n, pattern) for pattern in lora.targets)}
    made: dict[int, Adapted] = {}

    def held(name: str, value: Any) -> Any:
        if isinstance(value, Param):
            return made.setdefault(id(value), Adapted(value, lora)) if found.owners[id(value)] in chosen else value
        if not isinstance(value, (list, tuple, dict)):
            return value
        items = value.values() if isinstance(value, dict) else value
        new = [held(name, item) for item in items]
        if all(mine is old for mine, old in zip(new, items, strict=True)):
            return value
        if any(isinstance(item, Param) for item in new):
            raise UserError(
                f"LoRA.targets: {name}",
                expected="all weights of a list, or none",
                got="some of them",
                do="Use a pattern that matches all or none.",
            )
        return dict(zip(value, new, strict=True)) if isinstance(value, dict) else type(value)(new)

    replace_held(model, held)
    return model
