"""Measure how planning a save or a restore grows with the processes: Llama-3.1-405B's state, without data.

    python -m benchmarks.checkpoint_growth          # about a minute

AdamW in fp32 (parameters and two moments), parameters cut over fsdp and tensor, from 16 to 16,384 processes: bytes of
the root, and for a few processes of each size the time and memory that planning takes: what to write, and what to read
to resume with half as many processes (with fsdp halved, so that all boxes differ). No file is touched.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from checkpoints_format import Planner, SaveLayout, SaveMesh, Sharded, Tensor, Want
from checkpoints_format.boxes import Box
from checkpoints_format.manifest import PackRecord, Root, encode_root
from checkpoints_format.read_plan import RequestPlanner

LAYERS, EMBED, HEADS, KV_HEADS, HEAD_DIM, MLP, VOCAB = 126, 16384, 128, 8, 128, 53248, 128256
TENSORS = {
    "embed/table": (("vocab", VOCAB), ("embed", EMBED)),
    "head": (("vocab", VOCAB), ("embed", EMBED)),
    "final_norm/scale": (("norm", EMBED),),
    "blocks/attn/wq": (("layers", LAYERS), ("embed", EMBED), ("heads", HEADS), ("head_dim", HEAD_DIM)),
    "blocks/attn/wk": (("layers", LAYERS), ("embed", EMBED), ("kv_heads", KV_HEADS), ("head_dim", HEAD_DIM)),
    "blocks/attn/wv": (("layers", LAYERS), ("embed", EMBED), ("kv_heads", KV_HEADS), ("head_dim", HEAD_DIM)),
    "blocks/attn/wo": (("layers", LAYERS), ("heads", HEADS), ("head_dim", HEAD_DIM), ("embed", EMBED)),
    "blocks/mlp/gate": (("layers", LAYERS), ("embed", EMBED), ("mlp", MLP)),
    "blocks/mlp/up": (("layers", LAYERS), ("embed", EMBED), ("mlp", MLP)),
    "blocks/mlp/down": (("layers", LAYERS), ("mlp", MLP), ("embed", EMBED)),
    "blocks/attn_norm/scale": (("layers", LAYERS), ("norm", EMBED)),
    "blocks/mlp_norm/scale": (("layers", LAYERS), ("norm", EMBED)),
}
CUT = {"embed": ("fsdp",), "heads": ("tensor",), "kv_heads": ("tensor",), "mlp": ("tensor",), "vocab": ("tensor",)}
SIZES = {16: (16, 1), 256: (64, 4), 4096: (512, 8), 16384: (2048, 8)}
"""Processes -> (fsdp, tensor); the rest is replicas."""
RECORD = PackRecord(1_073_741_824, 4096, 4_294_967_295, 4_294_967_295)


def layout(processes: int, fsdp: int, tensor: int) -> SaveLayout:
    mesh = SaveMesh(axes=(("replica", processes // (fsdp * tensor)), ("fsdp", fsdp), ("tensor", tensor)))
    return SaveLayout(
        tensors=tuple(
            Tensor(
                name=f"{role}/{name}",
                dtype="float32",
                shape=tuple(n for _, n in axes),
                axes=tuple(a for a, _ in axes),
                role=role.split("/")[0],
                placement=Sharded(spec=tuple(CUT.get(a, ()) for a, _ in axes)),
            )
            for role in ("params", "opt/m", "opt/v")
            for name, axes in TENSORS.items()
        ),
        meshes=(mesh,),
        writers=processes,
    )


def root_of(made: SaveLayout, packs: list[int]) -> Root:
    """Return a root with every pack's record, with numbers as long as real ones."""
    return Root(save="a1", layout=made, packs=tuple((RECORD,) * n for n in packs), meta={})


