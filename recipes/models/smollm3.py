"""SmolLM3 (Bakouch et al. 2025, huggingface.co/blog/smollm3): a Llama in which every fourth layer has no rotary
positions (Yang et al. 2025, arXiv:2501.18795).

Shape letters: B batch, S seq, E embed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from portatrain.checkpoint.interop import Fields, Hub
from portatrain.model.layers import Attention, GatedMLP, layers_of
from portatrain.model.module import Module
from portatrain.model.ops import Array, Ops
from recipes.models.causal import (
    ATTENTION,
    ATTENTION_BIASES,
    MLP,
    MLP_BIASES,
    PRE_NORMS,
    CausalConfig,
    CausalLM,
    Kind,
    hub,
    layer_types,
    read_sizes,
    rms_norm,
    sliding_of,
)


@dataclass(frozen=True, kw_only=True)
class SmolLM3Config(CausalConfig):
    """The sizes of a `SmolLM3`."""

    rotated: tuple[bool, ...] = ()
    """Whether each layer has rotary positions. Empty: every layer but each fourth."""
    window: int | None = None
    """Tokens that a token attends to in the layers of ``sliding``, itself included."""
    sliding: tuple[bool, ...] = ()
    """Whether each layer has the window. Empty: none has."""
    attention_bias: bool = False
    """Add biases to queries, keys, values and the output of attention."""
    mlp_bias: bool = False
    """Add biases to the three maps of the feed-forward block."""

    def build(self) -> SmolLM3:
        """Return the model."""
        return SmolLM3(self)

    def small(self) -> SmolLM3Config:
        """Return the same kind of model with small sizes."""
        made: SmolLM3Config = super().small()
        last, window = slice(-made.layers, None), self.window and min(self.window, 8)
        return replace(made, rotated=self.rotated[last], sliding=self.sliding[last], window=window)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kind of each layer."""
        rotated = self.rotated or tuple(bool((i + 1) % 4) for i in range(self.layers))
        sliding = self.sliding or (False,) * self.layers
        return tuple(
            Kind(window=self.window if s else None, rope=0 if r else None)
            for r, s in zip(rotated, sliding, strict=True)
        )

    def huggingface(self) -> Hub:
        """Return the config and the tensor names of the same model in transformers."""
        names = [*PRE_NORMS, *ATTENTION, *MLP]
        names += ATTENTION_BIASES if self.attention_bias else ()
        names += MLP_BIASES if self.mlp_bias else ()
        more: dict[str, Any] = {"attention_bias": self.attention_bias, "mlp_bias": self.mlp_bias}
        more |= {k: v for k, v in layer_types(self.kinds, self.window).items() if k != "max_window_layers"}
        more["no_rope_layers"] = [int(kind.rope is not None) for kind in self.kinds]
        return hub(self, "smollm3", "SmolLM3ForCausalLM", names, **more)


class Block(Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, c: SmolLM3Config, kind: Kind) -> None:
        self.attn_norm = rms_norm(c)
        self.attn = Attention(
            embed=c.embed,
            heads=c.heads,
            kv_heads=c.kv,
            head_dim=c.head_size,
            window=kind.window,
            bias="qkvo" if c.attention_bias else False,
        )
        self.mlp_norm = rms_norm(c)
        self.mlp = GatedMLP(embed=c.embed, mlp=c.mlp_size, bias=c.mlp_bias)
        self.rotated = kind.rope is not None

    def __call__(self, ops: Ops, x_BSE: Array, ropes: tuple[Any, ...], segment_ids: Array | None) -> tuple[Array, None]:
        rope = ropes[0] if self.rotated else None
        x_BSE = x_BSE + self.attn(ops, self.attn_norm(ops, x_BSE), rope, segment_ids)
        return x_BSE + self.mlp(ops, self.mlp_norm(ops, x_BSE)), None


class SmolLM3(CausalLM):
    """A language model that predicts the next token; `CausalLM` says what a batch has."""

    def __init__(self, c: SmolLM3Config) -> None:
        super().__init__(c, layers_of(c.kinds, lambda kind: Block(c, kind)), rms_norm(c))


def from_hub(fields: Fields) -> SmolLM3Config:
    """Return the sizes of a SmolLM3. Defaults are those of SmolLM3Config in transformers."""
    fields.only("hidden_act", "silu")
    sizes = read_sizes(fields, theta=2e6, tied=True, kv_heads=4)
    layers = sizes["layers"]
    every, given = fields.size("no_rope_layer_interval", 4), fields.get("no_rope_layers")
    rotated = [bool((i + 1) % every) for i in range(layers)]
    if given is not None and (not isinstance(given, list) or len(given) < layers):
        fields.problem("no_rope_layers", f"{layers} numbers")
    elif given is not None:
        rotated = [bool(each) for each in given[:layers]]
    window = fields.optional("sliding_window")
    window = window if fields.flag("use_sliding_window", False) else None
    sliding = [window is not None and not r for r in rotated]
    if fields.get("layer_types") is not None:
        sliding = [s and window is not None for s in sliding_of(fields, layers)]
    fields.get("max_window_layers")  # transformers does not read it
    return SmolLM3Config(
        **sizes,
        rotated=tuple(rotated),
        window=window if any(sliding) else None,
        sliding=tuple(sliding) if any(sliding) else (),
        attention_bias=fields.flag("attention_bias", False),
        mlp_bias=fields.flag("mlp_bias", False),
    )
