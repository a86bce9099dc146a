"""Model shapes: published parameter counts, FLOPs by hand, sharding as the layout does it, and any recipe."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portatrain.errors import UserError
from portatrain.model.layout import COMPUTE, PARAMS, Layout, Mesh
from portatrain.model.module import Normal, TensorInfo
from portatrain.plan.cost.recipes import find, shape_of
from portatrain.plan.cost.shapes import PRESETS, ModelShape
from portatrain.plan.cost.tensors import LogicalTensor, Sizes
from portatrain.plan.cost.workload import on_mesh
from portatrain.recipe import apply_overrides, load_recipe
from recipes.models.deepseek_v3 import DeepseekV3Config


@pytest.mark.parametrize(
    ("name", "count"),
    [
        # From the models' own files on their hubs.
        ("llama3-1b", 1_235_814_400),
        ("llama3-8b", 8_030_261_248),
        ("llama3-70b", 70_553_706_496),
        ("llama3-405b", 405_853_388_800),
        ("llama2-70b", 68_976_648_192),
        ("mixtral-8x7b", 46_702_792_704),
        # 671,026,419,200 with the 58 x 256 biases of its router, which are not trained by gradient.
        ("deepseek-v3", 671_026_419_200 - 58 * 256),
    ],
)
def test_parameter_counts(name: str, count: int) -> None:
    assert PRESETS[name].parameters == count


def test_flops_by_hand() -> None:
    """Llama 3 8B: 6 x (all but the lookup) + 12 x layers x heads x head_dim x length / 2."""
    shape = PRESETS["llama3-8b"]
    layer = 4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336
    matmuls = 32 * layer + 4096 * 128256
    assert shape.active == matmuls
    assert shape.model_flops == 6 * matmuls + 12 * 32 * 32 * 128 * 8192 / 2


def test_experts_count_by_the_share_that_a_token_visits() -> None:
    shape = PRESETS["mixtral-8x7b"]
    attention = 32 * (4096 * 4096 * 2 + 4096 * 1024 * 2)
    experts = 32 * 2 * 3 * 4096 * 14336
    assert shape.active == attention + experts + 32 * 4096 * 8 + 4096 * 32000
    assert PRESETS["deepseek-v3"].active == pytest.approx(37e9, rel=0.02)


def test_a_tied_table_is_multiplied_with() -> None:
    shape = PRESETS["llama3-1b"]
    assert shape.active == pytest.approx(shape.parameters, rel=1e-3)


meshes = st.tuples(*[st.sampled_from([1, 2, 3, 4, 8, 16]) for _ in range(5)])


@given(st.sampled_from(sorted(PRESETS)), meshes)
def test_shards_are_those_of_the_layout(name: str, sizes: Sizes) -> None:
    """The planner sums over groups of tensors; the layout is the judge of each tensor."""
    shape = PRESETS[name]
    layout = Layout(mesh=Mesh(*sizes), params={**COMPUTE, **PARAMS, **shape.params})
    for role in ("params", "compute"):
        try:
            total = sum(
                t.size / math.prod(layout.mesh.over(dim) for dim in layout.tensor_spec(_info(t), role=role))
                for t in shape.all_tensors
            )
        except UserError:
            splits = [s for g in shape.groups for s in (g.params if role == "params" else g.compute)]
            assert not all(split.fits(sizes) for split in splits)
            continue
        groups = [
            g.numel / (g.param_shards(sizes) if role == "params" else g.compute_shards(sizes)) for g in shape.groups
        ]
        assert sum(groups) == pytest.approx(total)


def _info(tensor: LogicalTensor) -> TensorInfo:
    return TensorInfo(
        name=tensor.name,
        role="params",
        shape=tensor.shape,
        axes=tensor.axes,
        batch_dims=tensor.batch_dims,
        fan_in_axes=tensor.fan_in_axes,
        init=Normal(std=1.0),
    )


def test_work_is_shared_by_all_axes_but_replication() -> None:
    """Every mesh of as many devices multiplies as much in all: tokens a device x parameters of each."""
    shape = PRESETS["llama3-8b"]
    for mesh in ((1, 64, 1, 1, 1), (8, 8, 1, 1, 1), (1, 8, 1, 1, 8), (2, 4, 1, 2, 4)):
        work = on_mesh(shape, mesh)
        tokens = shape.batch / work.rows * work.seq
        assert sum(work.matmul.values()) * tokens * 64 == pytest.approx(shape.active * shape.tokens_per_step)


def test_moe_work_is_shared_by_the_expert_axis() -> None:
    shape = PRESETS["mixtral-8x7b"]
    router = 32 * 4096 * 8  # no axis of it lies on tensor: each of those devices computes it
    for mesh, again in (((1, 64, 1, 1, 1), 0), ((1, 8, 8, 1, 1), 0), ((1, 8, 4, 1, 2), router)):
        work = on_mesh(shape, mesh)
        tokens = shape.batch / work.rows * work.seq
        in_all = sum(work.matmul.values()) * tokens * 64
        assert in_all == pytest.approx((shape.active + again) * shape.tokens_per_step)


def test_any_recipe_plans_from_its_tensors() -> None:
    shape = shape_of(find("tiny-lm"))
    assert (shape.layers, shape.embed, shape.heads, shape.kv_heads, shape.mlp, shape.vocab) == (4, 128, 4, 2, 384, 256)
    assert shape.gated and shape.tied and shape.causal and shape.slot_bytes == 8
    # What the model says of itself is what the planner derives.
    assert shape.model_flops == 6 * shape.active + 3 * shape.attention_flops
    twin = ModelShape(
        name="twin",
        layers=4,
        embed=128,
        heads=4,
        kv_heads=2,
        head_dim=32,
        mlp=384,
        vocab=256,
        tied=True,
        seq_len=256,
        batch=8,
    )
    assert (twin.parameters, twin.active) == (shape.parameters, shape.active)
    assert twin.groups == shape.groups


def test_value_heads_of_their_own_size_are_counted() -> None:
    recipe = apply_overrides(load_recipe("tiny-lm"), ["model.value_head_dim=24", "model.sinks=true"])
    shape = shape_of(recipe)
    assert shape.model_flops == 6 * shape.active + 3 * shape.attention_flops
    assert (shape.q_width, shape.kv_width, shape.out_width) == (4 * 32, 2 * (32 + 24), 4 * 24)
    plain = shape_of(load_recipe("tiny-lm"))
    assert plain.parameters - shape.parameters == 4 * 128 * (32 - 24) * (2 + 4) - 4 * 4  # wv and wo, without the sinks
    # A sink is multiplied with nothing, and a device has those of its heads.
    assert plain.active - shape.active == 4 * 128 * (32 - 24) * (2 + 4)
    assert (
        on_mesh(shape, (1, 1, 1, 1, 2)).held == on_mesh(plain, (1, 1, 1, 1, 2)).held - 4 * 128 * 8 * 6 / 2 + 4 * 4 / 2
    )


@pytest.mark.parametrize(("layers", "dense", "depth"), [(4, 2, 0), (4, 1, 1), (3, 1, 2), (6, 3, 3)])
def test_further_tokens_are_counted_and_equal_stacks_too(layers: int, dense: int, depth: int) -> None:
    """Also where Stacks have equal lengths. The output table is multiplied with once for each further token, and is in
    memory once."""
    sizes = {"vocab": 64, "embed": 32, "heads": 4, "mlp": 48, "experts": 4, "chosen": 2, "expert_mlp": 24}
    latent = {"q_rank": 12, "kv_rank": 8, "nope_dim": 8, "rope_dim": 4, "value_dim": 8}
    config = DeepseekV3Config(**sizes, **latent, layers=layers, dense_layers=dense, predict_depth=depth, tied=False)
    recipe = dataclasses.replace(load_recipe("tiny-lm"), model=config)
    shape = shape_of(recipe)
    assert shape.layers == layers + depth
    assert shape.model_flops == pytest.approx(6 * shape.active + 3 * shape.attention_flops)
    assert shape.parameters == recipe.describe().parameters
    assert on_mesh(shape, (1, 2, 1, 1, 1)).head == 64 * 32


@pytest.mark.parametrize(("dense", "shared", "depth"), [(0, 0, 0), (2, 1, 0), (1, 2, 1)])
def test_layers_with_and_without_experts_have_widths_of_their_own(dense: int, shared: int, depth: int) -> None:
    """All of them are called mlp, whatever they lie in."""
    sizes = {"vocab": 64, "embed": 32, "heads": 4, "mlp": 480, "experts": 4, "chosen": 2, "expert_mlp": 24}
    latent = {"q_rank": 12, "kv_rank": 8, "nope_dim": 8, "rope_dim": 4, "value_dim": 8}
    more = {"dense_layers": dense, "shared_experts": shared, "predict_depth": depth, "tied": False}
    recipe = dataclasses.replace(load_recipe("tiny-lm"), model=DeepseekV3Config(**sizes, **latent, **more, layers=5))
    routed = (5 - dense + depth, 24.0 * (2 + shared), True)
    assert shape_of(recipe).stacks == (((dense, 480.0, False), routed) if dense else (routed,))


def test_a_vision_recipe_plans_from_its_tensors() -> None:
    shape = shape_of(find("tiny-vit"))
    assert (shape.seq_len, shape.vocab, shape.causal, shape.gated, shape.heads) == (16, 0, False, False, 4)
    assert 6 * shape.active + 3 * shape.attention_flops == pytest.approx(shape.model_flops, rel=1e-3)


def test_a_shape_needs_sizes() -> None:
    with pytest.raises(UserError, match="batch"):
        PRESETS["llama3-8b"].with_batch(0)
