"""The maximal update parametrization (muP): one learning rate for every width of a model.

A model of width n is compared with the same model at a base width, parameter by parameter. Let i be the growth of its
fan-in, the product of (size / size at the base) over the contracted axes, and o that of its other axes. Batch axes
(layers, experts) do not count. The kind of a parameter follows from i and o, and the rest from the kind:

    kind     what grows                std           multiplier    lr of Adam   lr of SGD
    input    fan-out                   base          1             1            o
    hidden   fan-in and fan-out        base i^-1/2   1             1/i          o/i
    output   fan-in                    base          1/i           1            i
    table    fan_in_axes=0, features   base          1, or 1/o     1            o
    vector   fan_in_axes=0, one axis   base          1             1            o
    same     nothing                   base          1             1            1

"base" is the std of the parameter at the base width. The multiplier is a factor of what the parameter gives. A table
over tokens or positions is an input where rows are looked up, and an output (1/o) where its features are contracted, in
`ops.cross_entropy` or an einsum; so a tied table is both. Biases are vectors, whatever axes they have. Scores of
attention are scaled by 1/d instead of 1/sqrt(d): if the size of a head grows by r, the scale is that of the base / r.
Each optimizer states its own factor of lr (`Rule.width_factor`). At the base width every factor is 1, and the run is
that of the standard parametrization to the last bit.

Source: Yang et al., Tensor Programs V, 2022 (arXiv:2203.03466), table 8 and definition 4.1; it needs no factor that
differs between the two uses of a tied table, and keeps the norm of a gradient, which is clipped, from growing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from portatrain.config import check_types, fits, hints
from portatrain.config import describe as describe_type
from portatrain.errors import UserError, choice, no_match
from portatrain.model.layers import Attention, LatentAttention
from portatrain.model.module import Constant, Definition, Init, Module, Normal, Param, TensorInfo, Values, describe
from portatrain.model.replacing import replace_held
from portatrain.model.scaled import Scaled


@dataclass(frozen=True, kw_only=True)
class MuP:
    """The maximal update parametrization (Yang et al. 2022, arXiv:2203.03466): tune at a base width, train at any.

    Initial scales, learning rates and multipliers of the parameters follow from how their fan-in and fan-out have grown
    since the base width (`portatrain.model.widths`). `portatrain show` lists them.

    Raises:
        UserError: `base` is empty, a factor is not above 0, or a field has the wrong type.
    """

    base: Mapping[str, Any]
    """The fields of ``model`` that make it a model of the base width, such as {'embed': 64, 'heads': 2}. Other fields
    are those of ``model``."""
    lr: Mapping[str, float] | None = None
    """Name pattern -> a further factor of the learning rate, at every width. None: no others."""
    init: Mapping[str, float] | None = None
    """Name pattern -> a further factor of the initial values, at every width. None: no others."""
    fixed: tuple[str, ...] = ()
    """Name patterns of the parameters to leave as in the standard parametrization. (): none."""

    def __post_init__(self) -> None:
        check_types(self)
        if not self.base:
            raise UserError(
                "MuP.base",
                expected="at least one field of the model, with its value at the base width",
                got="none",
                do="Name what grows with the width: MuP(base={'embed': 64, 'heads': 2, 'mlp': 192}).",
            )
        for field in ("lr", "init"):
            for pattern, factor in (getattr(self, field) or {}).items():
                if not 0 < factor < math.inf:
                    raise UserError(
                        f"MuP.{field}, pattern {pattern!r}",
                        expected="a factor above 0",
                        got=repr(factor),
                        do="1 leaves the parameters as they are; `frozen` of the recipe switches training off.",
                    )

    def spec_at_base(self, spec: Any) -> Any:
        """Return the model's spec at the base width.

        Raises:
            UserError: `spec` is no dataclass, has no field of a name in `base`, or one of another type.
        """
        if not is_dataclass(spec) or isinstance(spec, type):
            raise UserError(
                "recipe.model",
                expected="a dataclass, with parametrization=MuP",
                got=type(spec).__name__,
                do="Make the sizes of the model fields of a frozen dataclass.",
            )
        known = hints(type(spec))
        for name, value in self.base.items():
            if name not in known:
                raise choice(f"MuP.base: field {name!r} of {type(spec).__name__}", name, known)
            if not fits(value, known[name]):
                raise UserError(
                    f"MuP.base: field {name!r} of {type(spec).__name__}",
                    expected=describe_type(known[name]),
                    got=repr(value),
                    do="Give it the value that it has at the base width.",
                )
        return replace(spec, **self.base)

    def apply(self, model: Module, base: Module) -> dict[str, Width]:
        """Give `model` the initial values, multipliers and scales of attention of its width, in place.

        Args:
            model: as it was built.
            base: the same model at the base width.

        Returns:
            For each parameter, how it has grown.

        Raises:
            UserError: the models differ in more than sizes, a pattern matches no parameter, or the size of a head grows
                in a module that is no attention of `portatrain.model.layers`.
        """
        here, there = describe(model), describe(base)
        _check_same(here, there)
        for field in ("lr", "init", "fixed"):
            for pattern in getattr(self, field) or ():
                if not any(fnmatchcase(name, pattern) for name in here.params):
                    raise no_match(f"MuP.{field}", pattern, here.params)
        found = {}
        for name, info in here.params.items():
            fixed = any(fnmatchcase(name, pattern) for pattern in self.fixed)
            found[name] = _width(info, there.params[name], fixed, _product(self.lr, name))
        other = [name for name, info in here.params.items() if info.shape != there.params[name].shape]
        if other and all(width.kind == "same" for width in found.values()):
            raise UserError(
                "MuP.base",
                expected="a field that grows with the width, such as embed, heads or mlp",
                got=f"{', '.join(self.base)}, which changes the number of layers, experts or rows of a table alone",
                do="Name what is wider than in the model whose learning rate was tuned; depth is no part of it.",
            )
        _scale_attention(here, there)

        def init_of(name: str) -> Init:
            width, extra = found[name], _product(self.init, name)
            given = here.params[name].init if width.kind == "fixed" else there.params[name].init
            if isinstance(given, Constant):
                return replace(given, value=given.value * extra)
            if isinstance(given, Values):  # as the model itself gives them, at any width
                own = here.params[name].init
                assert isinstance(own, Values)
                return Values(values=tuple(value * extra for value in own.values))
            return Normal(std=given.std * extra * (width.fan_in**-0.5 if width.kind == "hidden" else 1.0))

        _replace(model, here, found, init_of)
        return found


@dataclass(frozen=True, kw_only=True)
class Width:
    """How a parameter has grown since the base width, and what follows from it, but for the optimizer's part."""

    kind: str
    """'input', 'hidden', 'output', 'table', 'vector', 'same' or 'fixed'."""
    fan_in: float
    """Growth of the contracted axes."""
    fan_out: float
    """Growth of the others; of a table, of its features."""
    growth: tuple[float, ...]
    """Growth of each axis, without the axes of Stacks."""
    lr: float
    """The factor of the learning rate that the recipe states by name."""

    @property
    def multiplier(self) -> float:
        """The factor of what the parameter gives where its features are contracted."""
        return {"output": 1 / self.fan_in, "table": 1 / self.fan_out}.get(self.kind, 1.0)


