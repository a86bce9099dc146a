"""Read a config.json field by field, so that no field which decides what weights compute goes unread.

A family's `from_hub(fields)` takes every field that it knows from a `Fields`. What it does not take, and what is not
known to have no effect, is a problem; so is a field with a value that the family cannot compute. All problems of a
config are told at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from portatrain.checkpoint.interop import hub_rope
from portatrain.model.rope import Scaling

# Fields without effect on logits: names, files, how weights began, how text is generated.
HARMLESS = frozenset(
    (
        *("_name_or_path", "architectures", "auto_map", "transformers_version", "torch_dtype", "dtype", "use_cache"),
        *("initializer_range", "pretraining_tp", "attention_dropout", "max_position_embeddings", "name_or_path"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "decoder_start_token_id"),
        *("return_dict", "output_hidden_states", "output_attentions", "torchscript", "is_decoder", "id2label"),
        *("label2id", "problem_type", "task_specific_params", "tokenizer_class", "prefix", "chunk_size_feed_forward"),
        *("is_encoder_decoder", "finetuning_task", "use_bfloat16", "tf_legacy_loss", "_attn_implementation"),
        *("attn_implementation", "_attn_implementation_autoset", "_flash_attn_2_enabled", "model_type"),
        *("cache_implementation", "num_labels", "output_scores", "use_flash_attn", "num_nextn_predict_layers"),
    )
)


class Fields:
    """The fields of a config.json; `problems` lists what the family that reads them cannot compute."""

    def __init__(self, config: Mapping[str, Any], what: str = "config.json") -> None:
        self.config, self.what = config, what
        self.kind = str(config.get("model_type"))
        self.problems: list[str] = []
        self._taken: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        """Return a field as it is, or `default` if it is missing or null."""
        self._taken.add(name)
        found = self.config.get(name)
        return default if found is None else found

    def size(self, name: str, default: int | None = None) -> int:
        """Return a whole number of at least 1; a missing one without default is a problem."""
        found = self.get(name, default)
        if isinstance(found, bool) or not isinstance(found, int) or found < 1:
            self.problem(name, "a whole number of at least 1")
            return 1
        return found

    def optional(self, name: str, default: int | None = None) -> int | None:
        """Return a whole number of at least 1, or None for null. `default` counts only if the field is missing, since a
        null means something else."""
        self._taken.add(name)
        return None if self.config.get(name, default) is None else self.size(name, default)

    def number(self, name: str, default: float | None = None) -> float:
        """Return a number; a missing one without default is a problem."""
        found = self.get(name, default)
        if isinstance(found, bool) or not isinstance(found, (int, float)):
            self.problem(name, "a number")
            return 1.0
        return float(found)

    def flag(self, name: str, default: bool) -> bool:
        """Return true or false."""
        found = self.get(name, default)
        if not isinstance(found, bool):
            self.problem(name, "true or false")
            return default
        return found

    def only(self, name: str, *values: Any) -> Any:
        """Take a field that must have one of `values`; the first is its default, and also what is returned for another
        value, which is a problem."""
        found = self.get(name, values[0])
        if not any(found == v and isinstance(found, bool) == isinstance(v, bool) for v in values):
            self.problem(name, " or ".join(_text(v) for v in values))
            return values[0]
        return found

    def kv_heads(self, heads: int, default: int | None = None) -> int:
        """Return the number of key-value heads; a null is that of the heads."""
        self._taken.add("num_key_value_heads")
        return self.size("num_key_value_heads", self.config.get("num_key_value_heads", default) or heads)

    def rope(
        self, *, theta: float = 10_000.0, partial: bool = False, given: Mapping[str, Any] | None = None
    ) -> tuple[float, Scaling | None, float]:
        """Return (theta, scaling, the part of a head's features that is rotated). `theta` is the default of the type.

        given: the parameters of one kind of layers, where these differ. Without `partial`, another part than 1 is a
        problem.
        """
        self._taken |= {*hub_rope.FIELDS, "original_max_position_embeddings"}
        longest = self.config.get("max_position_embeddings")
        found = hub_rope.read_rope(self.config, self.what, theta=theta, longest=longest, given=given)
        if found[2] != 1 and not partial:
            self.problem("partial_rotary_factor", "1", found[2])
        return found

    def problem(self, name: str, expected: str, got: Any = None) -> None:
        """Note that a field has a value that the family cannot compute."""
        self.problems.append(f"{name} {_text(self.config.get(name) if got is None else got)} (expected {expected})")

    def unread(self) -> list[str]:
        """Return the fields that nobody took and that are not known to change nothing, with their values. A null, or a
        switch that is off, changes nothing."""
        left = sorted(self.config.keys() - self._taken - HARMLESS)
        return [f"{name} {_text(self.config[name])}" for name in left if self.config[name] not in (None, False)]


def _text(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, (Mapping, list, str)) else str(value)
    return text if len(text) <= 200 else text[:200] + " ..."
