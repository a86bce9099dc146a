"""A parameter's contraction on a CPU is a product of two matrices; for other devices the program is unchanged."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest

from tests.support.running import BACKENDS

pytestmark = pytest.mark.skipif("jax" not in BACKENDS, reason="jax is not installed")

SIZES = dict(zip("bsehdvxgcm", (2, 3, 4, 5, 6, 7, 2, 3, 5, 8), strict=True))
PRODUCTS = ["bse,ehd->bshd", "bshd,hde->bse", "bse,ve->bsv", "bse,em->bsm", "xgce,xem->xgcm", "xgce,xme->xgcm"]
OTHERS = [
    "be,em->bm",  # a product of matrices already
    "bse,em->sbm",  # the result is transposed
    "bsehd,dhe->bs",  # there is nothing of the parameter in the result
    "bshd,dhe->bse",  # the contracted letters are in another order
    "bsd,ehd->bsehd",  # the letter d is in all terms
    "bse->bs",
]


@pytest.mark.parametrize("spec", PRODUCTS)
def test_a_product_of_matrices_is_the_einsum(spec: str) -> None:
    from portatrain.backends.jax.cpu_products import product_of

    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal([SIZES[k] for k in term]) for term in spec.partition("->")[0].split(","))
    product = product_of(spec)
    assert product is not None
    np.testing.assert_allclose(product(x, w), np.einsum(spec, x, w), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", OTHERS)
def test_other_contractions_are_left_to_xla(spec: str) -> None:
    from portatrain.backends.jax.cpu_products import product_of

    assert product_of(spec) is None


def test_only_cpus_get_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step of a device that is no CPU is lowered to the same text as without them; on a CPU the gradient of every
    weight contracts the first dimension of both operands."""
    from benchmarks.shapes import SHAPES, batch_of, open_ours
    from portatrain.backends.jax.ops import JaxOps

    shape = SHAPES["toy"]
    backend = open_ours("jax", shape)
    state = backend.init_state()
    batch = backend._put({k: v[None] for k, v in batch_of(shape).items()}, 1)  # type: ignore[attr-defined]

    def lowered(device: str) -> str:
        backend.site = dataclasses.replace(backend.site, device=device)  # type: ignore[attr-defined]
        backend._gradients_of.clear_cache()  # type: ignore[attr-defined]
        return backend._gradients_of.lower(state, batch, np.int32(1)).as_text()  # type: ignore[attr-defined]

    found = {device: lowered(device) for device in ("cpu", "tpu", "cuda")}
    over_two = re.compile(r"dot_general %\S+, %\S+, contracting_dims = \[\d+, \d+\]")
    assert not over_two.search(found["cpu"])
    assert over_two.search(found["tpu"])
    monkeypatch.setattr(JaxOps, "_merges", False)
    assert {device: lowered(device) for device in ("tpu", "cuda")} == {k: found[k] for k in ("tpu", "cuda")}


@pytest.mark.parametrize(
    ("mesh", "merged"),
    [("", True), ("fsdp=2", True), ("replica=2,fsdp=2", True), ("context=2", False), ("tensor=2", False)],
)
def test_no_sharded_dimension_is_crossed(mesh: str, merged: bool) -> None:
    from portatrain.backends.jax.cpu_products import may_merge
    from portatrain.model.layout import Layout, Mesh

    assert may_merge(Layout(mesh=Mesh.parse(mesh))) is merged
