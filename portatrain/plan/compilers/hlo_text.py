"""Parse the text of an optimised HLO module: its computations, the types of its values, and how often each runs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

BYTES = {
    "pred": 1,
    "f8e4m3fn": 1,
    "f8e5m2": 1,
    "f8e4m3fnuz": 1,
    "f8e5m2fnuz": 1,
    "f8e8m0fnu": 1,
    "s4": 0.5,
    "u4": 0.5,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
    "c64": 8,
}
_HEAD = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s*\(.*->.*\{\s*$")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|branch_computations|called_computations)=\{?([^}\s]*(?:, *%[^}\s]*)*)"
)


@dataclass
class Instruction:
    """One line. ``type``: the type of its result; ``rest``: the text after the operands."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    rest: str


@dataclass
class Computation:
    name: str
    entry: bool
    lines: list[Instruction] = field(default_factory=list)
    named: dict[str, Instruction] = field(default_factory=dict)

    def line(self, name: str) -> Instruction | None:
        """Return an instruction of this computation by name."""
        if len(self.named) != len(self.lines):
            self.named = {line.name: line for line in self.lines}
        return self.named.get(name)

    def type_of(self, name: str) -> str:
        """Return the type of an instruction of this computation."""
        line = self.line(name)
        return line.type if line is not None else ""


_METADATA = re.compile(r"kernel_metadata=\{\n.*\n\}")
"""What a Pallas kernel says of itself: the only attribute that is written over several lines."""


def read(text: str) -> dict[str, Computation]:
    """Return the computations of a module by name."""
    found: dict[str, Computation] = {}
    now: Computation | None = None
    for line in _METADATA.sub("kernel_metadata={}", text).splitlines():
        if now is None:
            head = _HEAD.match(line)
            if head:
                now = Computation(head[2], bool(head[1]))
                found[now.name] = now
        elif line.strip().startswith("}"):
            now = None
        else:
            made = _instruction(line)
            if made is not None:
                now.lines.append(made)
    return found


def elements(type_: str) -> list[tuple[str, tuple[int, ...]]]:
    """Return every array in a type, for a tuple in order: (element type, dimensions)."""
    return [(kind, tuple(int(n) for n in dims.split(",") if n)) for kind, dims in _SHAPE.findall(type_)]


def nbytes(type_: str) -> float:
    return sum(BYTES.get(kind, 0) * math.prod(dims) for kind, dims in elements(type_))


def _instruction(line: str) -> Instruction | None:
    left, equals, right = line.strip().removeprefix("ROOT ").partition(" = ")
    if not equals:
        return None
    if right.startswith("("):
        end = _closing(right, 0) + 1
    else:
        end = right.find(" ")
    type_, right = right[:end], right[end:].lstrip()
    opcode, bracket, _ = right.partition("(")
    if not bracket or not re.fullmatch(r"[\w\-]+", opcode):
        return None
    close = _closing(right, len(opcode))
    inside = right[len(opcode) + 1 : close]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside)) or tuple(w.split()[-1] for w in inside.split(",") if w.strip())
    return Instruction(left.lstrip("%"), type_, opcode, operands, right[close + 1 :])


