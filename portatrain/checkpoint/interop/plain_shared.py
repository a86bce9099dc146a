"""Write the boxes of all processes as one checkpoint, and read any box, for plain torch and plain JAX."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_format import Box, Explicit, FormatError, Reader, SaveLayout, Tensor, Writer, commit
from portatrain.backends.state import COUNT
from portatrain.checkpoint.locations import location_of
from portatrain.errors import UserError


@dataclass(frozen=True)
class Part:
    """A box of a logical tensor that this process has, and a function that copies it to the host."""

    box: Box
    fetch: Callable[[], np.ndarray]


@dataclass(frozen=True)
class About:
    """A logical tensor. Every process must give the same description."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]


def write(
    where: Path | str,
    step: int,
    tensors: Mapping[str, About],
    mine: Mapping[str, Sequence[Part]],
    every: Sequence[Mapping[str, Sequence[Box]]],
    *,
    process: int,
    barrier: Callable[[], None],
    save: str,
    meta: Mapping[str, Any] | None,
) -> None:
    """Save the checkpoint `step` in the folder or URL `where`. `every` lists the boxes of each process; the first
    process that holds a box writes it. All processes call it, with equal arguments except `mine` and `process`."""
    made = []
    for name, about in tensors.items():
        seen: dict[Box, int] = {}
        for writer, boxes in enumerate(every):
            for box in boxes.get(name, ()):
                seen.setdefault(box, writer)
        role = name.split("/")[0]
        made.append(
            Tensor(
                name=name,
                dtype=about.dtype,
                shape=about.shape,
                axes=about.axes,
                role=role,
                placement=Explicit(boxes=tuple((writer, box) for box, writer in seen.items())),
            )
        )
    layout = SaveLayout(tensors=tuple(made), writers=len(every))
    try:
        store = location_of(where).open(step, create=True)
        held = {n: [(p.box, p.fetch()) for p in parts] for n, parts in mine.items()}
        Writer(store, layout, save=save, writer=process).write(held)
        barrier()
        if process == 0:
            commit(store, layout, save=save, meta={"step": step, **(meta or {})})
        barrier()
        store.close()
    except FormatError as error:
        raise _user(error) from error


def open_newest(where: Path | str, step: int | None) -> tuple[int, Reader]:
    """Return (step, reader) of the checkpoint `step`, by default the newest that is committed."""
    place = location_of(where)
    steps = [s for s in place.steps() if place.committed(s)] if step is None else [step]
    if not steps:
        raise UserError(
            f"checkpoints in {place.name}",
            expected="one that is committed",
            got="none",
            do="Check the path; it is the folder that `save` was given.",
        )
    try:
        return steps[-1], Reader(place.open(steps[-1]))
    except FormatError as error:
        raise _user(error) from error


def read(reader: Reader, name: str, box: Box, dtype: np.dtype | None = None) -> np.ndarray:
    try:
        return reader.read(name, box)
    except FormatError as error:
        raise _user(error) from error


def check_shapes(reader: Reader, tensors: Mapping[str, About]) -> None:
    """Raise UserError, with all differences, for tensors that the checkpoint lacks or has in another shape or dtype."""
    there = {t.name: t for t in reader.layout.tensors}
    wrong = [f"no {n}" for n in tensors if n not in there]
    wrong += [
        f"{n} is {there[n].dtype} {list(there[n].shape)}, not {a.dtype} {list(a.shape)}"
        for n, a in tensors.items()
        if n in there and (there[n].dtype, there[n].shape) != (a.dtype, a.shape)
    ]
    if wrong:
        raise UserError(
            "checkpoint",
            expected="the tensors of this model and optimizer",
            got="; ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""),
            do="Use the model, the optimizer and the table that it was saved with.",
        )


def count_of(reader: Reader) -> int:
    return int(read(reader, COUNT, Box((), ()))) if COUNT in reader.names else 0


def _user(error: FormatError) -> UserError:
    return UserError.of(error)


__all__ = ["About", "Part", "check_shapes", "count_of", "open_newest", "read", "write"]
