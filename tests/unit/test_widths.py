"""The maximal update parametrization: scales and rates by a table written by hand, what it computes, and refusals."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portatrain import MuP
from portatrain.backends import reference
from portatrain.backends.base import Context
from portatrain.backends.program import make_program
from portatrain.checkpoint.interop.huggingface import hub_of
from portatrain.checkpoint.surgery.edits import Surgery
from portatrain.checkpoint.surgery.operate import Operated
from portatrain.errors import UserError
from portatrain.model.lora import LoRA
from portatrain.model.module import Module, Normal, Param, Stack, describe
from portatrain.model.scaled import Scaled
from portatrain.optim import SGD, Adafactor, AdamW, Lion, Muon, Rule
from portatrain.recipe import Recipe, apply_overrides, load_recipe
from recipes.models.decoder import DecoderConfig
from recipes.models.deepseek_v3 import DeepseekV3Config
from recipes.models.gpt_oss import GptOssConfig
from recipes.models.mixtral import MixtralConfig
from recipes.models.vit import ViTConfig
from tests.docs.pages import ROOT
from tests.support.running import image_batch, parameters, tokens_batch

BASE = {"embed": 32, "heads": 4, "kv_heads": 2, "mlp": 48}


def recipe(
    spec: Any = None, *, optimizer: Rule | None = None, base: dict[str, Any] | None = None, **options: Any
) -> Recipe:
    """A recipe with muP; without a spec that of a decoder of twice the base width."""
    spec = spec or DecoderConfig(vocab=64, layers=3, **{name: 2 * n for name, n in BASE.items()})
    mup = MuP(base=base or BASE, **options)
    return dataclasses.replace(
        load_recipe("tiny-lm"), model=spec, optimizer=optimizer or AdamW(lr=1e-2), parametrization=mup
    )


# Yang et al. 2022, table 8, worked out by hand for embed 32 -> 64 and -> 128: (std, lr of Adam, lr of SGD, multiplier).
BY_HAND = {
    64: {
        "embed/table": (0.02, 1, 2, 1 / 2),
        "head": (32**-0.5, 1, 2, 1 / 2),
        "blocks/attn/wq": (64**-0.5, 1 / 2, 1, 1),
        "blocks/attn/wk": (64**-0.5, 1 / 2, 1, 1),
        "blocks/attn/wv": (64**-0.5, 1 / 2, 1, 1),
        "blocks/attn/wo": (64**-0.5, 1 / 2, 1, 1),
        "blocks/mlp/gate": (64**-0.5, 1 / 2, 1, 1),
        "blocks/mlp/up": (64**-0.5, 1 / 2, 1, 1),
        "blocks/mlp/down": (96**-0.5, 1 / 2, 1, 1),
        "blocks/attn_norm/scale": (None, 1, 2, 1),
        "blocks/mlp_norm/scale": (None, 1, 2, 1),
        "final_norm/scale": (None, 1, 2, 1),
    },
    128: {
        "embed/table": (0.02, 1, 4, 1 / 4),
        "head": (32**-0.5, 1, 4, 1 / 4),
        "blocks/attn/wq": (128**-0.5, 1 / 4, 1, 1),
        "blocks/attn/wk": (128**-0.5, 1 / 4, 1, 1),
        "blocks/attn/wv": (128**-0.5, 1 / 4, 1, 1),
        "blocks/attn/wo": (128**-0.5, 1 / 4, 1, 1),
        "blocks/mlp/gate": (128**-0.5, 1 / 4, 1, 1),
        "blocks/mlp/up": (128**-0.5, 1 / 4, 1, 1),
        "blocks/mlp/down": (192**-0.5, 1 / 4, 1, 1),
        "blocks/attn_norm/scale": (None, 1, 4, 1),
        "blocks/mlp_norm/scale": (None, 1, 4, 1),
        "final_norm/scale": (None, 1, 4, 1),
    },
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("width", BY_HAND)
def test_scales_and_rates_are_those_worked_out_by_hand(width: int, tied: bool) -> None:
    grown = {name: n * width // 32 for name, n in BASE.items()}
    spec = DecoderConfig(vocab=64, layers=3, tied=tied, **grown)
    want = {name: row for name, row in BY_HAND[width].items() if name != "head" or not tied}
    for column, rule in ((1, AdamW(lr=1e-2)), (1, Lion(lr=1e-2)), (1, Adafactor(lr=1e-2)), (2, SGD(lr=1e-2))):
        params = recipe(spec, optimizer=rule).describe().params
        assert params.keys() == want.keys()
        for name, row in want.items():
            std = params[name].init.std if isinstance(params[name].init, Normal) else None
            assert (std, params[name].lr, params[name].multiplier) == pytest.approx((row[0], row[column], row[3])), name


@settings(max_examples=60, deadline=None)
@given(
    grown=st.tuples(st.sampled_from([1, 2, 3, 8]), st.sampled_from([1, 2]), st.sampled_from([1, 4])),
    heads=st.sampled_from([(2, 2), (4, 2), (4, 1)]),
    kv_grows=st.booleans(),
    tied=st.booleans(),
    rule=st.sampled_from([AdamW(lr=1e-2), SGD(lr=1e-2, momentum=0.9)]),
)
def test_every_decoder_has_the_scales_of_its_axes(
    grown: tuple[int, int, int], heads: tuple[int, int], kv_grows: bool, tied: bool, rule: Rule
) -> None:
    """embed, head_dim and mlp grow by numbers of their own; the number of heads with embed, and kv heads or not."""
    e, d, m = grown
    base = {"embed": 16, "heads": heads[0], "kv_heads": heads[1], "head_dim": 4, "mlp": 24}
    k = e if kv_grows else 1
    spec = DecoderConfig(
        vocab=48,
        layers=2,
        tied=tied,
        **{"embed": 16 * e, "heads": heads[0] * e, "kv_heads": heads[1] * k, "head_dim": 4 * d, "mlp": 24 * m},
    )
    definition = recipe(spec, optimizer=rule, base=base).describe()

    def weight(fan_in: int, grown_in: float, grown_out: float) -> tuple[float, float, float]:
        """(std, lr, multiplier) of a weight with this fan-in at the base."""
        if grown_in > 1 and grown_out == 1:
            return fan_in**-0.5, (1 if isinstance(rule, AdamW) else grown_in), 1 / grown_in
        lr = 1 / grown_in if isinstance(rule, AdamW) else grown_out / grown_in
        return (fan_in * grown_in) ** -0.5, lr, 1

    table = 1 if isinstance(rule, AdamW) else e
    want = {
        "embed/table": (0.02, table, 1 / e),
        "head": (0.25, table, 1 / e),
        "blocks/attn/wq": weight(16, e, e * d),
        "blocks/attn/wk": weight(16, e, k * d),
        "blocks/attn/wv": weight(16, e, k * d),
        "blocks/attn/wo": weight(4 * heads[0], e * d, e),
        "blocks/mlp/gate": weight(16, e, m),
        "blocks/mlp/up": weight(16, e, m),
        "blocks/mlp/down": weight(24, m, e),
    }
    for name, info in definition.params.items():
        if name in want:
            assert isinstance(info.init, Normal)
            assert (info.init.std, info.lr, info.multiplier) == pytest.approx(want[name], rel=1e-12), name
        else:
            assert (info.lr, info.multiplier) == (table if "norm" in name else 1, 1), name
    scale = definition.modules["blocks/attn"].scale  # type: ignore[attr-defined]
    assert scale == (None if d == 1 else pytest.approx(4**0.5 / (4 * d)))  # sqrt(d0) / d


def test_at_the_base_width_nothing_changes() -> None:
    spec = DecoderConfig(vocab=64, layers=3, tied=False, **BASE)
    for rule in (AdamW(lr=1e-2), SGD(lr=1e-2), Lion(lr=1e-2), Adafactor(lr=1e-2), Muon(lr=1e-2)):
        with_mup = recipe(spec, optimizer=rule)
        found, plain = with_mup.describe(), dataclasses.replace(with_mup, parametrization=None).describe()
        assert {n: dataclasses.replace(t, kind="") for n, t in found.params.items()} == plain.params
        assert {t.kind for t in found.params.values()} == {"same"}
        assert not any(isinstance(module, Scaled) for module in found.modules.values())


def test_without_a_parametrization_hash_and_tensors_are_as_before() -> None:
    plain = load_recipe("tiny-lm")
    assert "parametrization" not in plain.to_json()
    for info in plain.describe().params.values():
        assert (info.kind, info.lr, info.multiplier) == ("", 1.0, 1.0)
    changed = recipe()
    assert changed.sha256 != dataclasses.replace(changed, parametrization=None).sha256
    assert Recipe.from_json(changed.to_json()) == changed


SIZES = {"vocab": 32, "layers": 2, "experts": 4, "chosen": 2}
WIDE = {"embed": 32, "heads": 4, "mlp": 16, "expert_mlp": 12}
NARROW = {"embed": 16, "heads": 2, "mlp": 8, "expert_mlp": 6}
LATENT = {"q_rank": 6, "kv_rank": 6, "nope_dim": 4, "rope_dim": 4, "value_dim": 4, "dense_layers": 1}
TOKENS = tokens_batch(vocab=32, batch=3, seq=8)
ROWS = ("embed/table", "position")
"""Tables of which rows are looked up or added."""
FAMILIES: list[tuple[Any, dict[str, Any], dict[str, np.ndarray]]] = [
    (DecoderConfig(vocab=32, embed=32, layers=2, heads=4, kv_heads=2, mlp=24), {"embed": 16, "heads": 2}, TOKENS),
    (
        DecoderConfig(vocab=32, embed=32, layers=2, heads=4, kv_heads=1, head_dim=8, mlp=24, tied=False, qk_norm=True),
        {"embed": 8, "head_dim": 4, "heads": 2, "mlp": 12},
        TOKENS,
    ),
    (MixtralConfig(**SIZES, **WIDE), NARROW, TOKENS),
    (DeepseekV3Config(**SIZES, **WIDE, **LATENT), NARROW, TOKENS),
    (GptOssConfig(**SIZES, **WIDE, window=3, sliding=(True, False)), NARROW, TOKENS),
    (
        ViTConfig(rows=8, columns=8, channels=1, patch=2, classes=10, embed=32, layers=2, heads=4, mlp=48),
        {"embed": 16, "heads": 2, "mlp": 24},
        image_batch(classes=10, batch=3),
    ),
]


@pytest.mark.parametrize(
    ("spec", "base", "batch"), FAMILIES, ids=["tied", "untied", "mixture", "latents", "sinks", "vision"]
)
def test_it_computes_the_model_with_multiplied_weights(spec: Any, base: dict, batch: dict[str, np.ndarray]) -> None:
    """In float64, beside the standard model with each output weight times its multiplier; of a tied table, the features
    before it. Scores of attention are those of queries times the ratio of the scales."""
    made = recipe(spec, base=base)
    with_mup, plain = made.describe(), dataclasses.replace(made, parametrization=None).describe()
    assert any(t.multiplier != 1 for t in with_mup.params.values())
    values = parameters(plain)
    tied = "head" not in values
    other = dict(values)
    outputs = {n: t.multiplier for n, t in with_mup.params.items() if t.multiplier != 1 and n not in ROWS}
    for name, multiplier in outputs.items():
        other[name] = values[name] * multiplier
    if tied:
        other["final_norm/scale"] = values["final_norm/scale"] * with_mup.params["embed/table"].multiplier
    for path, module in with_mup.modules.items():
        was = getattr(plain.modules.get(path), "scale", None)
        if isinstance(getattr(module, "scale", None), float) and was is None:
            heads = "q_norm/scale" if f"{path}/q_norm/scale" in values else "wq"
            size = with_mup.params[f"{path}/wq"].shape[-1]
            other[f"{path}/{heads}"] = other[f"{path}/{heads}"] * (module.scale * size**0.5)
    states = reference.initial_states(plain)
    context = Context(seed=5, step=1, training=False)
    one = reference.forward(plain, other, batch, context, states=states)
    two = reference.forward(with_mup, values, batch, context, states=states)
    np.testing.assert_allclose(two.value.loss_B, one.value.loss_B, rtol=1e-12)
    for name in (*outputs, *(["final_norm/scale"] if tied else [])):  # none of them is without effect
        moved = reference.forward(plain, other | {name: values[name]}, batch, context, states=states)
        assert np.abs(moved.value.loss_B - one.value.loss_B).max() > 1e-9, name


def test_factors_by_name() -> None:
    found = recipe(lr={"*/wq": 0.5, "*/attn/*": 3.0}, init={"*/down": 0.1}, fixed=("*/up",)).describe().params
    assert found["blocks/attn/wq"].lr == 0.5 * 3.0 / 2 and found["blocks/attn/wk"].lr == 3.0 / 2
    assert found["blocks/mlp/down"].init == Normal(std=pytest.approx(0.1 * 96**-0.5))
    up = found["blocks/mlp/up"]
    assert (up.kind, up.lr, up.init) == ("fixed", 1.0, Normal(std=64**-0.5))
    plain = dataclasses.replace(recipe(), parametrization=None).describe().params
    assert up == dataclasses.replace(plain["blocks/mlp/up"], kind="fixed")
    assert recipe(lr={"*/wq": 0.5}, fixed=("*/wq",)).describe().params["blocks/attn/wq"].lr == 0.5


def test_more_rows_of_a_table_are_no_growth() -> None:
    """A row that is looked up, and features that are contracted with one, do not depend on the number of rows."""
    for rule in (AdamW(lr=1e-2), SGD(lr=1e-2)):
        plain, more = (
            recipe(optimizer=rule, base=base).describe().params["embed/table"] for base in (BASE, {**BASE, "vocab": 16})
        )
        assert (more.kind, more.lr, more.multiplier) == (plain.kind, plain.lr, plain.multiplier)
        assert (plain.kind, plain.multiplier) == ("table", 0.5)
        with pytest.raises(UserError, match="got vocab, which changes the number of layers, experts or rows"):
            recipe(optimizer=rule, base={"vocab": 16}).describe()


def test_a_wrong_einsum_is_explained_as_without_a_multiplier() -> None:
    table = Scaled(Param(vocab=8, embed=4, fan_in_axes=0), (1.0, 2.0))

    def einsum(spec: str, *operands: Any, dtype: Any = None) -> Any:
        raise UserError("ops.einsum", expected="", got=spec, do="")

    for spec in ("bse,vex->bsv", "bse->bs"):
        with pytest.raises(UserError, match=re.escape(spec)):
            table.contracted(einsum, spec, (np.zeros((2, 3, 4)), table), None)


def test_the_command_line_sets_it() -> None:
    base = "parametrization.base={'embed':32,'heads':1,'kv_heads':1,'mlp':96}"
    made = apply_overrides(load_recipe("tiny-lm"), ["parametrization=MuP", base, "parametrization.lr={'*/wq':2}"])
    assert made.parametrization == MuP(base={"embed": 32, "heads": 1, "kv_heads": 1, "mlp": 96}, lr={"*/wq": 2})
    assert made.describe().params["blocks/attn/wq"].lr == 0.5


def test_muon_grows_the_spectral_norm_as_the_square_root_of_fan_out_over_fan_in() -> None:
    """A step of an orthogonal matrix, whose largest singular value is that of the rule's factors alone."""

    def largest(rule: Muon, rows: int, cols: int, base: tuple[int, int], multiplier: float) -> float:
        info = dataclasses.replace(
            describe(_Matrix(rows, cols)).params["weight"], name="weight", multiplier=multiplier, kind="hidden"
        )
        factor = rule.width_factor(info, fan_in=rows / base[0], fan_out=cols / base[1], multiplier=multiplier)
        grad = np.linalg.qr(np.random.default_rng(0).normal(size=(max(rows, cols), min(rows, cols))))[0]
        grad = grad if grad.shape == (rows, cols) else grad.T
        slots = {"m": np.zeros((rows, cols))}
        info = dataclasses.replace(info, lr=factor)
        delta, _ = rule.update(
            np, info=info, grad=grad, param=np.zeros((rows, cols)), slots=slots, scale=1.0, count=1.0, decay=False
        )
        return float(np.linalg.norm(delta, 2)) * multiplier

    rule = Muon(lr=1.0, coefficients=((1.5, -0.5, 0.0),) * 30)  # converges to singular values of 1
    for base in ((4, 6), (6, 4)):
        start = largest(rule, *base, base, 1.0)
        for rows, cols, multiplier in ((8, 12, 1.0), (12, 8, 1.0), (4, 24, 1.0), (24, 4, 1 / 6), (16, 6, 0.25)):
            grown = math.sqrt((cols / base[1]) / (rows / base[0]))
            assert largest(rule, rows, cols, base, multiplier) == pytest.approx(start * grown), (base, rows, cols)


