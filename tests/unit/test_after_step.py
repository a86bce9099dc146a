"""`after_step`, once per module and layer, and the copies that it works on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from portatrain.backends.reference import ReferenceOps, after_step, initial_states
from portatrain.errors import UserError
from portatrain.model.bind import bind, source_of
from portatrain.model.module import Module, Param, Stack, State, describe
from portatrain.model.state_updates import needs_after_step, run_after_step


class Counter(Module):
    def __init__(self, by: int = 1) -> None:
        self.count = State(dtype="int32")
        self.other = State(experts=2, init="ones")
        self.by = by

    def after_step(self, ops: Any) -> None:
        ops.update(self, count=self.count + self.by, other=ops.where(self.other > 0, self.other * 2.0, 0.0))


class Plain(Module):
    """A State that nothing changes."""

    def __init__(self, **held: Any) -> None:
        self.kept = State(embed=3, init="ones")
        self.w = Param(embed=3)
        vars(self).update(held)


class Broken(Module):
    def __init__(self, call: Any) -> None:
        self.count = State(experts=3)
        self.w = Param(embed=2)
        self.call = call

    def after_step(self, ops: Any) -> None:
        self.call(self, ops)


def test_modules_outside_and_inside_stacks() -> None:
    inner = Stack(Plain(counter=Counter(10)), 3, axis="sublayers")
    model = Plain(counter=Counter(), blocks=Stack(Plain(own=Counter(100), inner=inner), 2))
    definition = describe(model)
    states = initial_states(definition)
    states["blocks/inner/counter/count"] = np.arange(6, dtype=np.int32).reshape(2, 3)
    found = after_step(definition, states)
    assert set(found) == set(states)
    assert found["counter/count"] == 1
    assert found["blocks/own/count"].tolist() == [100, 100]
    assert found["blocks/inner/counter/count"].tolist() == [[10, 11, 12], [13, 14, 15]]
    assert found["blocks/inner/counter/other"].tolist() == [[[2.0, 2.0]] * 3] * 2
    assert found["kept"] is states["kept"]
    assert states["counter/count"] == 0


def test_a_stack_of_a_stack() -> None:
    class Block(Counter):
        def __init__(self) -> None:
            super().__init__(5)
            self.w = Param(embed=2)

    definition = describe(Stack(Stack(Block(), 2, axis="sublayers"), 3))
    found = after_step(definition, initial_states(definition))
    assert found["count"].tolist() == [[5, 5]] * 3


def test_layers_that_update_nothing_keep_theirs() -> None:
    class Some(Module):
        def __init__(self) -> None:
            self.count = State()
            self.w = Param(embed=2)

        def after_step(self, ops: Any) -> None:
            if float(self.count) > 1:
                ops.update(self, count=self.count * 10)

    definition = describe(Plain(blocks=Stack(Some(), 3)))
    states = {**initial_states(definition), "blocks/count": np.array([1.0, 2.0, 3.0])}
    assert after_step(definition, states)["blocks/count"].tolist() == [1.0, 20.0, 30.0]


def test_every_module_sees_the_states_from_before() -> None:
    class Child(Module):
        def __init__(self) -> None:
            self.count = State(init="ones")

        def after_step(self, ops: Any) -> None:
            ops.update(self, count=self.count + 1)

    class Parent(Module):
        def __init__(self) -> None:
            self.first, self.last = Child(), Child()
            self.seen = State()
            self.w = Param(embed=2)

        def after_step(self, ops: Any) -> None:
            ops.update(self, seen=self.first.count + 10 * self.last.count)

    definition = describe(Parent())
    found = after_step(definition, initial_states(definition))
    assert (found["seen"], found["first/count"], found["last/count"]) == (11, 2, 2)


def test_without_any_nothing_is_called() -> None:
    definition = describe(Plain(blocks=Stack(Plain(), 2)))
    states = initial_states(definition)
    assert not needs_after_step(definition)
    found = run_after_step(definition, states, None, None)  # type: ignore[arg-type]
    assert all(found[name] is array for name, array in states.items())
    assert needs_after_step(describe(Plain(counter=Counter())))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda self, ops: ops.update(self, cuont=self.count), "Did you mean count?"),
        (lambda self, ops: ops.update(self, w=self.count), "one of count"),
        (lambda self, ops: ops.update(self, count=self.count[:2]), "an array of shape (3,), as in State(experts)"),
        (lambda self, ops: ops.tally(self, count=self.count), "ops.update, which sets a State"),
    ],
)
def test_wrong_updates(call: Any, message: str) -> None:
    definition = describe(Broken(call))
    with pytest.raises(UserError) as caught:
        after_step(definition, initial_states(definition))
    assert message in str(caught.value)


def test_update_in_the_forward_pass_is_refused() -> None:
    with pytest.raises(UserError, match="a call from within after_step"):
        ReferenceOps().update(Counter(), count=1)


def test_bound_copies_leave_the_original_alone() -> None:
    shared = Counter()
    model = Plain(pair=[shared, (shared,)], by_key={"a": shared}, blocks=Stack(Counter(), 2), number=7)
    bound: Any = bind(model, lambda p: "array" if isinstance(p, State) else p)
    assert bound.kept == "array" and isinstance(model.kept, State)
    assert bound.w is model.w and bound.number == 7
    assert bound.pair[0] is bound.pair[1][0] is bound.by_key["a"] is not shared
    assert bound.pair[0].count == "array" and isinstance(shared.count, State)
    assert bound.blocks.block is model.blocks.block  # type: ignore[attr-defined]
    assert source_of(bound) is model and source_of(bound.pair[0]) is shared
    assert type(bound) is Plain
