"""Every operation at its kinks, ties, infinities, zeros, tiny numbers and empty axes: value and derivative equal on
every backend and in the oracle."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import numpy as np
import pytest

from portatrain.backends.base import backend_class
from portatrain.backends.reference.ops import ReferenceOps
from portatrain.model.ops import Ops
from portatrain.testing.special_case import Special, kink, special_checks
from portatrain.testing.special_cases import ALL_SLOPES, SPECIALS, WITHOUT
from tests.support.running import BACKENDS

GROUPS = {training: [c for c in SPECIALS if c.context.training == training] for training in (False, True)}


def test_every_operation_has_special_points() -> None:
    """A new operation without cases fails here."""
    operations = {name for name, _ in inspect.getmembers(Ops, inspect.isfunction) if not name.startswith("_")}
    covered = {case.method for case in SPECIALS}
    assert operations - covered - WITHOUT.keys() == set(), "add cases to portatrain/testing/special_cases.py"
    assert covered <= operations and not covered & WITHOUT.keys() and WITHOUT.keys() <= operations


def test_names_are_distinct() -> None:
    assert len({case.name for case in SPECIALS}) == len(SPECIALS)


@pytest.mark.parametrize("training", GROUPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_special_points(backend: str, training: bool) -> None:
    """All in one program, as each would otherwise be compiled alone."""
    bad = [str(check) for check in special_checks(backend_class(backend), GROUPS[training]) if not check.good]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("name", ALL_SLOPES)
def test_stated_derivatives_are_subgradients_of_the_oracle(name: str) -> None:
    """A table that states a wrong derivative would make every backend wrong with it."""
    _, fn, slope, _ = ALL_SLOPES[name]
    if name == "stop_gradient":
        return  # its derivative is not the function's, on purpose
    points = np.array([0.0, 0.25, 1.0, 2.5, -0.25, -1.0, -2.5])
    if name in ("sign", "floor"):
        points = points[[1, 3, 4, 6]]  # they jump between those
    if name in ("log", "sqrt", "rsqrt"):
        points = points[1:4]
    points = points[points > -1] if name == "log1p" else points
    assert kink(lambda x: fn(ReferenceOps(), x), slope, points).max() < 1e-6


def _mutant(name: str, wrong: Callable[..., object]) -> type:
    base = backend_class(BACKENDS[-1])
    operations = type("Wrong", (base.ops,), {name: wrong})
    return type("Mutant", (base,), {"ops": operations})


@pytest.mark.skipif("torch" not in BACKENDS, reason="torch is not installed")
def test_another_convention_at_a_kink_is_seen() -> None:
    """relu as it was on jax: the derivative at 0 is 1/2."""
    import torch

    mutant = _mutant("relu", lambda self, x: torch.maximum(x, torch.zeros_like(x)))
    cases: list[Special] = [c for c in SPECIALS if c.method == "relu"]
    assert [c.what for c in special_checks(mutant, cases) if not c.good] != []
