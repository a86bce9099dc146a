"""Use a folder of transformers without a run: the recipe that its config.json implies, and its texts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from portatrain.checkpoint.interop.families import sizes_from
from portatrain.checkpoint.interop.hub_config import FILE as CONFIG
from portatrain.checkpoint.interop.hub_config import read_config
from portatrain.checkpoint.interop.hub_tokenizer import GENERATION
from portatrain.data.encode import Bytes, Encoding, Tokenized
from portatrain.data.spec import TextFiles
from portatrain.data.texts import Texts
from portatrain.errors import UserError
from portatrain.recipe import Recipe, load_recipe
from portatrain.system import json_files

LONGEST = 4096
"""Tokens of a sample of an evaluation, if the model takes longer texts."""


def is_hub_folder(path: Path) -> bool:
    """Return whether `path` is a folder with a config.json, and no run and no checkpoint of ours."""
    return (path / "config.json").is_file() and not any(
        (path / name).exists() for name in ("run.json", "COMMIT", "checkpoints", "checkpoints.json")
    )


def recipe_of(folder: Path) -> Recipe:
    """Return a recipe with the model that config.json describes, and the folder's tokenizer. It is for use, not for
    training.

    Raises:
        UserError: no config.json, or a model that no family computes.
    """
    config = read_config(folder)
    sizes = sizes_from(config, f"file {folder / CONFIG}")
    longest = config.get("max_position_embeddings")
    length = min(longest, LONGEST) if isinstance(longest, int) and longest > 0 else LONGEST
    tokenizer = str(folder) if (folder / "tokenizer.json").is_file() else None
    data = TextFiles(paths=(), seq_len=length, validation=0.0, tokenizer=tokenizer)
    return replace(load_recipe("tiny-lm"), name="folder", model=sizes, data=data, hooks=())


def texts_of_folder(folder: Path) -> Texts:
    """Return the texts of a folder: its tokenizer with the special tokens that it adds itself, and the ids at which
    transformers would stop. A vocabulary of 256 without a tokenizer is bytes, as we export them."""
    config = read_config(folder)
    more = json_files.read_object(folder / GENERATION) if (folder / GENERATION).is_file() else {}
    stops = frozenset(_ids(more.get("eos_token_id", config.get("eos_token_id"))))
    first = next(iter([*_ids(config.get("bos_token_id")), *_ids(config.get("eos_token_id"))]), None)
    if (folder / "tokenizer.json").is_file():
        return Texts(encoding=Special(str(folder), None), opens=(), stops=stops, first=first)
    is_bytes = config.get("vocab_size") == Bytes.vocab
    encoding: Encoding | None = Bytes() if is_bytes else None
    opens = tuple(_ids(config.get("bos_token_id"))) if is_bytes else ()
    return Texts(encoding=encoding, opens=opens, stops=stops, first=first)


def _ids(value: Any) -> Iterable[int]:
    return [n for n in (value if isinstance(value, list) else [value]) if isinstance(n, int)]


class Special(Tokenized):
    """A tokenizer with the special tokens that its own file adds to a text."""

    def __call__(self, data: bytes, where: str) -> np.ndarray:
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            raise UserError(where, expected="UTF-8 text", got=str(error), do="Convert it.") from error
        return np.array(self._tokenizer.encode(text, add_special_tokens=True).ids, np.uint32)
