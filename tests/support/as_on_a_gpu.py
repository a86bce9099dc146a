"""Run the kernels of attention that the table chooses for a GPU, on a CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from portatrain.backends import kernels

FLEX = "as on a GPU"
"""The name of these cells, in the place of a mutant's."""


@contextmanager
def flex_on_a_cpu() -> Iterator[None]:
    """FlexAttention runs by the reference of its operator, also with the small heads for which a GPU has no kernel."""
    plain = kernels.Site.of

    def of(program: Any, *, device: str, **given: Any) -> Any:
        named = (("attention", "flex"),)
        return dataclasses.replace(plain(program, device=device, **given), device="cuda", named=named)

    rows = tuple(dataclasses.replace(r, refuses=lambda case: None) if r.name == "flex" else r for r in kernels.TABLE)
    with mock.patch.object(kernels.Site, "of", of), mock.patch.object(kernels, "TABLE", rows):
        yield
