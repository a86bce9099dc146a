"""`portatrain sample` and `portatrain eval` on a run and on a folder of transformers, and `portatrain.load`."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import portatrain
from portatrain.cli import main
from portatrain.commands import eval as eval_command
from portatrain.data import TextFiles
from portatrain.errors import UserError
from portatrain.optim import AdamW
from portatrain.optim.schedules import Constant
from portatrain.recipe import Recipe, load_recipe
from portatrain.runs.run_dir import RunDir
from portatrain.training.trainer import train
from recipes.models.decoder import DecoderConfig
from tests.support.running import BACKENDS

BACKEND = BACKENDS[-1]
GREEDY = ["--temperature", "0", "--max-tokens", "6", "--backend", BACKEND]


def recipe(texts: Path) -> Recipe:
    return Recipe(
        name="words",
        model=DecoderConfig(vocab=256, embed=16, layers=1, heads=2),
        data=TextFiles(paths=str(texts), seq_len=16, validation=0.4),
        optimizer=AdamW(lr=1e-2),
        schedule=Constant(),
        steps=4,
        batch=4,
        eval_every=2,
        ema_decay=0.5,
    )


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for n in range(8):
        (folder / f"{n}.txt").write_text(f"{n} and {n} make {2 * n}.\n" * 8)
    return folder


@pytest.fixture(scope="module")
def run(texts: Path) -> Path:
    """A run of four steps, at a path that is relative to nothing."""
    path = texts.parent / "run"
    assert train(recipe(texts), RunDir(path), backend=BACKEND) == 0
    return path


def rows(capsys: pytest.CaptureFixture[str], words: list[str]) -> list[dict[str, Any]]:
    assert main([*words, "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_run_continues_texts_the_same_on_every_backend(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "3 and"}\n\n{"prompt": "4\\n"}\n')
    words = ["sample", str(run), "--prompt", "1 ", "--ids", "0,50", "--prompts", str(tmp_path / "p.jsonl")]
    found = {name: rows(capsys, [*words, "--max-tokens", "9", "--backend", name]) for name in BACKENDS}
    for name, texts in found.items():
        assert [t["prompt"] for t in texts] == ["1 ", [0, 50], "3 and", "4\n"]
        assert all(t["step"] == 4 and t["backend"] == name and len(t["ids"]) <= 9 for t in texts)
        assert texts[0]["prompt_ids"] == [0, *b"1 "] and texts[1]["prompt_ids"] == [0, 50]
        assert texts[3]["text"] == bytes(n for n in texts[3]["ids"]).decode("utf-8", "replace")
        assert [t["ids"] for t in texts] == [t["ids"] for t in found[BACKEND]]
    model = portatrain.load(run, backend=BACKEND)
    again = model.generate(["1 ", [0, 50], "3 and", "4\n"], 9, rows=3, cache=False)
    assert [list(t.tokens) for t in again] == [t["ids"] for t in found[BACKEND]] and model.recomputes == ""

    assert main(["sample", str(run), *GREEDY, "--prompt", "1 and"]) == 0
    out = capsys.readouterr()
    (text,) = model.generate(["1 and"], 6, 0.0)
    assert out.out.rstrip("\n") == f"1 and{text.text}".rstrip("\n") and "tokens/s" in out.err
    assert main(["sample", str(run), *GREEDY]) == 0  # a document of its own


def test_an_evaluation_is_the_runs_own(run: Path, texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", str(run), "--backend", BACKEND]
    (found,) = rows(capsys, words)
    recorded = RunDir(run).events("eval")[-1]
    assert (found["loss"], found["samples"], found["step"]) == (recorded["loss"], recorded["samples"], 4)
    assert found["perplexity"] == math.exp(found["loss"]) and found["bits_per_byte"] > 0
    (part,) = rows(capsys, [*words, "--batches", "1", "--batch", "3"])
    assert part["samples"] == 3
    (trained,) = rows(capsys, [*words, "--split", "train"])
    (whole,) = rows(capsys, [*words, "--set", f"data.paths={texts}"])  # nothing held out
    assert whole["split"] == "all" and whole["samples"] > trained["samples"]
    (averaged,) = rows(capsys, [*words, "--ema"])
    assert averaged["loss"] != found["loss"] and averaged["samples"] == found["samples"]
    assert main(words) == 0 and "perplexity" in capsys.readouterr().out


def test_averaged_weights_are_those_of_the_checkpoint(run: Path) -> None:
    from checkpoints_format import Box
    from portatrain.runs.find_checkpoints import opened

    models = {ema: portatrain.load(run, backend=BACKEND, ema=ema) for ema in (False, True)}
    with opened(run) as reader:
        for ema, role in ((False, "params"), (True, "ema")):
            backend: Any = models[ema]._backend
            for box in backend.local_boxes(models[ema]._state):
                if box.role == "params":
                    want = reader.read(f"{role}/{box.name}", Box(box.offset, box.shape))
                    np.testing.assert_array_equal(box.fetch(), want)
            assert {box.role for box in backend.local_boxes(models[ema]._state)} == {"params", "opt/count"}


MISTAKES = [
    (["sample", "RUN", "--prompts", "missing.txt"], "a text file"),
    (["sample", "RUN", "--ids", "1,x"], "token ids with commas"),
    (["sample", "RUN", "--ids", "999"], "ids from 0 to 255"),
    (["sample", "RUN", "--temperature", "-1"], "temperature"),
    (["sample", "RUN", "--step", "3"], "step 3 among its checkpoints"),
    (["sample", "nothing"], "a run in runs"),
    (["eval", "RUN", "--set", "model.layers=2"], "a field of data"),
    (["eval", "RUN", "--batches", "0"], "at least 1"),
    (["eval", "RUN", "--set", "data.paths=missing"], "missing"),
]


@pytest.mark.parametrize(("words", "said"), MISTAKES)
def test_a_mistake_is_one_paragraph(
    words: list[str], said: str, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent)
    assert main([str(run) if w == "RUN" else w for w in words] + ["--backend", BACKEND]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and said in error


def test_a_text_needs_one_tokenizer(run: Path) -> None:
    from portatrain.data import Digits, Mixture, TokenMemmap
    from portatrain.data.texts import texts_of

    ids = texts_of(TokenMemmap(paths="x", seq_len=4, vocab=9, separator=7))
    assert ids.stops == {7} and ids.after([1], [2]) is None
    for data in (ids, texts_of(Digits())):
        with pytest.raises(UserError, match="token ids, since no tokenizer"):
            data.ids("a")
    words = TextFiles(paths="x", seq_len=4)
    with pytest.raises(UserError, match="one tokenizer"):
        texts_of(Mixture(sources=(words, replace(words, tokenizer="t.json")), weights=(1.0, 1.0)))
    with pytest.raises(UserError, match="a list of prompts"):
        portatrain.load(run, backend=BACKEND).generate("a")


def test_a_tokenizer_of_a_run_and_of_a_folder(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    from portatrain.checkpoint.interop.hub_folder import texts_of_folder
    from portatrain.data.texts import texts_of

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE({"<s>": 0} | {c: n + 1 for n, c in enumerate(alphabet)}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<s>"])
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 257, "eos_token_id": [0, 3]}))
    plain = made.encode("née", add_special_tokens=False).ids
    assert len(plain) == 4

    words = TextFiles(paths="x", seq_len=4, tokenizer=str(tmp_path / "tokenizer.json"))
    added, named, folder = texts_of(words), texts_of(replace(words, bos="<s>")), texts_of_folder(tmp_path)
    assert (added.opens, added.stops) == ((257,), {257}) and (named.opens, named.stops) == ((0,), {0})
    assert (folder.opens, folder.stops) == ((), {0, 3})
    for one, opened in ((added, 257), (named, 0), (folder, 0)):
        prompt = one.ids("née")
        assert prompt == [opened, *plain]
        assert one.after(prompt, plain) == "née"
        assert one.after(prompt[:2], plain[1:]) == "ée"
        assert one.after(prompt[:3], plain[2:]) == "\ufffde"  # the prompt ended within a letter


LLAMAS: dict[str, dict[str, Any]] = {
    "grouped": {"num_key_value_heads": 2, "tie_word_embeddings": False},
    "tied, wide heads": {"num_key_value_heads": 4, "head_dim": 16, "tie_word_embeddings": True},
    "window": {"num_key_value_heads": 1, "sliding_window": 5},
}


@pytest.mark.parametrize("kind", LLAMAS)
def test_greedy_texts_are_those_of_transformers(
    kind: str, tmp_path: Path, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    name = "Mistral" if kind == "window" else "Llama"
    config = getattr(transformers, f"{name}Config")(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=None,
        **LLAMAS[kind],
    )
    theirs = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    theirs.save_pretrained(tmp_path / "hub")
    prompts = [[3, 1, 4, 1, 5, 9, 2], [6]]
    for backend in BACKENDS if kind == "window" else [BACKEND]:
        model = portatrain.load(tmp_path / "hub", backend=backend)
        for prompt, text in zip(prompts, model.generate(prompts, 12, temperature=0), strict=True):
            made = theirs.generate(
                torch.tensor([prompt]),
                max_new_tokens=12,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
            top = torch.stack(made.logits, 1)[0].topk(2, dim=-1).values
            assert (top[:, 0] - top[:, 1]).min() > 1e-4  # no tie that rounding decides
            assert made.sequences[0, len(prompt) :].tolist() == list(text.tokens)
    (found,) = rows(capsys, ["eval", str(tmp_path / "hub"), "--backend", BACKEND, "--set", f"data.paths={texts}"])
    tokens = model.texts.ids("1 and")
    assert tokens == [0, *b"1 and"] and found["step"] == 0 and found["split"] == "all"
    batch = {k: np.array([v], np.int32) for k, v in (("tokens", tokens[:-1]), ("targets", tokens[1:]))}
    with torch.no_grad():
        want = theirs(torch.tensor([tokens]), labels=torch.tensor([tokens])).loss.item()
    assert abs(float(model.evaluate(batch)["loss_B"][0]) / 5 - want) < 1e-5 * max(1.0, want)


@pytest.mark.parametrize(
    ("name", "has"), [("tiny-lm", True), ("tiny-chat", True), ("tiny-vit", False), ("tiny-dpo", False)]
)
def test_a_loss_that_is_no_mean_over_targets_has_no_perplexity(name: str, has: bool) -> None:
    found = eval_command._perplexity(load_recipe(name), math.log(2))
    assert found == ({"perplexity": pytest.approx(2)} if has else {})
