"""Choose the kernel that runs an operation, such as attention, from the table of kernels (`kernels.py`).

The backend calls `choose` with the case while it runs or traces the operation. The first row of the table that belongs
to the backend and has no reason against the case runs, unless a kernel was named explicitly.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from portatrain.backends import fp8_chips
from portatrain.backends.kernels import OPERATIONS, Case, Kernel, Named, Site, rows
from portatrain.errors import UserError, choice


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


_taken: dict[tuple[str, Case], Choice] = {}


def first(operation: str, case: Case) -> Kernel:
    """Return the first kernel of the table that covers the case, which runs unless another is named.

    Raises UserError if none does, which only an fp8 matmul meets: every other operation has a row for all cases.
    """
    found = next((k for k in rows(operation, case.site.backend) if k.refuses(case) is None), None)
    if found is None:
        raise _uncovered(f"kernel of {operation}", operation, case)
    return found


def fp8_refusal(site: Site, chip: str) -> UserError | None:
    """Return the error if no kernel at `site` computes the matmuls of precision fp8, else None. `chip`: its name."""
    case = Case(site=site, dtype="bfloat16", shape=(1, 1, 1), traits=frozenset({"row-scales"}))
    if any(k.refuses(case) is None for k in rows("fp8_matmul", site.backend)):
        return None
    return _uncovered(f"precision fp8 on {chip}", "fp8_matmul", case)


def check_fp8(site: Site, chip: str) -> None:
    """Raise `fp8_refusal`."""
    if (error := fp8_refusal(site, chip)) is not None:
        raise error


def _uncovered(what: str, operation: str, case: Case) -> UserError:
    known = rows(operation, case.site.backend)
    reasons = "; ".join(f"{k.name}: {k.refuses(case)}" for k in known)
    anyway = f" `portatrain train --kernel {operation}={known[-1].name}` runs it anyway, slowly." if known else ""
    return UserError(
        what,
        expected=f"a chip with 8-bit matmuls ({fp8_chips.CHIPS}), or a CPU, which emulates them",
        got=f"no kernel for it ({reasons or f'the backend {case.site.backend} has none'})",
        do=f"Use --set precision=bf16, or another chip.{anyway}",
    )


def choose(operation: str, case: Case) -> Choice:
    """Return the kernel that runs `operation` in this case, with the reasons against the others.

    Raises UserError if a kernel was named that does not cover the case.
    """
    known = rows(operation, case.site.backend)
    reasons = {k.name: k.refuses(case) for k in known}
    by_default = first(operation, case)
    name = dict(case.site.named).get(operation)
    if name is None:
        chosen = by_default
    else:
        chosen = rows(operation, case.site.backend, name)[0]
        if (reason := reasons[name]) is not None:
            raise UserError(
                f"kernel {operation}={name}",
                expected="a case that it covers",
                got=f"{reason} (shape {case.shape}, {case.dtype}, {', '.join(sorted(case.traits)) or 'no mask'})",
                do=f"Leave --kernel out: {by_default.name} runs then.",
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


def attention_traits(options: Mapping[str, Any], sizes: tuple[int, int]) -> frozenset[str]:
    """Return the traits of a call of `Ops.attention` with these keywords. `sizes`: of a key head and a value head."""
    present = {
        "causal": options.get("causal", True),
        "window": options.get("window") is not None,
        "segments": options.get("segment_ids") is not None,
        "segment-pair": isinstance(options.get("segment_ids"), tuple),
        "positions": options.get("positions") is not None,
        "prefix": options.get("prefix") is not None,
        "alibi": bool(options.get("alibi", False)),
        "softcap": options.get("softcap") is not None,
        "sinks": options.get("sinks") is not None,
        "value-size": sizes[0] != sizes[1],
    }
    return frozenset(name for name, there in present.items() if there)
