"""Continuing texts: the cache gives the oracle's logits of each text alone, on every backend; what mixes positions is
found; a token is a function of logits, seed, text and position.

Shape letters: B rows, S positions, V vocab.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from portatrain.backends import reference
from portatrain.errors import UserError
from portatrain.model.layers import Embedding, Experts, LatentAttention, MixtureMLP, Router
from portatrain.model.lora import LoRA, adapt
from portatrain.model.module import Definition, Module, Param, Stack, describe
from portatrain.testing.tolerance import amplification, tolerance
from portatrain.training.drawing import Drawing
from portatrain.training.generation import Generator
from portatrain.training.left_to_right import batch_of
from recipes.models.decoder import Decoder, DecoderConfig
from tests.support.running import BACKENDS, Running, parameters

VOCAB = 37
SIZES: dict[str, Any] = {"vocab": VOCAB, "embed": 16, "layers": 2, "heads": 4, "head_dim": 6, "mlp": 24}
CONFIGS = {
    "one kv head, untied": {"kv_heads": 1, "tied": False},
    "window, sinks, caps, other values": {
        **{"kv_heads": 2, "window": 4, "sinks": True, "softcap": 4.0, "logit_softcap": 8.0},
        **{"value_head_dim": 3, "qk_norm": True},
    },
}
PROMPTS = (3, 1, 6)
NEW = 5


def teacher_forced(running: Running, texts_BS: np.ndarray) -> np.ndarray:
    """Logits, (B, NEW, V): the tokens after each prompt are given, not drawn."""
    stream = Generator(running.backend, lambda: running.state)._with_cache(
        [text[:n] for text, n in zip(texts_BS, PROMPTS, strict=True)], max(PROMPTS), NEW
    )
    logits = [next(stream)]
    for n in range(NEW - 1):
        logits.append(stream.send(np.array([t[p + n] for t, p in zip(texts_BS, PROMPTS, strict=True)], np.int32)))
    return np.stack(logits, 1)


def alone(definition: Definition, texts_BS: np.ndarray) -> tuple[np.ndarray, float]:
    """The oracle's logits of every text alone, (B, NEW, V), and how far a float32 computation may lie from them."""
    params = parameters(definition)

    def logits(*values: np.ndarray) -> np.ndarray:
        named, found = dict(zip(params, values, strict=True)), []
        for text, n in zip(texts_BS, PROMPTS, strict=True):
            batch = batch_of(text[None, : n + NEW - 1])
            whole = reference.forward(definition, named, batch, method="predict", operations=reference.ReferenceOps)
            found.append(whole.value[0, n - 1 :])
        return np.stack(found)

    exact = logits(*params.values())
    change = amplification(logits, list(params.values()), exact, np.random.default_rng(0))
    return exact, tolerance(float(np.abs(exact).max()), change)


