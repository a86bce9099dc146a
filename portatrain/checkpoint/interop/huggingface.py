"""Read and write a folder of transformers: config.json, model-NNNNN-of-NNNNN.safetensors,
model.safetensors.index.json."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_format import Box, Reader
from checkpoints_format.dtypes import NUMPY
from portatrain.checkpoint.begun import begun
from portatrain.checkpoint.interop.hub_config import FILE as CONFIG
from portatrain.checkpoint.interop.hub_config import check
from portatrain.checkpoint.interop.hub_stored import Stored, cut_anew, under_our_names
from portatrain.checkpoint.interop.hub_table import Hub, Row
from portatrain.checkpoint.interop.hub_tokenizer import classes, kept, written
from portatrain.errors import UserError
from portatrain.model.lora import FACTORS
from portatrain.model.module import TensorInfo
from portatrain.recipe import Recipe
from portatrain.system import json_files

FILE_BYTES = 4 << 30
INDEX = "model.safetensors.index.json"
DTYPES = ("F64", "F32", "F16", "BF16")
BUFFERS = "rotary_emb.inv_freq"
"""A tensor that some models hold although config.json determines it."""


def hub_of(recipe: Recipe) -> Hub:
    """Return the table of the recipe's model; raise UserError if it has none."""
    made = getattr(recipe.model, "huggingface", None)
    if made is None:
        raise UserError(
            f"recipe {recipe.name}: model {type(recipe.model).__name__}",
            expected="a model with a table of its names in transformers",
            got="none",
            do="Give its sizes a method huggingface() that returns a portatrain.checkpoint.interop.Hub, as "
            "recipes/models/decoder.py has. --to orbax, dcp, torch and nnx need none.",
        )
    if recipe.parametrization is not None:
        grown = [info.name for info in recipe.describe().params.values() if info.kind not in ("same", "fixed")]
        if grown:
            raise UserError(
                f"recipe {recipe.name}: parametrization",
                expected="a model that computes with its weights alone, as those of transformers do",
                got=f"muP at another width than the base, with multipliers that config.json cannot state ({grown[0]})",
                do="Export --to orbax, dcp, torch or nnx, and use portatrain.load_trained to compute with it.",
            )
    return made()


def _slice(row: Row, shape: tuple[int, ...]) -> Box:
    at, inner = row.leading, row.inner(shape)
    return Box((*at, *(0,) * len(inner)), (*(1,) * len(at), *inner))


