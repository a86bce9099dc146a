"""Export our checkpoints to other formats as complete folders, and import checkpoints as the start of a run."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_format import Box, Reader, Store, Writer, commit
from checkpoints_format.dtypes import NUMPY
from portatrain.backends.program import make_program
from portatrain.backends.state import COUNT, full_name, initial_box
from portatrain.checkpoint import fingerprints
from portatrain.checkpoint.begun import IMPORTED
from portatrain.checkpoint.errors import explained
from portatrain.checkpoint.format_layout import format_layout
from portatrain.checkpoint.interop import huggingface, trees
from portatrain.checkpoint.interop.hub_tokenizer import kept_of
from portatrain.checkpoint.interop.trusted_code import is_trusted
from portatrain.errors import UserError
from portatrain.model.lora import is_factor
from portatrain.recipe import Recipe
from portatrain.recipe.same import deciding_changes, in_words

Values = Callable[[Box], np.ndarray]


def recipe_in(reader: Reader) -> Recipe:
    """Return the recipe in a checkpoint; raise UserError if it has none, or if the recipe's code is missing here."""
    what, stored = "checkpoint", reader.meta.get("recipe")
    if not isinstance(stored, Mapping):
        raise UserError(
            what,
            expected="a recipe in its meta",
            got="none",
            do="The checkpoint is not from a training run: use --to orbax or dcp.",
        )
    try:
        return Recipe.from_json(stored, trusted=is_trusted)
    except (ImportError, AttributeError, KeyError, TypeError) as error:
        raise UserError(
            what,
            expected="a recipe whose code can be imported",
            got=str(error),
            do="Run the command where the recipe's file is, or use --to orbax or dcp.",
        ) from error


