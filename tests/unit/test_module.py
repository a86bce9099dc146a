"""Definitions: what `describe` finds, names and refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from portatrain.backends.state import initial_box
from portatrain.errors import UserError
from portatrain.model.module import (
    RESERVED_NAMES,
    Constant,
    Module,
    Normal,
    Param,
    Stack,
    State,
    children,
    describe,
    site_of,
)


class Leaf(Module):
    def __init__(self, **options: Any) -> None:
        self.w = Param(embed=4, mlp=6, **options)


class Holder(Module):
    def __init__(self, **held: Any) -> None:
        vars(self).update(held)


def one(param: Param | State) -> Any:
    """The TensorInfo of a lone tensor."""
    found = describe(Holder(w=param, other=Param(embed=1)))
    return found.tensors["state" if isinstance(param, State) else "params", "w"]


# ---- one tensor


@pytest.mark.parametrize(
    ("param", "std"),
    [
        (Param(embed=16, mlp=3), 1 / 4),
        (Param(heads=3, head_dim=12, embed=5, fan_in_axes=2), 1 / 6),
        (Param(vocab=100, embed=25, fan_in_axes=0), 0.02),
        (Param(layers=7, embed=16, mlp=3), 1 / 4),
        (Param(layers=7, experts=5, embed=16, mlp=3), 1 / 4),
        (Param(experts=5, mlp=25, embed=4), 1 / 5),
        (Param(embed=16, experts=9), 1 / 4),  # experts that do not lead are no batch axis
        (Param(embed=16, mlp=3, init=0.5), 0.5),
        (Param(embed=16, mlp=3, init=Normal(std=0.25)), 0.25),
        (Param(embed=16, mlp=3, init=0), 0.0),
    ],
)
def test_initial_deviation(param: Param, std: float) -> None:
    init = one(param).init
    assert isinstance(init, Normal) and math.isclose(init.std, std)


@pytest.mark.parametrize(
    ("init", "value"), [("zeros", 0.0), ("ones", 1.0), (Constant(value=-2.5), -2.5)], ids=["zeros", "ones", "value"]
)
def test_constant_start(init: Any, value: float) -> None:
    assert one(Param(embed=3, fan_in_axes=0, init=init)).init == Constant(value=value)
    assert one(State(embed=3, init=init)).init == Constant(value=value)


def test_facts_of_a_tensor() -> None:
    info = one(Param(layers=2, experts=3, embed=4, mlp=5))
    assert (info.shape, info.axes) == ((2, 3, 4, 5), ("layers", "experts", "embed", "mlp"))
    assert (info.batch_dims, info.stack_dims, info.fan_in_axes, info.size) == (2, 0, 1, 120)
    state = one(State(experts=3, dtype="int32"))
    assert (state.role, state.dtype, state.shape, state.fan_in_axes) == ("state", "int32", (3,), 0)
    assert one(State()).shape == ()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Param(embed=0), "expected a size of at least 1 for axis 'embed', got 0"),
        (lambda: Param(embed=2.0), "got 2.0"),  # type: ignore[arg-type]
        (lambda: Param(embed=True), "got True"),
        (lambda: State(embed=-1), "got -1"),
        (lambda: Param(embed=4, fan_in_axes=2), "fan_in_axes between 0 and 1"),
        (lambda: Param(layers=3, embed=4, fan_in_axes=2), "fan_in_axes between 0 and 1"),
        (lambda: Param(embed=4, fan_in_axes=-1), "fan_in_axes between 0 and 1"),
        (lambda: Param(embed=4, init="normal"), "'zeros', 'ones', a standard deviation"),
        (lambda: State(embed=4, init=0.5), "expected init='zeros', 'ones' or Constant"),
        (lambda: State(embed=4, dtype="float64"), "expected dtype 'float32', 'int32' or 'bool'"),
        (lambda: Stack(Leaf(), 0), "expected at least one layer, got 0"),
    ],
)
def test_wrong_declarations(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        make()
    assert message in str(caught.value)


def test_the_former_name_of_fan_in_axes_is_accepted_with_a_warning() -> None:
    with pytest.warns(DeprecationWarning, match="fan_in_axes=n"):
        param = Param(heads=3, head_dim=12, embed=5, inputs=2)
    assert param.fan_in_axes == 2
    with pytest.warns(DeprecationWarning, match="Param.fan_in_axes"):
        assert param.inputs == 2
    info = describe(Holder(w=param)).params["w"]
    with pytest.warns(DeprecationWarning, match="TensorInfo.fan_in_axes"):
        assert info.inputs == 2


# ---- names and order


def test_names_follow_attributes_lists_and_dicts() -> None:
    model = Holder(
        first=Leaf(),
        pair=[Leaf(), (Param(embed=2), 7, Leaf())],
        by_key={"a": Leaf(), "b": State(embed=2)},
        number=3,
        text="x",
        nothing=None,
    )
    found = describe(model)
    assert list(found.params) == ["first/w", "pair/0/w", "pair/1/0", "pair/1/2/w", "by_key/a/w"]
    assert list(found.states) == ["by_key/b"]
    assert [name for name, _ in children(model)] == ["first", "pair/0", "pair/1/0", "pair/1/2", "by_key/a", "by_key/b"]


def test_a_stack_adds_an_axis_and_no_name() -> None:
    found = describe(Holder(blocks=Stack(Holder(leaf=Leaf(), seen=State(experts=3)), 5)))
    assert list(found.params) == ["blocks/leaf/w"]
    weight, state = found.params["blocks/leaf/w"], found.states["blocks/seen"]
    assert (weight.shape, weight.axes) == ((5, 4, 6), ("layers", "embed", "mlp"))
    assert (weight.batch_dims, weight.stack_dims) == (1, 1)
    assert weight.init == Normal(std=0.5)
    assert (state.shape, state.batch_dims, state.stack_dims) == ((5, 3), 2, 1)


def test_stacks_nest() -> None:
    inner = Stack(Holder(w=Param(experts=7, embed=4, mlp=3)), 3, axis="sublayers")
    info = describe(Holder(blocks=Stack(Holder(inner=inner), 5))).params["blocks/inner/w"]
    assert info.axes == ("layers", "sublayers", "experts", "embed", "mlp")
    assert (info.shape, info.batch_dims, info.stack_dims) == ((5, 3, 7, 4, 3), 3, 2)


def test_a_stack_of_a_stack() -> None:
    info = describe(Stack(Stack(Leaf(), 2, axis="sublayers"), 3)).params["w"]
    assert (info.axes, info.shape) == (("layers", "sublayers", "embed", "mlp"), (3, 2, 4, 6))


def test_paths_and_sites() -> None:
    leaf, block = Leaf(), Holder()
    block.leaf = leaf  # type: ignore[attr-defined]
    model = Holder(blocks=Stack(block, 2), other=[Leaf()])
    found = describe(model)
    assert (model.path, block.path, leaf.path) == ("", "blocks", "blocks/leaf")
    assert leaf.site == site_of("blocks/leaf") != site_of("blocks")
    assert found.modules["."] is model
    assert found.modules["blocks"] is block
    assert found.modules["other/0"] is model.other[0]  # type: ignore[attr-defined]


def test_sites_are_fixed_words() -> None:
    """Part of every run's trajectory: SHA-256 of the empty text begins with e3b0c442."""
    assert site_of("") == 0xE3B0C442 >> 1
    assert site_of("blocks/attn_dropout") == 1614151131
    assert all(0 <= site_of(f"blocks/{i}") < 2**31 for i in range(100))


