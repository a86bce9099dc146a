"""Measure an optimised HLO module from its text: FLOPs of matmuls, and bytes of collectives by mesh axis.

XLA's own cost analysis counts the body of a loop once; this module counts it as often as it runs. A collective is named
by the mesh axes along which its groups differ, not by its operation, because a compiler may replace one by another.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from portatrain.plan.compilers.hlo_text import Computation, Instruction, elements, multiplicity, nbytes, read

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")

_CHANNEL = re.compile(r"channel_id=(\d+)")
_MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:,\s*device_ids=\((\[[\d,]+\](?:T\([\d,]+\))?|[\d,]+)\))?\s*\{([^}]*)\}"
)


@dataclass
class Found:
    """The figures of one device and one run of the module. ``flops_fp8``: those of matmuls of two 8-bit floats.
    ``dots``: the number of matmuls, by the types of their operands ('bf16 x bf16'). ``bytes``: bytes of the gathered
    arrays of collectives, by mesh axes (joined by ``+``), an all-reduce counted twice. ``kinds``: the same bytes by
    mesh axes and operation, as the compiler names it. ``calls``: the number of collectives."""

    flops: float = 0.0
    flops_fp8: float = 0.0
    dots: dict[str, float] = field(default_factory=dict)
    bytes: dict[str, float] = field(default_factory=dict)
    kinds: dict[str, dict[str, float]] = field(default_factory=dict)
    calls: dict[str, float] = field(default_factory=dict)

    def multiply(self, times: float, flops: float, kinds: Sequence[str]) -> None:
        both = " x ".join(kinds)
        self.dots[both] = self.dots.get(both, 0.0) + times
        self.flops += times * flops
        self.flops_fp8 += times * flops * all(kind.startswith("f8") for kind in kinds)

    def add(self, axes: str, kind: str, times: float, moved: float) -> None:
        self.bytes[axes] = self.bytes.get(axes, 0.0) + times * moved
        of_axes = self.kinds.setdefault(axes, {})
        of_axes[kind] = of_axes.get(kind, 0.0) + times * moved
        self.calls[axes] = self.calls.get(axes, 0.0) + times


def measure(text: str, sizes: Mapping[str, int]) -> Found:
    """Measure a module whose devices are numbered row-major over the mesh with these axis sizes."""
    computations = read(text)
    found = Found()
    in_pieces: dict[str, tuple[float, float, str, str]] = {}
    for name, times in multiplicity(computations).items():
        one = computations[name]
        for line in one.lines:
            if line.opcode in ("dot", "convolution"):
                found.multiply(times, _flops(one, line), [kind for x in line.operands[:2] for kind in _kind(one, x)])
            elif line.opcode == "custom-call" and (contracted := _LIBRARY.search(line.rest)):
                dims = [int(n) for n in re.findall(r"\d+", contracted[1])]
                kinds = [kind for x in line.operands[:2] for kind in _kind(one, x)]
                found.multiply(times, _library_flops(one, line, dims), kinds)
            elif line.opcode == "custom-call":
                found.flops += times * _kernel_flops(one, line)
            kind = line.opcode.removesuffix("-start")
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"  # on a TPU: an all-reduce fused with the slice that a device keeps
            if kind in COLLECTIVES and not line.opcode.endswith("-done"):
                axes = "+".join(_axes(line.rest, sizes)) or "none"
                moved = _gathered(one, line, kind, _group_size(line.rest, sizes))
                channel = _CHANNEL.search(line.rest)
                if channel and "async_collective_fusion_config" in line.rest:
                    # On a TPU one collective appears in every fusion that runs beside it, inner loops among them. It
                    # starts as often as the least frequent of these fusions.
                    piece = (times, moved, axes, kind)
                    in_pieces[channel[1]] = min(in_pieces.get(channel[1], piece), piece)
                    continue
                found.add(axes, kind, times, moved)
    for times, moved, axes, kind in in_pieces.values():
        found.add(axes, kind, times, moved)
    return found


# ---- matmuls

_LIBRARY = re.compile(r'custom_call_target="__cublas\$.*"lhs_contracting_dimensions":\[([^\]]*)\]')
"""A call of cuBLAS, cuBLASLt or, by the same name, AMD's libraries."""


