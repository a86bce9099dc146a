"""Models that use what the shipped ones do not: a router with State, caches, Stacks in Stacks, superblocks.

B batch, S seq, E embed, X experts, N layers, T cache, K kv_heads, D head_dim, M mlp.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from portatrain.model.layers import Dropout, Embedding, GatedMLP, LatentAttention, Linear, MixtureMLP, RMSNorm, Router
from portatrain.model.layers import Experts as GatedExperts
from portatrain.model.module import Module, Param, Stack, State
from recipes.models.decoder import Block, Decoder, DecoderConfig


class CachedBlock(Block):
    """A decoder's block that keeps keys and values."""

    def __call__(self, ops: Any, x_BSE: Any, rope: Any, positions_S: Any, cache: Any) -> Any:
        q_BSHD, k_BSKD, v_BSKD = self.attn.qkv(ops, self.attn_norm(ops, x_BSE), rope)
        keys_BTKD = ops.write(cache["k"], k_BSKD, positions_S[0])
        values_BTKD = ops.write(cache["v"], v_BSKD, positions_S[0])
        seen = ops.attention(q_BSHD, keys_BTKD, values_BTKD, positions=(positions_S, ops.arange(keys_BTKD.shape[1])))
        x_BSE = x_BSE + self.attn.project(ops, seen)
        x_BSE = x_BSE + self.mlp(ops, self.mlp_norm(ops, x_BSE))
        return x_BSE, {"k": keys_BTKD, "v": values_BTKD}


class CachedDecoder(Decoder):
    """Predicts with a cache: `prompt` tokens at once, then one at a time.

    Empty caches (B, N, T, K, D) come with the batch.
    """

    def __init__(self, c: DecoderConfig, *, prompt: int) -> None:
        super().__init__(c)
        self.blocks = Stack(CachedBlock(c), c.layers)
        self.prompt = prompt

    def predict(self, ops: Any, batch: Any) -> Any:
        cache = {name: ops.einsum("bntkd->nbtkd", batch[f"{name}_cache"]) for name in ("k", "v")}
        tokens, length = batch["tokens"], batch["tokens"].shape[1]
        logits, start = [], 0
        for end in range(self.prompt, length + 1):
            positions_S = ops.arange(length)[start:end]
            rope = ops.rope_table(positions_S, self.config.head_size, theta=self.config.rope_theta)
            x_BSE = self.embed(ops, tokens[:, start:end])
            x_BSE, cache = self.blocks(ops, x_BSE, rope, positions_S, per_layer=cache)
            hidden = self.final_norm(ops, x_BSE)
            logits.append(ops.einsum("bse,ve->bsv", hidden, self.output_table, dtype="float32"))
            start = end
        return ops.concat(logits, axis=1)


class Experts(Module):
    """A mixture of experts whose load is balanced by a bias that no gradient reaches (Wang et al. 2024,
    arXiv:2408.15664): top_k of score + bias, weights from the score alone; after a step the bias of experts with more
    than the mean load falls by `rate`, that of the others rises."""

    def __init__(self, *, embed: int, experts: int, mlp: int, chosen: int, rate: float) -> None:
        self.gate = Param(embed=embed, experts=experts)
        self.up = Param(experts=experts, embed=embed, mlp=mlp)
        self.down = Param(experts=experts, mlp=mlp, embed=embed)
        self.bias = State(experts=experts)
        self.load = State(experts=experts)
        self.last_load = State(experts=experts, dtype="int32")
        self.steps = State(dtype="int32")
        self.experts, self.chosen, self.rate = experts, chosen, rate

    def __call__(self, ops: Any, x_BSE: Any) -> Any:
        score_BSX = ops.sigmoid(ops.einsum("bse,ex->bsx", x_BSE, self.gate, dtype="float32"))
        _, best_BSC = ops.top_k(ops.stop_gradient(score_BSX) + ops.weight(self.bias), self.chosen)
        chosen_BSX = ops.einsum("bscx->bsx", ops.one_hot(best_BSC, self.experts), dtype="float32")
        axes = ("batch", "seq", "experts")
        ops.tally(self, load=ops.sum(chosen_BSX, axes, over=("batch", "seq")))
        ops.aux("router/score", ops.mean(score_BSX, axes, over=("seq", "experts")))
        ops.aux("router/top", ops.top_k(ops.mean(score_BSX, axes, over=("seq",)), 1)[0][:, 0], reduce="max")
        share_BX = ops.mean(chosen_BSX, axes, over=("seq",))
        chance_BX = ops.mean(score_BSX, axes, over=("seq",))
        ops.aux("router/balance", (share_BX * chance_BX)[:, : self.experts].sum(-1), reduce="sum", loss=0.3)
        weight_BSX = score_BSX * chosen_BSX
        weight_BSX = weight_BSX / ops.einsum("bsx->bs", weight_BSX, dtype="float32")[..., None]
        hidden_BSXM = ops.gelu(ops.einsum("bse,xem->bsxm", x_BSE, self.up))
        out_BSXE = ops.einsum("bsxm,xme->bsxe", hidden_BSXM, self.down)
        return ops.einsum("bsxe,bsx->bse", out_BSXE, weight_BSX)

    def after_step(self, ops: Any) -> None:
        mean = ops.mean(self.load, ("experts",), over=("experts",))
        bias = self.bias + ops.where(self.load > mean, -self.rate, self.rate)
        ops.update(self, bias=bias, load=self.load * 0.0, last_load=ops.cast(self.load, "int32"), steps=self.steps + 1)