def with_widths(
    definition: Definition, widths: Mapping[str, Width], factor_of: Callable[[TensorInfo, Width], float]
) -> Definition:
    """Return `definition` with the facts of `widths`. `factor_of`: the optimizer's factor of the learning rate."""
    params = {}
    for name, info in definition.params.items():
        width = widths[name]
        factor = 1.0 if width.kind in ("same", "fixed") else factor_of(info, width)
        params[name] = replace(info, kind=width.kind, multiplier=width.multiplier, lr=factor * width.lr)
    return replace(definition, params=params)


def _width(info: TensorInfo, base: TensorInfo, fixed: bool, lr: float) -> Width:
    ratios = [n / m for n, m in zip(info.shape, base.shape, strict=True)]
    split = info.batch_dims + info.fan_in_axes
    fan_in, fan_out = math.prod(ratios[info.batch_dims : split]), math.prod(ratios[split:])
    table = not info.fan_in_axes and _is_table(info)
    if table:
        fan_out = math.prod(ratios[split + 1 :])  # more rows change neither a row nor what is contracted with it
    if fixed:
        kind = "fixed"
    elif fan_in == 1 and fan_out == 1:
        kind = "same"
    elif info.fan_in_axes:
        kind = "input" if fan_in == 1 else "output" if fan_out == 1 else "hidden"
    else:
        kind = "table" if table else "vector"
    return Width(kind=kind, fan_in=fan_in, fan_out=fan_out, growth=tuple(ratios[info.stack_dims :]), lr=lr)


