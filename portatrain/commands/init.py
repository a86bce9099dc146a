"""Write a short commented recipe to FILE. It trains unchanged, and is yours to edit.

--model decoder is a language model, vision an image classifier, own a small model that the file itself defines.
--data text reads the files under --paths, or the source code of Python's standard library; tokens reads files of token
ids (.bin, raw and little-endian, or .npy); images are scikit-learn's handwritten digits.

--from FOLDER fine-tunes a model of transformers: its config.json gives the sizes, and its files the weights that the
run begins with.

examples:
  portatrain init my_recipe.py
  portatrain init my_recipe.py --paths my/texts
  portatrain init my_recipe.py --model own --data tokens --paths train.bin
  portatrain init my_recipe.py --model vision
  portatrain init my_recipe.py --from models/SmolLM3-3B --paths my/texts
"""

from __future__ import annotations

import argparse
import importlib.resources
import json
import os
import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from portatrain.commands import options
from portatrain.errors import UserError

if TYPE_CHECKING:
    import numpy as np

# The kinds of data that each model takes; the first is the default of --data.
MODELS = {"decoder": ("text", "tokens"), "vision": ("images",), "own": ("text", "tokens", "images")}
FILES = {"decoder": "decoder.py", "vision": "vision.py", "own": "own.py"}
DATA = ("text", "tokens", "images")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="the file to write; an existing file is never overwritten")
    parser.add_argument("--model", choices=tuple(MODELS), default="decoder", help="default: decoder")
    parser.add_argument("--data", choices=DATA, help="default: images for vision, otherwise text")
    parser.add_argument(
        "--paths", metavar="PATH", nargs="+", default=[], help="files, folders or globs with the text or the token ids"
    )
    parser.add_argument(
        "--from",
        dest="source",
        metavar="FOLDER",
        type=options.folder,
        help="fine-tune the model in this folder of transformers (config.json, .safetensors, tokenizer.json)",
    )


def run(args: argparse.Namespace) -> int:
    path = Path(args.file)
    if args.source is not None:
        return _fine_tune(args, path)
    data = args.data or MODELS[args.model][0]
    if data not in MODELS[args.model]:
        takes = [model for model, kinds in MODELS.items() if data in kinds]
        raise UserError(
            f"--model {args.model} --data {data}",
            expected=f"data that the model takes: {' or '.join(MODELS[args.model])}",
            got=data,
            do=f"Use --model {' or --model '.join(takes)} for {data}.",
        )
    text = recipe_text(args.model, data, args.paths, path)
    _write(path, text)
    print(f"{path}: {args.model}, {data}\n\n  launch --cluster local {path}\n  portatrain show {path}")
    return 0


def recipe_text(model: str, data: str, paths: Sequence[str], path: Path) -> str:
    """Return the recipe for `path`: the template of `model`, reading `data` from `paths`."""
    text = named("own_images.py" if (model, data) == ("own", "images") else FILES[model], path)
    if data == "images" and paths:
        raise UserError(
            "--paths",
            expected="no paths for images: they are the digits of scikit-learn",
            got=", ".join(paths),
            do="Leave it out; docs/start/data.md explains how to read your own data.",
        )
    if data == "text" and paths:
        held_out = 0.1 if _documents(paths, "text files") > 1 else 0.0
        return _with_data(text, _template("data_text.py"), paths, held_out)
    if data == "tokens":
        if not paths:
            raise UserError(
                "--data tokens",
                expected="--paths with the files of token ids",
                got="none",
                do="Write --paths train.bin (raw little-endian ids) or --paths train.npy.",
            )
        held_out = 0.1 if _documents(paths, "files of token ids") > 1 else 0.0
        dtype, vocab = _look(paths)
        block = _template("data_tokens.py").replace('"uint16"', f'"{dtype}"').replace("50_257", str(vocab))
        return _with_data(text, block, paths, held_out)
    return text


def _fine_tune(args: argparse.Namespace, path: Path) -> int:
    from portatrain.commands.init_from_hub import left_out
    from portatrain.commands.init_from_hub import recipe_text as text_of

    if args.data is not None or args.model != "decoder":
        raise UserError(
            "--from",
            expected="no --model and no --data: the folder decides them",
            got=" ".join(f"--{name} {getattr(args, name)}" for name in ("model", "data") if getattr(args, name)),
            do="Leave them out; --paths names your texts.",
        )
    _write(path, text_of(named("finetune.py", path), args.source, args.paths))
    print(f"{path}: fine-tune {args.source}")
    if said := left_out(args.source):
        print(said)
    print(f"\n  launch --cluster local {path}\n  portatrain show {path}")
    return 0