def _sharing(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Return the rows of each tensor of theirs, in the order of the table."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.theirs, []).append(row)
    return found


def export(reader: Reader, recipe: Recipe, out: Path, *, role: str = "params", dtype: str = "float32") -> list[str]:
    """Write weights into the empty folder `out`, rounded to `dtype` (to nearest, ties to even); return the names of the
    files. Holds one file in memory at a time. Weights that came as `dtype` and were not trained keep their bits."""
    width = NUMPY[dtype]
    hub, names = hub_of(recipe), []
    params, shapes = recipe.describe().params, {t.name: t.shape for t in reader.layout.tensors}
    parts: list[dict[str, list[Row]]] = [{}]
    used = 0
    for theirs, rows in _sharing(hub.rows).items():
        nbytes = width.itemsize * sum(math.prod(row.inner(shapes[row.full])) for row in rows)
        if parts[-1] and used + nbytes > FILE_BYTES:
            parts.append({})
            used = 0
        parts[-1][theirs] = rows
        used += nbytes
    from safetensors.numpy import save_file

    weights, total = {}, 0
    for number, tensors in enumerate(parts, start=1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        held = {}
        for theirs, rows in tensors.items():
            pieces = [row.out(_weight(reader, recipe, params, shapes, role, row)) for row in rows]
            # The state of a router stays as it is: small steps move it.
            held[theirs] = _joined(rows, pieces).astype(np.float32 if rows[0].state else width, copy=False)
            total += held[theirs].nbytes
            weights[theirs] = file
        save_file(held, out / file, metadata={"format": "pt"})
        names.append(file)
    index = {"metadata": {"total_size": total}, "weight_map": weights}
    (out / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    fields, more = written(recipe.data, out)
    began = begun_from(reader, recipe)
    more += kept(began, out)
    length = {"max_position_embeddings": _longest(recipe, hub)} if "vocab_size" in hub.config else {}
    config = {**length, **hub.config, **classes(began, hub.config), **fields, "torch_dtype": dtype}
    (out / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return [*names, INDEX, CONFIG, *more]


def begun_from(reader: Reader, recipe: Recipe) -> Mapping[str, Any]:
    """Return what names the folder of transformers from which the run began: its `path`, or what an import kept of it.
    {} if the recipe and the checkpoint name none."""
    if recipe.init is not None:
        return {"path": recipe.init}
    found = begun(reader.meta)
    return found if found.get("format") == "huggingface" else {}


def _joined(rows: Sequence[Row], pieces: Sequence[np.ndarray]) -> np.ndarray:
    """Return one tensor of theirs from its rows, C-contiguous."""
    if not rows[0].shares:
        return np.ascontiguousarray(pieces[0])
    shapes = [row.whole_shape(piece.shape) for row, piece in zip(rows, pieces, strict=True)]
    whole = np.empty(tuple(max(sizes) for sizes in zip(*shapes, strict=True)), np.float32)
    for row, piece in zip(rows, pieces, strict=True):
        whole[row.cut(piece.shape)] = piece
    return whole


def _longest(recipe: Recipe, hub: Hub) -> int:
    """Return the longest text, in tokens, that the model takes: its training length, or the length it is stretched
    to."""
    stretch = hub.config.get("rope_scaling") or {}
    reach = stretch.get("original_max_position_embeddings", 0) * stretch.get("factor", 0)
    return max(int(reach), recipe.data.tokens_per_sample() or 2048)


def _weight(
    reader: Reader,
    recipe: Recipe,
    params: Mapping[str, TensorInfo],
    shapes: Mapping[str, tuple[int, ...]],
    role: str,
    row: Row,
) -> np.ndarray:
    """Return the weight of a row, LoRA's product added to it. A tensor without an average gives its parameter."""

    def read(name: str) -> np.ndarray:
        full = f"{role}/{name}" if f"{role}/{name}" in shapes else f"params/{name}"
        full = row.full if row.state else full
        shape = shapes[full]
        return reader.read(full, _slice(row, shape)).reshape(row.inner(shape)).astype(np.float32, copy=False)

    weight, factors = read(row.ours), [f"{row.ours}/{factor}" for factor in FACTORS]
    if recipe.lora is None or factors[0] not in params:
        return weight
    info = params[row.ours]
    lead = weight.shape[: info.batch_dims - len(row.leading)]
    a, b = (read(factor) for factor in factors)
    rank = recipe.lora.rank
    product = a.reshape(*lead, -1, rank) @ b.reshape(*lead, rank, -1)
    return weight + np.float32(recipe.lora.alpha / rank) * product.reshape(weight.shape)


def read(source: Path, recipe: Recipe, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Callable[[Box], np.ndarray]]:
    """Return our tensors by their full names, each as a function from a box to its values (float32).

    shapes: of our parameters and States, by their full names ('params/...', 'state/...').
    Raises UserError for a folder without weights, and for names and shapes that are not the model's, all listed.
    """
    hub, what = hub_of(recipe), f"folder {source}"
    check(source, hub, recipe.name)
    there = under_our_names(hub, _files(source))
    wanted, copies = _sharing(hub.read), {row.theirs for row in hub.rows if row.copy}
    missing, more = sorted(wanted.keys() - there.keys()), sorted(there.keys() - wanted.keys() - copies)
    more = [n for n in more if not (n.endswith(BUFFERS) or n.startswith(hub.passed_over))]
    sizes, wrong = {}, []
    for name, each in wanted.items():
        every = [row.whole_shape(row.their_shape(row.inner(shapes[row.full]))) for row in each]
        sizes[name] = tuple(max(ends) for ends in zip(*every, strict=True))
    held = {name: Stored.whole(*there[name]) for name in sorted(wanted.keys() & there.keys())}
    cut_anew(hub, held, sizes)
    for name, tensor in held.items():
        if tensor.shape != sizes[name]:
            wrong.append(f"{name} of {list(tensor.shape)} for {list(sizes[name])}")
    if missing or more or wrong:
        listed = [
            f"{kind}: {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
            for kind, names in (("not there", missing), ("not the model's", more), ("other shapes", wrong))
            if names
        ]
        raise UserError(
            what,
            expected=f"the tensors of recipe {recipe.name}",
            got="; ".join(listed),
            do="Set the recipe's sizes to those of config.json, or import another model.",
        )
    rows: dict[str, list[Row]] = {}
    for row in hub.read:
        rows.setdefault(row.full, []).append(row)

    def values(ours: str) -> Callable[[Box], np.ndarray]:
        def of(box: Box) -> np.ndarray:
            out = np.empty(box.shape, np.float32)
            for row in rows[ours]:
                n = len(row.leading)
                at = tuple(index - start for index, start in zip(row.leading, box.offset[:n], strict=True))
                if not all(0 <= index < size for index, size in zip(at, box.shape[:n], strict=True)):
                    continue
                inner = Box(box.offset[n:], box.shape[n:])
                out[at] = row.taken(held[row.theirs], inner, row.inner(shapes[ours]))
            return out

        return of

    return {ours: values(ours) for ours in rows}


def left_out(source: Path, hub: Hub) -> str:
    """Return a sentence about the tensors of the folder `source` that the model passes over; '' if there are none, or
    no weights."""
    held = any(source.glob("*.safetensors")) and hub.passed_over
    names = sorted(n for n in _files(source) if n.startswith(hub.passed_over)) if held else []
    if not names:
        return ""
    more = f"; {hub.takes_them} says how many of these layers the model has" if hub.takes_them else ""
    return f"left out: {len(names)} tensors of {source}, {names[0]} to {names[-1]}{more}"


def _files(source: Path) -> dict[str, Path]:
    """Return the file of every tensor, by the tensor's name, from the index or else from the files themselves.

    A file may be a link, as in the cache of huggingface_hub. Raises UserError for a folder without weights, a file
    that the index names and that is missing, and a tensor that its file does not hold.
    """
    index, wanted = source / INDEX, {}
    if index.exists():
        try:
            wanted = json_files.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(wanted.values()))
            good = all(isinstance(n, str) and isinstance(f, str) for n, f in wanted.items())
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise _no_index(index, f"{type(error).__name__}: {error}") from error
        if not good or any(Path(name).name != name for name in names):
            raise _no_index(index, "other names")
        files = [source / name for name in names]
    else:
        files = sorted(source.glob("*.safetensors"))
    gone = [f.name for f in files if not f.is_file()]
    if gone or not files:
        raise UserError(
            f"folder {source}",
            expected="a model's .safetensors files",
            got=f"no {', '.join(gone) or 'such file'}",
            do="Fetch the model again, with all its files.",
        )
    there: dict[str, Path] = {}
    for file in files:
        held = _held(file)
        if twice := sorted(set(held) & there.keys() - wanted.keys()):
            raise UserError(
                f"file {file}", expected="tensors that no other file holds", got=twice[0], do=f"Write a {INDEX}."
            )
        there |= {name: file for name in held if not wanted or wanted.get(name) == file.name}
    if lost := sorted(wanted.keys() - there.keys()):
        raise UserError(
            f"file {index}",
            expected=f"tensor {lost[0]} in {wanted[lost[0]]}",
            got="no such tensor",
            do="Fetch the model again, with all its files.",
        )
    return there


def _no_index(path: Path, got: str) -> UserError:
    return UserError(
        f"file {path}", expected="a weight_map from tensors to files beside it", got=got, do="Fetch it again."
    )


def _held(file: Path) -> list[str]:
    """Return the names of the tensors in a file. Raises UserError if it is damaged or holds quantized weights."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as opened:
            kinds = {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"file {file}", expected="a safetensors file", got=str(error), do="Fetch it again.") from error
    for name, kind in kinds.items():
        if kind not in DTYPES and not name.endswith(BUFFERS):
            raise UserError(
                f"file {file}: tensor {name}",
                expected=f"one of {', '.join(DTYPES)}",
                got=kind,
                do="Import weights that are not quantized.",
            )
    return list(kinds)
