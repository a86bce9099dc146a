"""What ZeRO can run: check a program before the processes wait for each other."""

from __future__ import annotations

from portatrain.backends.program import Program
from portatrain.errors import UserError
from portatrain.optim import SGD, AdamW, Lion

RULES = (AdamW, Lion, SGD)
"""Rules that update each element alone, so that they can run on a flat range of a tensor."""


def check(program: Program, *, backend: str, stage: int) -> None:
    """Raise UserError if ZeRO at `stage` cannot run the program. The check needs no other process."""
    mesh, rule = program.layout.mesh, program.optimizer
    sizes = [axis for axis, n in mesh.sizes.items() if n > 1]
    if sizes not in ([], ["fsdp"], ["replica"]):
        raise UserError(
            f"mesh {mesh} on the {backend} backend",
            expected="fsdp or replica alone, over all processes",
            got=" and ".join(sizes),
            do=f"Use fsdp={mesh.devices}, or --backend torch, which has the other axes.",
        )
    if not isinstance(rule, RULES):
        raise UserError(
            f"optimizer {type(rule).__name__} on the {backend} backend",
            expected=f"one of {', '.join(r.__name__ for r in RULES)}, which act on every element alone",
            got=type(rule).__name__,
            do="ZeRO cuts tensors into flat ranges: use --backend torch for the others.",
        )
    if scalars := [name for name, info in program.definition.params.items() if info.shape == ()]:
        raise UserError(
            f"parameters without axes on the {backend} backend",
            expected="at least one axis, as DeepSpeed cuts every parameter",
            got=", ".join(scalars),
            do="Give each an axis of size 1, as in Param(scale=1, fan_in_axes=0), or use --backend torch.",
        )
    if program.precision in ("bf16-state", "fp8"):
        raise UserError(
            f"precision {program.precision} on the {backend} backend",
            expected="fp32 or bf16",
            got=program.precision,
            do="Use bf16, or --backend torch.",
        )
    if program.compile:
        raise UserError(
            f"compile on the {backend} backend",
            expected="blocks that run eagerly",
            got="compile=True",
            do="Leave compile out, or use --backend torch.",
        )
    if stage == 3 and program.remat != "none":
        raise UserError(
            f"remat {program.remat!r} on the {backend} backend",
            expected="none",
            got=repr(program.remat),
            do="Stage 3 gathers parameters by hooks that recomputation would disturb: use stage 2 or torch.",
        )
