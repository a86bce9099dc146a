"""The surgeries by the names of `--surgery`, and how one of your own is found: FILE.py:FUNCTION."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from portatrain.checkpoint.surgery.edits import Surgery, Transform
from portatrain.checkpoint.surgery.embed import embed
from portatrain.checkpoint.surgery.experts import experts
from portatrain.checkpoint.surgery.layers import layers
from portatrain.checkpoint.surgery.lora import drop_lora, merge_lora
from portatrain.checkpoint.surgery.qk_norm import qk_norm
from portatrain.checkpoint.surgery.rope import rope
from portatrain.checkpoint.surgery.vocabulary import vocabulary
from portatrain.checkpoint.surgery.width import width
from portatrain.errors import UserError, choice
from portatrain.model.module import Definition
from portatrain.recipe.loading import import_file

NAMES: Mapping[str, Transform] = {
    "vocabulary": vocabulary,
    "layers": layers,
    "width": width,
    "embed": embed,
    "experts": experts,
    "qk-norm": qk_norm,
    "rope": rope,
    "merge-lora": merge_lora,
    "drop-lora": drop_lora,
}


def chosen(text: str, *, cwd: Path | None = None) -> Transform:
    """Return the surgery of this name, or the function of a file (`FILE.py:FUNCTION`, relative to `cwd`).

    Raises:
        UserError: there is no such name, file or function, or the function returns no `Surgery`.
    """
    file, colon, name = text.rpartition(":")
    if not colon:
        if text not in NAMES:
            raise choice("--surgery (one of your own is FILE.py:FUNCTION)", text, NAMES)
        return NAMES[text]
    found = getattr(import_file(((cwd or Path.cwd()) / file).resolve(), what=f"--surgery {text}"), name, None)
    if not callable(found):
        raise UserError(
            f"--surgery {text}",
            expected=f"a function {name}(before, after) in {file}",
            got="none of that name",
            do="Write it as docs/run/surgery.md shows, or correct the name.",
        )

    def checked(before: Definition, after: Definition) -> Surgery:
        made = found(before, after)
        if not isinstance(made, Surgery):
            raise UserError(
                f"--surgery {text}",
                expected="a Surgery from the function",
                got=f"a {type(made).__name__}",
                do="End it with: return Surgery(edits={...}).",
            )
        return made

    return checked
