"""Parts of `Recipe.describe`: build a model from its sizes, and the optimizer's part of a parametrization."""

from __future__ import annotations

from typing import Any

from portatrain.errors import UserError
from portatrain.errors.users_code import line_of, line_of_method
from portatrain.model.module import Module, TensorInfo
from portatrain.model.widths import MuP, Width
from portatrain.optim import Rule


def built(spec: Any, name: str) -> Module:
    """Return the model of `spec`, the sizes in the recipe called `name`.

    Raises:
        UserError: `spec` has no method `build`, or this returns no Module.
    """
    kind = type(spec)
    if not callable(getattr(spec, "build", None)):
        raise UserError(
            f"recipe {name}: model {kind.__qualname__}{line_of(kind)}",
            expected="a configuration with a method build() that returns a portatrain.Module",
            got="a class without build()",
            do="Add it: def build(self): return Model(self).",
        )
    model = spec.build()
    if not isinstance(model, Module):
        raise UserError(
            f"recipe {name}: model",
            expected=f"a portatrain.Module from {kind.__name__}.build()",
            got=f"{model!r}{line_of_method(spec, 'build')}",
            do="Return the model at the end of build().",
        )
    return model


def built_at_base(parametrization: MuP, spec: Any, name: str) -> Module:
    """Return the model of `spec` at the base width.

    Raises:
        UserError: the sizes at the base width make no model.
    """
    base = parametrization.spec_at_base(spec)
    try:
        return built(base, name)
    except UserError as error:
        do = f"At the base width: {error.do} What `base` does not name is as in `model`."
        raise UserError(f"MuP.base: {error.what}", expected=str(error.expected), got=str(error.got), do=do) from error


def lr_factor(optimizer: Rule, info: TensorInfo, width: Width) -> float:
    """Return the optimizer's factor of the learning rate of a tensor at its width."""
    # A table has a multiplier in one of its uses alone, and the factor is that of both (Yang et al. 2022, table 8).
    multiplier = width.multiplier if info.fan_in_axes else 1.0
    rule = optimizer.rule_for(info)
    return rule.width_factor(info, fan_in=width.fan_in, fan_out=width.fan_out, multiplier=multiplier)
