"""Pairs of chats: which tokens are targets, what is passed over, and what is refused in one paragraph."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from portatrain.config import from_json, to_json
from portatrain.data import Preferences, open_data
from portatrain.data.in_sample import parts_of
from portatrain.data.split import Split
from portatrain.errors import UserError
from recipes import chats

pytest.importorskip("jinja2")
tokenizers = pytest.importorskip("tokenizers")

Row = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("chats")
    chats.write(at)
    return at / "tokenizer"


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ASKED, RIGHT, WRONG = said("user", "1 + 1?"), said("assistant", "2"), said("assistant", "23")
BEFORE = [said("user", "a?"), said("assistant", "b!")]


def spec(at: Path, folder: Path, rows: list[Any], **more: Any) -> Preferences:
    (at / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"seq_len": 128, "tokenizer": str(folder), "bos": chats.TEXT, "validation": 0.0, **more}
    return Preferences(paths=str(at / "pairs.jsonl"), **given)


def told(split: Split, folder: Path) -> list[tuple[str, str, str, str]]:
    """(chosen chat, its targets, rejected chat, its targets) of every sample."""
    made = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    found = []
    for batch in split.once(1):
        row = {k: v[0] for k, v in batch.items()}
        out: list[str] = []
        for side in (1, 2):
            here = row["segment_ids"] == side
            assert (row["positions"][here] == np.arange(here.sum())).all() and here.any()
            for ids in (row["tokens"][here], row["targets"][here & (row["mask"] > 0)]):
                out.append(made.decode(ids.tolist(), skip_special_tokens=False))
        # What follows is the next token, within a side; nothing counts in padding.
        same = row["segment_ids"][1:] == row["segment_ids"][:-1]
        assert (row["targets"][:-1][same] == row["tokens"][1:][same]).all()
        assert not row["mask"][row["segment_ids"] == 0].any()
        found.append((out[0], out[1], out[2], out[3]))
    return found


FORMS: dict[str, tuple[Row, dict[str, str]]] = {
    "whole chats": ({"chosen": [*BEFORE, ASKED, RIGHT], "rejected": [*BEFORE, ASKED, WRONG]}, {}),
    "a prompt of messages": ({"p": [*BEFORE, ASKED], "chosen": [RIGHT], "rejected": [WRONG]}, {"prompt": "p"}),
    "texts": ({"p": [*BEFORE, ASKED], "chosen": "2", "rejected": "23"}, {"prompt": "p"}),
    "other names": (
        {"good": [*BEFORE, ASKED, RIGHT], "bad": [*BEFORE, ASKED, WRONG]},
        {"chosen": "good", "rejected": "bad"},
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_targets_are_the_answers_that_differ(form: str, folder: Path, tmp_path: Path) -> None:
    row, more = FORMS[form]
    ((chosen, right, rejected, wrong),) = told(open_data(spec(tmp_path, folder, [row], **more), seed=0).train, folder)
    turns = "<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\nb!<|im_end|>\n<|im_start|>user\n1 + 1?<|im_end|>\n"
    before = f"<|text|>{turns}<|im_start|>assistant\n"
    # The answer that both have is none of the pair's; the last token of a side is a target only.
    assert (chosen, right) == (f"{before}2<|im_end|>", "2<|im_end|>")
    assert (rejected, wrong) == (f"{before}23<|im_end|>", "23<|im_end|>")


def test_a_text_is_one_message_of_the_user(folder: Path, tmp_path: Path) -> None:
    row = {"p": "1 + 1?", "chosen": "2", "rejected": "23"}
    ((chosen, *_),) = told(open_data(spec(tmp_path, folder, [row], prompt="p"), seed=0).train, folder)
    assert chosen.startswith("<|text|><|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n2")


def test_what_is_passed_over_is_counted_and_named(folder: Path, tmp_path: Path) -> None:
    good = {"chosen": [ASKED, RIGHT], "rejected": [ASKED, WRONG]}
    same = {"chosen": [ASKED, RIGHT], "rejected": [ASKED, RIGHT]}
    none = {"chosen": [ASKED, RIGHT], "rejected": [ASKED]}
    long = {"chosen": [ASKED, RIGHT], "rejected": [ASKED, said("assistant", "x" * 200)]}
    rows = [good, same, none, long, {**good, "chosen": [ASKED, said("assistant", "4")]}]
    data = open_data(spec(tmp_path, folder, rows), seed=0, pack_dir=tmp_path / "pack")
    assert sorted(right for _, right, _, _ in told(data.train, folder)) == ["2<|im_end|>", "4<|im_end|>"]
    assert (
        sorted(data.passed_over)
        == [
            "Preferences: 1 pair longer than seq_len=128",
            "Preferences: 1 pairs without an answer on one side: pairs.jsonl, record 2",
            "Preferences: 1 pairs whose sides are the same: pairs.jsonl, record 1",
        ]
        or data.passed_over
    )


def test_the_pack_is_the_data(folder: Path, tmp_path: Path) -> None:
    """A run that moves does not need the source; samples do not depend on where they are read, but on seq_len."""
    rows = [{"chosen": [ASKED, said("assistant", str(100 + n))], "rejected": [ASKED, WRONG]} for n in range(40)]
    made = spec(tmp_path, folder, rows, validation=0.3)
    first = open_data(made, seed=0, pack_dir=tmp_path / "pack")
    (tmp_path / "pairs.jsonl").unlink()
    again = open_data(made, seed=0, pack_dir=tmp_path / "pack")
    assert first.fingerprint == again.fingerprint and first.validation is not None
    assert first.train.windows + first.validation.windows == 40 and first.validation.windows > 3
    one, two = (data.train.batch(7, 9) for data in (first, again))
    assert all((one[k] == two[k]).all() for k in one)
    assert not {t for t in told(first.train, folder)} & {t for t in told(first.validation, folder)}
    other = open_data(made, seed=1, pack_dir=tmp_path / "pack").train.batch(0, 9)
    assert (other["tokens"] != first.train.batch(0, 9)["tokens"]).any()
    (part,) = parts_of(made, first, [3])[3]
    assert part.source == "Preferences" and part.document < first.train.windows
    assert from_json(to_json(made)) == made


@pytest.mark.parametrize("format", ["parquet", "arrow"])
def test_tables(format: str, folder: Path, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    rows = [{"chosen": [ASKED, RIGHT], "rejected": [ASKED, WRONG], "other": n} for n in range(3)]
    table, path = pa.Table.from_pylist(rows), tmp_path / f"pairs.{format}"
    if format == "parquet":
        pytest.importorskip("pyarrow.parquet").write_table(table, path)
    else:
        with pa.ipc.new_stream(str(path), table.schema) as out:
            out.write_table(table)
    lines = open_data(spec(tmp_path, folder, rows), seed=0)
    given = {"seq_len": 128, "tokenizer": str(folder), "bos": chats.TEXT, "validation": 0.0}
    found = open_data(Preferences(paths=str(path), format=format, **given), seed=0)  # type: ignore[arg-type]
    assert found.fingerprint == lines.fingerprint


BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "a side is missing": (
        {"chosen": [ASKED, RIGHT]},
        {},
        "line 2, field 'rejected': .* got no such field, only chosen",
    ),
    "a side is null": ({"chosen": [ASKED, RIGHT], "rejected": None}, {}, "since a pair has two sides, got nothing"),
    "a side is empty": ({"chosen": [], "rejected": [ASKED, WRONG]}, {}, "field 'chosen': expected .* got nothing"),
    "an empty text": ({"p": "?", "chosen": "2", "rejected": ""}, {"prompt": "p"}, "field 'rejected': .* got nothing"),
    "a text without a prompt": (
        {"chosen": "2", "rejected": "3"},
        {},
        "a list of messages, since .* got str.*prompt='prompt'",
    ),
    "the prompt is missing": (
        {"chosen": "2", "rejected": "3"},
        {"prompt": "p"},
        "line 2, field 'p': .* no such field, only chosen, rejected",
    ),
    "no object": ([1, 2], {}, "expected one JSON object, got list"),
    "no messages": ({"chosen": [ASKED, RIGHT], "rejected": ["23"]}, {}, "field 'rejected': .* with role and content"),
    "an unknown role": (
        {"chosen": [said("human", "?"), RIGHT], "rejected": [ASKED, WRONG]},
        {},
        "field 'chosen': .* a message of the role human; roles are system, user and assistant",
    ),
    "an unknown format": ({"chosen": [ASKED, RIGHT], "rejected": [ASKED, WRONG]}, {"format": "csv"}, "jsonl, parquet"),
    "no template": (
        {"chosen": [ASKED, RIGHT], "rejected": [ASKED, WRONG]},
        {"tokenizer": None, "bos": None},
        "template",
    ),
    "too long": ({"chosen": [ASKED, RIGHT], "rejected": [ASKED, WRONG]}, {"seq_len": 9}, "at most seq_len=9 targets"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_pairs_end_in_one_paragraph(case: str, folder: Path, tmp_path: Path) -> None:
    row, more, wanted = BAD[case]
    good = {"chosen": [ASKED, RIGHT], "rejected": [ASKED, WRONG], "p": "?"}
    with pytest.raises(UserError, match=wanted) as caught:
        open_data(spec(tmp_path, folder, [good, row], **more), seed=0, pack_dir=tmp_path / "pack")
    assert "\n" not in str(caught.value)
    assert case == "too long" or not (tmp_path / "pack").exists()


def test_no_pair_at_all(folder: Path, tmp_path: Path) -> None:
    rows = [{"chosen": [ASKED], "rejected": [ASKED]}]
    with pytest.raises(UserError, match=r"an answer on each side in the train split, got 1 of 1 pair"):
        open_data(spec(tmp_path, folder, rows), seed=0)
    with pytest.raises(UserError, match="Preferences paths: expected files of pairs of chats"):
        open_data(Preferences(paths=(), seq_len=8, tokenizer=str(folder)), seed=0)
