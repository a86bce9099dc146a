"""Precision fp8: operands, products and gradients of both frameworks beside the oracle, and models in it."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from portatrain.backends.choose_kernel import choose
from portatrain.backends.kernels import Case, Kernel, Site
from portatrain.backends.reference import fp8 as oracle
from portatrain.model.fp8 import E4M3, E5M2, SCALINGS, Form, Format, axes_of, form_of
from tests.support.running import BACKENDS

ROOT = Path(__file__).parents[2]
SPECS = {
    "bse,em->bsm": ((2, 5, 12), (12, 7)),
    "bse,ehd->bshd": ((2, 3, 8), (8, 4, 6)),
    "bshd,hde->bse": ((2, 3, 4, 6), (4, 6, 8)),
    "bse,me->bsm": ((1, 4, 16), (5, 16)),
    "bxse,xem->bxsm": ((2, 3, 4, 8), (3, 8, 5)),
    "bse,ehd->bhsd": ((1, 1, 300), (300, 2, 3)),
    "sbe,em->bsm": ((3, 2, 8), (8, 8)),
}


def hard(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Numbers of bfloat16 with rows of zeros, very small and very large ones, ties and numbers that are not normal."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * np.exp2(rng.integers(-12, 12, shape))
    x = np.where(rng.random(shape) < 0.3, rng.integers(-40, 40, shape) / 16, x)
    if shape[0] > 1:
        x[0] *= rng.choice([0.0, 2.0**-130, 2.0**-100, 1e4, 2.0**100])
    flat = x.reshape(-1)
    flat[rng.integers(0, flat.size, 3)] = [1e4, 2.0**-133, 448 * 2.0 ** rng.integers(-3, 3)]
    return _bfloat16(x)


def _bfloat16(x: np.ndarray) -> np.ndarray:
    import ml_dtypes

    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


def operands(name: str, x: np.ndarray, term: str, over: str, kind: Format) -> tuple[np.ndarray, np.ndarray]:
    """Return (rounded values, scales) as a framework computes them on a CPU."""
    if name == "jax":
        import jax

        from portatrain.backends.jax import fp8

        @jax.jit
        def both(x: Any) -> Any:
            values, scale = fp8.scaled(x, axes_of(over, term), kind)
            return fp8.rounded(values, kind), scale

        return tuple(np.asarray(a) for a in both(x))  # type: ignore[return-value]
    import torch

    from portatrain.backends.torch import fp8 as torch_fp8

    values, scale = torch_fp8.scaled(torch.from_numpy(x), term, over, kind)
    return torch_fp8.rounded(values, kind).numpy(), scale.numpy()


def kernel_of(name: str, formats: str) -> Kernel:
    """Return the kernel that runs on a device with these formats; '' is a CPU."""
    site = Site(backend=name, device="gpu" if formats else "cpu", formats=formats)
    return choose("fp8_matmul", Case(site=site, dtype="bfloat16", shape=(8, 8, 8))).kernel


def contracted(
    name: str, form: Form, x: np.ndarray, w: np.ndarray, g: np.ndarray, formats: str = ""
) -> list[np.ndarray]:
    """Return the product and both gradients in a framework, all float32, as on a device with these formats."""
    kernel = kernel_of(name, formats)
    if name == "jax":
        import jax
        import jax.numpy as jnp

        from portatrain.backends.jax import fp8

        def of(x: Any, w: Any) -> Any:
            return fp8.contraction(form, jnp.bfloat16, w.dtype, (None, None), (kernel, formats), x, w)

        @jax.jit
        def both(x: Any, w: Any, g: Any) -> Any:
            y, back = jax.vjp(of, x, w)
            return y, *back(g.astype(y.dtype))

        return [np.asarray(a, np.float32) for a in both(x, w, g)]
    import torch

    from portatrain.backends.torch import fp8 as torch_fp8

    a, b = (torch.from_numpy(v).requires_grad_() for v in (x, w))
    torch_fp8.load_kernels()
    y = torch_fp8.contraction(form, a.bfloat16(), b.bfloat16(), kernel.where, formats)
    return [v.float().detach().numpy() for v in (y, *torch.autograd.grad(y, (a, b), torch.from_numpy(g).bfloat16()))]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("kind", [E4M3, E5M2], ids=lambda k: k.name)
def test_operands_have_the_bits_of_the_oracle(name: str, kind: Format) -> None:
    cases = [hard((6, 5, 8), seed) for seed in range(4)]
    steps = np.arange(-(1 << 15), 1 << 15, dtype=np.int32) << 16  # every bfloat16 number, 8 in a row
    cases.append(steps.astype(np.int32).view(np.float32).reshape(-1, 4, 2))
    for x in cases:
        got, want = operands(name, x, "abc", "bc", kind), oracle.rounded(x, (1, 2), kind)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("spec", SPECS)
def test_products_and_gradients_are_those_of_the_oracle(name: str, scaling: str, spec: str) -> None:
    """The operands have the same bits, so sums in float32 and one rounding to bfloat16 are all that differs."""
    form = form_of(spec, 1, scaling)
    assert form is not None
    sizes = {c: n for t, s in zip((form.x, form.w), SPECS[spec], strict=True) for c, n in zip(t, s, strict=True)}
    rng = np.random.default_rng(5)
    x, w, g = (_bfloat16(rng.normal(size=[sizes[c] for c in t])) for t in (form.x, form.w, form.out))
    x[..., :1] *= 1e4
    x.reshape(-1, x.shape[-1])[0] = 0
    got = contracted(name, form, x, w, g)
    want = (oracle.product(form, x, w), *oracle.gradients(form, x, w, g))
    dx_size = oracle.gradients(form, np.abs(x), np.abs(w), np.abs(g))
    sums = (oracle.product(form, np.abs(x), np.abs(w)), *dx_size)
    for a, b, size, terms in zip(got, want, sums, (form.k, form.n, "bs"), strict=True):
        n = np.prod([sizes[c] for c in terms if c in sizes])
        np.testing.assert_array_less(np.abs(a - b), 2.0**-8 * np.abs(b) + n * 2.0**-24 * size + 1e-30)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_numbers_that_are_not_finite_do_not_vanish(name: str, value: float) -> None:
    form = form_of("be,em->bm", 1)
    assert form is not None
    rng = np.random.default_rng(0)
    x, w, g = (_bfloat16(rng.normal(size=shape)) for shape in ((3, 8), (8, 4), (3, 4)))
    x[1, 2], g[0, 3] = value, value
    y, dx, dw = contracted(name, form, x, w, g)
    assert (np.isfinite(y) == [[True], [False], [True]]).all()
    assert (np.isfinite(dx) == [[False], [True], [True]]).all()
    assert not np.isfinite(dw[2]).any() and not np.isfinite(dw[:, 3]).any()


def _matmul(a: Any, b: Any, *, scale_a: Any, scale_b: Any, out_dtype: Any, use_fast_accum: bool) -> Any:
    """Do what `torch._scaled_mm` does on a GPU."""
    assert not use_fast_accum and a.is_contiguous() and b.mT.is_contiguous()
    assert not any(n % 16 for n in (*a.shape, *b.shape))
    return ((a.float() @ b.float()) * scale_a * scale_b).to(out_dtype)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("formats", ["ocp", "fnuz"])
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("spec", ["bse,ehd->bshd", "bshd,hde->bse", "bxse,xem->bxsm"])
def test_products_of_8_bit_arrays_are_those_of_the_emulation(
    name: str, formats: str, scaling: str, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The arrays that a GPU or TPU multiplies, in its own formats, give the same result: here a CPU multiplies them."""
    if name == "torch":
        monkeypatch.setattr("torch._scaled_mm", _matmul)
    form = form_of(spec, 1, scaling)
    assert form is not None
    assert kernel_of(name, formats).name == {"jax": "float8", "torch": "scaled_mm"}[name]
    sizes = {c: n for t, s in zip((form.x, form.w), SPECS[spec], strict=True) for c, n in zip(t, s, strict=True)}
    rng = np.random.default_rng(7)
    # Powers of two times small integers: all sums are exact, in any order.
    x, w, g = (
        (rng.integers(-8, 8, s) * np.exp2(rng.integers(-6, 1, s))).astype(np.float32)
        for s in ([sizes[c] for c in t] for t in (form.x, form.w, form.out))
    )
    for a, b in zip(contracted(name, form, x, w, g, formats), contracted(name, form, x, w, g), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.skipif("jax" not in BACKENDS, reason="jax is not installed")
def test_a_mesh_of_jax_changes_no_bit() -> None:
    """The largest value of what shares a scale is over all shards. The operands are such that no sum is rounded."""
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.support.fp8_on_a_mesh"]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    rounded = {name: found.pop(name) for name in [name for name in found if name.endswith("rounded")]}
    assert len(found) == 4 and not any(found.values()), found
    # A scale of a shard alone would show: of all, one rounds where one of each row does not.
    assert rounded == {"row, rounded": [], "tensor, rounded": ["result", "gradient of x"]}, rounded


@pytest.mark.skipif("torch" not in BACKENDS, reason="torch is not installed")
@pytest.mark.filterwarnings("default")  # of torch's tracer, which turns warnings into errors of its own
@pytest.mark.parametrize("spec", ["bse,ehd->bshd", "bxse,xem->bxsm"])
def test_torch_compile_traces_the_product_of_a_gpu(spec: str) -> None:
    """As a whole, without a break: blocks are compiled on GPUs by default."""
    import torch

    from portatrain.backends.torch import fp8 as torch_fp8

    form = form_of(spec, 1)
    assert form is not None
    product = form.forward

    def run(x: Any, w: Any) -> Any:
        sides = zip((x, w), (product.a, product.b), strict=True)
        found = [torch_fp8.scaled(v, side.term, side.shared, side.kind) for v, side in sides]
        return torch_fp8.scaled_mm(product, *found, formats="ocp", dtype=torch.bfloat16)

    x, w = (torch.ones(shape, dtype=torch.bfloat16) for shape in SPECS[spec])
    y = torch.compile(run, fullgraph=True, backend="eager")(x, w)
    assert torch.equal(y, run(x, w)) and (y == SPECS[spec][0][-1]).all()  # a CPU has torch._scaled_mm too


def test_what_shares_a_scale() -> None:
    row, whole = (form_of("bxse,xem->bxsm", 1, scaling) for scaling in SCALINGS)
    assert row is not None and whole is not None
    assert [(p.a.shared, p.b.shared) for p in (row.forward, row.of_x)] == [("e", "e"), ("m", "m")]
    # One for each sample, and one for the weight of each expert.
    assert [(p.a.left, p.b.left) for p in (whole.forward, whole.of_x)] == [("b", "x"), ("b", "x")]
    assert form_of("sbe,em->bm", 1) is None
    # Experts first: their axis is none of samples, and what shares a scale must not depend on the microbatch.
    first, by_row = (form_of("xbe,xem->xbm", 1, scaling) for scaling in reversed(SCALINGS))
    assert first is not None and by_row is not None
    for one, other in ((first.forward, by_row.forward), (first.of_x, by_row.of_x)):
        assert (one.a.left, one.b.left) == (other.a.left, other.b.left) and "b" in one.a.left
    turned = form_of("esb,em->sbm", 1, "tensor")  # its first axis is contracted: no axis of samples
    assert turned is not None and (turned.forward.a.left, turned.forward.b.left) == ("sb", "m")


def test_form() -> None:
    assert form_of("bse,em->bsm", 1) == Form("bse", "em", "bsm", "e")
    assert form_of("em, bse -> bsm", 0) == Form("bse", "em", "bsm", "e")
    assert form_of("bse,ehd->bshd", 1).n == "hd"  # type: ignore[union-attr]
    for spec in ("bse,e->bs", "bse,em->bsem", "bse,em->bm", "e,em->m", "bee,em->bm", "bse->bs", "...e,em->...m"):
        assert form_of(spec, 1) is None, spec
    assert dataclasses.replace(E4M3).largest == 448 and E5M2.largest == 57344