def _library_flops(one: Computation, line: Instruction, contracted: Sequence[int]) -> float:
    """Return 2 x multiplications of a matmul of a library; the first array of its result is the product."""
    left = elements(one.type_of(line.operands[0]))
    if not left:
        return 0.0
    return 2.0 * math.prod(elements(line.type)[0][1]) * math.prod(left[0][1][n] for n in contracted)


_KERNEL = re.compile(r"attention_of_(\d+)_blocks_of_(\d+)x(\d+)_and_sizes_(\d+)_(\d+)\b.*?splash_m[hq]a_(fwd|dq|dkv)")
_KERNEL_MATMULS = {"fwd": (1, 1), "dq": (2, 1), "dkv": (2, 2)}
"""The matmuls over a block of scores in each kernel of splash attention: of the size of keys, and of values."""


def _kernel_flops(one: Computation, line: Instruction) -> float:
    """Return the FLOPs of a call of a splash kernel, which XLA does not look into; 0 of any other call. Its name says
    what one head computes (`backends/jax/splash.py`)."""
    named = _KERNEL.search(line.rest)
    if named is None:
        return 0.0
    blocks, queries, keys, size, values = (int(named[i]) for i in range(1, 6))
    of_keys, of_values = _KERNEL_MATMULS[named[6]]
    heads = math.prod(elements(one.type_of(line.operands[2]))[0][1][:-2])  # of the queries, (B, H, S, D)
    return 2.0 * heads * blocks * queries * keys * (of_keys * size + of_values * values)


def _kind(one: Computation, name: str) -> list[str]:
    """Return the type of the numbers of an array, in a list; of an operand that is not found, an empty one."""
    return [kind for kind, _ in elements(one.type_of(name))[:1]]


def _flops(one: Computation, line: Instruction) -> float:
    """Return 2 x multiplications of a ``dot``, or of the ``convolution`` that XLA makes of one on TPUs."""
    out = elements(line.type)[0][1]
    left = elements(one.type_of(line.operands[0]))
    if not left:
        return 0.0
    dims = left[0][1]
    if line.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line.rest)
        inner = [dims[int(n)] for n in contracted[1].split(",") if n] if contracted else []
        return 2.0 * math.prod(out) * math.prod(inner)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", line.rest)
    if labels is None:
        return 0.0
    at = {label: index for index, label in enumerate(labels[1])}
    out_at = {label: index for index, label in enumerate(labels[3])}
    groups = re.search(r"feature_group_count=(\d+)", line.rest)
    inner_size = dims[at["f"]] // (int(groups[1]) if groups else 1)
    pairs = 1.0
    spatial = sorted(label for label in at if label.isdigit())
    for label, window in zip(spatial, _windows(line.rest, len(spatial)), strict=True):
        pairs *= _pairs(dims[at[label]], out[out_at[label]], *window)
    batch = re.search(r"batch_group_count=(\d+)", line.rest)
    return 2.0 * out[out_at["b"]] * out[out_at["f"]] * inner_size * pairs / (int(batch[1]) if batch else 1)


def _windows(rest: str, n: int) -> list[tuple[int, int, int, int, int]]:
    """Return (size, stride, low padding, left dilation, right dilation) of every spatial dimension."""
    found = re.search(r"window=\{([^}]*)\}", rest)
    parts = dict(p.split("=") for p in found[1].split()) if found else {}
    size, stride = parts.get("size", ""), parts.get("stride", "")
    pad, left, right = parts.get("pad", ""), parts.get("lhs_dilate", ""), parts.get("rhs_dilate", "")

    def ints(text: str, default: int) -> list[int]:
        return [int(v.split("_")[0]) for v in text.split("x")] if text else [default] * n

    return list(zip(ints(size, 1), ints(stride, 1), ints(pad, 0), ints(left, 1), ints(right, 1), strict=True))


