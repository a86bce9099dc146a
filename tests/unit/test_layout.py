"""Layouts: specs, boxes, the kv_heads rule, and every sharding error."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from portatrain.errors import UserError
from portatrain.model.layout import COMPUTE, MESH_AXES, PARAMS, Layout, Mesh, is_uneven
from portatrain.model.module import Definition, Module, Param, Stack, State, TensorInfo, describe


class Block(Module):
    def __init__(self, kv_heads: int) -> None:
        self.wq = Param(embed=16, heads=8, head_dim=4)
        self.wk = Param(embed=16, kv_heads=kv_heads, head_dim=4)
        self.down = Param(mlp=24, embed=16)
        self.scale = Param(embed=16, fan_in_axes=0)
        self.load = State(experts=4)
        self.up = Param(experts=4, embed=16, mlp=24)


class Model(Module):
    def __init__(self, kv_heads: int = 4) -> None:
        self.table = Param(vocab=32, embed=16, fan_in_axes=0)
        self.blocks = Stack(Block(kv_heads), 3)


class Dense(Module):
    def __init__(self) -> None:
        self.w = Param(embed=16, mlp=24)


def definition(**sizes: int) -> Definition:
    return describe(Model(**sizes))


def lone(role: str = "params", **axes: int) -> TensorInfo:
    """A single tensor."""
    model = Dense()
    model.one = State(**axes) if role == "state" else Param(**axes, fan_in_axes=0)  # type: ignore[attr-defined]
    return describe(model).tensors[role, "one"]


# ---- meshes


def test_a_mesh_parses_and_prints() -> None:
    assert Mesh.parse("fsdp=4,tensor=2") == Mesh(fsdp=4, tensor=2)
    assert Mesh.parse("") == Mesh.parse("  ,") == Mesh()
    assert Mesh.parse(" tensor = 2".replace(" ", "")) == Mesh(tensor=2)
    assert str(Mesh(fsdp=4, tensor=2)) == "fsdp=4,tensor=2"
    assert str(Mesh()) == "1"
    assert Mesh(replica=2, fsdp=3, expert=5, context=7, tensor=11).devices == 2310


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fdsp=4", "Did you mean fsdp?"),
        ("stage=2", "one of context, expert, fsdp, replica, tensor"),
        ("fsdp", "each axis once, with a whole number"),
        ("fsdp=", "each axis once, with a whole number"),
        ("fsdp=-2", "got 'fsdp=-2'"),
        ("fsdp=2.5", "got 'fsdp=2.5'"),
        ("fsdp=2,fsdp=3", "got 'fsdp=3'"),
        ("fsdp=0", "a whole number of at least 1"),
    ],
)
def test_wrong_meshes(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        Mesh.parse(text)
    assert message in str(caught.value)


@pytest.mark.parametrize("size", [0, -1, True, 2.0, "2"])
def test_mesh_sizes_are_whole_numbers(size: Any) -> None:
    with pytest.raises(UserError, match="mesh axis tensor: expected a whole number"):
        Mesh(tensor=size)


meshes = st.builds(Mesh, **{axis: st.integers(1, 3) for axis in MESH_AXES})


@given(meshes)
def test_coordinates_count_row_major(mesh: Mesh) -> None:
    shape = tuple(mesh.sizes.values())
    for rank in range(mesh.devices):
        at = mesh.coordinates(rank)
        assert list(mesh.sizes) == list(MESH_AXES)
        assert np.ravel_multi_index([at[axis] for axis in MESH_AXES], shape) == rank


def test_neighbours_on_tensor_are_neighbours() -> None:
    mesh = Mesh(fsdp=2, tensor=4)
    assert [mesh.coordinates(rank)["tensor"] for rank in range(8)] == [0, 1, 2, 3, 0, 1, 2, 3]


# ---- specs


def test_default_specs() -> None:
    layout = Layout.of(definition(), Mesh(fsdp=2, tensor=2, expert=2))
    tensors = definition().tensors
    specs = {name: layout.tensor_spec(info) for (_, name), info in tensors.items()}
    assert specs["table"] == (("tensor",), ("fsdp",))
    assert specs["blocks/wq"] == ((), ("fsdp",), ("tensor",), ())
    assert specs["blocks/down"] == ((), ("tensor",), ("fsdp",))
    assert specs["blocks/up"] == ((), ("expert",), ("fsdp",), ("tensor",))
    assert specs["blocks/scale"] == ((), ("fsdp",))
    assert specs["blocks/load"] == ((), ("expert",))  # a State lies where values lie
    assert layout.spec(("batch", "res_seq", None)) == (("replica", "fsdp", "expert"), ("context", "tensor"), ())
    assert layout.spec(("batch", "seq", "heads", None)) == (
        ("replica", "fsdp", "expert"),
        ("context",),
        ("tensor",),
        (),
    )


def test_fsdp_is_one_line_of_difference() -> None:
    layout = Layout.of(definition())
    assert dict(layout.params) == {**COMPUTE, **PARAMS}
    assert PARAMS == {"embed": "fsdp", "latent": "fsdp"}
    assert layout.spec(("embed",)) == ((),)
    assert layout.spec(("embed",), role="params") == layout.spec(("embed",), role="opt") == (("fsdp",),)


def test_optimizer_state_follows_the_params_and_a_models_states_the_values() -> None:
    layout = Layout(params={"embed": ("fsdp", "replica")})
    assert layout.spec(("embed",), role="opt") == layout.spec(("embed",), role="params") == (("fsdp", "replica"),)
    assert layout.spec(("embed",), role="state") == ((),)


def test_index_is_the_inverse_of_coordinates() -> None:
    mesh = Mesh(replica=2, fsdp=3, context=2, tensor=4)
    for device in range(mesh.devices):
        at = mesh.coordinates(device)
        assert mesh.index(MESH_AXES, at) == device
        assert mesh.index(("tensor", "fsdp"), at) == 3 * at["tensor"] + at["fsdp"]
        assert mesh.index((), at) == 0


def test_a_layout_for_one_device_is_a_layout() -> None:
    layout = Layout.of(definition())
    for info in definition().tensors.values():
        assert layout.box(info, layout.mesh.coordinates(0)) == ((0,) * len(info.shape), info.shape)
    layout.check_batch(1, 7)


def test_entries_replace_the_default_mapping() -> None:
    layout = Layout.of(
        definition(), Mesh(tensor=2), compute={"mlp": ()}, params={"vocab": ("fsdp", "tensor"), "embed": ()}
    )
    specs = {name: layout.tensor_spec(info) for name, info in definition().params.items()}
    assert specs["blocks/down"] == ((), (), ())
    assert specs["table"] == (("fsdp", "tensor"), ())
    assert layout.spec(("vocab",)) == (("tensor",),)


# ---- boxes


@st.composite
def tensors_on_meshes(draw: Any) -> tuple[TensorInfo, Layout]:
    """A random tensor whose sizes divide, on a random mesh with random mappings."""
    mesh = draw(meshes)
    names = draw(st.permutations(["vocab", "embed", "mlp", "head_dim"]))[: draw(st.integers(1, 4))]
    order = draw(st.permutations(MESH_AXES))
    mapping, sizes = {}, {}
    for name in names:
        count = draw(st.integers(0, min(3, len(order))))
        mapping[name], order = tuple(order[:count]), order[count:]
        sizes[name] = mesh.over(mapping[name]) * draw(st.integers(1, 3))
    return lone(**sizes), Layout(mesh=mesh, compute=mapping, params=mapping)


@given(tensors_on_meshes())
def test_boxes_cover_exactly(case: tuple[TensorInfo, Layout]) -> None:
    """Every element lies in as many boxes as there are replicas of its shard, and every box has the same shape."""
    info, layout = case
    covered = np.zeros(info.shape, int)
    shapes = set()
    for rank in range(layout.mesh.devices):
        offset, shape = layout.box(info, layout.mesh.coordinates(rank))
        assert all(o >= 0 and o + n <= size for o, n, size in zip(offset, shape, info.shape, strict=True))
        covered[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))] += 1
        shapes.add(shape)
    split = layout.mesh.over(axis for dim in layout.tensor_spec(info) for axis in dim)
    assert (covered == layout.mesh.devices // split).all()
    assert len(shapes) == 1


def test_tensor_is_major_to_fsdp_on_a_shared_dimension() -> None:
    """The mapping's order counts: with tensor major, a tensor group's devices hold one contiguous run."""
    info = lone(mlp=8)
    layout = Layout(mesh=Mesh(fsdp=2, tensor=2), compute={"mlp": "tensor"}, params={"mlp": ("tensor", "fsdp")})
    offsets = {(at["fsdp"], at["tensor"]): layout.box(info, at)[0][0] for at in map(layout.mesh.coordinates, range(4))}
    assert offsets == {(0, 0): 0, (1, 0): 2, (0, 1): 4, (1, 1): 6}
    minor = Layout(mesh=layout.mesh, compute=layout.compute, params={"mlp": ("fsdp", "tensor")})
    offsets = {(at["fsdp"], at["tensor"]): minor.box(info, at)[0][0] for at in map(minor.mesh.coordinates, range(4))}
    assert offsets == {(0, 0): 0, (0, 1): 2, (1, 0): 4, (1, 1): 6}


# ---- the kv_heads rule


@pytest.mark.parametrize(
    ("kv_heads", "tensor", "expected"),
    [(8, 4, ("tensor",)), (4, 4, ("tensor",)), (2, 4, ()), (1, 4, ()), (4, 1, ("tensor",)), (6, 4, None), (3, 4, None)],
)
def test_kv_heads_rule(kv_heads: int, tensor: int, expected: tuple[str, ...] | None) -> None:
    """Split where they divide, replicated where the mesh axis is a multiple of them, else refused."""
    info, layout = lone(kv_heads=kv_heads), Layout(mesh=Mesh(tensor=tensor))
    if expected is None:
        with pytest.raises(UserError, match="'kv_heads' on mesh tensor=4"):
            layout.tensor_spec(info)
    else:
        assert layout.tensor_spec(info) == (expected,)
        replicas = [layout.box(info, {**layout.mesh.coordinates(r)}) for r in range(tensor)]
        assert len(set(replicas)) == (1 if not expected or tensor == 1 else tensor)


def test_only_kv_heads_are_replicated() -> None:
    with pytest.raises(UserError, match="'heads' on mesh tensor=4"):
        Layout(mesh=Mesh(tensor=4)).tensor_spec(lone(heads=2))


# ---- errors


def layout_of(mesh: str, model: Module | None = None, **options: Any) -> Layout:
    return Layout.of(describe(model or Model()), Mesh.parse(mesh), **options)


_ERRORS: dict[str, tuple[Callable[[], Any], str]] = {
    "size not divisible": (
        lambda: layout_of("fsdp=3"),
        "table, axis 'embed' on mesh fsdp=3: expected a size that fsdp=3 divides, got 16. "
        "The nearest sizes that work are 15 or 18; or use a smaller fsdp axis.",
    ),
    "smaller than the mesh axis": (
        lambda: layout_of("tensor=5", Dense(), compute={"mlp": ("tensor", "context")}, params={"embed": ()}),
        "w, axis 'mlp' on mesh tensor=5: expected a size that tensor=5 divides, got 24",
    ),
    "tiny size": (
        lambda: Layout(mesh=Mesh(tensor=4)).tensor_spec(lone(heads=3)),
        "The nearest sizes that work are 4; or use a smaller tensor axis.",
    ),
    "a batch over several axes, of which one is cut": (
        lambda: layout_of("fsdp=4").check_batch(6),
        "a microbatch, axis 'batch' on mesh fsdp=4: expected a size that fsdp=4 divides, got 6. "
        "The nearest sizes that work are 4 or 8; or use a smaller fsdp axis.",
    ),
    "a batch over several axes, of which two are cut": (
        lambda: layout_of("replica=2,fsdp=4").check_batch(12),
        "expected a size that replica=2 x fsdp=4 divides, got 12. "
        "The nearest sizes that work are 8 or 16; or use a smaller replica or fsdp axis.",
    ),
    "unknown logical axis": (
        lambda: layout_of("fsdp=2").spec(("batch", "sqe", None), what="ops.shard"),
        "logical axis in ops.shard: expected one of batch, embed",
    ),
    "unknown logical axis, near": (lambda: layout_of("").spec(("sqe",)), "Did you mean seq"),
    "mesh axis twice": (
        lambda: layout_of("").spec(("heads", "mlp"), what="ops.shard"),
        "layout of ops.shard: expected a mesh axis at most once in a tensor, got 'tensor' twice "
        "(heads->tensor, mlp->tensor). Rename one of the axes (embed_out), or map it elsewhere.",
    ),
    "mesh axis twice through one mapping": (
        lambda: layout_of("", compute={"seq": "tensor"}).spec(("seq", "heads")),
        "'tensor' twice (seq->tensor, heads->tensor)",
    ),
    "mesh axis twice in a parameter": (
        lambda: layout_of("", params={"mlp": "fsdp"}),
        "layout of blocks/down: expected a mesh axis at most once",
    ),
    "unknown mesh axis": (
        lambda: layout_of("", compute={"mlp": "tesnor"}),
        "mapping 'mlp': expected one of context, expert, fsdp, replica, tensor, got 'tesnor'. Did you mean tensor?",
    ),
    "unknown mesh axis in params": (lambda: layout_of("", params={"embed": ("fsdp", "data")}), "got 'data'"),
    "expert axis, dense model": (
        lambda: layout_of("expert=2", Dense()),
        "mesh expert=2: expected an 'experts' axis in the model",
    ),
    "microbatch": (
        lambda: layout_of("fsdp=2,expert=2").check_batch(6),
        "a microbatch, axis 'batch' on mesh fsdp=2,expert=2: expected a size that "
        "fsdp=2 x expert=2 divides, got 6. The nearest sizes that work are 4 or 8; or use a smaller fsdp or expert "
        "axis.",
    ),
    "sequence": (
        lambda: layout_of("context=2,tensor=4").check_batch(8, 12),
        "a microbatch, axis 'res_seq' on mesh context=2,tensor=4: expected a size that context=2 x tensor=4 divides",
    ),
}


@pytest.mark.parametrize(("make", "message"), _ERRORS.values(), ids=_ERRORS)
def test_errors(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        make()
    assert message in str(caught.value)


@given(meshes)
def test_a_layout_either_fits_or_says_why(mesh: Mesh) -> None:
    """On any mesh: a UserError before anything is allocated, or a box for every tensor and device."""
    model = definition()
    try:
        layout = Layout.of(model, mesh)
    except UserError as error:
        assert str(mesh) in str(error)
        return
    for info, rank in itertools.product(model.tensors.values(), range(mesh.devices)):
        _, shape = layout.box(info, mesh.coordinates(rank))
        assert all(n >= 1 for n in shape)


def test_an_uneven_size_is_known_from_other_errors() -> None:
    with pytest.raises(UserError) as uneven:
        layout_of("fsdp=3")
    with pytest.raises(UserError) as other:
        Mesh.parse("fsdp=x")
    assert is_uneven(uneven.value) and not is_uneven(other.value)
