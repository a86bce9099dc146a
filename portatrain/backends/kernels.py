"""Choose the implementation of an operation from one table for all backends, read from the top.

An operation has one meaning (`model/ops.py`) and several implementations, its kernels. Which one runs follows from the
backend, the kind of device, the dtype, the sizes on one device, the traits of the call (its mask, mostly) and the mesh:
the first row of `TABLE` that belongs to the backend and has no reason against the case. The last row of a backend is
the operation written out, which always applies. A kernel that is named explicitly runs or is refused with its reason.

A laboratory adds rows by the entry-point group `portatrain.kernels`; they stand before ours. No framework is imported
here: `Kernel.load` imports the implementation when it runs.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from portatrain.errors import UserError, choice
from portatrain.system.plugins import Registry

GROUP = "portatrain.kernels"
"""The entry-point group in which other packages register rows: each entry is a `Kernel` or a sequence of them."""
KERNELS_OF_OTHERS = Registry(kind="kernel", group=GROUP, ours={})
OPERATIONS = ("attention",)
"""The operations with more than one implementation."""
SCORES_BYTES = 256 << 20
"""The largest size of the float32 scores of attention on a device at one time, on jax."""

Named = tuple[tuple[str, str], ...]
"""(operation, kernel) of the kernels that were named explicitly."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where operations run. backend: 'jax', 'torch' (DeepSpeed too) or 'torch-xla'. device: the framework's
    name of the kind of device. mesh: the mesh as text, in the form that `Mesh` prints."""

    backend: str
    device: str = "cpu"
    mesh: str = "1"
    named: Named = ()

    @classmethod
    def of(cls, program: Any, *, backend: str, device: str) -> Site:
        """Return the site of `program`; raise UserError if it names a kernel that `backend` does not have."""
        for operation, name in program.kernels:
            rows(operation, backend, name)
        return cls(backend=backend, device=device, mesh=str(program.layout.mesh), named=tuple(program.kernels))


@dataclass(frozen=True, kw_only=True)
class Case:
    """Everything that decides which kernel runs.

    shape: the sizes on one device; for attention (B, S, T, H, K, D), as `Ops.attention` names them. traits: for
    attention, those of 'causal', 'window', 'segments', 'positions', 'prefix', 'alibi' and 'softcap' that the call has,
    and 'uneven' if the queries do not divide over the devices that hold them.
    """

    site: Site
    dtype: str
    shape: tuple[int, ...]
    traits: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A row of the table: an implementation of an operation, and the cases that it covers.

    refuses: returns the reason why the implementation does not cover a case, or None if it covers it. where:
    'module:function' of the implementation. The function takes the arguments of the operation and, by keyword, those
    that the backend adds: `precision`, `shards` and `may_be_blind` on jax, `kept` on torch and torch-xla.
    """

    operation: str
    name: str
    backends: tuple[str, ...]
    where: str
    refuses: Callable[[Case], str | None] = lambda case: None

    def load(self) -> Callable[..., Any]:
        """Import and return the implementation."""
        return _loaded(self.where)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Name the kernel that runs, and the reason against every other row of the backend."""

    kernel: Kernel
    case: Case
    against: tuple[tuple[str, str], ...]

    def as_json(self) -> dict[str, Any]:
        case = self.case
        return {
            "operation": self.kernel.operation,
            "kernel": self.kernel.name,
            "named": self.kernel.operation in dict(case.site.named),
            "backend": case.site.backend,
            "device": case.site.device,
            "mesh": case.site.mesh,
            "dtype": case.dtype,
            "shape": list(case.shape),
            "traits": sorted(case.traits),
            "against": dict(self.against),
        }


# ---- reasons


def chunks(rows: int, heads: int, queries: int, keys: int) -> int:
    """Return the number of chunks into which jax cuts the queries of attention. Sizes are those on one device. The
    number is the smallest that divides the queries and keeps the scores of a chunk within `SCORES_BYTES`."""
    for n in range(1, queries):
        if queries % n == 0 and 4 * rows * heads * (queries // n) * keys <= SCORES_BYTES:
            return n
    return max(queries, 1)


def _chunked_refuses(case: Case) -> str | None:
    b, s, t, h, _, _ = case.shape
    if "uneven" in case.traits:
        return "the queries do not divide over the devices that hold them"
    if chunks(b, h, s, t) == 1:
        return f"the scores of all queries fit in {SCORES_BYTES / 2**20:g} MiB"
    return None


def _sdpa_refuses(case: Case) -> str | None:
    return "torch's kernels cannot soft-cap the scores" if "softcap" in case.traits else None


def _sdpa_masked_refuses(case: Case) -> str | None:
    if reason := _sdpa_refuses(case):
        return reason
    if "alibi" in case.traits and case.dtype != "float32":
        return f"the bias of ALiBi would be rounded to {case.dtype}"
    return None


def _sdpa_causal_refuses(case: Case) -> str | None:
    if reason := _sdpa_refuses(case):
        return reason
    if "causal" not in case.traits:
        return "the mask is not causal"
    if more := case.traits - {"causal"}:
        return f"its mask is causal and knows no {' or '.join(sorted(more))}"
    if case.shape[1] != case.shape[2]:
        return f"{case.shape[1]} queries and {case.shape[2]} keys are not the same positions"
    return None


# ---- the table

TABLE: tuple[Kernel, ...] = (
    Kernel(
        operation="attention",
        name="chunked",
        backends=("jax",),
        where="portatrain.backends.jax.attention:chunked",
        refuses=_chunked_refuses,
    ),
    Kernel(
        operation="attention",
        name="sdpa-causal",
        backends=("torch",),
        where="portatrain.backends.torch.attention:sdpa_causal",
        refuses=_sdpa_causal_refuses,
    ),
    Kernel(
        operation="attention",
        name="sdpa-masked",
        backends=("torch",),
        where="portatrain.backends.torch.attention:sdpa_masked",
        refuses=_sdpa_masked_refuses,
    ),
    Kernel(
        operation="attention",
        name="written-out",
        backends=("jax",),
        where="portatrain.backends.jax.attention:written_out",
    ),
    Kernel(
        operation="attention",
        name="written-out",
        backends=("torch",),
        where="portatrain.backends.torch.attention:written_out",
    ),
    Kernel(
        operation="attention",
        name="written-out",
        backends=("torch-xla",),
        where="portatrain.backends.torch_xla.attention:written_out",
    ),
)


@functools.cache
def _loaded(where: str) -> Callable[..., Any]:
    module, _, name = where.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


@functools.cache
def others() -> tuple[Kernel, ...]:
    """Return the rows that other packages register."""
    found: list[Kernel] = []
    for name in KERNELS_OF_OTHERS.names():
        made = KERNELS_OF_OTHERS.load(name)
        mine = tuple(made) if isinstance(made, Sequence) else (made,)
        for kernel in mine:
            if not isinstance(kernel, Kernel) or kernel.operation not in OPERATIONS:
                raise UserError(
                    f"kernel {name}",
                    expected=f"a portatrain.backends.kernels.Kernel of {', '.join(OPERATIONS)}",
                    got=repr(kernel)[:80],
                    do=f"Repair or remove the package that registers it under {GROUP}.",
                )
        found += mine
    return tuple(found)


def rows(operation: str, backend: str, name: str | None = None) -> tuple[Kernel, ...]:
    """Return the rows of `operation` on `backend`, in the order of the table; those called `name`, if it is given.
    Raises UserError if there are none."""
    if operation not in OPERATIONS:
        raise choice("operation of a kernel", operation, OPERATIONS)
    found = tuple(k for k in (*others(), *TABLE) if k.operation == operation and backend in k.backends)
    if name is None:
        return found
    named = tuple(k for k in found if k.name == name)
    if not named:
        raise choice(f"kernel of {operation} on {backend}", name, [k.name for k in found])
    return named


def parse(texts: Iterable[str]) -> Named:
    """Read texts such as `attention=NAME`, at most one an operation; raise UserError for any other text."""
    found: dict[str, str] = {}
    for text in texts:
        operation, sign, name = text.partition("=")
        if operation not in OPERATIONS:
            raise choice(f"--kernel {text}", operation, OPERATIONS)
        if not sign or not name or operation in found:
            raise UserError(
                f"--kernel {text}",
                expected="each operation once, with the name of a kernel, as in attention=written-out",
                got=repr(text),
                do="Leave it out to take the first kernel of the table that covers the case.",
            )
        found[operation] = name
    return tuple(sorted(found.items()))


# ---- the choice

_taken: dict[tuple[str, Case], Choice] = {}


def choose(operation: str, case: Case) -> Choice:
    """Return the kernel that runs `operation` in this case, with the reasons against the others.

    Raises UserError if a kernel was named that does not cover the case.
    """
    known = rows(operation, case.site.backend)
    reasons = {k.name: k.refuses(case) for k in known}
    first = next(k for k in known if reasons[k.name] is None)
    name = dict(case.site.named).get(operation)
    if name is None:
        chosen = first
    else:
        chosen = rows(operation, case.site.backend, name)[0]
        if (reason := reasons[name]) is not None:
            raise UserError(
                f"kernel {operation}={name}",
                expected="a case that it covers",
                got=f"{reason} (shape {case.shape}, {case.dtype}, {', '.join(sorted(case.traits)) or 'no mask'})",
                do=f"Leave --kernel out: {first.name} runs then.",
            )
    against = {k.name: reasons[k.name] or _passed_over(chosen, named=name is not None) for k in known if k != chosen}
    made = Choice(kernel=chosen, case=case, against=tuple(against.items()))
    _taken[operation, case] = made
    return made


def _passed_over(chosen: Kernel, *, named: bool) -> str:
    return f"{chosen.name} was named" if named else f"{chosen.name} comes first"


def taken() -> list[dict[str, Any]]:
    """Return the choices of this process since the last call, as JSON. The process keeps them, not a program: while a
    compiled step is traced, no object of ours is at hand to hold them."""
    found = [made.as_json() for made in _taken.values()]
    _taken.clear()
    return found


def attention_traits(options: Mapping[str, Any]) -> frozenset[str]:
    """Return the traits of a call of `Ops.attention` with these keywords."""
    present = {
        "causal": options.get("causal", True),
        "window": options.get("window") is not None,
        "segments": options.get("segment_ids") is not None,
        "positions": options.get("positions") is not None,
        "prefix": options.get("prefix") is not None,
        "alibi": bool(options.get("alibi", False)),
        "softcap": options.get("softcap") is not None,
    }
    return frozenset(name for name, there in present.items() if there)
