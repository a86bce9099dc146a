"""Tasks of lm-evaluation-harness with their data, a tokenizer and a recipe for them; all in one folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from portatrain.data import TextFiles
from portatrain.optim import AdamW, Constant
from portatrain.recipe import Recipe
from recipes.models.decoder import DecoderConfig

SEQ = 64
TASKS = ("choose", "last", "lines", "says")
SUMS = [(a, b) for a in range(10) for b in range(10)]


def text(a: int, b: int) -> str:
    return f"{a} and {b} make {a + b}.\n"


def tokenizer(at: Path, *, adds: bool) -> Path:
    """Write a tokenizer of bytes with a few merges; `adds`: its file puts <s> before a text."""
    import tokenizers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    ids = {"<s>": 0} | {c: n + 1 for n, c in enumerate(alphabet)}
    merges = [("a", "n"), ("an", "d"), ("m", "a"), ("k", "e"), ("ma", "ke"), ("Ġ", "and"), ("Ġ", "make")]
    for left, right in merges:
        ids[left + right] = len(ids)
    made = tokenizers.Tokenizer(tokenizers.models.BPE(ids, merges))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<s>"])
    if adds:
        made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    path = at / "tokenizer.json"
    made.save(str(path))
    return path


def recipe(at: Path, tokens: Path | None, *, steps: int = 200) -> Recipe:
    """Write the corpus; return a recipe that reads it, with a tokenizer or as bytes."""
    (at / "corpus").mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for n in range(20):
        lines = "".join(text(*SUMS[i]) for i in rng.permutation(100)[:12])
        (at / "corpus" / f"{n}.txt").write_text(lines)
    path = None if tokens is None else str(tokens)
    return Recipe(
        name="sums",
        model=DecoderConfig(vocab=264 if tokens else 256, embed=32, layers=2, heads=2),
        data=TextFiles(
            paths=str(at / "corpus"), seq_len=SEQ, validation=0.1, tokenizer=path, bos="<s>" if tokens else None
        ),
        optimizer=AdamW(lr=1e-2),
        schedule=Constant(warmup=min(5, steps)),
        steps=steps,
        batch=8,
        checkpoint_every=max(1, steps // 2),
        ema_decay=0.9,
    )


def definitions(at: Path) -> Path:
    """Write the tasks below `at`; return their folder."""
    folder = at / "tasks"
    folder.mkdir(exist_ok=True)
    rows = []
    for a, b in SUMS[3:97:7]:
        choices = [f" {n}." for n in (a + b, a + b + 1, a, 30 - b)]
        rows.append(
            {"before": f"{a} and {b} make", "choices": choices, "after": choices[0], "text": text(a, b) + text(b, a)}
        )
    rows[0]["before"] = "<s>" + str(rows[0]["before"])  # begins with the token that opens a text
    (at / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    head = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(at / "rows.jsonl")}},
        "test_split": "test",
        "metadata": {"version": 1.0},
    }
    kinds = {
        "choose": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{before}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": 0,
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "last": {
            "output_type": "loglikelihood",
            "doc_to_text": "{{before}}",
            "doc_to_target": "{{after}}",
            "target_delimiter": "",
            "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
        },
        "lines": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
        },
        "says": {
            "output_type": "generate_until",
            "doc_to_text": "{{before}}",
            "doc_to_target": "{{after}}",
            "target_delimiter": "",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False, "temperature": 0.0},
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    for name, fields in kinds.items():  # JSON is YAML
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **head, **fields}))
    return folder