def test_describe_twice_is_the_same() -> None:
    model = Holder(a=Leaf(), b=Stack(Leaf(), 2))
    first, second = describe(model), describe(model)
    assert first.params == second.params and first.owners == second.owners


# ---- ties


def test_tied_tensors_belong_to_the_first_owner() -> None:
    shared = Param(vocab=10, embed=4, fan_in_axes=0)
    found = describe(Holder(embed=Holder(table=shared), head=shared))
    assert list(found.params) == ["embed/table"]
    assert found.owners[id(shared)] == "embed/table"
    assert found.parameters == 40


def test_tied_modules_count_once() -> None:
    leaf = Leaf()
    found = describe(Holder(a=leaf, b=[leaf]))
    assert list(found.params) == ["a/w"]
    assert leaf.path == "a"


def test_ties_within_a_stack() -> None:
    leaf = Leaf()
    found = describe(Holder(blocks=Stack(Holder(a=leaf, b=leaf), 3)))
    assert list(found.params) == ["blocks/a/w"]


@pytest.mark.parametrize("kind", ["param", "module"])
def test_ties_across_stacks_are_refused(kind: str) -> None:
    shared = Param(embed=4) if kind == "param" else Leaf()
    with pytest.raises(UserError, match="same Stack, or outside") as caught:
        describe(Holder(outside=shared, blocks=Stack(Holder(inside=shared), 2)))
    assert "'outside' and 'blocks/inside'" in str(caught.value)
    with pytest.raises(UserError, match="pass it in as a shared argument"):
        describe(Holder(one=Stack(Holder(inside=shared), 2), two=Stack(Holder(inside=shared), 3)))


