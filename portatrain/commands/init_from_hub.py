"""The recipe that a folder of transformers implies, for `portatrain init --from` and `portatrain ckpt import`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from portatrain.errors import UserError
from portatrain.system import json_files

LONGEST = 1024
"""Tokens of a sample, if the model takes longer texts."""


def recipe_text(template: str, folder: Path, paths: Sequence[str], *, imported: bool = False) -> str:
    """Return `template` with the sizes of the model in `folder`, its tokenizer, and the texts in `paths`.

    imported: the run has the weights already, so the recipe does not begin with those of the folder.

    Raises:
        UserError: no config.json, a model that no family computes, or no tokenizer for texts.
    """
    from portatrain.checkpoint.interop.families import sizes_from
    from portatrain.checkpoint.interop.hub_config import read_config

    config = read_config(folder)
    sizes = sizes_from(config, f"file {folder / 'config.json'}")
    classes: dict[str, set[str]] = {}
    model = source_of(sizes, classes)
    longest = config.get("max_position_embeddings", config.get("n_positions"))
    seq_len = min(longest, LONGEST) if isinstance(longest, int) and longest > 0 else LONGEST
    shapes = getattr(sizes, "sample_shapes", None)
    if shapes is None:
        kind, about, data = _data(folder, paths, seq_len, sizes.vocab)
    else:
        kind, about, data = _arrays(folder, paths, shapes())
    classes.setdefault("portatrain.data" if shapes is None else "recipes.arrays", set()).add(kind)
    before = "from portatrain.data import Stdlib\nfrom portatrain.optim import AdamW, Cosine\n"
    before += "from portatrain.recipe import Recipe\nfrom recipes.models.decoder import DecoderConfig\n"
    classes |= {"portatrain.optim": {"AdamW", "Cosine"}, "portatrain.recipe": {"Recipe"}}
    # The order of ruff: modules by name, which puts `recipes` last.
    imports = "".join(f"from {name} import {', '.join(sorted(classes[name]))}\n" for name in sorted(classes))
    old_data = template[template.index("# Data:") : template.index("\n\n\ndef recipe")]
    text = template.replace(before, imports).replace(old_data, f"{about}\nDATA = {data}")
    if imported:
        about = "# A folder of transformers; each process reads its own ranges of the .safetensors files.\n"
        text = text.replace("        init=INIT,\n", "").replace(
            about,
            f"# The folder of transformers, {'for its tokenizer' if shapes is None else 'which gave the weights'}.\n",
        )
    return text.replace('INIT = "FOLDER"', f"INIT = {_quoted(str(folder.absolute()))}").replace(
        "MODEL = DecoderConfig(vocab=256, embed=64, layers=2, heads=4)", f"MODEL = {model}"
    )


def left_out(folder: Path) -> str:
    """Return a sentence about the tensors of `folder` that the recipe's model does not have and that are passed over;
    '' if there are none."""
    from portatrain.checkpoint.interop import huggingface
    from portatrain.checkpoint.interop.families import sizes_from
    from portatrain.checkpoint.interop.hub_config import read_config

    return huggingface.left_out(folder, sizes_from(read_config(folder)).huggingface())


def source_of(value: Any, classes: dict[str, set[str]], indent: int = 0) -> str:
    """Return Python source that makes `value`, a config or plain data; its classes are added to `classes` by module.
    Fields with their defaults are left out."""
    if not dataclasses.is_dataclass(value):
        if isinstance(value, tuple):
            return _sequence([source_of(each, classes, indent + 4) for each in value])
        return _quoted(value) if isinstance(value, str) else repr(value)
    classes.setdefault(type(value).__module__, set()).add(type(value).__name__)
    pad, given = " " * (indent + 4), []
    for field in dataclasses.fields(value):
        found = getattr(value, field.name)
        if field.default is dataclasses.MISSING or found != field.default:
            given.append(f"{pad}{field.name}={source_of(found, classes, indent + 4)},\n")
    return f"{type(value).__name__}(\n{''.join(given)}{' ' * indent})"


def _sequence(items: Sequence[str]) -> str:
    """Return a tuple; one that repeats a short pattern as a product, so that it stays a line."""
    n = len(items)
    period = next((p for p in range(1, n) if all(items[i] == items[i % p] for i in range(n))), n)
    if n // max(period, 1) < 2:
        return f"({', '.join(items)}{',' if n == 1 else ''})"
    rest = n % period
    once = f"({', '.join(items[:period])}{',' if period == 1 else ''}) * {n // period}"
    return once if not rest else f"{once} + ({', '.join(items[:rest])}{',' if rest == 1 else ''})"


def _data(folder: Path, paths: Sequence[str], seq_len: int, vocab: int) -> tuple[str, str, str]:
    """Return (class, comment, source) of the data."""
    more = ""
    if (folder / "tokenizer.json").is_file():
        bos = _opening(folder)
        more = f", tokenizer=INIT{'' if bos is None else f', bos={_quoted(bos)}'}"
    elif vocab != 256:
        if paths:
            raise UserError(
                f"folder {folder}",
                expected="a tokenizer.json, since its model does not read bytes",
                got="none",
                do="Put the model's tokenizer into the folder, or leave --paths out for a recipe that reads token ids.",
            )
        about = "# Data: files of token ids of this model's tokenizer; the folder has no tokenizer.json."
        return (
            "TokenMemmap",
            about,
            f'TokenMemmap(paths="tokens/*.bin", seq_len={seq_len}, vocab={vocab}, dtype="uint32")',
        )
    if not paths:
        about = "# Data: the source code of Python's standard library, in the tokens of the model.\n"
        about += '# Yours: TextFiles(paths="folder of text files", ...) or Jsonl(...), both in portatrain.data.'
        return "Stdlib", about, f"Stdlib(seq_len={seq_len}, validation=0.03{more})"
    given = _quoted(paths[0]) if len(paths) == 1 else f"({', '.join(map(_quoted, paths))})"
    about = (
        "# Data: a document is a file; paths are files, folders or globs, from the folder in which the run is started."
    )
    return "TextFiles", about, f"TextFiles(paths={given}, seq_len={seq_len}, validation=0.1{more})"


def _arrays(folder: Path, paths: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, str, str]:
    """Return (class, comment, source) of the data of a model that reads arrays of these shapes."""
    if len(paths) > 1:
        raise UserError(
            "--paths",
            expected="one .npz file, since this model reads no texts",
            got=", ".join(paths),
            do="Put all samples into one file: np.savez('images.npz', image=images, label=labels).",
        )
    listed = ", ".join(f"{name} {('samples', *shape)}".replace("'", "") for name, shape in shapes.items())
    about = f"# Data: a .npz file of NumPy, with the arrays {listed}.\n"
    path = folder / "preprocessor_config.json"
    found = json_files.read_object(path) if path.is_file() else {}
    if {"image_mean", "image_std"} <= found.keys():
        about += f"# Pixels are those of transformers: (value / 255 - {found['image_mean']}) / {found['image_std']}.\n"
    about += "# Any other source is a class with `sample(index)` (docs/start/own-data.md)."
    return "NpzFile", about, f"NpzFile(path={_quoted(paths[0] if paths else 'images.npz')}, validation=0.1)"


def _opening(folder: Path) -> str | None:
    """Return the token that opens a text, or else the one that ends it; None if the folder names neither."""
    path = folder / "tokenizer_config.json"
    try:
        found = json_files.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        return None
    for name in ("bos_token", "eos_token"):
        token = found.get(name) if isinstance(found, dict) else None
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return token
    return None


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
