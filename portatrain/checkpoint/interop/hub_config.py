"""Compare a config.json of transformers with what a recipe computes, field by field.

Names and shapes of weights do not determine the function: the same tensors with another rotary base, epsilon or
activation give other logits. So every field either agrees, is known to have no effect, or is refused.

Sources of the defaults: transformers' LlamaConfig and MistralConfig (version 4 and 5 agree on them).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from portatrain.checkpoint.interop.hub_table import Hub
from portatrain.errors import UserError, choice
from portatrain.system import json_files

FILE = "config.json"

# The defaults of the fields that a config.json leaves out, by model_type. A Mistral is a Llama with a sliding window.
_LLAMA: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": None,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "intermediate_size": 14336, "num_key_value_heads": 8, "sliding_window": 4096},
}
# Fields of these types without effect on logits: names, files, how weights began, how text is generated.
HARMLESS = frozenset(
    (
        *("_name_or_path", "architectures", "auto_map", "transformers_version", "torch_dtype", "dtype", "use_cache"),
        *("initializer_range", "pretraining_tp", "attention_dropout", "max_position_embeddings", "name_or_path"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "decoder_start_token_id"),
        *("return_dict", "output_hidden_states", "output_attentions", "torchscript", "is_decoder", "id2label"),
        *("label2id", "problem_type", "task_specific_params", "tokenizer_class", "prefix", "chunk_size_feed_forward"),
        *("is_encoder_decoder", "finetuning_task", "use_bfloat16", "tf_legacy_loss", "_attn_implementation"),
        *("attn_implementation", "_attn_implementation_autoset", "_flash_attn_2_enabled", "model_type"),
    )
)
_ROPE = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")
# The fields that each rotary type reads, with the default of each (... : the field is required).
_ROPE_FIELDS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": ...},
    "dynamic": {"factor": ..., "original_max_position_embeddings": None},
    "yarn": {
        **{"factor": ..., "original_max_position_embeddings": None, "beta_fast": 32, "beta_slow": 1},
        **{"attention_factor": None, "mscale": None, "mscale_all_dim": None, "truncate": True},
    },
    "longrope": {
        **{"short_factor": ..., "long_factor": ..., "factor": None, "attention_factor": None},
        **{"original_max_position_embeddings": None},
    },
    "llama3": {
        **{"factor": ..., "low_freq_factor": ..., "high_freq_factor": ..., "original_max_position_embeddings": ...}
    },
}


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A field that determines the function, with its value in config.json and its value in the recipe."""

    field: str
    theirs: Any
    ours: Any
    override: str = ""
    """The override with which the recipe agrees; '' if there is none."""

    def __str__(self) -> str:
        mend = f" ({self.override})" if self.override else " (this model has no such option)"
        return f"{self.field} {_text(self.theirs)}, the recipe {_text(self.ours)}{mend}"


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json of `folder`. Raises UserError if it is missing or is no JSON object."""
    path = folder / FILE
    try:
        found = json_files.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"folder {folder}",
            expected=f"a {FILE}, which decides what the weights compute",
            got="none",
            do="Fetch the model again, with all its files.",
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"file {path}", expected="JSON", got=str(error), do="Fetch it again.") from error
    if not isinstance(found, dict):
        raise UserError(f"file {path}", expected="a JSON object", got=type(found).__name__, do="Fetch it again.")
    return found


def check(folder: Path, hub: Hub, recipe: str) -> None:
    """Raise UserError unless config.json in `folder` describes the function that `hub`, of `recipe`, computes."""
    found, what = read_config(folder), f"file {folder / FILE}"
    kind = found.get("model_type")
    if kind not in DEFAULTS:
        raise choice(f"{what}: model_type {kind!r}", str(kind), DEFAULTS)
    theirs, unknown = canonical(found, what)
    ours, more = canonical(hub.config, "the recipe's table")
    assert not more, more
    listed = [f"{name} {_text(found[name])} (not a field that is known to change nothing)" for name in unknown]
    listed += [str(each) for each in differences(theirs, ours, hub.overrides)]
    if listed:
        raise UserError(
            what,
            expected=f"the function that recipe {recipe} computes",
            got="; ".join(listed),
            do="Add the overrides that are named; what has none, this model cannot compute.",
        )


def differences(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], overrides: Mapping[str, str]
) -> Iterable[Difference]:
    """Return the fields in which two canonical configs differ. `overrides`: config.json's name -> the recipe's
    field."""
    for name in sorted({*theirs, *ours}):
        a, b = theirs.get(name), ours.get(name)
        if not _same(a, b):
            field = overrides.get(name)
            how = "" if field is None else _override(name, field, a)
            yield Difference(field=name, theirs=a, ours=b, override=how)


def _override(name: str, field: str, value: Any) -> str:
    if name != "rope_scaling":
        return f"--set {field}={'none' if value is None else str(value).lower() if isinstance(value, bool) else value}"
    if value is None:
        return f"--set {field}=none"
    if value["rope_type"] != "llama3":
        return ""
    keys = (
        ("factor", "factor"),
        ("low", "low_freq_factor"),
        ("high", "high_freq_factor"),
        ("original", "original_max_position_embeddings"),
    )
    inside = ", ".join(f"{ours}={value[theirs]!r}" for ours, theirs in keys)
    return f"set {field.rpartition('.')[2]}=RopeScaling({inside}) in the recipe"


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return math.isclose(a, b, rel_tol=1e-12)  # both come from decimal text: equal, except for the last digit
    return bool(a == b)


def canonical(config: Mapping[str, Any], what: str) -> tuple[dict[str, Any], list[str]]:
    """Return (every field that determines the function, with defaults; the fields that are not known)."""
    known = dict(DEFAULTS[str(config["model_type"])])
    found = {name: config.get(name, default) for name, default in known.items()}
    unknown = [
        name
        for name, value in config.items()
        if name not in known and name not in HARMLESS and name not in _ROPE and value is not None
    ]
    if found["num_key_value_heads"] is None:
        found["num_key_value_heads"] = found["num_attention_heads"]
    if found["head_dim"] is None and isinstance(found["num_attention_heads"], int) and found["num_attention_heads"]:
        found["head_dim"] = found["hidden_size"] // found["num_attention_heads"]
    found["rope_theta"], found["rope_scaling"] = _rope(config, what)
    found["partial_rotary_factor"] = config.get("partial_rotary_factor") or 1.0
    if config.get("use_sliding_window") is False:
        found["sliding_window"] = None
    return found, sorted(set(unknown) - {"use_sliding_window"})


def _rope(config: Mapping[str, Any], what: str) -> tuple[float, dict[str, Any] | None]:
    """Return (theta, the other fields of the rotary type; None for plain rotary positions), from either notation.

    transformers 4 writes `rope_theta` and `rope_scaling`, 5 writes `rope_parameters`; if both are there, 5 reads
    `rope_scaling` first, and the theta inside it before the one beside it.
    """
    inside = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(inside, Mapping) or any(isinstance(v, Mapping) for v in inside.values()):
        raise UserError(what, expected="one set of rotary parameters", got=_text(inside), do="Use a model with one.")
    theta = inside.get("rope_theta", config.get("rope_theta"))
    if config.get("rope_scaling") and "rope_theta" not in inside and config.get("rope_theta") is None:
        theta = (config.get("rope_parameters") or {}).get("rope_theta")
    theta = 10_000.0 if theta is None else theta
    kind = str(inside.get("rope_type", inside.get("type", "default")))
    if kind not in _ROPE_FIELDS:
        raise choice(f"{what}: rope_type", kind, _ROPE_FIELDS)
    fields = _ROPE_FIELDS[kind]
    ignored = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
    if more := sorted(inside.keys() - fields.keys() - ignored if kind != "default" else ()):
        raise UserError(f"{what}: rope_type {kind}", expected=f"{', '.join(fields)}", got=", ".join(more), do="Update.")
    if kind == "default":
        return theta, None
    return theta, {"rope_type": kind, **{name: inside.get(name, None if d is ... else d) for name, d in fields.items()}}


def _text(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, (Mapping, list, str)) else str(value)
    return text if len(text) <= 200 else text[:200] + " ..."