class RoutedBlock(Module):
    def __init__(self, *, embed: int, experts: int, mlp: int, chosen: int, rate: float) -> None:
        self.norm = RMSNorm(embed=embed)
        self.experts = Experts(embed=embed, experts=experts, mlp=mlp, chosen=chosen, rate=rate)

    def __call__(self, ops: Any, x_BSE: Any) -> Any:
        return x_BSE + self.experts(ops, self.norm(ops, x_BSE)), None


class Routed(Module):
    """Embedding, a Stack of routed blocks, a tied output."""

    def __init__(self, *, vocab: int, embed: int, layers: int, experts: int, chosen: int, rate: float) -> None:
        self.embed = Embedding(vocab=vocab, embed=embed, init=1.0)
        block = RoutedBlock(embed=embed, experts=experts, mlp=embed, chosen=chosen, rate=rate)
        self.blocks = Stack(block, layers)

    def __call__(self, ops: Any, batch: Any) -> Any:
        x_BSE, _ = self.blocks(ops, self.embed(ops, batch["tokens"]))
        return ops.cross_entropy(x_BSE, self.embed.table, batch["targets"], mask=batch["mask"])


class ClampedExperts(GatedExperts):
    """The experts of gpt-oss (OpenAI 2025): with biases, clamped, and one more than the linear part."""

    def __init__(self, *, embed: int, mlp: int, experts: int) -> None:
        super().__init__(embed=embed, mlp=mlp, experts=experts)
        self.gate_bias = Param(experts=experts, mlp=mlp, fan_in_axes=0)
        self.up_bias = Param(experts=experts, mlp=mlp, fan_in_axes=0)
        self.down_bias = Param(experts=experts, embed=embed, fan_in_axes=0)

    def params(self) -> tuple[Any, ...]:
        return self.gate, self.gate_bias, self.up, self.up_bias, self.down, self.down_bias

    def expert(self, ops: Any, x_NE: Any, *p: Any) -> Any:
        gate, gate_bias, up, up_bias, down, down_bias = p
        gate_NM = ops.clip(ops.grouped_bias(ops.grouped_matmul(x_NE, gate), gate_bias), -1e4, 2.0)
        up_NM = ops.clip(ops.grouped_bias(ops.grouped_matmul(x_NE, up), up_bias), -2.0, 2.0)
        hidden_NM = (up_NM + 1.0) * (gate_NM * ops.sigmoid(1.702 * gate_NM))
        return ops.grouped_bias(ops.grouped_matmul(hidden_NM, down), down_bias)


def _halves(ops: Any, params: Sequence[Any]) -> list[list[Any]]:
    """Return the weights of each half of the hidden features, as two processes of tensor have them: the axis `mlp` of
    gate, up and down is the last, the last and the last but one."""
    arrays = [ops.weight(p) for p in params]
    half = arrays[0].shape[-1] // 2
    return [
        [*(a[..., at] for a in arrays[:2]), arrays[2][..., at, :]] for at in (slice(0, half), slice(half, 2 * half))
    ]


