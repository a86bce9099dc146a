"""Save and restore one state, ours beside raw files, safetensors, Orbax and torch DCP, on the same bytes.

    python -m benchmarks.checkpoint [--mib 720] [--rounds 9] [--free GIB] [--disk DIR] [--memory DIR] [--write]

The state of llama3-1b's layers in fp32 (parameters and two slots) is saved and restored by every contender once a
round, in an order drawn anew, on a disk and on a RAM disk; ratios are taken within a round, medians with their 95 %
interval of order statistics. `raw` is what no format can avoid: pwrite of the arrays into one file and fsync; pread of
that file into new arrays, by one thread, an array a call. New arrays are fresh memory in every contender's restore, so
that the kernel's zeroing of pages is in all of them, raw too. Saves are durable as far as each contender makes them
(raw, safetensors and ours: fsync); before each, what others left to be written is synced. Before a read the pages of
its files are dropped from the cache (posix_fadvise), which a disk then reads; a RAM disk has no colder place.

In a virtual machine whose host takes free memory back, give --free: see `Memory`.

Then: what a column read of row shards reads beside what it needs, by the plan and by /proc/self/io; how long a save
stalls training, over a copy of the state; and with half of the memory that the copies take, over the stated bound.
Orbax and DCP run with their defaults and, marked 'tuned', with the settings that their documentation offers for speed.
With --write the tables go into docs/run/checkpoints.md, goals that are missed included.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import random
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.checkpoint_contenders import State, contenders, raw_save
from benchmarks.paired import Ratio, ratio
from checkpoints_format import Box, LocalStore, Reader, SaveLayout, SaveMesh, Sharded, Tensor, Want, Writer, commit

Taken = dict[str, list[float]]
SAVE, RESTORE, STALL, OTHERS = 1.2, 1.1, 1.1, 2.0
"""The goals: our seconds over raw, over raw, and over a copy of the state; Orbax and DCP over ours."""
MARKS = ("<!-- checkpoint benchmark -->", "<!-- end of checkpoint benchmark -->")


def make_state(mib: int) -> State:
    """Return parameters, m and v of about `mib` MiB in all: whole layers of llama3-1b, at least one, and a short
    table."""
    rng = np.random.default_rng(0)
    embed, heads, kv_heads, mlp, vocab = 2048, 32, 8, 8192, 1024
    a_layer = embed * (2 * embed + 2 * kv_heads * embed // heads + 3 * mlp)
    layers = max(1, round((mib * 2**20 / 4 / 3 - vocab * embed) / a_layer))
    shapes = {
        "embed/table": (vocab, embed),
        "blocks/attn/wq": (layers, embed, heads, embed // heads),
        "blocks/attn/wk": (layers, embed, kv_heads, embed // heads),
        "blocks/attn/wv": (layers, embed, kv_heads, embed // heads),
        "blocks/attn/wo": (layers, heads, embed // heads, embed),
        "blocks/mlp/gate": (layers, embed, mlp),
        "blocks/mlp/up": (layers, embed, mlp),
        "blocks/mlp/down": (layers, mlp, embed),
        "blocks/norm/scale": (layers, embed),
    }
    return {
        f"{role}/{name}": rng.standard_normal(shape, dtype=np.float32)
        for role in ("params", "opt/m", "opt/v")
        for name, shape in shapes.items()
    }


def drop_cache(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Memory:
    """Have memory ready when a contender asks for it.

    The host of a virtual machine takes free memory back and provides it again at the first touch. That can take ten
    times as long as the measured work, and it hits contenders at random. With `free_gib`, all memory except that amount
    is held while this object lives. In either case `ready` touches as much as a contender may need, just before its
    turn.
    """

    def __init__(self, free_gib: float | None, needed: int) -> None:
        self._needed, held = needed, 0 if free_gib is None else available() - int(free_gib * 2**30)
        self._held = [touched(min(1 << 30, held - at)) for at in range(0, held, 1 << 30)]

    def ready(self) -> None:
        os.sync()
        touched(min(self._needed, available() - (1 << 30)))


def available() -> int:
    """Return the bytes that processes may still allocate, by the kernel's estimate."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable")))


def touched(nbytes: int) -> np.ndarray:
    array = np.empty(max(0, nbytes), np.uint8)
    array[::4096] = 1
    return array


def measure(state: State, where: Path, rounds: int, memory: Memory) -> dict[str, Taken]:
    """Return seconds by 'save' or 'restore' and contender, one value a round."""
    found: dict[str, Taken] = {"save": {}, "restore": {}}

    def timed(what: str, name: str, run: Callable[[], Any]) -> Any:
        memory.ready()
        began = time.perf_counter()
        back = run()
        found[what].setdefault(name, []).append(time.perf_counter() - began)
        return back

    with tempfile.TemporaryDirectory(prefix="ckpt-bench-", dir=where) as scratch:
        at = Path(scratch) / "checkpoint"
        order, rng = list(contenders()), random.Random(0)
        for number in range(rounds + 1):
            for contender in order:
                timed("save", contender.name, lambda c=contender: c.save(state, at))
                drop_cache(at)
                back = timed("restore", contender.name, lambda c=contender: c.load(state, at))
                if not number:
                    assert all(np.array_equal(np.asarray(back[n]), a) for n, a in state.items()), contender.name
                del back
                shutil.rmtree(at)
            if number:
                print(f"  round {number} of {rounds} on {where}", flush=True)
            else:  # an unmeasured first round: imports, pools, and a check of the contents
                found = {"save": {}, "restore": {}}
            rng.shuffle(order)
    return found