def export_to(reader: Reader, to: str, out: Path, *, role: str = "params", dtype: str = "float32") -> list[str]:
    """Write the checkpoint in format `to` as the folder `out`, which appears when it is complete; return its files.
    `dtype` is that of weights for transformers; other formats keep the dtypes of the checkpoint."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            f"folder {out}",
            expected="a new name or an empty folder",
            got="a file, or a folder that is not empty",
            do="Choose another name; nothing in it was changed.",
        )
    if not any(name.startswith(f"{role}/") for name in reader.names):
        raise UserError(
            "checkpoint",
            expected=f"tensors of role {role}",
            got="none",
            do="Leave --ema out: the recipe keeps no averages.",
        )
    parent = out.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=parent))
    except OSError as error:
        raise UserError(
            f"folder {out}", expected="a writable folder", got=str(error), do="Choose another folder."
        ) from error
    try:
        with explained():
            names = _written(reader, to, partial, role, dtype)
        partial.chmod(0o755)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return names


def _written(reader: Reader, to: str, out: Path, role: str, dtype: str) -> list[str]:
    if to == "huggingface":
        return huggingface.export(reader, recipe_in(reader), out, role=role, dtype=dtype)
    if to == "orbax":
        return trees.to_orbax(reader, out)
    if to == "dcp":
        return trees.to_dcp(reader, out)
    definition = recipe_in(reader).describe()
    if to == "torch":
        return trees.to_torch(reader, definition, out)
    return trees.to_nnx(reader, definition, out)


def import_from(
    source: Path, kind: str, recipe: Recipe, store_of: Callable[[int], Store], *, accept_drift: bool = False
) -> int:
    """Write a checkpoint for `recipe`, made from `source`, into the store that `store_of(step)` opens; return its step.

    Our own export continues as the same run, with the state of its optimizer. From any other source only the parameters
    are taken, at step 0: slots are zero, averages equal the parameters.

    Raises UserError, with nothing committed, if the tensors are not those of the recipe. Unless `accept_drift`, also if
    our own export is of another recipe, or if a bit of a tensor differs from its fingerprint.
    """
    if not source.is_dir():
        raise UserError(
            f"folder {source}",
            expected=f"a checkpoint of format {kind}",
            got="a file" if source.exists() else "no such folder",
            do="Check the path.",
        )
    program = make_program(recipe)
    layout = format_layout(program)
    shapes = {t.name: t.shape for t in layout.tensors}
    meta: dict[str, Any] | None = None
    given: dict[str, Values]
    if kind == "huggingface":
        given = huggingface.read(source, recipe, shapes)
    else:
        found = (trees.from_orbax if kind == "orbax" else trees.from_dcp)(source)
        meta = trees.read_meta(source)
        changes = {} if meta is None or accept_drift else deciding_changes(meta, recipe, trusted=is_trusted)
        if changes:
            raise UserError(
                f"folder {source}",
                expected="an export of a run of this recipe",
                got=f"one of another recipe, which differs in {in_words(changes)}",
                do="Give the --set values of that run. To go on with this recipe all the same, give --accept-drift "
                f"REASON; to begin a new run with the parameters alone, remove {trees.META} from the folder.",
            )
        copies = {full_name(*key) for key, info in program.definition.tensors.items() if info.start}
        given = _taken(found, shapes, copies, whole=meta is not None, what=f"folder {source}")
    if meta is None:
        about = {"format": kind, "path": str(source), **(kept_of(source) if kind == "huggingface" else {})}
        meta = {"step": 0, IMPORTED: about, "recipe_sha256": recipe.sha256, "recipe": recipe.to_json()}
    step = int(meta["step"])

    def values(name: str, dtype: str) -> Values:
        if name in given:
            return lambda box: given[name](box).astype(NUMPY[dtype], copy=False)
        role, _, rest = name.partition("/")
        if role == "ema":
            return values(f"params/{rest}", dtype)
        if (info := program.definition.tensors.get((role, rest))) is not None:
            if info.start:
                return values(f"{role}/{info.start}", dtype)
            # Factors of LoRA, which the source may lack; States.
            return lambda box: initial_box(info, recipe.seed, box.offset, box.shape)
        return lambda box: np.zeros(box.shape, NUMPY[dtype])

    with explained(), contextlib.closing(store_of(step)) as store:
        sums = fingerprints.Sums()
        sources = sums.counting({t.name: values(t.name, t.dtype) for t in layout.tensors})
        Writer(store, layout, save="import").write(sources, note=sums.note)
        prints = fingerprints.joined(layout, [sums.note()])
        saved = fingerprints.saved_in(meta)
        if (name := fingerprints.unknown_algorithm(meta)) and not accept_drift:
            raise UserError(
                f"folder {source}",
                expected=f"fingerprints by {fingerprints.ALGORITHM}",
                got=f"some by {name}, which this version cannot compare",
                do="Import it with the release that exported it. To go on all the same, give --accept-drift REASON.",
            )
        if saved is not None and not accept_drift and (bad := fingerprints.changed(saved, prints["tensors"])):
            raise UserError(
                f"folder {source}",
                expected="the tensors that were exported, bit for bit",
                got=f"other bits in {', '.join(bad[:6])}{f' and {len(bad) - 6} more' if len(bad) > 6 else ''}",
                do="Export again. To go on with these tensors all the same, give --accept-drift REASON.",
            )
        commit(store, layout, save="import", meta={**meta, fingerprints.FIELD: prints} if saved is None else meta)
    return step


def _taken(
    found: Mapping[str, np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
    copies: Collection[str],
    *,
    whole: bool,
    what: str,
) -> dict[str, Values]:
    """Return the tensors of `shapes`: all of them if `whole`, else the parameters, of which factors of LoRA and
    `copies`, which begin with the values of others, may be missing. Raises UserError if any other is missing."""
    if not any(n.startswith("params/") for n in found):
        found = {f"params/{n}": a for n, a in found.items()}
    wanted = {
        n: s
        for n, s in shapes.items()
        if whole or (n.startswith("params/") and (n in found or not (is_factor(n) or n in copies)))
    }
    missing = sorted(wanted.keys() - found.keys())
    more = sorted(n for n in found.keys() - shapes.keys() if n != COUNT)
    wrong = [
        f"{n} of {list(found[n].shape)} for {list(s)}" for n, s in wanted.items() if n in found and found[n].shape != s
    ]
    if missing or more or wrong:
        kinds = (("not there", missing), ("not the recipe's", more), ("other shapes", wrong))
        got = "; ".join(
            f"{kind}: {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
            for kind, names in kinds
            if names
        )
        raise UserError(what, expected="the tensors of the recipe", got=got, do="Set the recipe's sizes, or rename.")

    def of(array: np.ndarray) -> Values:
        return lambda box: array[box.slices()] if box.shape else np.asarray(array)

    return {n: of(np.asarray(found[n])) for n in wanted}