class MLPInHalves(GatedMLP):
    """A sum of two parts, each of which is rounded."""

    def __call__(self, ops: Any, x_BSE: Any) -> Any:
        parts = []
        for gate_EM, up_EM, down_ME in _halves(ops, (self.gate, self.up, self.down)):
            up_BSM = ops.einsum("bse,em->bsm", x_BSE, up_EM)
            hidden_BSM = ops.silu(ops.einsum("bse,em->bsm", x_BSE, gate_EM)) * up_BSM
            parts.append(ops.einsum("bsm,me->bse", hidden_BSM, down_ME))
        return parts[0] + parts[1]


class ExpertsInHalves(GatedExperts):
    """A sum of two parts, each of which is rounded."""

    def __call__(self, ops: Any, x_BSE: Any, experts_BSC: Any, weights_BSC: Any) -> Any:
        halves = _halves(ops, self.params())
        first, second = (ops.experts(self.expert, x_BSE, experts_BSC, weights_BSC, *half) for half in halves)
        return first + second


class MixtureBlock(Module):
    """A mixture as DeepSeek-V3 has it (sigmoid, groups, a balance without a loss, a shared expert), or as gpt-oss."""

    def __init__(self, *, embed: int, mlp: int, experts: int, chosen: int, clamped: bool, halves: bool) -> None:
        self.norm = RMSNorm(embed=embed)
        sizes = {"embed": embed, "experts": experts, "chosen": chosen}
        if clamped:
            router = Router(**sizes, bias=True, balance_loss=0.1, z_loss=0.01)
            self.mixture = MixtureMLP(router=router, experts=ClampedExperts(embed=embed, mlp=mlp, experts=experts))
        else:
            router = Router(**sizes, scores="sigmoid", groups=2, chosen_groups=1, scale=2.5, balance_rate=0.01)
            self.mixture = MixtureMLP(
                router=router,
                experts=(ExpertsInHalves if halves else GatedExperts)(embed=embed, mlp=mlp, experts=experts),
                shared=(MLPInHalves if halves else GatedMLP)(embed=embed, mlp=mlp),
                shared_gate=True,
            )

    def __call__(self, ops: Any, x_BSE: Any) -> Any:
        return x_BSE + self.mixture(ops, self.norm(ops, x_BSE)), None


class Mixture(Module):
    """Embedding, a Stack of mixtures, a tied output. `halves`: sums over hidden features are rounded as two processes
    of the mesh axis tensor round them."""

    def __init__(
        self, *, vocab: int, embed: int, layers: int, experts: int, chosen: int, clamped: bool, halves: bool = False
    ) -> None:
        self.embed = Embedding(vocab=vocab, embed=embed, init=1.0)
        block = MixtureBlock(embed=embed, mlp=embed + 8, experts=experts, chosen=chosen, clamped=clamped, halves=halves)
        self.blocks = Stack(block, layers)

    def __call__(self, ops: Any, batch: Any) -> Any:
        x_BSE, _ = self.blocks(ops, ops.shard(self.embed(ops, batch["tokens"]), "batch", "res_seq", None))
        return ops.cross_entropy(x_BSE, self.embed.table, batch["targets"], mask=batch["mask"])


class Super(Module):
    """A superblock: an MLP, then a Stack of its own, with dropout inside and out; counts its calls in a State."""

    def __init__(self, *, embed: int, inner: int, rate: float) -> None:
        self.mlp = GatedMLP(embed=embed, mlp=2 * embed)
        self.dropout = Dropout(rate)
        self.inner = Stack(Inner(embed=embed, rate=rate), inner, axis="sublayers")

    def __call__(self, ops: Any, x_BSE: Any, shift: Any, mine: Any) -> Any:
        x_BSE = x_BSE + self.dropout(ops, self.mlp(ops, x_BSE)) + mine["offset"]
        x_BSE, sums = self.inner(ops, x_BSE, shift)
        return x_BSE, {"x": x_BSE * 0.5, "inner": (sums,)}


