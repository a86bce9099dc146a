"""Write the decoder of `recipes/models/decoder.py` and its training step as one does in plain torch.

The choices: nn.RMSNorm; rotations in the rotate-half form from tables made once; the fused attention with
grouped heads and is_causal (with packed documents one boolean mask, made once a step); F.cross_entropy on all logits;
foreach gradient clipping; fused AdamW with decay on matrices alone; gradients set to None. Compiled: torch.compile over
the whole model and its loss, one graph, which takes the longer the deeper the model; or over each block and over the
loss, as training at scale does, two graphs at any depth.

B batch, S seq, E embed, V vocab, H heads, K kv_heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.shapes import ADAMW, CLIP_NORM, Shape

Step = Callable[[], float]
"""Run one training step to its end; return the loss before the update."""


def rotate(x_BSHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x_BSHD.chunk(2, dim=-1)
    return x_BSHD * cos + torch.cat([-x2, x1], dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = s.heads, s.kv_heads, s.head_dim
        self.wq = nn.Linear(s.embed, s.heads * s.head_dim, bias=False)
        self.wk = nn.Linear(s.embed, s.kv_heads * s.head_dim, bias=False)
        self.wv = nn.Linear(s.embed, s.kv_heads * s.head_dim, bias=False)
        self.wo = nn.Linear(s.heads * s.head_dim, s.embed, bias=False)

    def forward(self, x_BSE: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        b, s, _ = x_BSE.shape
        q = rotate(self.wq(x_BSE).view(b, s, self.heads, self.head_dim), cos, sin)
        k = rotate(self.wk(x_BSE).view(b, s, self.kv_heads, self.head_dim), cos, sin)
        v = self.wv(x_BSE).view(b, s, self.kv_heads, self.head_dim)
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=True,
        )
        return self.wo(out.transpose(1, 2).reshape(b, s, -1))


class Block(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.attn_norm, self.mlp_norm = (nn.RMSNorm(s.embed, eps=s.norm_eps) for _ in range(2))
        self.attn = Attention(s)
        self.gate, self.up = (nn.Linear(s.embed, s.mlp, bias=False) for _ in range(2))
        self.down = nn.Linear(s.mlp, s.embed, bias=False)

    def forward(self, x_BSE: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        x_BSE = x_BSE + self.attn(self.attn_norm(x_BSE), cos, sin, mask)
        y_BSE = self.mlp_norm(x_BSE)
        return x_BSE + self.down(F.silu(self.gate(y_BSE)) * self.up(y_BSE))


class Llama(nn.Module):
    cos: Tensor
    sin: Tensor

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.embed = nn.Embedding(s.vocab, s.embed)
        self.blocks = nn.ModuleList(Block(s) for _ in range(s.layers))
        self.final_norm = nn.RMSNorm(s.embed, eps=s.norm_eps)
        frequencies = s.rope_theta ** -(torch.arange(0, s.head_dim, 2, dtype=torch.float64) / s.head_dim)
        angles = torch.arange(s.seq)[:, None].float() * frequencies.float().repeat(2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(
        self, tokens: Tensor, targets: Tensor, segment_ids: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Return the mean loss."""
        mask = None
        cos, sin = self.cos[:, None], self.sin[:, None]  # (S, 1, D)
        if segment_ids is not None and positions is not None:
            cos, sin = self.cos[positions][:, :, None], self.sin[positions][:, :, None]  # (B, S, 1, D)
            mask = (segment_ids[:, None, :, None] == segment_ids[:, None, None, :]).tril()
        x_BSE = self.embed(tokens)
        for block in self.blocks:
            x_BSE = block(x_BSE, cos, sin, mask)
        return self.loss_of(x_BSE, targets)

    def loss_of(self, x_BSE: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(self.final_norm(x_BSE), self.embed.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten().long())

    def compile_parts(self) -> None:
        """Compile each block, and the loss."""
        for block in self.blocks:
            block.compile(fullgraph=True, dynamic=False)
        self.loss_of = torch.compile(self.loss_of, fullgraph=True, dynamic=False)  # type: ignore[method-assign]


def load(model: Llama, params: Mapping[str, np.ndarray]) -> None:
    """Take portatrain's parameters: (E, H, D) becomes nn.Linear's (H*D, E)."""

    def take(to: Tensor, array: np.ndarray, inputs: int = 1) -> None:
        if array.ndim > 1 and inputs:
            array = array.reshape(int(np.prod(array.shape[:inputs])), -1).T
        to.copy_(torch.from_numpy(np.ascontiguousarray(array)))

    with torch.no_grad():
        take(model.embed.weight, params["embed/table"], inputs=0)
        take(model.final_norm.weight, params["final_norm/scale"])
        for i, block in enumerate(model.blocks):
            for name in ("wq", "wk", "wv"):
                take(getattr(block.attn, name).weight, params[f"blocks/attn/{name}"][i])
            take(block.attn.wo.weight, params["blocks/attn/wo"][i], inputs=2)
            for name in ("gate", "up", "down"):
                take(getattr(block, name).weight, params[f"blocks/mlp/{name}"][i])
            for name in ("attn_norm", "mlp_norm"):
                take(getattr(block, name).weight, params[f"blocks/{name}/scale"][i])


def training_step(model: nn.Module, loss_of: Callable[[], Tensor]) -> Step:
    """Run forward, backward, clip and AdamW."""
    params = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in params if p.ndim > 1], "weight_decay": ADAMW.weight_decay},
            {"params": [p for p in params if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=ADAMW.lr,
        betas=(ADAMW.b1, ADAMW.b2),
        eps=ADAMW.eps,
        fused=True,
    )

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(params, CLIP_NORM, foreach=True)
        optimizer.step()
        return loss.item()

    return step


def as_tensors(batch: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    return {k: torch.from_numpy(v) for k, v in batch.items() if k != "sample"}


def hand_written(
    shape: Shape,
    params: Mapping[str, np.ndarray],
    batch: Mapping[str, np.ndarray],
    *,
    compile: Literal["", "whole", "parts"] = "",
) -> Step:
    model = Llama(shape)
    load(model, params)
    run: Callable[..., Tensor] = model
    if compile == "whole":
        run = torch.compile(model, fullgraph=True, dynamic=False)
    elif compile == "parts":
        model.compile_parts()
    return training_step(model, lambda: run(**as_tensors(batch)))


def hand_fsdp2(
    shape: Shape, params: Mapping[str, np.ndarray], batch: Mapping[str, np.ndarray], *, compile: bool
) -> Step:
    """Apply `fully_shard` to every block and the root, for this process's rows of the batch, in an existing group."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    model = Llama(shape)
    load(model, params)
    if compile:
        model.compile_parts()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    n, mine = dist.get_world_size(), dist.get_rank()
    given = {k: v.chunk(n)[mine] for k, v in as_tensors(batch).items()}
    step = training_step(model, lambda: model(**given))

    def run() -> float:
        loss = torch.tensor(step())
        dist.all_reduce(loss)
        return float(loss) / n

    return run


def transformers_llama(
    shape: Shape, params: Mapping[str, np.ndarray], batch: Mapping[str, np.ndarray], *, compile: bool
) -> Step:
    """Return transformers' LlamaForCausalLM with fused attention and only a causal mask."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.embed,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.seq,
        rms_norm_eps=shape.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    ours = Llama(shape)
    load(ours, params)
    names = {"embed": "model.embed_tokens", "final_norm": "model.norm"}
    inside = {
        "attn_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "attn.wq": "self_attn.q_proj",
        "attn.wk": "self_attn.k_proj",
        "attn.wv": "self_attn.v_proj",
        "attn.wo": "self_attn.o_proj",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    }
    with torch.no_grad():
        for name, tensor in ours.named_parameters():
            own = name.removesuffix(".weight")
            if own in names:
                theirs = names[own]
            else:
                _, layer, part = own.split(".", 2)
                theirs = f"model.layers.{layer}.{inside[part]}"
            model.get_parameter(f"{theirs}.weight").copy_(tensor)
    run = torch.compile(model) if compile else model

    def loss_of() -> Tensor:
        given = as_tensors(batch)
        targets = given["targets"].long()
        return run(input_ids=given["tokens"], labels=targets, shift_labels=targets).loss

    return training_step(model, loss_of)
