"""Every operation of every backend beside the oracle, values and gradients."""

from __future__ import annotations

import numpy as np
import pytest

from portatrain.backends.base import Context, backend_class
from portatrain.testing import CASES, Case, check_case
from portatrain.testing.loss_cases import cross_entropy_case
from tests.support.running import BACKENDS

pytestmark = pytest.mark.usefixtures("compiled_quickly")

_ALL = [pytest.param(case, precision, id=f"{case.name}-{precision}") for case in CASES for precision in case.precisions]


# The backend varies fastest, so that the oracle's answers are computed once for all of them.
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("case", "precision"), _ALL)
def test_operation(backend: str, case: Case, precision: str) -> None:
    check_case(backend_class(backend), case, precision)


def test_case_names_are_distinct() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"z_loss": 0.1}, {"softcap": 2.0}, {"z_loss": 0.1, "softcap": 2.0}], ids=str)
def test_cross_entropy_in_chunks(backend: str, options: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks agree with the oracle in values and gradients: 12 positions of 9 logits, 3 at a time."""
    monkeypatch.setattr(f"portatrain.backends.{backend}.losses.CHUNK_BYTES", 2 * 3 * 9 * 4)
    check_case(backend_class(backend), cross_entropy_case(f"in chunks {options}", 2, 12, 5, 9, **options))


@pytest.mark.parametrize("backend", BACKENDS)
def test_cross_entropy_in_chunks_of_uneven_length(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"portatrain.backends.{backend}.losses.CHUNK_BYTES", 2 * 3 * 9 * 4)
    check_case(backend_class(backend), cross_entropy_case("in uneven chunks", 2, 11, 5, 9))


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_does_not_depend_on_the_batch(backend: str) -> None:
    """A sample draws the same elements alone, in any batch, at any place in it."""
    sample = np.array([9, 4, 2**40, 7], np.int64)
    x = np.ones((4, 3, 50), np.float32)

    def run(rows: list[int], step: int = 1) -> np.ndarray:
        context = Context(seed=3, step=step, sample=sample[rows], training=True)
        return backend_class(backend).evaluate(lambda ops, x: ops.dropout(x, 0.5, site=8), (x[rows],), context)

    together = run([0, 1, 2, 3])
    assert np.array_equal(run([2]), together[[2]])
    assert np.array_equal(run([3, 0]), together[[3, 0]])
    assert not np.array_equal(run([0, 1, 2, 3], step=2), together)
    assert len({row.tobytes() for row in together}) == 4