def _closing(text: str, start: int) -> int:
    """Return the index of the bracket that closes the one at ``start``."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if not depth:
            return index
    return len(text) - 1


# ---- loops


def multiplicity(computations: Mapping[str, Computation]) -> dict[str, float]:
    """Return how often each computation runs in one run of the module."""
    times: dict[str, float] = {}

    def visit(name: str, count: float) -> None:
        times[name] = times.get(name, 0.0) + count
        for line in computations[name].lines:
            inside = count * (_trips(computations[name], line, computations) if line.opcode == "while" else 1)
            for called in _called(line, computations):
                visit(called, inside)

    for one in computations.values():
        if one.entry:
            visit(one.name, 1.0)
    return times


def _called(line: Instruction, computations: Mapping[str, Computation]) -> Iterable[str]:
    for group in _CALLED.findall(line.rest):
        for name in re.findall(r"[\w.\-]+", group):
            if name in computations:
                yield name


def _trips(one: Computation, line: Instruction, computations: Mapping[str, Computation]) -> float:
    """Return how often the loop `line` of `one` runs: the trip count in the text, else the bound in its condition over
    the amount that its body adds to the counter. A TPU's compiler may join two rounds of a windowed matmul's loop."""
    known = re.search(r'known_trip_count"?[:=]\s*\{\s*"?n"?[:=]\s*"?(\d+)', line.rest)
    if known:
        return float(known[1])
    called = dict(re.findall(r"(condition|body)=%?([\w.\-]+)", line.rest))
    condition, body = (computations.get(called.get(key, "")) for key in ("condition", "body"))
    if condition is None:
        return 1.0
    bound = max((n for at in condition.lines if (n := _constant(condition, at.name)) is not None), default=1)
    counters = [at for at in condition.lines if at.opcode == "get-tuple-element" and _is_integer(at.type)]
    if body is None or not body.lines or len(counters) != 1 or (at := _index(counters[0])) is None:
        return float(bound)
    step = _added(body, body.lines[-1].operands[at], at, computations) if at < len(body.lines[-1].operands) else None
    start = one.line(line.operands[0]) if line.operands else None
    first = _constant(one, start.operands[at]) if start and at < len(start.operands) else None
    return float(max(1, -(-(bound - (first or 0)) // (step or 1))))


def _added(one: Computation, name: str, at: int, computations: Mapping[str, Computation], depth: int = 0) -> int | None:
    """Return what a loop's body adds to element `at` of its tuple for the value `name`; None if that is no number."""
    line = one.line(name)
    if line is None or depth > 16:
        return None
    if line.opcode == "get-tuple-element" and _index(line) == at:
        source = one.line(line.operands[0])
        return 0 if source is not None and source.opcode == "parameter" else None
    if line.opcode in ("copy", "bitcast", "convert"):
        return _added(one, line.operands[0], at, computations, depth + 1)
    if line.opcode == "fusion":
        inside = computations.get(next(iter(_called(line, computations)), ""))
        if inside is None:
            return None
        total, base = _through(inside, inside.lines[-1].name)
        into = _added(one, line.operands[base], at, computations, depth + 1) if base is not None else None
        return None if into is None else total + into
    if line.opcode == "add":
        for counter, more in (line.operands, line.operands[::-1]):
            n, before = _constant(one, more), _added(one, counter, at, computations, depth + 1)
            if n is not None and before is not None:
                return before + n
    return None


def _through(one: Computation, name: str) -> tuple[int, int | None]:
    """Return (n, i) if the value `name` of a fusion is its operand i plus n; i is None if it is anything else."""
    line = one.line(name)
    if line is None:
        return 0, None
    if line.opcode == "parameter":
        return 0, int(line.operands[0])
    if line.opcode in ("copy", "bitcast", "convert"):
        return _through(one, line.operands[0])
    if line.opcode == "add":
        for base, more in (line.operands, line.operands[::-1]):
            if (n := _constant(one, more)) is not None:
                total, found = _through(one, base)
                return total + n, found
    return 0, None


def _constant(one: Computation, name: str) -> int | None:
    """Return the whole number that is the value of `name`; None if it is no whole number."""
    line = one.line(name)
    while line is not None and line.opcode in ("copy", "bitcast", "convert"):
        line = one.line(line.operands[0])
    if line is None or line.opcode != "constant" or not line.operands:
        return None
    return int(line.operands[0]) if re.fullmatch(r"-?\d+", line.operands[0]) else None


def _index(line: Instruction) -> int | None:
    """Return the index of the element that a get-tuple-element takes."""
    found = re.search(r"index=(\d+)", line.rest)
    return int(found[1]) if found else None


def _is_integer(type_: str) -> bool:
    return re.match(r"[su]\d+\[\]", type_) is not None
