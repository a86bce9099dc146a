"""Export what a folder of transformers has beside weights and sizes: the tokenizer's files, with the ids that open and
end a text, how texts are generated and images prepared, and the names of classes."""

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
KEPT = {"generation": GENERATION, "preprocessor": "preprocessor_config.json"}
"""A name in the meta of an imported checkpoint -> the file whose contents it keeps."""
LABELS = "labels"
"""The name of the classes there."""
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


def kept_of(source: Path) -> dict[str, Any]:
    """Return what an import from the folder `source` keeps of it beside weights and sizes: how texts are generated and
    images prepared, and the names of classes."""
    found: dict[str, Any] = {
        key: json_files.read_object(source / name) for key, name in KEPT.items() if (source / name).is_file()
    }
    labels = json_files.read_object(source / "config.json").get("id2label")
    return found | ({LABELS: labels} if isinstance(labels, dict) else {})


def kept(begun: Mapping[str, Any], out: Path) -> list[str]:
    """Write how texts are generated and images prepared into `out`, unless the tokenizer's folder had the file; return
    the names of the files. `begun`: that from which the run began, with the contents of the files or the path of their
    folder. A run whose data has no tokenizer keeps them so."""
    names = []
    for key, name in KEPT.items():
        if (out / name).exists():
            continue
        if key in begun:
            (out / name).write_text(json.dumps(begun[key], indent=2) + "\n", encoding="utf-8")
        elif "path" in begun and (there := expand(str(begun["path"])) / name).is_file():
            shutil.copyfile(there, out / name)
        else:
            continue
        names.append(name)
    return names


def classes(begun: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of config.json with the names of classes, for a model that has some in `config`: those of the
    folder from which the run began, if they are as many."""
    ours, theirs = config.get("id2label"), begun.get(LABELS)
    if ours is None:
        return {}
    if theirs is None and "path" in begun and (there := expand(str(begun["path"])) / "config.json").is_file():
        theirs = json_files.read_object(there).get("id2label")
    if not isinstance(theirs, Mapping) or theirs.keys() != ours.keys():
        return {}
    return {"id2label": dict(theirs), "label2id": {name: int(n) for n, name in theirs.items()}}


def _leaves(data: DataSpec) -> Iterable[DataSpec]:
    if isinstance(data, Mixture):
        for source in data.sources:
            yield from _leaves(source)
    else:
        yield data
