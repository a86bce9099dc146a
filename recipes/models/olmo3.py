"""OLMo 3 (OLMo Team 2025, arXiv:2512.13961): an OLMo 2 with a sliding window in three layers of four, in which the
rotary frequencies are never scaled.

Shape letters: B batch, S seq.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from portatrain.checkpoint.interop import Fields, Hub
from portatrain.model.ops import Array, Ops
from recipes.models.causal import HUB_FIELDS, Kind, read_sizes, read_two_ropes, sliding_of, two_ropes, types_of
from recipes.models.olmo2 import Olmo2, Olmo2Config


@dataclass(frozen=True, kw_only=True)
class Olmo3Config(Olmo2Config):
    """The sizes of an `Olmo3`."""

    rope_theta: float = 500_000.0
    """Base of the rotary frequencies in the layers without a window."""
    local_theta: float = 500_000.0
    """Base of the rotary frequencies in the layers with a window."""
    window: int = 4096
    """Tokens that a token attends to in the layers of ``sliding``, itself included."""
    sliding: tuple[bool, ...] = ()
    """Whether each layer has the window. Empty: three layers of four have it."""

    def build(self) -> Olmo3:
        """Return the model."""
        return Olmo3(self)

    def small(self) -> Olmo3Config:
        """Return the same kind of model with small sizes."""
        made: Olmo3Config = super().small()
        return replace(made, window=min(self.window, 8), sliding=self.sliding[-made.layers :])

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kind of each layer. Rotary table 0 is for the layers without a window."""
        sliding = self.sliding or usual(self.layers)
        return tuple(Kind(window=self.window, rope=1) if s else Kind() for s in sliding)

    def huggingface(self) -> Hub:
        """Return the config and the tensor names of the same model in transformers."""
        made = super().huggingface()
        config = {
            **made.config,
            "model_type": "olmo3",
            "architectures": ["Olmo3ForCausalLM"],
            "sliding_window": self.window,
            "layer_types": types_of(self.kinds),
            **two_ropes(self, self.local_theta),
        }
        return replace(made, config=config, overrides={**HUB_FIELDS, "layer_types": "model.sliding"})


def usual(layers: int) -> tuple[bool, ...]:
    """Return whether each layer has the window, if nothing else is said: all but every fourth."""
    return tuple(bool((i + 1) % 4) for i in range(layers))


class Olmo3(Olmo2):
    """A language model that predicts the next token; `CausalLM` says what a batch has."""

    def shared(self, ops: Ops, positions: Array, segment_ids: Array | None) -> tuple[Any, ...]:
        """Return the rotary tables of the layers without and with a window, and the segment ids."""
        ropes, segments = super().shared(ops, positions, segment_ids)
        local = ops.rope_table(positions, self.config.head_size, theta=self.config.local_theta)
        return (*ropes, local), segments


def from_hub(fields: Fields) -> Olmo3Config:
    """Return the sizes of an OLMo 3. Defaults are those of Olmo3Config in transformers."""
    fields.only("hidden_act", "silu")
    theta = 500_000.0
    nested = fields.config.get("rope_parameters") or {}
    if "sliding_attention" not in nested and fields.config.get("rope_theta", theta) != theta:
        # transformers 4 takes it for all layers, transformers 5 for those without a window only.
        fields.problem("rope_theta", f"{theta:g}, or rope_parameters with a sliding_attention of its own")
    given, local = read_two_ropes(fields, theta=theta, local=theta)
    sizes = read_sizes(fields, theta=theta, eps=1e-5, given=given)
    named = fields.config.get("layer_types") is not None
    return Olmo3Config(
        **sizes,
        attention_bias=fields.flag("attention_bias", False),
        local_theta=local,
        window=fields.size("sliding_window", 4096),
        sliding=tuple(sliding_of(fields, sizes["layers"])) if named else usual(sizes["layers"]),
    )