def goal(name: str, what: str, over_raw: Ratio, over_ours: Ratio) -> str:
    """Return the goal of a row, and whether its median reaches it."""
    if name == "ours":
        most = SAVE if what == "save" else RESTORE
        return f"at most {most} x raw: {'met' if over_raw.median <= most else '**missed**'}"
    if name.startswith(("Orbax", "DCP")):
        return f"{OTHERS:.0f} x ours: {'met' if over_ours.median >= OTHERS else '**missed**'}"
    return ""


def rows(found: Mapping[str, Taken], where: str, nbytes: int) -> Iterator[str]:
    for what, taken in found.items():
        for name, values in taken.items():
            # Their seconds over those of the first argument, round by round.
            over_raw, over_ours = ratio(taken["raw"], values), ratio(taken["ours"], values)
            rate = nbytes / statistics.median(values) / 2**20
            yield (
                f"| {where} | {what} | {name} | {rate:.0f} | {over_raw} | {over_ours} "
                f"| {goal(name, what, over_raw, over_ours)} |"
            )


def io_bytes() -> int:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


def column_read(where: Path) -> Iterator[str]:
    """Measure an eighth of the columns of eight row shards, on tile boundaries and off them."""
    shape, shards = (4096, 4096), 8
    values = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    layout = SaveLayout(
        tensors=(Tensor(name="w", dtype="float32", shape=shape, placement=Sharded(spec=(("fsdp",), ()))),),
        meshes=(SaveMesh(axes=(("fsdp", shards),)),),
        writers=shards,
    )
    with tempfile.TemporaryDirectory(prefix="ckpt-bench-", dir=where) as scratch:
        with LocalStore(Path(scratch) / "c", create=True) as store:
            rows = shape[0] // shards
            for writer in range(shards):
                Writer(store, layout, save="a", writer=writer).write({"w": values[rows * writer : rows * (writer + 1)]})
            commit(store, layout, save="a")
        for what, box, tells in (
            ("on tile lines, columns 512 to 1024", Box((0, 512), (4096, 512)), True),
            ("off them, columns 500 to 1000", Box((0, 500), (4096, 500)), False),
        ):
            with LocalStore(Path(scratch) / "c") as store:
                reader = Reader(store)
                plan = reader.plan([Want("w", box)])
                asking = -io_bytes() + io_bytes()  # which are bytes read, too
                before = io_bytes()
                assert np.array_equal(reader.read("w", box), values[box.slices()])
                through = io_bytes() - before - asking - plan.table_bytes
            exact = "met" if through == plan.wanted_bytes else "**missed**"
            aim = f"1.000: {exact}" if tells else f"tile-rounded, {plan.read_bytes / plan.wanted_bytes:.3f}"
            yield (
                f"| bytes read / needed of a column of {shards} row shards of {list(shape)} float32, {what}, by "
                f"/proc/self/io | {through / plan.wanted_bytes:.3f}, and {plan.table_bytes} bytes of checksums; "
                f"{plan.requests} requests | {aim} |"
            )


class Holding:
    """A backend as far as a save needs one: it holds arrays and does not change them."""

    def __init__(self, state: State) -> None:
        from portatrain.backends.program import Program
        from portatrain.model.layout import Layout as Mapping_
        from portatrain.model.module import Module, Param, describe
        from portatrain.optim import AdamW

        named = {n.replace("/", "_"): a for n, a in state.items() if n.startswith("params/")}

        class Toy(Module):
            def __init__(self) -> None:
                for n, a in named.items():
                    setattr(self, n, Param(**{f"a{i}": size for i, size in enumerate(a.shape)}))

        definition = describe(Toy())
        names = frozenset(definition.params)
        self.program = Program(
            definition=definition,
            layout=Mapping_.of(definition),
            optimizer=AdamW(lr=1e-3),
            trainable=names,
            decay=names,
        )
        self.held = {f"{role}/{n}": a for role in ("params", "opt/m", "opt/v") for n, a in named.items()}
        self.held["opt/count"] = np.asarray(1, np.int32)

    def agree(self, value: int) -> int:
        return value

    def irregular_shards(self, held: State) -> Any:
        return {}

    def local_boxes(self, held: State) -> Any:
        from portatrain.backends.base import LocalBox

        for n, a in held.items():
            role, _, name = (n, "", "") if n == "opt/count" else n.rpartition("/")
            yield LocalBox(name=name, role=role, offset=(0,) * a.ndim, shape=a.shape, fetch=a.copy)