def _is_table(info: TensorInfo) -> bool:
    last = info.name.rpartition("/")[2]
    return len(info.shape) - info.batch_dims > 1 and not (last == "bias" or last.endswith("_bias"))


def _product(factors: Mapping[str, float] | None, name: str) -> float:
    return math.prod(factor for pattern, factor in (factors or {}).items() if fnmatchcase(name, pattern))


def _check_same(here: Definition, there: Definition) -> None:
    other = [n for n in here.params if n not in there.params] + [n for n in there.params if n not in here.params]
    other += [n for n, t in here.params.items() if n in there.params and t.axes != there.params[n].axes]
    if other:
        raise UserError(
            "MuP.base",
            expected="the same parameters at the base width, in other sizes",
            got=f"differences in {', '.join(other[:4])}" + (f" and {len(other) - 4} more" if len(other) > 4 else ""),
            do="Let `base` name sizes alone, and no field that adds or removes a part of the model.",
        )


def _scale_attention(here: Definition, there: Definition) -> None:
    """Scale scores by 1/d where the size of a head differs from that at the base width."""
    for path, module in here.modules.items():
        sizes = [(value, getattr(there.modules[path], name, None)) for name, value in vars(module).items()]
        grown = [
            (value.axes["head_dim"], base.axes["head_dim"])
            for value, base in sizes
            if isinstance(value, Param) and isinstance(base, Param) and "head_dim" in value.axes
        ]
        if all(size == base for size, base in grown):
            continue
        if not isinstance(module, (Attention, LatentAttention)):
            if any("heads" in value.axes for value, _ in sizes if isinstance(value, Param)):
                raise UserError(
                    f"MuP: {type(module).__name__} at {path}",
                    expected="heads of one size at every width, in an attention that is not of portatrain's layers",
                    got=f"head_dim={grown[0][0]}, and {grown[0][1]} at the base width",
                    do="Let the number of heads grow, or use layers.Attention: scores need the scale 1/d.",
                )
            continue
        size, base = grown[0]
        given: Any = getattr(there.modules[path], "scale", None)
        module.scale = (base**-0.5 if given is None else given) * base / size


def _replace(model: Module, found: Definition, widths: Mapping[str, Width], init_of: Callable[[str], Init]) -> None:
    """Set the initial values of all parameters of `model`, and replace those with a multiplier by `Scaled` ones."""
    made: dict[int, Any] = {}

    def held(value: Any) -> Any:
        if isinstance(value, Param):
            if id(value) not in made:
                name = found.owners[id(value)]
                value.init = init_of(name)
                width = widths[name]
                made[id(value)] = Scaled(value, width.growth) if width.multiplier != 1 else value
            return made[id(value)]
        items: Sequence[Any] = list(value.values()) if isinstance(value, dict) else value
        if not isinstance(items, (list, tuple)) or not any(
            isinstance(item, (Param, list, tuple, dict)) for item in items
        ):
            return value
        new = [held(item) for item in items]
        return dict(zip(value, new, strict=True)) if isinstance(value, dict) else type(value)(new)

    replace_held(model, lambda _, value: held(value))
