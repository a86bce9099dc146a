"""A family: a Llama by another name, with a rotary base of its own."""

from __future__ import annotations

from portatrain.checkpoint.interop import Fields
from recipes.models.causal import read_sizes
from recipes.models.decoder import DecoderConfig


def from_hub(fields: Fields) -> DecoderConfig:
    """Return the sizes of an acme_lm."""
    fields.only("hidden_act", "silu")
    return DecoderConfig(**read_sizes(fields, theta=700.0))
