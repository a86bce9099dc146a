"""Saving and restoring one state: ours beside raw files, safetensors, Orbax and torch DCP, on the same bytes.

    python -m benchmarks.checkpoint [--mib 256] [--rounds 7] [--disk DIR] [--memory DIR]

A decoder's state in fp32 (parameters and two slots) is saved and restored by every contender once a round, in an order
drawn anew, on a disk and on a RAM disk; ratios are taken within a round, medians with their 95 % interval of order
statistics. Saves are durable as far as each contender makes them (raw, safetensors and ours: fsync). Before a read the
pages of all its files are dropped from the cache (posix_fadvise). Then: what a column read of row shards reads beside
what it needs, by the store and by /proc/self/io, and how long training is stalled by a save, over a copy of the state.
Orbax and DCP run with their defaults and, marked 'tuned', with the settings that their documentation offers for speed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.paired import interleaved, ratio
from checkpoints_format import Box, Layout, LocalStore, Mesh, Reader, Sharded, Tensor, Want, Writer, commit

State = dict[str, np.ndarray]


def make_state(mib: int) -> State:
    """A decoder's parameters, m and v, of about `mib` MiB in all."""
    rng = np.random.default_rng(0)
    embed = 512
    layers = max(1, round((mib * 2**20 / 4 / 3 - 8192 * embed) / (12 * embed * embed)))
    shapes = {
        "embed/table": (8192, embed), "blocks/attn/wqkv": (layers, embed, 3, 8, embed // 8),
        "blocks/attn/wo": (layers, 8, embed // 8, embed), "blocks/mlp/up": (layers, embed, 4 * embed),
        "blocks/mlp/down": (layers, 4 * embed, embed), "blocks/norm/scale": (layers, embed),
    }  # fmt: skip
    return {
        f"{role}/{name}": rng.standard_normal(shape, dtype=np.float32)
        for role in ("params", "opt/m", "opt/v") for name, shape in shapes.items()
    }  # fmt: skip


def layout_of(state: State) -> Layout:
    return Layout(
        tensors=tuple(
            Tensor(name=n, dtype=str(a.dtype), shape=a.shape, role=n.split("/")[0], batch=int("blocks" in n))
            for n, a in state.items()
        )
    )


def drop_cache(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Contender:
    """Saves the state into a folder that is not there, and restores it into new arrays."""

    def __init__(
        self, name: str, save: Callable[[State, Path], None], load: Callable[[State, Path], State]
    ) -> None:
        self.name, self.save, self.load = name, save, load


def raw_save(state: State, path: Path) -> None:
    path.mkdir()
    with (path / "raw").open("wb", buffering=0) as file:
        for array in state.values():
            view = memoryview(array).cast("B")
            while view:
                view = view[os.write(file.fileno(), view) :]
        os.fsync(file.fileno())


def raw_load(state: State, path: Path) -> State:
    out = {n: np.empty_like(a) for n, a in state.items()}
    with (path / "raw").open("rb", buffering=0) as file:
        at = 0
        for array in out.values():
            view = memoryview(array).cast("B")
            while view:
                got = os.preadv(file.fileno(), [view], at)
                at, view = at + got, view[got:]
    return out


def our_save(state: State, path: Path) -> None:
    layout = layout_of(state)
    with LocalStore(path, create=True) as store:
        Writer(store, layout, save="a").write(state)
        commit(store, layout, save="a")


def our_load(state: State, path: Path) -> State:
    with LocalStore(path) as store:
        reader = Reader(store)
        return dict(zip(state, reader.read_many([Want(n) for n in state]), strict=True))


def safetensors_save(state: State, path: Path) -> None:
    from safetensors.numpy import save_file

    path.mkdir()
    save_file(state, path / "s")
    with (path / "s").open("rb") as file:
        os.fsync(file.fileno())


def safetensors_load(state: State, path: Path) -> State:
    from safetensors.numpy import load_file

    return load_file(path / "s")


def orbax(name: str, **options: Any) -> Contender:
    import orbax.checkpoint as ocp

    handler = ocp.PyTreeCheckpointHandler(**options)
    checkpointer = ocp.Checkpointer(handler)

    def load(state: State, path: Path) -> State:
        return checkpointer.restore(path.absolute())

    return Contender(name, lambda state, path: checkpointer.save(path.absolute(), state), load)


def dcp(name: str, **options: Any) -> Contender:
    import torch
    import torch.distributed.checkpoint as module

    def save(state: State, path: Path) -> None:
        held = {n: torch.from_numpy(a) for n, a in state.items()}
        module.save(held, storage_writer=module.FileSystemWriter(path, **options), no_dist=True)

    def load(state: State, path: Path) -> State:
        out = {n: torch.empty(a.shape) for n, a in state.items()}
        module.load(out, storage_reader=module.FileSystemReader(path), no_dist=True)
        return {n: t.numpy() for n, t in out.items()}

    return Contender(name, save, load)


def dcp_huggingface() -> Contender:
    import torch
    import torch.distributed.checkpoint as module

    def save(state: State, path: Path) -> None:
        held = {n: torch.from_numpy(a) for n, a in state.items()}
        module.save(held, storage_writer=module.HuggingFaceStorageWriter(str(path)), no_dist=True)

    def load(state: State, path: Path) -> State:
        out = {n: torch.empty(a.shape) for n, a in state.items()}
        module.load(out, storage_reader=module.HuggingFaceStorageReader(str(path)), no_dist=True)
        return {n: t.numpy() for n, t in out.items()}

    return Contender("DCP Hugging Face", save, load)


def contenders() -> list[Contender]:
    gib = 96
    return [
        Contender("ours", our_save, our_load),
        Contender("raw", raw_save, raw_load),
        Contender("safetensors", safetensors_save, safetensors_load),
        orbax("Orbax"),
        orbax(
            "Orbax tuned",
            use_zarr3=True,
            use_compression=False,
            save_concurrent_gb=gib,
            restore_concurrent_gb=gib,
        ),
        dcp("DCP"),
        dcp("DCP tuned", single_file_per_rank=False, thread_count=2, per_thread_copy_ahead=1 << 28),
        dcp_huggingface(),
    ]


def measure(state: State, where: Path, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds by 'save' and 'restore' and contender, a value a round."""
    found: dict[str, dict[str, list[float]]] = {"save": {}, "restore": {}}
    there = contenders()
    with tempfile.TemporaryDirectory(prefix="ckpt-bench-", dir=where) as scratch:

        def saving(c: Contender) -> Callable[[], None]:
            path = Path(scratch) / c.name.replace(" ", "-")

            def run() -> None:
                c.save(state, path)

            return run

        for c in there:  # once for nothing: imports, pools, and the contents are right
            path = Path(scratch) / c.name.replace(" ", "-")
            saving(c)()
            back = c.load(state, path)
            assert all(np.array_equal(np.asarray(back[n]), a) for n, a in state.items()), c.name
            shutil.rmtree(path)
        for number in range(rounds):
            order = {c.name: saving(c) for c in there}
            taken = interleaved(order, rounds=1, seed=number)
            for name, values in taken.items():
                found["save"].setdefault(name, []).extend(values)
            drop_cache(Path(scratch))
            reading = {
                c.name: (lambda c=c: c.load(state, Path(scratch) / c.name.replace(" ", "-"))) for c in there
            }
            for name, values in interleaved(reading, rounds=1, seed=1000 + number).items():
                found["restore"].setdefault(name, []).extend(values)
            for path in Path(scratch).iterdir():
                shutil.rmtree(path)
    return found


def print_table(found: Mapping[str, Mapping[str, list[float]]], where: str, nbytes: int) -> None:
    print(
        f"\n{where}: {nbytes / 2**20:.0f} MiB; time over that of raw, and of ours, in the same round [95 %]"
    )
    for what, taken in found.items():
        for name, values in taken.items():
            over_raw, over_ours = ratio(taken["raw"], values), ratio(taken["ours"], values)
            rate = nbytes / statistics.median(values) / 2**20
            print(f"  {what:8} {name:17} {rate:7.0f} MiB/s   / raw {over_raw!s:22} / ours {over_ours}")


def io_bytes() -> int:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


def column_read(where: Path) -> None:
    """An eighth of the columns of eight row shards: on tile lines, and off them."""
    shape, shards = (4096, 4096), 8
    values = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    layout = Layout(
        tensors=(Tensor(name="w", dtype="float32", shape=shape, placement=Sharded(spec=(("fsdp",), ()))),),
        meshes=(Mesh(axes=(("fsdp", shards),)),), writers=shards,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="ckpt-bench-", dir=where) as scratch:
        with LocalStore(Path(scratch) / "c", create=True) as store:
            rows = shape[0] // shards
            for writer in range(shards):
                Writer(store, layout, save="a", writer=writer).write(
                    {"w": values[rows * writer : rows * (writer + 1)]}
                )
            commit(store, layout, save="a")
        print(f"\nA column read of {shards} row shards of {list(shape)} float32")
        for what, box in {
            "columns 512 to 1024 (tile lines)": Box((0, 512), (4096, 512)),
            "columns 500 to 1000": Box((0, 500), (4096, 500)),
        }.items():
            with LocalStore(Path(scratch) / "c") as store:
                reader = Reader(store)
                plan = reader.plan([Want("w", box)])
                before = io_bytes()
                assert np.array_equal(reader.read("w", box), values[box.slices()])
                through = io_bytes() - before
            print(
                f"  {what:34} {plan.read_bytes / plan.wanted_bytes:.3f} of the bytes needed by the plan, "
                f"{through / plan.wanted_bytes:.3f} by /proc/self/io (with checksum tables), {plan.requests} requests"
            )


def stall(state: State, where: Path, rounds: int) -> None:
    """What `Checkpoints.save` keeps training from, beside a copy of the state."""
    from portatrain.checkpoint import Checkpoints

    class Holding:
        """A backend that holds the state as it is."""

        def __init__(self) -> None:
            from portatrain.layout import Layout as Mapping_
            from portatrain.module import Module, Param, describe
            from portatrain.optim import AdamW

            class Toy(Module):
                def __init__(self) -> None:
                    for n, a in state.items():
                        if n.startswith("params/"):
                            axes = {f"a{i}": size for i, size in enumerate(a.shape)}
                            setattr(self, n.replace("/", "_"), Param(**axes))

            from portatrain.backends.base import Program

            definition = describe(Toy())
            names = frozenset(definition.params)
            self.program = Program(
                definition=definition, layout=Mapping_.of(definition), optimizer=AdamW(lr=1e-3), trainable=names,
                decay=names,
            )  # fmt: skip

        def agree(self, value: int) -> int:
            return value

        def scattered(self, held: State) -> Any:
            return {}

        def local_boxes(self, held: State) -> Any:
            from portatrain.backends.base import LocalBox

            for n, a in held.items():
                role, _, name = n.rpartition("/")
                role, name = (n, "") if n == "opt/count" else (role, name)
                yield LocalBox(name=name, role=role, offset=(0,) * a.ndim, shape=a.shape, fetch=a.copy)

    backend: Any = Holding()
    params = {n.replace("/", "_"): a for n, a in state.items() if n.startswith("params/")}
    held = {f"{role}/{n}": a for role in ("params", "opt/m", "opt/v") for n, a in params.items()}
    held["opt/count"] = np.asarray(1, np.int32)
    with tempfile.TemporaryDirectory(prefix="ckpt-bench-", dir=where) as scratch:
        checkpoints = Checkpoints(Path(scratch))
        step = [0]

        def save() -> None:
            checkpoints.save(step[0], backend, held, {})

        ratios, copies = [], []
        for _ in range(rounds):
            step[0] += 1
            began = time.perf_counter()
            kept = [a.copy() for a in held.values()]
            middle = time.perf_counter()
            del kept
            checkpoints.wait()
            start = time.perf_counter()
            save()
            ratios.append((time.perf_counter() - start) / (middle - began))
            copies.append(middle - began)
            checkpoints.wait()
    low, high = min(ratios), max(ratios)
    print(
        f"\nStall of a save over a copy of the state ({statistics.median(copies) * 1e3:.0f} ms): "
        f"{statistics.median(ratios):.2f} [{low:.2f}, {high:.2f}] over {rounds} rounds"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--disk", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--memory", type=Path, default=Path("/dev/shm"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    state = make_state(args.mib)
    nbytes = sum(a.nbytes for a in state.values())
    print(f"{platform.machine()}, {os.cpu_count()} cores; NumPy {np.__version__}; {args.rounds} rounds")
    for where, folder in (("disk", args.disk), ("RAM disk", args.memory)):
        with contextlib.suppress(FileNotFoundError):
            print_table(measure(state, folder, args.rounds), f"{where} ({folder})", nbytes)
    column_read(args.memory if args.memory.is_dir() else args.disk)
    stall(state, args.memory if args.memory.is_dir() else args.disk, args.rounds)


if __name__ == "__main__":
    main()