def named(template: str, path: Path) -> str:
    """Return a template with the name of the recipe in the file `path`."""
    if path.suffix != ".py":
        raise UserError(f"file {path}", expected="a name that ends in .py", got=repr(path.name), do=f"Use {path}.py.")
    name = re.sub(r"[^a-z0-9]+", "-", path.stem.lower()).strip("-")[:63] or "my-recipe"
    return _template(template).replace("my-recipe", name).replace("my_recipe.py", path.name)


def _template(name: str) -> str:
    return (importlib.resources.files("portatrain.commands") / "templates" / name).read_text(encoding="utf-8")


def _with_data(text: str, block: str, paths: Sequence[str], held_out: float) -> str:
    """Return `text` with the import and the paragraph of its data replaced by those of `block`."""
    imported = re.compile(r"^from portatrain\.data import .*$", re.MULTILINE)
    paragraph = re.compile(r"^# Data: .*?(?=\n\n|\Z)", re.MULTILINE | re.DOTALL)
    given = json.dumps(paths[0], ensure_ascii=False) if len(paths) == 1 else _tuple(paths)
    block = re.sub(r"paths=\"[^\"]*\"", lambda _: f"paths={given}", block.rstrip())
    if not held_out:
        note = "\n# There is one file, so none is held out. For a validation loss, set validation_paths= or add files."
        block = block.replace("validation=0.1", "validation=0.0").replace("\nDATA =", f"{note}\nDATA =")
    new_import, new_paragraph = imported.search(block), paragraph.search(block)
    assert new_import is not None and new_paragraph is not None
    text = imported.sub(lambda _: new_import[0], text, count=1)
    return paragraph.sub(lambda _: new_paragraph[0], text, count=1)


def _tuple(paths: Sequence[str]) -> str:
    return f"({', '.join(json.dumps(path, ensure_ascii=False) for path in paths)})"


def _documents(paths: Sequence[str], what: str) -> int:
    """Return the number of files; UserError if a path has none."""
    from portatrain.data.finding import find

    return len(find(tuple(paths), f"--paths: {what}"))


def _look(paths: Sequence[str]) -> tuple[str, int]:
    """Return the dtype of the ids in token files, and the size of the vocabulary: the largest id plus one."""
    import numpy as np

    from portatrain.data.finding import find
    from portatrain.data.token_files import on_disk, read_ids

    kinds: dict[str, str] = {}
    most = 0
    for _, place in find(tuple(paths), "--paths"):
        with ExitStack() as copies:
            path = on_disk(place, copies)
            dtype = _npy_dtype(path) if place.suffix == ".npy" else _guessed(np.fromfile(path, "<u2", 1 << 20))
            kinds.setdefault(dtype, str(place))
            ids = read_ids(path, np.dtype(dtype).newbyteorder("<"), place)
            step = 1 << 26  # read in parts, because a corpus may be larger than memory
            most = max([most, *(int(ids[at : at + step].max()) for at in range(0, len(ids), step))])
    if len(kinds) > 1:
        raise UserError(
            "--paths",
            expected="files of one type of ids",
            got=", ".join(f"{dtype} in {path}" for dtype, path in kinds.items()),
            do="Write them all with one type.",
        )
    (dtype,) = kinds
    return dtype, most + 1


def _npy_dtype(path: Path) -> str:
    import numpy as np

    try:
        return str(np.load(path, mmap_mode="r").dtype)
    except (OSError, ValueError) as error:
        raise UserError(
            f"token file {path}", expected="an array that numpy.save wrote", got=str(error), do="Write it again."
        ) from error


def _guessed(words: np.ndarray) -> str:
    """Return the dtype of the ids in a raw file: 32 bits if every second 16-bit word is 0, as for ids below 65,536."""
    return "uint32" if len(words) > 1 and not words[1::2].any() else "uint16"


def _write(path: Path, text: str) -> None:
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        raise UserError(
            f"file {path}",
            expected="an unused name",
            got="a file that exists",
            do="Choose another name; nothing in it was changed.",
        ) from None
    except OSError as error:
        raise UserError(
            f"file {path}",
            expected="a writable file",
            got=error.strerror or str(error),
            do="Choose another folder, or create it first.",
        ) from error
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