def _pairs(base: int, out: int, size: int, stride: int, pad: int, left: int, right: int) -> float:
    """Return the number of pairs of output and window position that meet an element of the left operand."""
    last = (base - 1) * left
    count = 0
    for k in range(size):
        # o * stride + k * right - pad = i * left, with 0 <= i < base
        offset = k * right - pad
        step = math.lcm(stride, left)
        first = next((o for o in range(min(out, step)) if (o * stride + offset) % left == 0), None)
        if first is None:
            continue
        each = step // stride
        low = max(0, -(-(-offset - first * stride) // (stride * each)))
        high = min((out - 1 - first) // each, (last - offset - first * stride) // (stride * each))
        count += max(0, high - low + 1)
    return float(count)


# ---- collectives


def _gathered(one: Computation, line: Instruction, kind: str, group: int) -> float:
    """Return the bytes of the gathered array; for an all-reduce, twice its array; for a permute, one device's data. The
    arrays of a ragged all-to-all are a device's own rows, and a buffer with room for those of the whole group."""
    if kind == "ragged-all-to-all":
        return group * min(nbytes(one.type_of(name)) for name in line.operands[:2])
    out = nbytes(line.type)
    into = sum(nbytes(one.type_of(name)) for name in line.operands)
    if line.opcode.endswith("-start"):  # its result holds the operand too
        out = max(out - into, into) if kind != "all-reduce" else into
    if kind == "all-gather":
        return max(out, into * group) if into else out
    if kind == "reduce-scatter":
        return into
    return 2 * into if kind == "all-reduce" else into


def _axes(rest: str, sizes: Mapping[str, int]) -> list[str]:
    """Return the mesh axes along which the members of a collective's groups differ."""
    axes, group = list(sizes), _group(rest, sizes)
    places = [_place(rank, list(sizes.values())) for rank in group]
    return [axis for i, axis in enumerate(axes) if len({place[i] for place in places}) > 1]


def _group_size(rest: str, sizes: Mapping[str, int]) -> int:
    return len(_group(rest, sizes))


def _group(rest: str, sizes: Mapping[str, int]) -> Sequence[int]:
    """Return the members of the first group; for a permute, a source and its target."""
    pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", rest)
    if pairs:
        return int(pairs[1]), int(pairs[2])
    named = _MESH_GROUPS.search(rest)
    if named:
        return _along_named(named[1], named[2] or "", named[3])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", rest)
    if listed:
        return [int(n) for n in listed[1].split(",")]
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
    if iota:
        groups = [int(n) for n in iota[1].split(",")]
        dims = [int(n) for n in iota[2].split(",")]
        order = [int(n) for n in iota[3].split(",")] if iota[3] else list(range(len(dims)))
        return list(itertools.islice(_transposed(dims, order), math.prod(groups[1:])))
    return range(math.prod(sizes.values()))


def _along_named(axes: str, order: str, along: str) -> Sequence[int]:
    """Return the first group along the axes ``along`` of a mesh of named axes. An axis is 'a', or 'a':(n)m, the part of
    it with m members and n before it. Devices count row-major unless ``order`` says otherwise."""
    sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", axes)}
    devices: Sequence[int] = range(math.prod(sizes.values()))
    iota = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", order)
    if iota:
        dims = [int(n) for n in iota[1].split(",")]
        turned = [int(n) for n in iota[2].split(",")] if iota[2] else list(range(len(dims)))
        devices = list(_transposed(dims, turned))
    elif order:
        devices = [int(n) for n in order.split(",")]
    places, stride = [0], len(devices)
    strides = {}
    for name, n in sizes.items():
        stride //= n
        strides[name] = stride
    for name, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", along):
        size = int(part) if part else sizes[name]
        step = strides[name] * (sizes[name] // (int(before) * size) if part else 1)
        places = [at + i * step for at in places for i in range(size)]
    return [devices[at] for at in places]


def _transposed(dims: Sequence[int], order: Sequence[int]) -> Iterable[int]:
    """Yield the elements of an iota of ``dims``, transposed, row-major."""
    strides = [math.prod(dims[i + 1 :]) for i in range(len(dims))]
    for place in itertools.product(*(range(dims[i]) for i in order)):
        yield sum(at * strides[i] for at, i in zip(place, order, strict=True))


def _place(rank: int, sizes: Sequence[int]) -> tuple[int, ...]:
    found = []
    for n in reversed(sizes):
        rank, digit = divmod(rank, n)
        found.append(digit)
    return tuple(reversed(found))
