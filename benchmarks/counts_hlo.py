"""Count what an optimised XLA program executes, from its text: instructions and matmul FLOPs, with loops multiplied."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from math import prod

# These opcodes name, group or alias values, or run other computations, so they run no kernel themselves.
NOT_KERNELS = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "call",
    "while",
    "conditional",
}

_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_SHAPE = re.compile(r"\w+\[([\d,]*)\]")
_CONTRACTING = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")


@dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    shape: tuple[int, ...]
    operands: tuple[str, ...]
    text: str


@dataclass(kw_only=True)
class HloCounts:
    """Counts of a program. operations: instructions that run, by opcode (a fusion is one), times the trips of
    loops. in_loops: the instructions in one pass through every loop that is in no other loop. matmul_flops: 2 m n k of
    every dot, in any computation."""

    operations: Counter[str] = field(default_factory=Counter)
    in_loops: int = 0
    matmul_flops: float = 0.0

    @property
    def total(self) -> int:
        return sum(self.operations.values())


def count(hlo: str) -> HloCounts:
    """Return the counts of the entry computation. Raises ValueError if a loop does not say how often it runs."""
    computations, entry = parse(hlo)
    found = HloCounts()
    _add(computations, entry, 1, found, inside_fusion=False)
    return found


def parse(hlo: str) -> tuple[dict[str, list[Instruction]], str]:
    """Return ({computation: its instructions}, name of the entry)."""
    computations: dict[str, list[Instruction]] = {}
    entry = ""
    current: list[Instruction] = []
    for line in hlo.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif line.startswith("  ") and " = " in line:
            current.append(_instruction(line))
    return computations, entry


def _instruction(line: str) -> Instruction:
    name, _, rest = line.strip().removeprefix("ROOT ").partition(" = ")
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ") - 1
    kind, rest = rest[: end + 1], rest[end + 1 :].lstrip()
    opcode, _, _ = rest.partition("(")
    inside = rest[len(opcode) + 1 : _closing(rest, len(opcode))]
    shape = _SHAPE.match(kind)
    sizes = tuple(int(n) for n in shape[1].split(",") if n) if shape else ()
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(name.removeprefix("%"), opcode, sizes, operands, rest)


def _closing(text: str, at: int) -> int:
    """Return the index at which the parenthesis that opens at `at` closes."""
    depth = 0
    for i in range(at, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise ValueError(f"unbalanced: {text[:80]}")


def _add(
    computations: dict[str, list[Instruction]], name: str, times: int, found: HloCounts, *, inside_fusion: bool
) -> None:
    shapes = {i.name: i.shape for i in computations[name]}
    for one in computations[name]:
        if one.opcode not in NOT_KERNELS and not inside_fusion:
            found.operations[one.opcode] += times
        if one.opcode == "dot":
            contracted = [int(d) for d in _CONTRACTING.search(one.text)[1].split(",") if d]  # type: ignore[index]
            depth = prod(shapes[one.operands[0]][d] for d in contracted)
            found.matmul_flops += times * 2.0 * prod(one.shape) * depth
        if one.opcode == "while":
            trips = _TRIPS.search(one.text)
            if trips is None:
                raise ValueError(f"while {one.name} has no known trip count")
            called = dict(re.findall(r"(body|condition)=%?([\w.\-]+)", one.text))
            before = found.total
            _add(computations, called["body"], times * int(trips[1]), found, inside_fusion=False)
            found.in_loops += (found.total - before) // int(trips[1]) if times == 1 else 0
        elif one.opcode in ("fusion", "call", "custom-call"):
            for inner in _CALLED.findall(one.text):
                fused = inside_fusion or one.opcode != "call"
                _add(computations, inner, times, found, inside_fusion=fused)
        elif one.opcode == "conditional":
            # Any one branch may run, so the costliest counts.
            branches = _BRANCHES.search(one.text)
            names = re.findall(r"%?([\w.\-]+)", branches[1]) if branches else []
            names += re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", one.text)
            each = []
            for inner in names:
                each.append(HloCounts())
                _add(computations, inner, times, each[-1], inside_fusion=inside_fusion)
            most = max(each, key=lambda c: (c.matmul_flops, c.total))
            found.operations.update(most.operations)
            found.matmul_flops += most.matmul_flops