# ---- what is refused


@pytest.mark.parametrize("name", ["train", "to", "forward", "parameters", "sow", "site", "path", "after_step", "_w"])
def test_reserved_names_are_refused(name: str) -> None:
    model = Holder()
    vars(model)[name] = Param(embed=4)
    with pytest.raises(UserError, match=r"that torch\.nn\.Module and flax\.nnx\.Module do not use") as caught:
        describe(model)
    assert f"Holder.{name}" in str(caught.value) and f"{name.strip('_')}_1" in str(caught.value)


def test_a_name_with_a_dot_is_refused() -> None:
    with pytest.raises(UserError, match=r"without '\.'"):
        describe(Holder(by_key={"a.b": Param(embed=4)}))


def test_a_module_starts_as_another_one() -> None:
    class Pair(Module):
        unnamed = ("own",)

        def __init__(self, starts_as: str = "", mlp: int = 6) -> None:
            self.own, self.copy = Holder(at=Leaf(), n=State(embed=2)), Holder(at=Leaf(), n=State(embed=2, init="ones"))
            self.copy.at.w, self.copy.starts_as = Param(embed=4, mlp=mlp, init=0.5), starts_as

    found = describe(Pair())
    assert list(found.params) == ["at/w", "copy/at/w"] and list(found.states) == ["n", "copy/n"]
    assert [t.start for t in found.tensors.values()] == ["", "at/w", "", "n"]
    assert found.params["copy/at/w"].init == found.params["at/w"].init == Normal(std=0.5)
    assert found.states["copy/n"].init == Constant(value=0.0)
    assert [m.path for m in found.modules.values()] == ["", "", "at", "copy", "copy/at"]
    own, copy = (initial_box(found.params[n], 3, (1, 2), (2, 3)) for n in ("at/w", "copy/at/w"))
    assert (own == copy).all() and own.any()
    with pytest.raises(UserError, match=r"a tensor at/w of shape \(4, 5\), as copy/at/w has, got shape \(4, 6\)"):
        describe(Pair(mlp=5))
    with pytest.raises(UserError, match=r"a tensor elsewhere/at/w .* got none"):
        describe(Pair("elsewhere"))


@pytest.mark.parametrize("model", [Holder(x=1), Holder(blocks=Stack(Holder(s=State(embed=2)), 2))])
def test_a_model_without_parameters_is_refused(model: Module) -> None:
    with pytest.raises(UserError, match="at least one Param"):
        describe(model)