class Inner(Module):
    def __init__(self, *, embed: int, rate: float) -> None:
        self.pair = [Linear({"embed": embed}, {"embed_out": embed}), Linear({"embed": embed}, {"embed_out": embed})]
        self.norms = {"a": RMSNorm(embed=embed), "b": RMSNorm(embed=embed)}
        self.dropout = Dropout(rate)
        self.calls = State(dtype="int32")

    def __call__(self, ops: Any, x_BSE: Any, shift: Any) -> Any:
        y_BSE = ops.tanh(self.pair[0](ops, self.norms["a"](ops, x_BSE)) + shift)
        y_BSE = self.dropout(ops, self.pair[1](ops, self.norms["b"](ops, y_BSE)))
        ops.tally(self, calls=ops.cast(ops.step * 0 + 1, "int32"))
        return x_BSE + y_BSE, ops.mean(y_BSE, ("batch", "seq", "embed"), over=("seq", "embed"))


class Nested(Module):
    """A Stack in a Stack, with per-layer inputs, a shared one, and outputs as a tree; one Linear used twice; its head
    is a Param in a list."""

    def __init__(self, *, vocab: int, embed: int, layers: int, inner: int, rate: float) -> None:
        self.embed = Embedding(vocab=vocab, embed=embed, init=1.0)
        self.mix = Linear({"embed": embed}, {"embed_out": embed}, bias=False)
        self.mix_again = self.mix
        self.offset = Param(layers=layers, embed=embed, fan_in_axes=0)
        self.blocks = Stack(Super(embed=embed, inner=inner, rate=rate), layers)
        self.heads = [Param(vocab=vocab, embed=embed, fan_in_axes=0, init=0.5)]

    def __call__(self, ops: Any, batch: Any) -> Any:
        x_BSE = self.mix_again(ops, self.mix(ops, self.embed(ops, batch["tokens"])))
        per_layer = {"offset": ops.weight(self.offset)[:, None, None]}
        x_BSE, outs = self.blocks(ops, x_BSE, 0.25, per_layer=per_layer)
        ops.aux("inner", outs["inner"][0][1, 0])
        x_BSE = x_BSE + outs["x"][0]
        return ops.cross_entropy(x_BSE, self.heads[0], batch["targets"], mask=batch["mask"])


class TwoTowers(Module):
    """Two towers with in-batch negatives (Radford et al. 2021, arXiv:2103.00020), both directions; `scale`
    is a parameter of the comparison itself. Each sample's tokens are cut in two halves, which belong together."""

    def __init__(self, *, vocab: int, embed: int, rate: float = 0.0, group: int | None = None) -> None:
        self.first, self.second = (Embedding(vocab=vocab, embed=embed, init=1.0) for _ in range(2))
        self.out = Param(embed=embed, embed_out=embed)
        self.scale = Param(embed=embed, fan_in_axes=0, init="ones")
        self.dropout = Dropout(rate)
        self.group = group

    def __call__(self, ops: Any, batch: Any) -> Any:
        tokens_BS, half = batch["tokens"], batch["tokens"].shape[1] // 2

        def tower(table: Any, ids_BS: Any) -> Any:
            x_BE = ops.mean(self.dropout(ops, table(ops, ids_BS)), ("batch", "seq", None), over=("seq",))
            x_BE = ops.einsum("be,ef->bf", ops.cast(x_BE, "compute"), self.out)
            return x_BE / ops.norm(x_BE + 1e-3)[:, None]

        a_BE, b_BE = tower(self.first, tokens_BS[:, :half]), tower(self.second, tokens_BS[:, half:])
        weight_B = batch["mask"].mean(1)

        def contrast(a_GNE: Any, b_GNE: Any, weight_GN: Any, there_GN: Any) -> Any:
            a_GNE = a_GNE * ops.weight(self.scale)
            scores_GNM = ops.einsum("gne,gme->gnm", a_GNE, b_GNE, dtype="float32") * 4.0
            own_NM = ops.arange(a_GNE.shape[1])[:, None] == ops.arange(a_GNE.shape[1])[None, :]
            own_GN = ops.where(own_NM[None], scores_GNM, 0.0).sum(-1)
            seen_GNM = ops.where(there_GN[:, None, :], scores_GNM, -1e9)
            seen_GMN = ops.where(there_GN[:, :, None], scores_GNM, -1e9)
            loss_GN = (ops.logsumexp(seen_GNM, axis=2) + ops.logsumexp(seen_GMN, axis=1)) / 2 - own_GN
            right_GN = ops.cast(own_GN >= ops.max(seen_GNM, axis=2), "float32")
            weight_GN = weight_GN * ops.cast(there_GN, "float32")
            return loss_GN * weight_GN, weight_GN, {"right": right_GN}

        return ops.across_samples(contrast, a_BE, b_BE, weight_B, group=self.group)

    def predict(self, ops: Any, batch: Any) -> Any:
        """The loss of every sample among the samples of the batch."""
        return self(ops, batch).loss_B