class Records(Sequence):
    """List every writer's packs as the root does. One writer's packs are computed when they are asked for, because a
    reader has read them and need not compute them."""

    def __init__(self, made: SaveLayout, packs: int) -> None:
        self._planner, self._made, self._packs = Planner(made), made, packs
        self._known: dict[int, tuple[PackRecord, ...]] = {}

    def __len__(self) -> int:
        return self._made.writers

    def __iter__(self) -> Iterator[tuple[PackRecord, ...]]:
        return iter([(RECORD,) * self._packs] * len(self))

    def __getitem__(self, writer: Any) -> Any:
        if writer not in self._known:
            packs = self._planner.writer(writer).packs
            self._known[writer] = tuple(PackRecord(4096 + p.data_bytes, 4096, 0, 0) for p in packs)
        return self._known[writer]


def measured(work: object) -> tuple[float, int, object]:
    """Return (seconds, peak bytes, result) of a call. The time is measured apart from the memory."""
    assert callable(work)
    work()  # what a root read from a file would hold already
    began = time.perf_counter()
    result = work()
    took_s = time.perf_counter() - began
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return took_s, peak, result


def wants_of(there: SaveLayout, process: int) -> list[Want]:
    """Return the boxes that process `process` of the new mesh holds."""
    mesh = there.meshes[0]
    sizes = dict(mesh.axes)
    at, rest = {}, process
    for axis, size in reversed(mesh.axes):
        rest, at[axis] = divmod(rest, size)
    wants = []
    for tensor in there.tensors:
        offset, shape = [], []
        for size, axes in zip(tensor.shape, tensor.placement.spec, strict=True):  # type: ignore[union-attr]
            parts, index = 1, 0
            for axis in axes:
                parts, index = parts * sizes[axis], index * sizes[axis] + at[axis]
            offset.append(index * size // parts)
            shape.append(size // parts)
        wants.append(Want(tensor.name, Box(tuple(offset), tuple(shape))))
    return wants


def row(processes: int, samples: int) -> str:
    fsdp, tensor = SIZES[processes]
    made = layout(processes, fsdp, tensor)
    state = sum(t.nbytes for t in made.tensors)
    few = sorted({int(i) for i in np.linspace(0, processes - 1, samples)})
    writes = [measured(lambda p=p: Planner(made).writer(p)) for p in few]
    packs = len(writes[0][2].packs)  # type: ignore[attr-defined]
    root = root_of(made, [packs] * processes)
    encoded = len(encode_root(root))
    halved = layout(processes // 2, fsdp // 2, tensor)

    known = dataclasses.replace(root, packs=Records(made, packs))  # type: ignore[arg-type]

    def reading(process: int) -> object:
        planner = RequestPlanner(known, str, request_bytes=16 << 20, gap_bytes=1 << 20)
        return planner.requests([planner.checked(w) for w in wants_of(halved, process)])

    reads = [measured(lambda p=p: reading(p // 2)) for p in few]
    found: list = [r[2] for r in reads]
    files = max(len({(q.file.writer, q.file.number) for q in requests}) for requests in found)
    read_s, read_peak = statistics.median(r[0] for r in reads), max(r[1] for r in reads)
    counts = f"{max(map(len, found))} in {files} files"
    share = state / processes
    return (
        f"| {processes} | {fsdp} x {tensor} | {share / 2**30:.2f} | {encoded / 1e6:.2f} | {packs} | "
        f"{statistics.median(w[0] for w in writes) * 1e3:.0f} | {max(w[1] for w in writes) / 2**20:.1f} | "
        f"{read_s * 1e3:.0f} | {read_peak / 2**20:.1f} | {counts} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=3, help="processes of each size that are planned for")
    args = parser.parse_args()
    head = (
        "processes",
        "fsdp x tensor",
        "GiB a process",
        "root MB",
        "packs a process",
        "save: ms",
        "MiB",
        "restore: ms",
        "MiB",
        "requests",
    )
    print("|", " | ".join(head), "|")
    print("|---" * 10 + "|")
    for processes in SIZES:
        print(row(processes, args.samples), flush=True)


if __name__ == "__main__":
    main()