def test_an_axis_twice_is_refused() -> None:
    with pytest.raises(UserError, match="embed_out") as caught:
        describe(Holder(blocks=Stack(Holder(w=Param(layers=2, embed=4)), 3)))
    assert "blocks/w" in str(caught.value) and "layers, layers, embed" in str(caught.value)
    with pytest.raises(UserError, match="its own axis="):
        describe(Stack(Stack(Leaf(), 2), 3))


def test_a_module_without_call_says_so() -> None:
    with pytest.raises(TypeError, match="Leaf does not define __call__"):
        Leaf()(None)


def test_reserved_names_are_those_of_the_installed_frameworks() -> None:
    """Every public attribute of both native classes, and no more than older versions and we ourselves have."""
    torch, nnx = pytest.importorskip("torch"), pytest.importorskip("flax.nnx")
    native = {name for cls in (torch.nn.Module, nnx.Module) for name in dir(cls) if not name.startswith("_")}
    native -= {"smart_apply"}  # transformers sets it on torch's class when it makes a model, for that time alone
    # torch sets `training` on instances; the rest are names of our own Module.
    ours = {"training", "path", "site", "after_step"}
    assert native - RESERVED_NAMES == set()
    assert RESERVED_NAMES - native - ours == set()


# ---- inheritance


class Scaled(Leaf):
    def __init__(self, *, factor: float) -> None:
        super().__init__(fan_in_axes=0)
        self.gain = Param(embed=4, fan_in_axes=0, init=factor)

    @property
    def doubled(self) -> Any:
        return 2 * self.factor_of(1.0)

    def factor_of(self, x: Any) -> Any:
        return x

    def __call__(self, ops: Any, batch: Any) -> Any:
        y_BM = ops.einsum("be,em->bm", batch["x"] * ops.weight(self.gain), self.w)
        return ops.sum(y_BM * y_BM, ("batch", "mlp"), over=("mlp",))


class Doubled(Scaled):
    """Two levels below Leaf, calling upwards."""

    def __init__(self) -> None:
        super().__init__(factor=0.5)
        self.shift = Param(mlp=6, fan_in_axes=0)

    def factor_of(self, x: Any) -> Any:
        return 3 * super().factor_of(x)

    def __call__(self, ops: Any, batch: Any) -> Any:
        loss_B = self.doubled * super().__call__(ops, batch) + ops.sum(ops.weight(self.shift), ("mlp",), over=("mlp",))
        return ops.loss(loss_B, loss_B * 0.0 + 1.0)


def test_a_subclass_of_a_subclass_is_described() -> None:
    assert list(describe(Doubled()).params) == ["w", "gain", "shift"]


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_a_subclass_of_a_subclass_lowers(backend: str) -> None:
    """super(), a property, a helper that is overridden, and isinstance, on the framework's own module."""
    import numpy as np

    from portatrain.backends.base import backend_class, missing
    from portatrain.backends.program import Program
    from portatrain.backends.reference import forward
    from portatrain.model.layout import Layout
    from portatrain.optim import SGD

    if missing(backend):
        pytest.skip(f"{backend} is not installed")
    found = describe(Doubled())
    program = Program(
        definition=found,
        layout=Layout.of(found),
        optimizer=SGD(lr=0.1),
        trainable=frozenset(found.params),
        decay=frozenset(),
    )
    running = backend_class(backend)(program)
    native = running.lower()
    assert isinstance(native, Doubled) and isinstance(native, Scaled)
    assert type(native) is type(running.lower())  # made once
    state = running.init_state()
    params = {box.name: box.fetch() for box in running.local_boxes(state) if box.role == "params"}
    batch = {"x": np.arange(12, dtype=np.float32).reshape(3, 4), "sample": np.arange(3)}
    exact = forward(found, params, batch).value.loss_B
    np.testing.assert_allclose(running.eval(state, batch)["loss_B"], exact, rtol=1e-6)
