"""Honest kernels with one array multiplied by 1 + 2^-n: how small an error the court sees."""

from __future__ import annotations

from typing import Any

from portatrain.backends.kernels import Kernel
from portatrain.testing.kernels import Verdict, judge
from tests.support.wrong_kernels import HONEST_ATTENTION, HONEST_GROUPED, changed_gradient

ARRAYS = {"attention": ("result", "q", "k", "v"), "grouped_matmul": ("result", "x", "w")}
_now: dict[str, Any] = {}


def attention(q: Any, k: Any, v: Any, **options: Any) -> Any:
    return _result(HONEST_ATTENTION(*(_scaled(n, x) for n, x in zip("qkv", (q, k, v), strict=True)), **options))


def grouped_matmul(x: Any, w: Any, **options: Any) -> Any:
    return _result(HONEST_GROUPED(*(_scaled(n, a) for n, a in zip("xw", (x, w), strict=True)), **options))


def _scaled(name: str, x: Any) -> Any:
    factor = _now["factor"]
    return changed_gradient(x, lambda g: (g.float() * factor).to(g.dtype)) if name == _now["array"] else x


def _result(out: Any) -> Any:
    if _now["array"] != "result":
        return out
    wrong = (out.float() * _now["factor"]).to(out.dtype)
    return out + (wrong - out).detach()


SEEN = {"float32": 17, "bfloat16": 3}
"""The n of the smallest error that is convicted in every array, by dtype."""


def scaled(operation: str, array: str, dtype: str) -> Verdict:
    """Return the verdict on a kernel with `array` multiplied by 1 + 2^-SEEN[dtype]."""
    kernel = Kernel(operation=operation, name="scaled", backends=("torch",), where=f"{__name__}:{operation}")
    _now.update(array=array, factor=1 + 2.0 ** -SEEN[dtype])
    return judge(kernel, "torch", dtypes=(dtype,), first=True)
