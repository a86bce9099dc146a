"""No kernel of attention on a GPU makes an array of S x S elements: counted at 32,768 tokens, for all traits of a call.

The tensors have no contents. They are a GPU's if there is one. Without one torch cannot derive a GPU's tensors, so they
are a CPU's, under the kernels that the table chooses for a GPU.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from portatrain.backends import choose_kernel, kernels

torch = pytest.importorskip("torch")

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from portatrain.backends.torch.attention import attention, load_kernels  # noqa: E402

B, S, H, K, D = 1, 32768, 4, 2, 64
LINEAR = 4 * B * S * H * D
"""Elements: the largest array of the inputs four times. One sample's S x S is 32 times as much."""
TRAITS = ("window", "segments", "positions", "prefix", "alibi", "softcap")
COMBINATIONS = [frozenset(some) for n in range(len(TRAITS) + 1) for some in itertools.combinations(TRAITS, n)]


class Largest(TorchDispatchMode):
    """Note the largest tensor made, and what made it."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.of = 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.numel() > self.elements:
                self.elements, self.of = tensor.numel(), f"{func} {tuple(tensor.shape)}"
        return out


def run(causal: bool, traits: frozenset[str], dtype: Any) -> tuple[str, Largest]:
    """Run attention and its backward pass without contents; return the kernel and the largest tensor."""
    choose_kernel.taken()
    site = kernels.Site(backend="torch", device="cuda")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with FakeTensorMode(), Largest() as largest:
        q = torch.empty(B, S, H, D, dtype=dtype, device=device, requires_grad=True)
        k, v = (torch.empty(B, S, K, D, dtype=dtype, device=device, requires_grad=True) for _ in range(2))
        ids = torch.empty(B, S, dtype=torch.int32, device=device)
        at = torch.empty(S, dtype=torch.int32, device=device)
        given: dict[str, Any] = {"window": 1024, "segments": ids, "positions": (at, at), "prefix": ids}
        given |= {"alibi": True, "softcap": 30.0, "sinks": torch.empty(H, device=device, requires_grad=True)}
        options = {"segment_ids" if name == "segments" else name: given[name] for name in traits}
        out = attention(q, k, v, site=site, causal=causal, **options)
        torch.autograd.grad(out.float().sum(), (q, k, v))
    (chosen,) = choose_kernel.taken()
    assert set(chosen["traits"]) == traits | ({"causal"} if causal else set())
    return chosen["kernel"], largest


@pytest.mark.parametrize(
    ("dtype", "causal", "without_a_mask"),
    [
        ("bfloat16", True, "sdpa-causal"),
        pytest.param("bfloat16", False, "sdpa-masked", marks=pytest.mark.full),
        pytest.param("bfloat16", True, "sinks", marks=pytest.mark.full),
        pytest.param("float32", True, "flex", marks=pytest.mark.full),
        pytest.param("float32", False, "flex", marks=pytest.mark.full),
    ],
)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_nothing_of_s_by_s(dtype: str, causal: bool, without_a_mask: str) -> None:
    load_kernels()
    sinks = frozenset({"sinks"}) if without_a_mask == "sinks" else frozenset()
    for traits in COMBINATIONS:
        kernel, largest = run(causal, traits | sinks, getattr(torch, dtype))
        assert kernel == ("flex" if traits or sinks else without_a_mask)
        assert 0 < largest.elements <= LINEAR, f"{sorted(traits)}: {kernel} made {largest.of}"


def test_the_count_sees_a_dense_mask() -> None:
    """The kernels of a CPU in the same call: the test above can fail."""
    site = kernels.Site(backend="torch", device="cpu")
    with FakeTensorMode(), Largest() as largest:
        q = torch.empty(B, S, H, D)
        k = torch.empty(B, S, K, D)
        attention(q, k, k, site=site, segment_ids=torch.empty(B, S, dtype=torch.int32))
    assert largest.elements >= S * S