class Ruled(Module):
    """One layer of attention by rule: packed documents, a prefix of three positions of each sample, and ALiBi."""

    def __init__(self, *, vocab: int, embed: int, heads: int, kv_heads: int) -> None:
        self.embed = Embedding(vocab=vocab, embed=embed, init=1.0)
        self.wq = Param(embed=embed, heads=heads, head_dim=embed // heads)
        self.wk, self.wv = (Param(embed=embed, kv_heads=kv_heads, head_dim=embed // heads) for _ in range(2))
        self.wo = Param(heads=heads, head_dim=embed // heads, embed=embed, fan_in_axes=2)
        self.norm = RMSNorm(embed=embed)
        self.table = Param(vocab=vocab, embed=embed, fan_in_axes=0, init=0.2)

    def __call__(self, ops: Any, batch: Any) -> Any:
        x_BSE = ops.shard(self.embed(ops, batch["tokens"]), "batch", "res_seq", None)
        h_BSE = ops.shard(self.norm(ops, x_BSE), "batch", "seq", None)
        q_BSHD = ops.einsum("bse,ehd->bshd", h_BSE, self.wq)
        k_BSKD, v_BSKD = (ops.einsum("bse,ekd->bskd", h_BSE, w) for w in (self.wk, self.wv))
        segments_BS = batch["segment_ids"]
        prefix_BS = segments_BS * 0 + ops.arange(segments_BS.shape[1])[None, :] < 3
        for rule in ({"prefix": prefix_BS, "alibi": True}, {"window": 5, "prefix": prefix_BS}):
            out_BSHD = ops.attention(q_BSHD, k_BSKD, v_BSKD, segment_ids=segments_BS, **rule)
            x_BSE = x_BSE + ops.shard(ops.einsum("bshd,hde->bse", out_BSHD, self.wo), "batch", "res_seq", None)
        return ops.cross_entropy(
            ops.shard(x_BSE, "batch", "seq", None), self.table, batch["targets"], mask=batch["mask"]
        )


class LatentBlock(Module):
    def __init__(self, *, embed: int, mlp: int, **sizes: Any) -> None:
        self.norm = RMSNorm(embed=embed)
        self.attn = LatentAttention(embed=embed, **sizes)
        self.mlp_norm = RMSNorm(embed=embed)
        self.mlp = GatedMLP(embed=embed, mlp=mlp)

    def __call__(self, ops: Any, x_BSE: Any, rope: Any, segment_ids: Any) -> Any:
        x_BSE = x_BSE + self.attn(ops, self.norm(ops, x_BSE), rope, segment_ids)
        return x_BSE + self.mlp(ops, self.mlp_norm(ops, x_BSE)), None


class Latent(Module):
    """Embedding, a Stack of blocks with latent attention, a tied output."""

    def __init__(self, *, vocab: int, embed: int, layers: int, rope_dim: int, **sizes: Any) -> None:
        self.embed = Embedding(vocab=vocab, embed=embed, init=1.0)
        self.blocks = Stack(LatentBlock(embed=embed, rope_dim=rope_dim, **sizes), layers)
        self.rope_dim = rope_dim

    def hidden(self, ops: Any, batch: Any) -> Any:
        rope = ops.rope_table(batch["positions"], self.rope_dim)
        x_BSE = ops.shard(self.embed(ops, batch["tokens"]), "batch", "res_seq", None)
        x_BSE, _ = self.blocks(ops, x_BSE, rope, batch["segment_ids"])
        return ops.shard(x_BSE, "batch", "seq", None)

    def __call__(self, ops: Any, batch: Any) -> Any:
        return ops.cross_entropy(self.hidden(ops, batch), self.embed.table, batch["targets"], mask=batch["mask"])

    def predict(self, ops: Any, batch: Any) -> Any:
        return ops.einsum("bse,ve->bsv", self.hidden(ops, batch), self.embed.table, dtype="float32")