class _Matrix(Module):
    def __init__(self, rows: int, cols: int) -> None:
        self.weight = Param(embed=rows, mlp=cols)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Own(Rule):
    """A rule that says nothing of widths."""

    def slots(self, info: Any) -> dict:
        return {}


class _OwnHeads(Module):
    def __init__(self, c: OwnSizes) -> None:
        self.query = Param(embed=c.embed, heads=2, head_dim=c.head_dim)
        self.head: Any = Param(classes=3, embed=c.embed, fan_in_axes=0) if c.head else None
        self.blocks = Stack(_Matrix(c.embed, c.embed), 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnSizes:
    embed: int = 16
    head_dim: int = 8
    head: bool = True

    def build(self) -> Module:
        return _OwnHeads(self)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: recipe(optimizer=Own(lr=1e-3)).describe(), "Own.*width_factor"),
        (lambda: dataclasses.replace(recipe(), lora=LoRA()), "lora"),
        (lambda: dataclasses.replace(recipe(), init="folder"), "init"),
        (lambda: recipe(base={"embd": 32}).describe(), "embed"),
        (lambda: recipe(base={"embed": "32"}).describe(), "embed.*an integer"),
        (lambda: recipe(base={"heads": 3}).describe(), "MuP.base: Attention.*heads=3.*At the base width"),
        (lambda: recipe(lr={"*/nothing": 2.0}).describe(), "'\\*/nothing', which matches none"),
        (lambda: recipe(fixed=("*/nothing",)).describe(), "nothing"),
        (lambda: recipe(base={"layers": 2}).describe(), "MuP.base: .*got layers, which changes the number of layers"),
        (lambda: MuP(base={}), "at least one field"),
        (lambda: MuP(base=BASE, init={"*": 0.0}), "a factor above 0"),
        (lambda: recipe(base={**BASE, "tied": False}).describe(), "head"),
        (lambda: recipe(OwnSizes(), base={"head": False}).describe(), "head"),
        (lambda: recipe(OwnSizes(), base={"head_dim": 4}).describe(), "number of heads grow"),
        (lambda: hub_of(recipe()), "multipliers"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_is_refused(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        make()
    assert re.search(said, str(error.value), re.DOTALL), str(error.value)


def test_a_surgery_that_changes_multipliers_is_refused_and_one_that_does_not_is_done() -> None:
    def operated(**sizes: int) -> Operated:
        before, after = recipe(), recipe(dataclasses.replace(recipe().model, **sizes))
        edits = Surgery(edits={})
        return Operated(lambda name: np.zeros(()), {}, make_program(before), make_program(after), edits)

    with pytest.raises(UserError, match="multipliers of muP"):
        operated(embed=128)
    with pytest.raises(UserError, match="every other tensor"):  # the next check: nothing is made of the wider tensors
        operated(mlp=192)
    assert hub_of(recipe(base={"embed": 64})) is not None  # the base width itself


def test_the_page_of_the_study_is_of_the_kept_results() -> None:
    from benchmarks import widths

    held = json.loads((ROOT / widths.KEPT).read_text(encoding="utf-8"))
    page = (ROOT / widths.PAGE).read_text(encoding="utf-8")
    for part, (lines, picture) in widths.PARTS.items():
        drawn = ROOT / widths.PICTURES / f"width-{part}.svg"
        if part == "sizes" or drawn.exists():
            said = f"run python -m benchmarks.widths {part} --write"
            assert "\n".join(lines(held)) in page and drawn.read_text(encoding="utf-8") == picture(held), said
