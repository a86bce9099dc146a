"""Every surgery beside what it claims: the logits in float64, the tensors and the slots of the optimizer, on random
states of small models of all families."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from portatrain.checkpoint.surgery import INITIAL, NAMES, Edit, Surgery, chosen
from portatrain.checkpoint.surgery.layers import places
from portatrain.checkpoint.surgery.proof import BOUND
from portatrain.errors import UserError
from portatrain.model.lora import LoRA
from portatrain.model.rope import DynamicScaling, LinearScaling
from portatrain.optim import SGD, Adafactor, AdamW
from recipes.models.decoder import DecoderConfig
from recipes.models.deepseek_v3 import DeepseekV3Config
from recipes.models.gemma import GemmaConfig
from recipes.models.gpt2 import GPT2Config
from recipes.models.gpt_oss import GptOssConfig
from recipes.models.mixtral import MixtralConfig
from recipes.models.olmo2 import Olmo2Config
from recipes.models.olmo3 import Olmo3Config
from recipes.models.phi3 import Phi3Config
from recipes.models.qwen2 import Qwen2Config
from recipes.models.qwen3 import Qwen3Config
from recipes.models.qwen3_moe import Qwen3MoeConfig
from recipes.models.smollm3 import SmolLM3Config
from tests.support.operating import operated, proof, recipe_of, slope

SIZES: dict[str, Any] = {"vocab": 20, "embed": 8, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 4, "mlp": 6}
ROUTED: dict[str, Any] = {**SIZES, "experts": 4, "chosen": 2, "expert_mlp": 6}
LATENT: dict[str, Any] = {"q_rank": 6, "kv_rank": 6, "nope_dim": 4, "rope_dim": 4, "value_dim": 4}
DECODER = DecoderConfig(**SIZES, sinks=True, attention_bias=True, mlp_bias=True)
QK_NORMED = DecoderConfig(**SIZES, qk_norm=True)
GPT2 = GPT2Config(vocab=20, embed=8, layers=3, heads=2, positions=8, tied=False)
MIXTRAL = MixtralConfig(**ROUTED, norm_eps=1e-5)
OLMO2 = Olmo2Config(**{**SIZES, "kv_heads": 4})
FOUR: dict[str, Any] = {"layers": 4, "sliding": (True, False) * 2}
SIX: dict[str, Any] = {"layers": 6, "sliding": (True, False) * 3}
GEMMA = GemmaConfig(**{**SIZES, **FOUR}, generation=2, window=3, query_scale=4, logit_softcap=5.0)
GPT_OSS = GptOssConfig(**{**ROUTED, **FOUR}, window=3)
SMOLLM3 = SmolLM3Config(**{**SIZES, **FOUR}, window=3, rotated=(True, False) * 2)
DEEPSEEK = DeepseekV3Config(**ROUTED, **LATENT)
DENSE_QWEN = Qwen3Config(**SIZES)
PLAIN = DecoderConfig(**SIZES)
OLMO3 = Olmo3Config(**{**SIZES, "kv_heads": 4})
GEMMA_3 = replace(GEMMA, generation=3, tied=False)
PHI3 = Phi3Config(**SIZES)
QWEN2 = Qwen2Config(**SIZES)
QWEN_MOE = Qwen3MoeConfig(**ROUTED)

CASES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "layers of a decoder with all biases and sinks": ("layers", DECODER, {"layers": 5}),
    "layers of GPT-2": ("layers", GPT2, {"layers": 4}),
    "layers with norms of queries and keys": ("layers", QK_NORMED, {"layers": 3}),
    "layers of OLMo 2, with norms after each part": ("layers", OLMO2, {"layers": 3}),
    "layers of two kinds": ("layers", GEMMA, SIX),
    "layers of SmolLM 3": ("layers", SMOLLM3, {**SIX, "rotated": (True, False) * 3}),
    "layers of mixtures": ("layers", MIXTRAL, {"layers": 3}),
    "layers of mixtures with biases": ("layers", GPT_OSS, SIX),
    "layers with latents and a balance": ("layers", DEEPSEEK, {"layers": 3}),
    "feed-forward width": ("width", DECODER, {"mlp": 9}),
    "feed-forward width of GPT-2": ("width", GPT2, {"mlp": 40}),
    "width of experts": ("width", MIXTRAL, {"expert_mlp": 7}),
    "more query heads": ("width", DECODER, {"heads": 6}),
    "more groups of heads": ("width", DECODER, {"heads": 8, "kv_heads": 4}),
    "more heads of both kinds, and norms": ("width", QK_NORMED, {"heads": 9, "kv_heads": 3}),
    "heads and feed-forward": ("width", PLAIN, {"heads": 8, "mlp": 12}),
    "features of a decoder with all biases and sinks": ("embed", DECODER, {"embed": 16}),
    "features of a decoder, three times, untied": ("embed", replace(PLAIN, tied=False), {"embed": 24}),
    "features of a decoder with norms of queries": ("embed", QK_NORMED, {"embed": 16}),
    "features of OLMo 2": ("embed", OLMO2, {"embed": 16}),
    "features of OLMo 3": ("embed", OLMO3, {"embed": 16}),
    "features of Gemma 2, scaled and tied": ("embed", GEMMA, {"embed": 24}),
    "features of Gemma 3, scaled": ("embed", GEMMA_3, {"embed": 16}),
    "features of SmolLM 3": ("embed", SMOLLM3, {"embed": 16}),
    "features of Phi 3": ("embed", PHI3, {"embed": 16}),
    "features of Qwen 2": ("embed", QWEN2, {"embed": 16}),
    "features of Qwen 3": ("embed", DENSE_QWEN, {"embed": 16}),
    "features of Mixtral": ("embed", MIXTRAL, {"embed": 16}),
    "features of Qwen 3's mixture": ("embed", QWEN_MOE, {"embed": 16}),
    "features of gpt-oss": ("embed", GPT_OSS, {"embed": 16}),
    "features of DeepSeek V3": ("embed", DEEPSEEK, {"embed": 16}),
    "vocabulary, tied": ("vocabulary", PLAIN, {"vocab": 27}),
    "vocabulary, untied": ("vocabulary", GPT2, {"vocab": 33}),
    "vocabulary with a softcap": ("vocabulary", GEMMA, {"vocab": 21}),
}
UPCYCLED: dict[str, tuple[Any, Any]] = {
    "a decoder to Mixtral": (PLAIN, MIXTRAL),
    "Qwen 3 to its mixture": (DENSE_QWEN, Qwen3MoeConfig(**ROUTED, normalise=True)),
    "Qwen 3 with experts in every second layer": (
        replace(DENSE_QWEN, layers=4),
        Qwen3MoeConfig(**{**ROUTED, "layers": 4}, normalise=True, routed=(False, True) * 2),
    ),
    "Qwen 3 with experts in the last layers": (
        replace(DENSE_QWEN, layers=4),
        Qwen3MoeConfig(**{**ROUTED, "layers": 4}, normalise=True, routed=(False, True, True, True)),
    ),
    "DeepSeek with its first layer dense": (
        replace(DEEPSEEK, layers=3, dense_layers=3),
        replace(DEEPSEEK, layers=3, dense_layers=1),
    ),
    "one expert a token": (PLAIN, replace(MIXTRAL, chosen=1)),
    "all experts": (PLAIN, replace(MIXTRAL, chosen=4)),
}


@pytest.mark.parametrize("what", CASES)
def test_the_function_stays(what: str) -> None:
    name, model, sizes = CASES[what]
    found, _ = operated(recipe_of(model), recipe_of(replace(model, **sizes)), name)
    proved = proof(found)
    assert proved.claims and proved.holds and proved.difference <= BOUND * proved.scale
    assert proved.outputs == "logits" and proved.scale > 0.1 and proved.positions == 24
    assert proved.ids == (20 if name == "vocabulary" else None)


@pytest.mark.parametrize("what", UPCYCLED)
def test_experts_keep_the_function(what: str) -> None:
    found, _ = operated(*map(recipe_of, UPCYCLED[what]), "experts")
    proved = proof(found)
    assert proved.claims and proved.difference <= BOUND * proved.scale


def test_a_shared_part_starts_at_an_output_of_zero() -> None:
    dense = replace(DEEPSEEK, dense_layers=2)
    found, _ = operated(recipe_of(dense), recipe_of(DEEPSEEK), "experts")
    new = found.new()
    assert not new["blocks/mlp/shared/down"].any() and new["blocks/mlp/shared/gate"].any()
    assert proof(found).difference <= BOUND * proof(found).scale


@pytest.mark.parametrize("other", [{"normalise": False}, {"weight_scale": 2.5}])
def test_a_router_whose_weights_do_not_add_up_to_one_is_no_claim(other: dict[str, Any]) -> None:
    found, _ = operated(recipe_of(replace(DEEPSEEK, dense_layers=2)), recipe_of(replace(DEEPSEEK, **other)), "experts")
    proved = proof(found)
    assert not proved.claims and "do not add up to 1" in proved.why and proved.difference > 1e-3 * proved.scale


@dataclass(frozen=True, kw_only=True)
class Blind(DecoderConfig):
    """A decoder without logits, as a model that only has a loss."""

    def build(self) -> Any:
        model = super().build()
        model.predict = None  # type: ignore[assignment,method-assign]
        return model


def test_a_model_without_logits_is_measured_by_its_losses() -> None:
    blind = Blind(**SIZES)
    proved = proof(operated(recipe_of(blind), recipe_of(replace(blind, layers=3)), "layers")[0])
    assert proved.claims and proved.holds and (proved.outputs, proved.positions) == ("losses of samples", 3)
    proved = proof(operated(recipe_of(blind), recipe_of(replace(blind, vocab=30)), "vocabulary")[0])
    assert not proved.claims and "no method predict" in proved.why and proved.difference > 0.1


def test_tensors_in_bfloat16() -> None:
    """Kept ones keep their bits, and sums of two are rounded to the nearest."""
    half, lora = {"precision": "bf16-state"}, LoRA(rank=2)
    found, state = operated(recipe_of(PLAIN, lora=lora, **half), recipe_of(PLAIN, **half), "merge-lora")
    proved = proof(found)
    assert proved.difference <= BOUND * proved.scale and 1e-4 * proved.scale < proved.stored < 0.1 * proved.scale
    wo, table = found.stored("params/blocks/attn/wo"), found.stored("params/embed/table")
    assert wo.dtype == table.dtype == state["params/embed/table"].dtype != np.float32
    assert table.tobytes() == state["params/embed/table"].tobytes()
    assert np.array_equal(wo, found.exact("params/blocks/attn/wo").astype(wo.dtype))


# ---- what the proof finds


PLANTED = {
    "layers of a decoder with all biases and sinks": "blocks/mlp/down_bias",
    "feed-forward width": "blocks/mlp/down",
    "more groups of heads": "blocks/attn/wq",
    "vocabulary, tied": "embed/table",
}


@pytest.mark.parametrize("what", PLANTED)
def test_a_surgery_that_does_not_keep_the_function_is_refused(what: str) -> None:
    """A fault of one part in a million, in one tensor that it makes."""
    name, model, sizes = CASES[what]
    before, after = recipe_of(model), recipe_of(replace(model, **sizes))
    right = chosen(name)(before.describe(), after.describe())
    at = PLANTED[what]
    edit = right.edits[at]
    wrong = replace(edit, make=lambda *given: edit.make(*given) + 1e-6)
    found, _ = operated(before, after, Surgery(edits={**right.edits, at: wrong}))
    assert not proof(found).holds
    with pytest.raises(UserError, match="it says that the function stays, got a difference of"):
        proof(found).check(name, {"model.layers": [2, 3]})


def test_the_loss_on_old_ids_rises_by_no_more_than_the_vocabulary() -> None:
    """The logit of a new id is the mean of the old ones (Jensen), so the normaliser grows by at most the ratio."""
    for size in (21, 40, 200):
        found, _ = operated(recipe_of(PLAIN), recipe_of(replace(PLAIN, vocab=size)), "vocabulary")
        was, now = proof(found).loss
        assert 0 < now - was <= np.log(size / 20) + 1e-12


# ---- tensors and slots


def names_of(found: Any, fate: str) -> set[str]:
    return {name for name in found.names if found.fate(name) == fate}


def test_new_rows_are_the_mean_and_their_slots_zero() -> None:
    found, state = operated(recipe_of(PLAIN), recipe_of(replace(PLAIN, vocab=27)), "vocabulary")
    for role in ("params", "ema"):
        made, was = found.stored(f"{role}/embed/table"), state[f"{role}/embed/table"]
        assert np.array_equal(made[:20], was) and made.dtype == np.float32
        assert np.allclose(made[20:], was.mean(0), rtol=1e-6, atol=1e-7)
    for slot in ("m", "v"):
        made = found.stored(f"opt/{slot}/embed/table")
        assert np.array_equal(made[:20], state[f"opt/{slot}/embed/table"]) and not made[20:].any()
    kept = names_of(found, "kept")
    assert names_of(found, "mapped") == {"opt/m/embed/table", "opt/v/embed/table"}
    assert all(np.array_equal(found.stored(name), state[name]) for name in kept) and len(kept) == len(found.names) - 4


def test_new_layers_are_copies_that_write_nothing() -> None:
    assert places(4, 6) == [(0, False), (1, False), (1, True), (2, False), (3, False), (3, True)]
    assert places(1, 3) == [(0, False), (0, True), (0, True)]
    assert places(3, 4) == [(0, False), (1, False), (2, False), (2, True)]
    found, state = operated(recipe_of(DECODER), recipe_of(replace(DECODER, layers=3)), "layers")
    zero = {"blocks/attn/wo", "blocks/attn/o_bias", "blocks/mlp/down", "blocks/mlp/down_bias"}
    for name, made in found.new(rounded=True).items():
        was = state[f"params/{name}"]
        if name.startswith("blocks/"):
            assert np.array_equal(made[:2], was), name
            assert np.array_equal(made[2], np.zeros_like(was[1]) if name in zero else was[1]), name
            slot = found.stored(f"opt/m/{name}")
            assert np.array_equal(slot[:2], state[f"opt/m/{name}"]) and not slot[2].any()


def test_new_heads_go_behind_those_of_their_group() -> None:
    """4 heads share 2 key-value heads; of 6, the third and the sixth are new."""
    found, state = operated(recipe_of(DECODER), recipe_of(replace(DECODER, heads=6)), "width")
    new, old = found.new(rounded=True), state["params/blocks/attn/wo"]
    assert np.array_equal(new["blocks/attn/wo"][:, [0, 1, 3, 4]], old) and not new["blocks/attn/wo"][:, [2, 5]].any()
    assert np.array_equal(new["blocks/attn/wq"][:, :, [0, 1, 3, 4]], state["params/blocks/attn/wq"])
    assert new["blocks/attn/wq"][:, :, [2, 5]].std() > 0.1  # initial values: the head learns once wo does
    slot = found.stored("opt/v/blocks/attn/wo")
    assert np.array_equal(slot[:, [0, 1, 3, 4]], state["opt/v/blocks/attn/wo"]) and not slot[:, [2, 5]].any()


def test_each_copy_of_a_feature_gets_its_share_of_the_gradient() -> None:
    """The slots are made of a mean as the gradients are: of three elements of every tensor, by finite differences. The
    copies of what writes differ, as those of what reads do, so it is their mean."""
    found, _ = operated(recipe_of(GEMMA), recipe_of(replace(GEMMA, embed=16)), "embed")
    after, before, rng = found.new(), found.old(), np.random.default_rng(2)
    for name, edit in found.surgery.edits.items():
        axis = found.after.definition.params[name].axes.index("embed")
        for _ in range(3):
            at = tuple(int(rng.integers(n)) for n in before[name].shape)
            other = (*at[:axis], at[axis] + 8, *at[axis + 1 :])
            old = slope(found.before.definition, before, name, at)
            new = np.mean([slope(found.after.definition, after, name, i) for i in (at, other)])
            assert edit.slots is not None
            share = [edit.slots(np.ones(before[name].shape), degree)[at] for degree in (1, 2)]
            assert abs(new - share[0] * old) <= 1e-6 * max(1.0, abs(old)), name
            assert share[1] == pytest.approx(share[0] ** 2)
        assert np.array_equal(*np.split(found.stored(f"opt/v/{name}"), 2, axis))


def test_copies_of_a_feature_do_not_stay_equal() -> None:
    """What reads the copies differs, and adds up to the old weight."""
    found, state = operated(recipe_of(PLAIN), recipe_of(replace(PLAIN, embed=16)), "embed")
    made, was = found.new()["blocks/mlp/gate"], state["params/blocks/mlp/gate"].astype(np.float64)
    first, second = np.split(made, 2, 1)
    assert np.allclose(first + second, was, rtol=1e-12, atol=1e-12) and np.abs(first - second).max() > 0.1
    assert np.array_equal(*np.split(found.new()["blocks/mlp/down"], 2, 2))


def test_experts_share_the_gradient_of_the_dense_part() -> None:
    """An expert of four gets a quarter of the gradient: a quarter of its mean, a sixteenth of that of its square."""
    found, state = operated(recipe_of(PLAIN), recipe_of(MIXTRAL), "experts")
    for part in ("gate", "up", "down"):
        for expert in range(4):
            for role, factor in (("params", 1.0), ("ema", 1.0), ("opt/m", 0.25), ("opt/v", 0.0625)):
                made = found.stored(f"{role}/blocks/mlp/experts/{part}")[:, expert]
                assert np.array_equal(made, np.float32(factor) * state[f"{role}/blocks/mlp/{part}"])
    assert names_of(found, "fresh") == {f"{role}/blocks/mlp/router/weight" for role in ("opt/m", "opt/v", "ema")}
    assert found.as_json()["dropped"] == [f"blocks/mlp/{part}" for part in ("down", "gate", "up")]
    assert not found.stored("opt/m/blocks/mlp/router/weight").any()


def test_experts_in_some_layers_keep_the_others_with_their_slots() -> None:
    """Layers 1 and 3 of four are routed, so one Stack of two layers a period holds them."""
    before = replace(DENSE_QWEN, layers=4)
    after = Qwen3MoeConfig(**{**ROUTED, "layers": 4}, normalise=True, routed=(False, True) * 2)
    found, state = operated(recipe_of(before), recipe_of(after), "experts")
    for role in ("params", "ema", "opt/m", "opt/v"):
        for layer, rows in ((0, [0, 2]), (1, [1, 3])):
            for part in ("attn/wq", "mlp_norm/scale"):
                made = found.stored(f"{role}/blocks/runs/0/layer/{layer}/{part}")
                assert np.array_equal(made, state[f"{role}/blocks/{part}"][rows])
        down = found.stored(f"{role}/blocks/runs/0/layer/1/mlp/experts/down")
        share = {"opt/m": 0.25, "opt/v": 0.0625}.get(role, 1.0)
        assert all(
            np.array_equal(down[:, i], np.float32(share) * state[f"{role}/blocks/mlp/down"][[1, 3]]) for i in range(4)
        )
        dense = found.stored(f"{role}/blocks/runs/0/layer/0/mlp/down")
        assert np.array_equal(dense, state[f"{role}/blocks/mlp/down"][[0, 2]])


class Unknown(AdamW):
    """A rule of your own that does not say what its slots mean."""

    def meaning(self, slot: str) -> None:
        return None


@pytest.mark.parametrize("rule", [SGD(lr=0.1, momentum=0.9), Adafactor(lr=0.1), Unknown(lr=0.1)])
def test_slots_without_a_rule_start_at_zero(rule: Any) -> None:
    """Factors of Adafactor have other shapes than their weights, and nobody knows what the slots of `Unknown` mean."""
    before, after = (recipe_of(replace(PLAIN, layers=n), optimizer=rule) for n in (2, 3))
    found, state = operated(before, after, "layers")
    slots = [name for name in found.names if name.startswith("opt/")]
    made = {name for name in slots if "/blocks/" in name}
    factored = {n for n in made if state[n].shape != state[f"params/{n.split('/', 2)[2]}"].shape}
    assert bool(factored) == isinstance(rule, Adafactor) and found.fate(slots[0]) == "kept"
    assert {n for n in slots if found.fate(n) == "fresh"} == (made if isinstance(rule, Unknown) else factored)
    for name in slots:
        wanted = state[name] if name not in made else np.concatenate([state[name], np.zeros_like(state[name][:1])])
        assert np.array_equal(found.stored(name), np.zeros_like(wanted) if found.fate(name) == "fresh" else wanted)


# ---- surgery that changes the function


def test_a_scale_of_qk_norm_keeps_the_function_if_all_queries_have_one_length() -> None:
    """Orthogonal weights keep the length that the norm before them gives to every token, so a scale can undo it."""
    sizes: dict[str, Any] = {**SIZES, "heads": 1, "kv_heads": 1, "head_dim": 8, "norm_eps": 1e-30}
    before, after = recipe_of(DecoderConfig(**sizes)), recipe_of(DecoderConfig(**sizes, qk_norm=True))
    found, state = operated(before, after, "qk-norm")
    rng = np.random.default_rng(5)
    state["params/blocks/attn_norm/scale"] = np.ones((2, 8))
    for letter in "qk":
        turns = [np.linalg.qr(rng.normal(size=(8, 8)))[0] for _ in range(2)]
        state[f"params/blocks/attn/w{letter}"] = np.stack([0.7 * t for t in turns])[:, :, None]
    proved = proof(found)
    assert not proved.claims and proved.difference <= BOUND * proved.scale
    assert np.allclose(found.new()["blocks/attn/q_norm/scale"], 0.7, rtol=1e-12)


@pytest.mark.parametrize("model", [PLAIN, DECODER])
def test_qk_norm_is_no_claim_and_keeps_the_size_of_scores(model: DecoderConfig) -> None:
    found, state = operated(recipe_of(model), recipe_of(replace(model, qk_norm=True)), "qk-norm")
    proved = proof(found)
    assert not proved.claims and "no scale" in proved.why and proved.difference > 1e-3 * proved.scale
    scale = state["params/blocks/attn_norm/scale"].astype(np.float64)
    for letter in "qk":
        made = found.new()[f"blocks/attn/{letter}_norm/scale"]
        for layer in range(2):
            x_NE = np.random.default_rng(0).normal(size=(20000, 8)) * scale[layer]
            heads = np.einsum("ne,ehd->nhd", x_NE, state[f"params/blocks/attn/w{letter}"][layer].astype(np.float64))
            assert np.allclose(made[layer], np.sqrt((heads**2).mean()), rtol=0.03)  # sqrt(2 / 20000), three times


def test_rope_says_by_how_much() -> None:
    def stretched(scaling: Any) -> Any:
        return proof(operated(recipe_of(PLAIN), recipe_of(replace(PLAIN, rope_scaling=scaling)), "rope")[0])

    by_two, by_one = stretched(LinearScaling(factor=2.0)), stretched(LinearScaling(factor=1.0))
    assert not by_two.claims and by_two.difference > 1e-3 * by_two.scale and by_two.mean < by_two.difference
    assert by_one.difference == 0.0
    assert stretched(DynamicScaling(factor=2.0, original=64)).difference == 0.0  # short texts stay as they were


@pytest.mark.parametrize("model", [DECODER, QK_NORMED])
def test_lora_is_merged_or_dropped(model: Any) -> None:
    lora = LoRA(rank=2, alpha=3.0)
    found, state = operated(recipe_of(model, lora=lora), recipe_of(model), "merge-lora")
    proved = proof(found)
    assert proved.claims and proved.difference <= BOUND * proved.scale
    assert 0 < proved.stored < 1e-5 * proved.scale  # float32 rounds each merged weight
    wq = [state[f"params/blocks/attn/wq{end}"].astype(np.float64) for end in ("", "/lora_a", "/lora_b")]
    assert np.allclose(found.new()["blocks/attn/wq"], wq[0] + 1.5 * np.einsum("ler,lrhd->lehd", *wq[1:]), rtol=1e-12)
    assert found.fate("opt/m/blocks/attn/wq") == "fresh" and found.fate("opt/m/embed/table") == "kept"
    dropped, _ = operated(recipe_of(model, lora=lora), recipe_of(model), "drop-lora")
    assert not proof(dropped).claims and proof(dropped).difference > 1e-3
    assert np.array_equal(dropped.stored("params/blocks/attn/wq"), state["params/blocks/attn/wq"])


@pytest.mark.parametrize("model", [MIXTRAL, DEEPSEEK], ids=["Mixtral", "latents"])
def test_lora_of_experts_is_merged(model: Any) -> None:
    lora = LoRA(rank=2, alpha=3.0)
    found, state = operated(recipe_of(model, lora=lora), recipe_of(model), "merge-lora")
    proved = proof(found)
    assert proved.claims and proved.difference <= BOUND * proved.scale
    names = [n.removesuffix("/lora_a") for n in state if n.startswith("params/") and n.endswith("experts/up/lora_a")]
    assert names
    for name in names:
        w, a, b = (state[f"{name}{end}"].astype(np.float64) for end in ("", "/lora_a", "/lora_b"))
        assert np.allclose(found.new()[name.removeprefix("params/")], w + 1.5 * np.einsum("lxer,lxrm->lxem", a, b))


# ---- one of your own, and mistakes


def test_a_surgery_of_your_own(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from portatrain.checkpoint.surgery import Edit, Surgery\n\n"
        "def untie(before, after):\n"
        "    copy = Edit(of=('embed/table',), make=lambda table: table, slots=lambda slot, degree: slot)\n"
        "    return Surgery(edits={'head': copy})\n\n"
        "def nothing(before, after):\n    return {}\n"
    )
    before, after = recipe_of(PLAIN), recipe_of(replace(PLAIN, tied=False))
    untie = chosen("mine.py:untie", cwd=tmp_path)(before.describe(), after.describe())
    found, state = operated(before, after, untie)
    assert proof(found).difference == 0.0 and proof(found).claims
    assert np.array_equal(found.stored("opt/v/head"), state["opt/v/embed/table"])
    with pytest.raises(UserError, match="expected a Surgery from the function, got a dict"):
        chosen("mine.py:nothing", cwd=tmp_path)(before.describe(), after.describe())
    with pytest.raises(UserError, match="expected a function other"):
        chosen("mine.py:other", cwd=tmp_path)
    with pytest.raises(UserError, match="no such file"):
        chosen("yours.py:other", cwd=tmp_path)


MISTAKES: dict[str, tuple[str, Any, Any, str]] = {
    "an unknown name": ("layer", PLAIN, PLAIN, "Did you mean layers?"),
    "a size that shrinks": ("layers", PLAIN, replace(PLAIN, layers=1), "expected at least the 2 that axis layers has"),
    "a size that stays": ("vocabulary", PLAIN, replace(PLAIN, norm_eps=0.1), "expected a larger size of vocab"),
    "embed": ("width", PLAIN, replace(PLAIN, embed=12), "expected another size of heads and kv_heads and mlp alone"),
    "head_dim": ("width", PLAIN, replace(PLAIN, head_dim=6), "got head_dim 4 before, 6 after"),
    "head_dim with embed": ("embed", PLAIN, replace(PLAIN, embed=16, head_dim=8), "so no weights give the old scores"),
    "head_dim of GPT-2": ("embed", GPT2, replace(GPT2, embed=16, mlp=32), "its default is embed / heads"),
    "no whole multiple": ("embed", PLAIN, replace(PLAIN, embed=12), "expected a whole multiple of the features"),
    "features stay": ("embed", PLAIN, PLAIN, "expected a larger size of embed"),
    "another axis": ("layers", PLAIN, replace(PLAIN, layers=3, mlp=9), "expected another size of layers alone"),
    "other parts": ("layers", PLAIN, replace(QK_NORMED, layers=3), "got new: blocks/attn/k_norm/scale"),
    "too few heads": ("width", PLAIN, replace(PLAIN, kv_heads=4), "at least 2 query heads for each of the 4"),
    "no experts": ("experts", PLAIN, replace(PLAIN, mlp=9), "expected a new model with a MixtureMLP"),
    "experts of another size": ("experts", PLAIN, replace(MIXTRAL, expert_mlp=3), "of shape [2, 8, 3]"),
    "experts with other parts": ("experts", replace(PLAIN, mlp_bias=True), replace(MIXTRAL, vocab=21), "embed/table ("),
    "experts in more layers": (
        "experts",
        replace(DEEPSEEK, layers=3, dense_layers=2),
        replace(DEEPSEEK, layers=3, dense_layers=1),
        "expected layers that were in one Stack before",
    ),
    "experts and more layers": (
        "experts",
        PLAIN,
        replace(MIXTRAL, layers=3),
        "expected the 2 layers that the model has",
    ),
    "no norms": ("qk-norm", PLAIN, PLAIN, "expected new tensors q_norm/scale and k_norm/scale"),
    "stretched sizes": ("rope", PLAIN, replace(PLAIN, vocab=21), "expected the same sizes"),
    "no LoRA": ("merge-lora", PLAIN, PLAIN, "there is nothing to merge or to drop"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_ends_in_one_paragraph(what: str) -> None:
    name, before, after, said = MISTAKES[what]
    with pytest.raises(UserError) as raised:
        operated(recipe_of(before), recipe_of(after), name)
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_mistakes_of_a_surgery_of_your_own() -> None:
    def refused(said: str, edits: dict[str, Edit], after: Any = PLAIN) -> None:
        with pytest.raises(UserError, match=said):
            found, _ = operated(recipe_of(PLAIN), recipe_of(after), Surgery(edits=edits))
            proof(found)

    def edit(make: Any, of: Sequence[str] = (INITIAL,)) -> Edit:
        return Edit(of=tuple(of), make=make)

    refused("something else for head", {"head": np.array})  # type: ignore[dict-item]
    with pytest.raises(UserError, match="make=a function, and slots=a function or None"):
        Edit(of="embed/table", make=np.array)  # type: ignore[arg-type]
    refused("expected edits of tensors that the new model has, got head", {"head": edit(np.array)})
    refused("got table .for embed/table", {"embed/table": edit(np.array, ["table"])})
    refused("expected an array of shape .20, 8., as the new", {"embed/table": edit(lambda start: start[:, :4])})
    refused("got embed/table .*20, 8. before, .21, 8. after", {}, replace(PLAIN, vocab=21))


def test_every_surgery_is_tested() -> None:
    assert set(NAMES) == {case[0] for case in CASES.values()} | {
        "experts",
        "qk-norm",
        "rope",
        "merge-lora",
        "drop-lora",
    }
