"""Export the tokenizer's files beside the weights, with the ids that open and end a text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from portatrain.data.chat import ending
from portatrain.data.encode import encoding
from portatrain.data.own import gives_documents
from portatrain.data.spec import DataSpec, Mixture
from portatrain.system import json_files
from portatrain.system.paths import expand

GENERATION = "generation_config.json"
BESIDE = ("tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json", GENERATION)


def written(data: DataSpec, out: Path) -> tuple[dict[str, Any], list[str]]:
    """Copy the tokenizer of `data` into the folder `out`; return (fields for config.json, names of the files).

    Our documents end where the next one opens, so the id that opens a document is also the id at which to stop; after
    chats it is the one that ends an answer.
    Raises UserError if the tokenizer's file is no longer there.
    """
    sources = list(_leaves(data))
    given = {(getattr(s, "tokenizer", None), getattr(s, "bos", None)) for s in sources}
    if len(given) != 1 or not (hasattr(sources[0], "bos") or gives_documents(sources[0])):
        separator = getattr(sources[0], "separator", None) if len(given) == 1 else None
        return ({} if separator is None else {"bos_token_id": separator, "eos_token_id": separator}), []
    ((path, bos),) = given
    encode = encoding(path, bos)
    opens = int(encode.bos)
    ends = next((end for s in sources if (end := ending(s, encode)) is not None), opens)
    fields = {"bos_token_id": opens, "eos_token_id": ends}
    if path is None:  # bytes are their own ids
        return fields, []
    file = expand(path)
    folder, file = (file, file / "tokenizer.json") if file.is_dir() else (file.parent, file)
    shutil.copyfile(file, out / "tokenizer.json")
    names = ["tokenizer.json"]
    for name in BESIDE:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
            names.append(name)
    if "tokenizer_config.json" not in names:
        about = {"tokenizer_class": "PreTrainedTokenizerFast"}
        about |= {} if bos is None else {"bos_token": bos, "eos_token": bos}
        (out / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")
        names.append("tokenizer_config.json")
    # The template with which the model was trained, if it is not the tokenizer's own.
    if chats := [own for s in sources if isinstance(own := getattr(s, "chat_template", None), str)]:
        shutil.copyfile(expand(chats[0]), out / "chat_template.jinja")
        names = [*dict.fromkeys([*names, "chat_template.jinja"])]
    return fields, names


def generation_of(source: Path) -> dict[str, Any]:
    """Return how to generate texts, as an import from the folder `source` keeps it; {} if the folder does not say."""
    path = source / GENERATION
    return {"generation": json_files.read_object(path)} if path.is_file() else {}


def generation(begun: Mapping[str, Any], out: Path) -> list[str]:
    """Write how to generate texts into `out`, unless the tokenizer's folder had that file; return the names of the
    files. `begun`: that from which the run began, with the contents of the file or the path of its folder. A run whose
    data has no tokenizer keeps it so."""
    if (out / GENERATION).exists():
        return []
    if "generation" in begun:
        (out / GENERATION).write_text(json.dumps(begun["generation"], indent=2) + "\n", encoding="utf-8")
    elif "path" in begun and (there := expand(str(begun["path"])) / GENERATION).is_file():
        shutil.copyfile(there, out / GENERATION)
    else:
        return []
    return [GENERATION]


def _leaves(data: DataSpec) -> Iterable[DataSpec]:
    if isinstance(data, Mixture):
        for source in data.sources:
            yield from _leaves(source)
    else:
        yield data
