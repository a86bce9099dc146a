"""Define the contenders of benchmarks/checkpoint.py: raw files, safetensors, Orbax, torch DCP, and ours."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_format import LocalStore, Reader, SaveLayout, Tensor, Want, Writer, commit

State = dict[str, np.ndarray]


def layout_of(state: State) -> SaveLayout:
    return SaveLayout(
        tensors=tuple(
            Tensor(name=n, dtype=str(a.dtype), shape=a.shape, role=n.split("/")[0], batch=int("blocks" in n))
            for n, a in state.items()
        )
    )


@dataclass(frozen=True)
class Contender:
    """Save the state into a new folder, and restore it into new arrays."""

    name: str
    save: Callable[[State, Path], None]
    load: Callable[[State, Path], State]


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
        orbax("Orbax tuned", use_zarr3=True, use_compression=False, save_concurrent_gb=gib, restore_concurrent_gb=gib),
        dcp("DCP"),
        dcp("DCP tuned", single_file_per_rank=False, thread_count=2, per_thread_copy_ahead=1 << 28),
        dcp_huggingface(),
    ]
