"""Rotary parameters in a config.json: `rope_theta` and `rope_scaling` of transformers 4, `rope_parameters` of 5."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from portatrain.errors import UserError, choice
from portatrain.model.rope import DynamicScaling, LinearScaling, LongScaling, RopeScaling, Scaling, YarnScaling

FIELDS = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")
# The fields that each rotary type reads, and whether they are required.
_TYPES: dict[str, dict[str, bool]] = {
    "default": {},
    "linear": {"factor": True},
    "dynamic": {"factor": True, "original_max_position_embeddings": False},
    "yarn": {
        **{"factor": True, "original_max_position_embeddings": False, "beta_fast": False, "beta_slow": False},
        **{"attention_factor": False, "mscale": False, "mscale_all_dim": False, "truncate": False},
    },
    "longrope": {
        **{"short_factor": True, "long_factor": True, "factor": False, "attention_factor": False},
        **{"original_max_position_embeddings": False},
    },
    "llama3": {
        **{"factor": True, "low_freq_factor": True, "high_freq_factor": True},
        **{"original_max_position_embeddings": False},
    },
}
_OLD_NAMES = {"su": "longrope", "mrope": "default"}


def inside(config: Mapping[str, Any]) -> Any:
    """Return the mapping that holds the rotary parameters, empty if there is none. transformers 5 reads the older name
    first."""
    return config.get("rope_scaling") or config.get("rope_parameters") or {}


def read_rope(
    config: Mapping[str, Any], what: str, *, theta: float, longest: int | None, given: Mapping[str, Any] | None = None
) -> tuple[float, Scaling | None, float]:
    """Return (theta, scaling, the part of a head's features that is rotated).

    Args:
        theta: the default of the model's type. longest: `max_position_embeddings`, which some scalings read; None if
            the config has none.
        given: the mapping of a kind of layers, in models where these differ; None: that of the whole config.

    Raises:
        UserError: nested parameters where there should be one set, an unknown rotary type, a missing or unknown field,
            or no `max_position_embeddings` where the scaling reads it: its default is another one in each type.
    """
    held = inside(config) if given is None else given
    if not isinstance(held, Mapping) or any(isinstance(v, Mapping) for v in held.values()):
        raise UserError(what, expected="one set of rotary parameters", got=_text(held), do="Use a model with one.")
    found = held.get("rope_theta", config.get("rope_theta") if given is None else None)
    if found is None and given is None:
        found = (config.get("rope_parameters") or {}).get("rope_theta")
    base = float(theta if found is None else found)
    part = held.get("partial_rotary_factor")
    part = config.get("partial_rotary_factor") if part is None else part
    rotated = 1.0 if part is None else float(part)
    name = str(held.get("rope_type") or held.get("type") or "default")
    kind = _OLD_NAMES.get(name, name)
    if kind not in _TYPES:
        raise choice(f"{what}: rope_type", kind, _TYPES)
    about, fields = f"{what}: rope_type {kind}", _TYPES[kind]
    ignored = {"rope_theta", "rope_type", "type", "partial_rotary_factor", "original_max_position_embeddings"}
    if kind != "default" and (more := sorted(k for k in held.keys() - fields.keys() - ignored if held[k] is not None)):
        raise UserError(about, expected=", ".join(fields), got=", ".join(more), do="Remove them, or convert the model.")
    if missing := sorted(k for k, required in fields.items() if required and held.get(k) is None):
        raise UserError(about, expected=", ".join(missing), got="no such field", do="Fetch the model again.")
    return base, _scaling(kind, held, config, longest or 0, about), rotated


def _scaling(kind: str, held: Mapping[str, Any], config: Mapping[str, Any], longest: int, about: str) -> Scaling | None:
    # Phi-3 holds the length beside the parameters, and transformers lets that one decide.
    beside = config.get("original_max_position_embeddings")
    original = int(beside or held.get("original_max_position_embeddings") or longest)
    read = {"dynamic": longest, "longrope": longest if held.get("factor") is None else original}
    if not read.get(kind, original if kind not in ("default", "linear") else 1):
        raise UserError(about, expected="max_position_embeddings", got="no such field", do="Fetch the model again.")
    factor = held.get("factor")
    if kind == "linear":
        return LinearScaling(factor=float(held["factor"]))
    if kind == "dynamic":
        return DynamicScaling(factor=float(held["factor"]), original=longest)
    if kind == "llama3":
        return RopeScaling(
            factor=float(held["factor"]),
            low=float(held["low_freq_factor"]),
            high=float(held["high_freq_factor"]),
            original=original,
        )
    if kind == "yarn":
        factor = float(held["factor"])
        return YarnScaling(
            factor=factor,
            original=original,
            beta_fast=float(held.get("beta_fast") or 32),
            beta_slow=float(held.get("beta_slow") or 1),
            attention_factor=_yarn_factor(factor, held),
            truncate=bool(held.get("truncate", True)),
        )
    if kind == "longrope":
        ratio = longest / original if factor is None else float(factor)
        found = held.get("attention_factor")
        if found is None:
            found = 1.0 if ratio <= 1 else math.sqrt(1 + math.log(ratio) / math.log(original))
        short, long = (tuple(float(x) for x in held[name]) for name in ("short_factor", "long_factor"))
        return LongScaling(short=short, long=long, original=original, attention_factor=float(found))
    return None


def _yarn_factor(factor: float, held: Mapping[str, Any]) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if (found := held.get("attention_factor")) is not None:
        return float(found)
    if held.get("mscale") and held.get("mscale_all_dim"):
        return mscale(float(held["mscale"])) / mscale(float(held["mscale_all_dim"]))
    return mscale(1.0)


def rope_type(scaling: Scaling | None) -> dict[str, Any] | None:
    """Return the rotary parameters of a scaling as transformers names them; None for none.

    Raises:
        UserError: a scaling that transformers does not have.
    """
    match scaling:
        case None:
            return None
        case LinearScaling():
            return {"rope_type": "linear", "factor": scaling.factor}
        case DynamicScaling():
            return {"rope_type": "dynamic", "factor": scaling.factor}
        case RopeScaling():
            return {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low,
                "high_freq_factor": scaling.high,
                "original_max_position_embeddings": scaling.original,
            }
        case YarnScaling():
            factor = scaling.attention_factor
            return {
                "rope_type": "yarn",
                "factor": scaling.factor,
                "original_max_position_embeddings": scaling.original,
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
                "attention_factor": _yarn_factor(scaling.factor, {}) if factor is None else factor,
                "truncate": scaling.truncate,
            }
        case LongScaling():
            return {
                "rope_type": "longrope",
                "short_factor": list(scaling.short),
                "long_factor": list(scaling.long),
                "factor": 1.0,  # not read, since attention_factor is there
                "attention_factor": scaling.attention_factor,
                "original_max_position_embeddings": scaling.original,
            }
    raise UserError(
        f"rope_scaling {type(scaling).__name__}",
        expected="a scaling of portatrain.model.rope",
        got=repr(scaling),
        do="Export --to orbax, dcp, torch or nnx.",
    )


def rope_fields(theta: float, scaling: Scaling | None, *, part: float = 1.0) -> dict[str, Any]:
    """Return the fields of config.json for rotary positions, as both 4 and 5 of transformers read them."""
    stretch = rope_type(scaling)
    fields: dict[str, Any] = {
        # transformers 4 reads these two, and takes a default where they are missing; 5 reads the third.
        "rope_theta": theta,
        "rope_scaling": stretch,
        "rope_parameters": {"rope_theta": theta, **(stretch or {"rope_type": "default"})},
    }
    if part != 1:
        fields["partial_rotary_factor"] = fields["rope_parameters"]["partial_rotary_factor"] = part
    if isinstance(scaling, DynamicScaling):
        fields["max_position_embeddings"] = scaling.original
    return fields


def _text(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 200 else text[:200] + " ..."
