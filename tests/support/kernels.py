"""Backends whose operations run by a kernel that a test names."""

from __future__ import annotations

import dataclasses
from typing import Any

from portatrain.backends import kernels
from portatrain.backends.base import Context, backend_class


def naming(backend: str, kernel: str) -> Any:
    """The class of `backend`, whose operations on their own run by `kernel`."""
    site, plain = kernels.Site(backend=backend, named=(("attention", kernel),)), backend_class(backend)

    class Named(plain):  # type: ignore[valid-type,misc]
        @classmethod
        def _standalone(cls, context: Context) -> Any:
            ops = super()._standalone(context)
            if backend == "jax":
                return dataclasses.replace(ops, site=site)
            return dataclasses.replace(ops, static=dataclasses.replace(ops.static, site=site))

    return Named
