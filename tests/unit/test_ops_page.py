"""docs/reference/which-ops.md names operations that exist, and all operations on arrays."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from portatrain.model.ops import Ops
from portatrain.model.ops_arrays import ArrayOps

PAGE = Path(__file__).parents[2] / "docs/reference/which-ops.md"
THE_SAME = "relu gelu silu sigmoid tanh softplus exp expm1 log log1p sqrt rsqrt sin cos erf abs sign floor maximum"
SAME_NAMES = {*THE_SAME.split(), "minimum", "where", "logsumexp", "softmax", "log_softmax"}


def test_names() -> None:
    text = PAGE.read_text()
    named = set(re.findall(r"ops\.([a-z_0-9]+)", text)) - {"md", "py"}
    assert {name for name in named if not hasattr(Ops, name)} == set()
    rows = " ".join(line for line in text.splitlines() if "the same names" in line)
    assert {name for name in SAME_NAMES if f"`{name}`" not in rows or not hasattr(Ops, name)} == set()
    operations = {name for name, _ in inspect.getmembers(ArrayOps, inspect.isfunction) if not name.startswith("_")}
    assert operations - named - SAME_NAMES == set()