def check(make: Callable[[], Module], backends: list[str], seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    texts_BS = rng.integers(0, VOCAB, (len(PROMPTS), max(PROMPTS) + NEW)).astype(np.int32)
    exact, allowed = alone(describe(make()), texts_BS)
    for name in backends:
        running = Running(name, make())
        assert Generator(running.backend, lambda r=running: r.state).recomputes == ""
        assert np.abs(teacher_forced(running, texts_BS) - exact).max() <= allowed, name


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_cache_gives_the_logits_of_each_text_alone(config: dict[str, Any]) -> None:
    check(lambda: Decoder(DecoderConfig(**SIZES, **config)), BACKENDS)


def generated(seed: int) -> Module:
    """A decoder with options drawn at random."""
    rng = np.random.default_rng(seed)
    heads = int(rng.choice([1, 2, 4, 6]))
    divisors = [n for n in range(1, heads + 1) if heads % n == 0]
    made = Decoder(
        DecoderConfig(
            vocab=VOCAB,
            embed=int(rng.choice([8, 12, 20])),
            layers=int(rng.integers(1, 4)),
            heads=heads,
            kv_heads=int(rng.choice(divisors)),
            head_dim=int(rng.choice([2, 6, 8])),
            value_head_dim=[None, 3, 5][rng.integers(3)],
            mlp=16,
            tied=bool(rng.integers(2)),
            window=[None, 1, 3, 50][rng.integers(4)],
            softcap=[None, 3.0][rng.integers(2)],
            logit_softcap=[None, 5.0][rng.integers(2)],
            qk_norm=bool(rng.integers(2)),
            sinks=bool(rng.integers(2)),
            rope_theta=float(rng.choice([50.0, 1e4])),
        )
    )
    return adapt(made, LoRA(rank=2, targets=("*attn/w*",))) if rng.integers(2) else made


@pytest.mark.full
@pytest.mark.parametrize("seed", range(4))
def test_generated_decoders(seed: int) -> None:
    check(lambda: generated(seed), BACKENDS, seed)


@pytest.mark.soak
def test_many_generated_decoders() -> None:
    for seed in range(4, 204):
        check(lambda seed=seed: generated(seed), BACKENDS, seed)  # type: ignore[misc]


class LatentBlock(Module):
    """Latent attention and routed experts, which sort the tokens of all rows together."""

    def __init__(self) -> None:
        self.attn = LatentAttention(embed=8, heads=2, nope_dim=3, rope_dim=2, value_dim=5, kv_rank=6)
        self.mlp = MixtureMLP(router=Router(embed=8, experts=5, chosen=2), experts=Experts(embed=8, mlp=12, experts=5))

    def __call__(self, ops: Any, x_BSE: Any, rope: Any, segment_ids: Any) -> Any:
        x_BSE = x_BSE + self.attn(ops, ops.rms_norm(x_BSE), rope, segment_ids)
        return x_BSE + self.mlp(ops, ops.rms_norm(x_BSE)), None


class Routed(Module):
    def __init__(self) -> None:
        self.embed = Embedding(vocab=VOCAB, embed=8, init=1.0)
        self.blocks = Stack(LatentBlock(), 2)

    def __call__(self, ops: Any, batch: Any) -> Any:
        raise AssertionError("it only predicts")

    def predict(self, ops: Any, batch: Any) -> Any:
        rope = ops.rope_table(batch["positions"], 2, theta=100.0)
        x_BSE, _ = self.blocks(ops, self.embed(ops, batch["tokens"]), rope, batch["segment_ids"])
        return ops.einsum("bse,ve->bsv", ops.rms_norm(x_BSE), self.embed.table, dtype="float32")


@pytest.mark.full
def test_a_mixture_with_latent_attention_has_a_cache() -> None:
    check(Routed, BACKENDS)


class Toy(Module):
    """An embedding, something between, and a tied output; and attention, if the subclass has some."""

    def __init__(self) -> None:
        self.embed = Embedding(vocab=VOCAB, embed=8, init=1.0)
        self.kernel = Param(conv=3, channels=8, embed=8, fan_in_axes=2)
        self.table = Param(places=64, embed=8, fan_in_axes=0, init=1.0)

    def __call__(self, ops: Any, batch: Any) -> Any:
        return ops.cross_entropy(self.hidden(ops, batch), self.embed.table, batch["targets"])

    def predict(self, ops: Any, batch: Any) -> Any:
        return ops.einsum("bse,ve->bsv", self.hidden(ops, batch), self.embed.table, dtype="float32")

    def hidden(self, ops: Any, batch: Any) -> Any:
        x_BSE = self.embed(ops, batch["tokens"])
        return x_BSE + self.between(ops, x_BSE, batch)

    def between(self, ops: Any, x_BSE: Any, batch: Any) -> Any:
        return ops.tanh(x_BSE)

    def attended(self, ops: Any, x_BSE: Any, **options: Any) -> Any:
        x_BSHD = x_BSE[:, :, None, :]
        return ops.attention(x_BSHD, x_BSHD, x_BSHD, **options)[:, :, 0, :]


class Convolved(Toy):
    def between(self, ops: Any, x_BSE: Any, batch: Any) -> Any:
        return ops.conv(x_BSE, self.kernel, padding="causal")


class Still(Toy):
    """Mixes positions with weights of zero, which training would change."""

    def between(self, ops: Any, x_BSE: Any, batch: Any) -> Any:
        return ops.conv(x_BSE, 0 * ops.weight(self.kernel), padding="causal")


class Sliced(Toy):
    def between(self, ops: Any, x_BSE: Any, batch: Any) -> Any:
        return ops.concat([0 * x_BSE[:, :1], x_BSE[:, :-1]], axis=1)


class Counted(Toy):
    """Numbers documents by itself, in integers, which no NaN passes through."""

    def between(self, ops: Any, x_BSE: Any, batch: Any) -> Any:
        opens = ops.cast(batch["tokens"] == VOCAB + 1, "int32")
        return ops.cast(ops.cumsum(opens, axis=1), "compute")[..., None] * x_BSE


class Indexed(Toy):
    def between(self, ops: Any, x_BSE: Any, batch: Any) -> Any:
        return ops.weight(self.table)[: x_BSE.shape[1]] + 0 * x_BSE


class Placed(Toy):
    """Learned positions, from the batch, and ALiBi."""

    def between(self, ops: Any, x_BSE: Any, batch: Any) -> Any:
        seen_BSE = self.attended(ops, x_BSE, segment_ids=batch["segment_ids"], alibi=True)
        return ops.embed(self.table, batch["positions"]) + seen_BSE


class OwnSegments(Toy):
    def between(self, ops: Any, x_BSE: Any, batch: Any) -> Any:
        return self.attended(ops, x_BSE, segment_ids=batch["segment_ids"] * 1)


class BothWays(Toy):
    def between(self, ops: Any, x_BSE: Any, batch: Any) -> Any:
        return self.attended(ops, x_BSE, causal=False)


class Pairwise(Toy):
    """Attention written by hand."""

    def between(self, ops: Any, x_BSE: Any, batch: Any) -> Any:
        size = x_BSE.shape[1]
        scores = ops.einsum("bse,bte->bst", x_BSE, x_BSE)
        scores = ops.where(ops.arange(size)[:, None] >= ops.arange(size)[None, :], scores, -1e9)
        return ops.einsum("bst,bte->bse", ops.softmax(scores), x_BSE)


class Pixels(Toy):
    def between(self, ops: Any, x_BSE: Any, batch: Any) -> Any:
        return x_BSE + batch["image"]


class One(Toy):
    """Predicts one class a sample."""

    def predict(self, ops: Any, batch: Any) -> Any:
        return super().predict(ops, batch)[:, 0]


class Mute(Toy):
    predict = None  # type: ignore[assignment]


MIXES = "something in the model but attention mixes positions"
FOUND = {
    Toy: "",
    Placed: "",
    Convolved: MIXES,
    Still: MIXES,
    Sliced: MIXES,
    Pairwise: MIXES,
    Counted: "ops.cumsum runs along the positions",
    Indexed: "the model takes positions from the index of a token and not from batch['positions']",
    OwnSegments: "the segment_ids of attention are not those of the batch",
    BothWays: "attention is not causal",
}


@pytest.mark.parametrize("kind", FOUND)
def test_what_a_cache_cannot_serve_is_found(kind: type[Toy]) -> None:
    for name in BACKENDS if kind in (Still, Counted, OwnSegments) else BACKENDS[-1:]:
        running = Running(name, kind())
        assert Generator(running.backend, lambda r=running: r.state).recomputes == FOUND[kind]


@pytest.mark.parametrize("kind", [Placed, Convolved, Indexed, Pairwise])
def test_greedy_texts_are_the_oracles_with_and_without_a_cache(kind: type[Toy]) -> None:
    running = Running(BACKENDS[-1], kind())
    prompts = [[5, 6, 7], [1]]
    found = Generator(running.backend, lambda: running.state)(prompts, max_tokens=6, drawing=Drawing(temperature=0))
    for prompt, text in zip(prompts, found, strict=True):
        whole = [*prompt, *text.tokens]
        batch = batch_of(np.array([whole[:-1]], np.int32))
        logits = running.oracle(batch, method="predict", operations=reference.ReferenceOps).value[0, len(prompt) - 1 :]
        first, second = np.sort(logits, axis=-1)[:, :-3:-1].T
        assert (first - second).min() > 1e-4  # no tie that rounding decides
        assert logits.argmax(-1).tolist() == list(text.tokens)


def test_a_model_that_looks_ahead_is_refused() -> None:
    running = Running(BACKENDS[-1], BothWays())
    with pytest.raises(UserError, match="predictions change with a later token"):
        Generator(running.backend, lambda: running.state)([[1, 2]], max_tokens=2)


def test_a_text_longer_than_a_sample_goes_on_from_its_end() -> None:
    running = Running(BACKENDS[-1], Indexed())
    short = Generator(running.backend, lambda: running.state, context=4)
    (found,) = short([[5, 6, 7]], max_tokens=6, drawing=Drawing(temperature=0))
    (again,) = short([[5, 6, 7, *found.tokens[:5]]], max_tokens=1, drawing=Drawing(temperature=0))
    assert found.tokens[5:] == again.tokens


def test_draws_depend_on_seed_text_and_position_alone() -> None:
    runs = [Running(name, Placed()) for name in BACKENDS]
    made = [Generator(r.backend, lambda r=r: r.state) for r in runs]
    prompts = [[5, 6, 7], [5, 6, 7], [1]]
    drawing = Drawing(temperature=1.5, top_p=0.9, seed=4)
    whole = made[0](prompts, max_tokens=8, drawing=drawing)
    assert whole[0].tokens != whole[1].tokens
    assert all(other(prompts, max_tokens=8, drawing=drawing) == whole for other in made[1:])
    assert made[-1](prompts, max_tokens=8, drawing=drawing, rows=1) == whole
    # A text that stops is the same text, to the token before; a text that goes on draws as if it had not stopped.
    stop = whole[0].tokens[3]
    (ended, *_) = made[-1](prompts, max_tokens=8, drawing=drawing, stop={stop})
    assert ended.stopped and ended.tokens == whole[0].tokens[: whole[0].tokens.index(stop)]
    (rest,) = made[-1]([[5, 6, 7, *whole[0].tokens[:3]]], max_tokens=5, drawing=drawing)
    assert rest.tokens == whole[0].tokens[3:]
    assert made[-1](prompts, max_tokens=8, drawing=Drawing(temperature=1.5, seed=5)) != whole


def test_tokens_are_drawn_with_their_probabilities() -> None:
    logits_V = np.log(np.array([0.1, 0.5, 0.05, 0.35], np.float32))

    def shares(**options: Any) -> np.ndarray:
        drawing, n = Drawing(**options), 4000
        drawn = [drawing.token(logits_V, text=0, position=at) for at in range(n)]
        return np.bincount(drawn, minlength=4) / n

    def near(found: np.ndarray, weights: list[float]) -> bool:
        p = np.array(weights) / sum(weights)
        return bool((np.abs(found - p) <= 5 * np.sqrt(p * (1 - p) / 4000)).all())  # five standard deviations

    assert near(shares(temperature=1.0), [0.1, 0.5, 0.05, 0.35])
    assert near(shares(temperature=0.5), [0.01, 0.25, 0.0025, 0.1225])
    assert near(shares(temperature=1.0, top_p=0.8), [0, 0.5, 0, 0.35])
    assert near(shares(temperature=1.0, top_p=0.9), [0.1, 0.5, 0, 0.35])
    assert shares(temperature=1.0, top_p=1e-9).tolist() == shares(temperature=0.0).tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
    ],
)
def test_values_outside_their_range(options: dict[str, float], match: str) -> None:
    with pytest.raises(UserError, match=match):
        Drawing(**options)


def test_mistakes_are_paragraphs() -> None:
    running = Running(BACKENDS[-1], Toy())
    generator = Generator(running.backend, lambda: running.state)
    for prompts, tokens, match in (
        ([], 1, "at least one"),
        ([[1], []], 1, "prompt 1"),
        ([[1]], 0, "max_tokens"),
        ([[VOCAB]], 1, f"ids from 0 to {VOCAB - 1}"),
    ):
        with pytest.raises(UserError, match=match):
            generator(prompts, max_tokens=tokens)
    pixels = Running(BACKENDS[-1], Pixels())
    with pytest.raises(UserError, match="one that reads 'image' of the batch"):
        Generator(pixels.backend, lambda: pixels.state)([[1]], max_tokens=1)
    mute = Running(BACKENDS[-1], Mute())
    with pytest.raises(UserError, match=r"a method predict\(ops, batch\)"):
        Generator(mute.backend, lambda: mute.state)
    with pytest.raises(UserError, match=r"of shape .*vocabulary"):
        one = Running(BACKENDS[-1], One())
        Generator(one.backend, lambda: one.state)([[1]], max_tokens=1)
    with pytest.raises(UserError, match="finite numbers"):
        Drawing().token(np.array([0.0, np.nan]), text=0, position=1)
