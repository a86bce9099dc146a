"""`portatrain data check` beside sets of whole documents and of runs of tokens."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from portatrain.cli import main
from portatrain.data import Jsonl, PackedTokens
from portatrain.data.store import overlap
from portatrain.data.store.reading import streams_of
from tests.support.packed import packed, tokenizer


def store(where: Path, texts: list[str], validation: float = 0.0, **more: Any) -> Path:
    lines = where.with_suffix(".jsonl")
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    packed(Jsonl(paths=str(lines), seq_len=8, validation=validation, **more), where, shard_bytes=20_000)
    return where


def documents(where: Path) -> dict[str, list[tuple[int, ...]]]:
    streams = streams_of(PackedTokens(path=str(where), seq_len=8))
    return {split: [tuple(ids.tolist()) for ids in stream] for split, stream in streams.items()}


def runs(ids: tuple[int, ...], gram: int) -> list[tuple[int, ...]]:
    return [ids[i : i + gram] for i in range(len(ids) - gram + 1)]


def said(capsys: pytest.CaptureFixture[str], *args: str | Path) -> tuple[int, dict[str, Any]]:
    code = main(["data", "check", *map(str, args), "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("seed", range(6))
def test_copies_and_runs_are_those_of_sets(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(seed)
    gram = int(rng.integers(2, 7))
    monkeypatch.setattr(overlap, "BLOCK", int(rng.integers(1, 400)) if seed else 1 << 18)
    monkeypatch.setattr(overlap, "BUCKET_DOCUMENTS", int(rng.integers(5, 60)))
    monkeypatch.setattr(overlap, "SLICE_GRAMS", int(rng.integers(20, 5000)))

    def texts(count: int, letters: str) -> list[str]:
        made = ["".join(rng.choice(list(letters), int(rng.integers(1, 60)))) for _ in range(count)]
        return made + [made[i] for i in rng.integers(0, count, 9)]

    one = store(tmp_path / "one", texts(90, "abcdefgh"), validation=0.3)
    two = store(tmp_path / "two", [*texts(40, "efghijkl"), *texts(1, "ab")])
    held = [bytes(ids).decode() for ids in documents(one)["train"][2:5]]
    three = store(tmp_path / "three", [*held, *texts(20, "abmnop"), "z"])
    code, found = said(capsys, one, two, "--against", three, "--gram", str(gram))

    parts = {(str(at), split): ids for at in (one, two, three) for split, ids in documents(at).items() if ids}
    trained = {(str(one), "train"), (str(two), "train")}
    names = list(parts)
    assert [(p["path"], p["split"]) for p in found["parts"]] == names
    assert {(p["path"], p["split"]) for p in found["parts"] if p["trained"]} == trained

    copies = {(c["path"], c["split"], c["other"]["path"], c["other"]["split"]): c for c in found["copies"]}
    wanted = {}
    for i, b in enumerate(names):
        for a in names[: i + 1]:
            known = set(parts[a])
            n = len(parts[b]) - len(known) if a == b else sum(ids in known for ids in parts[b])
            if n:
                wanted[(*b, *a)] = n
    assert {key: c["documents"] for key, c in copies.items()} == wanted
    for key, c in copies.items():
        for here, there in c["examples"]:
            assert parts[key[:2]][here] == parts[key[2:]][there] and (key[:2] != key[2:] or there < here)

    known_runs = Counter(run for name in trained for ids in parts[name] for run in set(runs(ids, gram)))
    for part in found["parts"]:
        if part["trained"]:
            assert "shared" not in part
            continue
        ids = parts[part["path"], part["split"]]
        mine = [run for one_ids in ids for run in runs(one_ids, gram)]
        assert part["shared"] == {
            "grams": len(mine),
            "seen": sum(run in known_runs for run in mine),
            "documents": sum(any(run in known_runs for run in runs(one_ids, gram)) for one_ids in ids),
            "short": sum(len(one_ids) < gram for one_ids in ids),
            "trained": sum(bool(set(runs(one_ids, gram)) & set(mine)) for name in trained for one_ids in parts[name]),
        }
    assert code == 1


def test_nothing_shared_is_good(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    one = store(tmp_path / "one", ["".join(rng.choice(list("abcdefgh"), 13)) for _ in range(30)], validation=0.3)
    code, found = said(capsys, one, "--gram", "12")
    assert code == 0 and found["copies"] == [] and found["parts"][1]["shared"]["seen"] == 0
    assert main(["data", "check", str(one), "--gram", "14"]) == 0
    out = capsys.readouterr().out
    assert "none of its 0 runs of 14 tokens" in out and "too short to compare" in out and "no document is twice" in out
    assert main(["data", "check", str(one), "--gram", "3"]) == 1
    assert "are trained on (" in capsys.readouterr().out


def test_mistakes_in_one_paragraph(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = store(tmp_path / "one", ["abc" * 5, "abd" * 5])
    tokens = store(tmp_path / "two", ["abc" * 9], tokenizer=str(tokenizer(tmp_path / "tokenizer.json")))
    for args, word in (
        ([one, tokens], "the tokenizer of"),
        ([one, one], "each store once"),
        ([one, "--gram", "1"], "at least 2 tokens"),
        ([tmp_path / "none"], "none"),
    ):
        assert main(["data", "check", *map(str, args)]) == 2
        said_ = capsys.readouterr().err
        assert word in said_ and "Traceback" not in said_
