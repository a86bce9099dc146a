"""Low-rank factors: what they are called, what they compute, and what is refused."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from portatrain.backends import reference
from portatrain.backends.base import Context, backend_class
from portatrain.errors import UserError
from portatrain.model.lora import Adapted, LoRA, adapt, is_factor
from portatrain.model.module import Module, Param, describe
from portatrain.recipe import Recipe, apply_overrides, load_recipe
from recipes.models.decoder import DecoderConfig
from recipes.models.deepseek_v3 import DeepseekV3Config
from recipes.models.gpt_oss import GptOssConfig
from recipes.models.mixtral import MixtralConfig
from recipes.models.vit import ViTConfig
from tests.support.running import BACKENDS, image_batch, microbatches, parameters, program, tokens_batch
from tests.support.toy_models import Routed

DECODER = DecoderConfig(vocab=32, embed=16, layers=2, heads=4, kv_heads=2, mlp=24)
ROUTED = {"vocab": 32, "embed": 16, "layers": 2, "heads": 2, "mlp": 8, "experts": 4, "chosen": 2, "expert_mlp": 6}
LATENT = {"q_rank": 6, "kv_rank": 6, "nope_dim": 4, "rope_dim": 4, "value_dim": 4, "dense_layers": 1}
MIXTRAL, DEEPSEEK = MixtralConfig(**ROUTED), DeepseekV3Config(**ROUTED, **LATENT)
GPT_OSS = GptOssConfig(**ROUTED, window=3, sliding=(True, False))
VIT = ViTConfig(rows=8, columns=8, channels=1, patch=2, classes=10, embed=16, layers=2, heads=2, mlp=24)


def base_of(name: str) -> str:
    """Return the name of the weight that the factor `name` belongs to."""
    return name.rpartition("/")[0]


def test_names_and_axes() -> None:
    plain, adapted = describe(DECODER.build()), describe(adapt(DECODER.build(), LoRA(rank=3)))
    factors = {n: t for n, t in adapted.params.items() if is_factor(n)}
    assert {n: t for n, t in adapted.params.items() if n not in factors} == plain.params
    assert {base_of(n) for n in factors} == {n for n, t in plain.params.items() if t.fan_in_axes}
    wo_a, wo_b = factors["blocks/attn/wo/lora_a"], factors["blocks/attn/wo/lora_b"]
    assert (wo_a.axes, wo_a.shape, wo_a.fan_in_axes) == (("layers", "heads", "head_dim", "lora_rank"), (2, 4, 4, 3), 2)
    assert (wo_b.axes, wo_b.shape, wo_b.fan_in_axes) == (("layers", "lora_rank", "embed"), (2, 3, 16), 1)


def routed() -> Module:
    return Routed(vocab=32, embed=8, layers=2, experts=4, chosen=2, rate=0.01)


@pytest.mark.parametrize(
    ("build", "batch"),
    [
        (DECODER.build, tokens_batch(vocab=32, batch=3, seq=8)),
        (VIT.build, image_batch(classes=10, batch=3)),
        (routed, tokens_batch(vocab=32, batch=3, seq=8)),
        (MIXTRAL.build, tokens_batch(vocab=32, batch=3, seq=8)),
        (DEEPSEEK.build, tokens_batch(vocab=32, batch=3, seq=8)),
        (GPT_OSS.build, tokens_batch(vocab=32, batch=3, seq=8)),
    ],
    ids=["decoder", "vit", "experts gathered", "Mixtral", "latents and a mixture", "experts with biases"],
)
def test_it_computes_the_weight_plus_the_product(build, batch) -> None:
    """In float64, beside the model whose weights are W + alpha / rank * A B."""
    lora = LoRA(rank=3, alpha=6.0)
    plain, adapted = describe(build()), describe(adapt(build(), lora))
    values = parameters(adapted)
    merged = {}
    for name, info in plain.params.items():
        merged[name] = values[name]
        if f"{name}/lora_a" in values:
            batch_dims, split = info.batch_dims, info.batch_dims + info.fan_in_axes
            a, b = values[f"{name}/lora_a"], values[f"{name}/lora_b"]
            lead = a.shape[:batch_dims]
            product = a.reshape(*lead, -1, 3) @ b.reshape(*lead, 3, -1)
            assert np.abs(product).max() > 0.01 and split > batch_dims
            merged[name] = merged[name] + 2.0 * product.reshape(info.shape)
    states = reference.initial_states(plain)
    context = Context(seed=5, step=1, training=False)
    one = reference.forward(plain, merged, batch, context, states=states)
    two = reference.forward(adapted, values, batch, context, states=states)
    np.testing.assert_allclose(two.value.loss_B, one.value.loss_B, rtol=1e-12)


def test_the_first_step_sees_the_weight_alone() -> None:
    batch = tokens_batch(vocab=32, batch=3, seq=8)
    plain, adapted = describe(DECODER.build()), describe(adapt(DECODER.build(), LoRA()))
    values = reference.initial(adapted, 0)
    context = Context(seed=5, step=1, training=False)
    given = {n: values[n] for n in plain.params}
    one = reference.forward(plain, given, batch, context, states={})
    two = reference.forward(adapted, values, batch, context, states={})
    np.testing.assert_array_equal(two.value.loss_B, one.value.loss_B)


def test_a_recipe_trains_the_factors_alone_unless_told() -> None:
    recipe = apply_overrides(load_recipe("tiny-lm"), ["lora=LoRA", "lora.rank=4", "lora.targets=*/attn/*"])
    assert recipe.lora == LoRA(rank=4, targets=("*/attn/*",))
    names = recipe.describe().params
    assert {n for n in names if recipe.trains(n)} == {n for n in names if is_factor(n)}
    assert {base_of(n) for n in names if is_factor(n)} == {f"blocks/attn/w{x}" for x in "qkvo"}
    both = apply_overrides(recipe, ["trainable=*/lora_*,*/scale"])
    assert {n.rpartition("/")[2] for n in names if both.trains(n)} == {"lora_a", "lora_b", "scale"}
    assert Recipe.from_json(copy.deepcopy(recipe.to_json())) == recipe
    assert not any(is_factor(n) for n in load_recipe("tiny-lm").describe().params)


class Shared(Module):
    """A weight used twice, in a list, and one of which a model contracts the other side."""

    def __init__(self, *, backwards: bool = False) -> None:
        self.first = Param(embed=8, embed_out=8)
        self.again = [self.first, Param(embed_out=8, embed=8)]
        self.backwards = backwards

    def __call__(self, ops, batch):
        x = ops.einsum("be,ef->bf", batch["x"], self.first)
        x = ops.einsum("bf,fe->be", x, self.again[1])
        last = "be,fe->bf" if self.backwards else "be,ef->bf"
        return ops.loss(ops.einsum("bf->b", ops.einsum(last, x, self.again[0])), batch["mask"])


def test_a_tied_weight_has_one_pair_of_factors() -> None:
    found = describe(adapt(Shared(), LoRA(rank=2)))
    assert sorted(found.params) == sorted(
        f"{base}{end}" for base in ("first", "again/1") for end in ("", "/lora_a", "/lora_b")
    )
    batch = {"x": np.ones((2, 8)), "mask": np.ones(2)}
    context = Context(seed=5, step=1, training=False)
    values = parameters(found)
    loss = reference.forward(found, values, batch, context, states={}).value.loss_B

    def whole(name: str) -> np.ndarray:
        return values[name] + 8.0 * values[f"{name}/lora_a"] @ values[f"{name}/lora_b"]

    want = (batch["x"] @ whole("first") @ whole("again/1") @ whole("first")).sum(-1)
    np.testing.assert_allclose(loss, want, rtol=1e-12)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: LoRA(rank=0), "LoRA.rank"),
        (lambda: LoRA(alpha=0.0), "LoRA.alpha"),
        (lambda: adapt(DECODER.build(), LoRA(targets=("blocks/attn/wx",))), "blocks/attn/wq"),
        (lambda: adapt(DECODER.build(), LoRA(targets=("embed/table",))), "embed/table"),
        (lambda: adapt(Shared(), LoRA(targets=("again/1",))), "all weights of a list, or none"),
    ],
)
def test_what_is_refused(make, said: str) -> None:
    with pytest.raises(UserError, match=said):
        make()


def test_a_weight_that_is_contracted_on_the_other_side_is_refused() -> None:
    found = describe(adapt(Shared(backwards=True), LoRA(rank=2)))
    batch = {"x": np.ones((2, 8)), "mask": np.ones(2)}
    with pytest.raises(UserError, match="LoRA on first: expected an einsum that contracts its first 1 axes"):
        reference.forward(found, parameters(found), batch, Context(), states={})


class Read(Module):
    """A weight that is read as a value."""

    def __init__(self) -> None:
        self.w = Param(embed=8, embed_out=8)

    def __call__(self, ops, batch):
        return ops.loss(ops.einsum("bf->b", batch["x"] * ops.weight(self.w)[:2]), batch["mask"])


@pytest.mark.parametrize("name", ["reference", *BACKENDS])
def test_another_use_of_an_adapted_weight_is_refused(name: str) -> None:
    found = describe(adapt(Read(), LoRA(rank=2)))
    batch = {"x": np.ones((2, 8), np.float32), "mask": np.ones(2, np.float32), "sample": np.arange(2)}
    with pytest.raises(
        UserError, match=r"LoRA on w: expected a weight that only ops\.einsum and ops\.grouped_matmul use"
    ):
        if name == "reference":
            reference.forward(found, parameters(found), batch, Context(), states={})
        else:
            backend = backend_class(name)(program(found))
            backend.step(backend.init_state(), microbatches(batch), step=1, scale=1.0)


def test_adapted_keeps_its_place() -> None:
    model = adapt(DECODER.build(), LoRA(targets=("*/up",)))
    block = model.blocks.block
    assert isinstance(block.mlp.up, Adapted) and isinstance(block.mlp.down, Param)
