"""Every operation of torch-xla on one device beside the oracle, values and gradients; run by `make test-xla`."""

from __future__ import annotations

import numpy as np
import pytest

from portatrain.backends.base import Context, backend_class, missing
from portatrain.testing import CASES, Case, check_case
from portatrain.testing.loss_cases import cross_entropy_case

if missing("torch-xla"):
    pytest.skip("torch_xla is not installed: `make test-xla` has an environment for it", allow_module_level=True)

_ALL = [pytest.param(case, precision, id=f"{case.name}-{precision}") for case in CASES for precision in case.precisions]


@pytest.mark.parametrize(("case", "precision"), _ALL)
def test_operation(case: Case, precision: str) -> None:
    check_case(backend_class("torch-xla"), case, precision)


@pytest.mark.parametrize("positions", [12, 11], ids=["even", "uneven"])
@pytest.mark.parametrize("options", [{}, {"z_loss": 0.1, "softcap": 2.0}], ids=str)
def test_cross_entropy_in_chunks(options: dict[str, float], positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks of 9 logits a position agree with the oracle in values and gradients."""
    from portatrain.backends.torch_xla import losses

    monkeypatch.setattr(losses, "CHUNK_BYTES", 2 * 3 * 9 * 4)
    assert losses.chunks(2, positions, 9) == (4 if positions == 12 else 11)
    check_case(backend_class("torch-xla"), cross_entropy_case(f"in chunks {options}", 2, positions, 5, 9, **options))


def test_dropout_does_not_depend_on_the_batch() -> None:
    """A sample draws the same elements alone, in any batch, at any place in it; others at another step."""
    sample = np.array([9, 4, 2**40, 7], np.int64)
    x = np.ones((4, 3, 50), np.float32)

    def run(rows: list[int], step: int = 1) -> np.ndarray:
        context = Context(seed=3, step=step, sample=sample[rows], training=True)
        return backend_class("torch-xla").evaluate(lambda ops, x: ops.dropout(x, 0.5, site=8), (x[rows],), context)

    together = run([0, 1, 2, 3])
    assert np.array_equal(run([2]), together[[2]])
    assert np.array_equal(run([3, 0]), together[[3, 0]])
    assert not np.array_equal(run([0, 1, 2, 3], step=2), together)
    assert len({row.tobytes() for row in together}) == 4