def stall(state: State, where: Path, rounds: int, memory: Memory) -> Iterator[str]:
    """Measure how long `Checkpoints.save` stalls training, beside two bounds: a copy of the state, and, with half of
    the memory, the copy and a raw write of what exceeds the budget."""
    from portatrain.checkpoint.saver import Checkpoints

    backend: Any = Holding(state)
    held = backend.held
    nbytes = sum(a.nbytes for a in held.values())
    taken: Taken = {"copy": [], "save": [], "raw": [], "small": [], "bound": []}
    with tempfile.TemporaryDirectory(prefix="ckpt-bench-", dir=where) as scratch:
        whole = Checkpoints(Path(scratch) / "whole")
        half = Checkpoints(Path(scratch) / "half", budget_bytes=nbytes // 2)
        beyond = half.beyond_bytes(backend, held)

        def stalls(checkpoints: Checkpoints, step: int) -> float:
            memory.ready()
            began = time.perf_counter()
            checkpoints.save(step, backend, held, {})
            stalled = time.perf_counter() - began
            checkpoints.wait()
            for saved in Path(scratch).glob("*/*"):
                shutil.rmtree(saved)
            return stalled

        for step in range(1, rounds + 2):
            memory.ready()
            began = time.perf_counter()
            kept = [a.copy() for a in held.values()]
            copy_s = time.perf_counter() - began
            del kept
            save_s = stalls(whole, step)
            memory.ready()
            began = time.perf_counter()
            raw_save(held, Path(scratch) / "raw")
            raw_s = time.perf_counter() - began
            shutil.rmtree(Path(scratch) / "raw")
            small_s = stalls(half, step)
            if step > 1:  # the first one plans, as the first save of a run does
                for name, value in (("copy", copy_s), ("save", save_s), ("raw", raw_s), ("small", small_s)):
                    taken[name].append(value)
                taken["bound"].append(copy_s + raw_s * beyond / nbytes)
    over_copy, over_bound = ratio(taken["copy"], taken["save"]), ratio(taken["bound"], taken["small"])
    copy_ms, bound_ms = (1e3 * statistics.median(taken[name]) for name in ("copy", "bound"))
    yield (
        f"| a save's stall, memory for the whole state, over a copy of it ({copy_ms:.0f} ms) | "
        f"{over_copy} | at most {STALL}: {'met' if over_copy.median <= STALL else '**missed**'} |"
    )
    yield (
        f"| with half of that memory, over the bound: the copy and a raw write of the {beyond / 2**20:.0f} MiB that "
        f"exceed it ({bound_ms:.0f} ms) | {over_bound} "
        f"| at most 1: {'met' if over_bound.median <= 1 else '**missed**'} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=720, help="size of the state (720: a layer of llama3-1b)")
    parser.add_argument("--rounds", type=int, default=9, help="at least 6, for an interval (9)")
    parser.add_argument("--disk", type=Path, default=Path(tempfile.gettempdir()), metavar="DIR")
    parser.add_argument("--memory", type=Path, default=Path("/dev/shm"), metavar="DIR")
    parser.add_argument(
        "--free", type=float, metavar="GIB", help="hold all memory but this while measuring (hold none)"
    )
    parser.add_argument("--write", action="store_true", help="put the tables into docs/run/checkpoints.md")
    args = parser.parse_args()
    if args.rounds < 6:
        parser.error("--rounds: expected 6 or more, so that a median has an interval")
    warnings.filterwarnings("ignore")
    state = make_state(args.mib)
    nbytes = sum(a.nbytes for a in state.values())
    memory = Memory(args.free, 4 * nbytes)
    held = f" All memory but {args.free:g} GiB was held (--free {args.free:g})." if args.free else ""
    lines = [
        f"{nbytes / 2**20:.0f} MiB in {len(state)} tensors, {args.rounds} rounds; {platform.machine()}, "
        f"{os.cpu_count()} cores, NumPy {np.__version__}.{held}",
        "",
        "| on | | | MiB/s | time over raw [95 %] | over ours [95 %] | goal |",
        "|---|---|---|---|---|---|---|",
    ]
    for where, folder in (("disk", args.disk), ("RAM disk", args.memory)):
        with contextlib.suppress(FileNotFoundError):
            lines += rows(measure(state, folder, args.rounds, memory), where, nbytes)
    quick = args.memory if args.memory.is_dir() else args.disk
    lines += ["", "| | | goal |", "|---|---|---|", *column_read(quick), *stall(state, quick, args.rounds, memory)]
    print("\n".join(lines))
    if args.write:
        path = Path(__file__).parents[1] / "docs" / "run" / "checkpoints.md"
        before, _, rest = path.read_text().partition(MARKS[0])
        after = rest.partition(MARKS[1])[2]
        path.write_text("\n".join([before + MARKS[0], *lines, MARKS[1] + after]))


if __name__ == "__main__":
    main()
