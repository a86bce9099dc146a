"""The whole road of fine-tuning without a download: a base model, a set of chats, all weights or factors, and back to
transformers. What counts as a target is what transformers says of the same chats."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from portatrain.cli import main
from portatrain.data import open_data
from portatrain.recipe import Recipe, apply_overrides, load_recipe
from portatrain.runs.run_dir import RunDir
from portatrain.training.trained import load
from recipes import chats
from tests.support.running import BACKENDS
from tests.support.short_runs import losses

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("jinja2")
pytest.importorskip("tokenizers")

BACKEND = BACKENDS[-1]
SIZES = ["model.embed=64", "model.layers=2", "model.mlp=128", "batch=8", "accumulation=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("chats")
    chats.main([str(at)])
    return at


def recipe(folder: Path, *more: str) -> Recipe:
    data = (f"data.paths={folder}/chats.jsonl", f"data.tokenizer={folder}/tokenizer")
    return apply_overrides(load_recipe("tiny-chat"), [*SIZES, *data, *more])


@pytest.mark.parametrize("packing", ["best-fit", "single", "windows"])
def test_targets_of_an_epoch_are_the_answers_that_transformers_counts(folder: Path, packing: str) -> None:
    """Every chat is rendered by transformers' own tokenizer and template; whatever the packing, an epoch of both splits
    has its tokens, and as targets its answers, once."""
    made = transformers.AutoTokenizer.from_pretrained(str(folder / "tokenizer"))
    rows = [json.loads(line)["messages"] for line in (folder / "chats.jsonl").read_text().splitlines()]
    counted, answered = np.zeros(len(made), np.int64), 0
    for messages in rows:
        found = made.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True, tokenize=True)
        ids, mask = np.array(found["input_ids"]), np.array(found["assistant_masks"], bool)
        counted += np.bincount(ids[mask], minlength=len(made))
        answered += sum(m["role"] == "assistant" for m in messages)
        assert made.decode(ids[mask]) == "".join(
            m["content"] + chats.END for m in messages if m["role"] == "assistant"
        )  # nothing of a question, of a role or of the system
    data = open_data(recipe(folder, f"data.packing={packing}").data, seed=0)
    ours = np.zeros_like(counted)
    for split in (data.train, data.validation):
        assert split is not None
        for batch in split.once(16):
            here = batch["mask"] > 0
            ours += np.bincount(batch["targets"][here], minlength=len(made))
    (end,) = made.encode(chats.END, add_special_tokens=False)
    assert (ours == counted).all() and ours[end] == answered and ours.sum() > 5000


ROW = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}
BAD: dict[str, tuple[object, str, list[str], str]] = {
    "a row without messages": ({"text": "?"}, "", [], "line 3, field: expected one of text, got 'messages'"),
    "messages that are none": ({"messages": "?"}, "", [], "line 3, field 'messages': expected a list of messages"),
    "a message without a role": ({"messages": [{"content": "?"}]}, "", [], "each an object with role and content"),
    "a role that the template does not know": (
        {"messages": [{"role": "tool", "content": "?"}]},
        "",
        [],
        "accepts, got its refusal: a message of the role tool",
    ),
    "a template that fails": (ROW, "{{ messages[7].content }}", [], "got UndefinedError"),
    "a template that is none": (ROW, "{% for m in messages %}", [], "got TemplateSyntaxError"),
    "no answer at all": (
        {"messages": [{"role": "user", "content": "?"}]},
        "{% for m in messages %}{{ m.content }}{% endfor %}{% generation %}{% endgeneration %}",
        [],
        "in the train split, got 4 of 4 documents, all chats without an answer",
    ),
    "a tokenizer larger than the table": (
        ROW,
        "",
        ["model.vocab=200"],
        "259 ids, got embed/table with 200. Set model.vocab",
    ),
    "no token that opens a document": (
        ROW,
        "",
        ["model.vocab=259", "data.bos=none"],
        "name the token that opens a doc",
    ),
    "another tokenizer than that of the weights": (
        ROW,
        "",
        ["model.vocab=200", "init=weights"],
        "Take the tokenizer of the weights that the run begins with, weights",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_chats_end_in_one_paragraph(
    case: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row, template, values, wanted = BAD[case]
    rows = [ROW, ROW, row, ROW] if case != "no answer at all" else [row] * 4
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    given = [f"data.paths={tmp_path}/chats.jsonl", f"data.tokenizer={folder}/tokenizer", "data.validation=0"]
    given.append("data.packing=single")
    if template:
        (tmp_path / "t.jinja").write_text(template)
        given.append(f"data.chat_template={tmp_path}/t.jinja")
    assert main(command("tiny-chat", tmp_path / "run", *given, "batch=2", *values)) == 2
    told = capsys.readouterr().err
    assert wanted in told and "Traceback" not in told, told
    assert len([line for line in told.splitlines() if line.startswith("error: ")]) == 1
    assert not (tmp_path / "run" / "run.json").exists()


def command(recipe: str, run: Path, *values: str) -> list[str]:
    sizes = [word for value in (*SIZES, "eval_every=none", *values) for word in ("--set", value)]
    return ["train", recipe, "--run-dir", str(run), "--backend", BACKEND, *sizes]


@pytest.mark.full
@pytest.mark.timeout(600)
def test_from_a_base_model_to_answers_in_transformers(folder: Path, tmp_path: Path) -> None:
    base, exported, merged = tmp_path / "base", tmp_path / "exported", tmp_path / "merged"
    tokens = (f"model.vocab={chats.VOCAB}", f"data.tokenizer={folder}/tokenizer", f"data.bos={chats.TEXT}")
    more = ("data.seq_len=64", "steps=30", "schedule.warmup=5", "hooks=()", "eval_final_batches=1")
    assert main(command("tiny-lm", base, *tokens, *more)) == 0
    assert main(["ckpt", "export", str(base), str(exported), "--to", "huggingface"]) == 0

    data = (f"data.paths={folder}/chats.jsonl", f"data.tokenizer={folder}/tokenizer", "steps=60", "data.seq_len=128")
    # The base model has never seen the tokens of the template, so their rows are trained, too.
    factors = ("lora=LoRA", "lora.rank=8", "trainable=*/lora_*,embed/table", "optimizer.lr=3e-3")
    runs = {"full": (), "lora": factors}
    for name, values in runs.items():
        run = RunDir(tmp_path / name)
        assert main([*command("tiny-chat", run.path, *data, *values), "--init", str(exported)]) == 0
        fallen = losses(run)
        assert np.mean(fallen[-10:]) < 0.6 * np.mean(fallen[:10]), (name, fallen[::10])
        seen = run.events("eval")[-1]
        assert seen["loss"] < 0.6 * np.mean(fallen[:10]), name  # also of chats that were held out

    lora = tmp_path / "lora"
    assert main(["ckpt", "export", str(lora), str(merged), "--to", "huggingface"]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(merged).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(merged)
    (end,) = tokenizer.encode(chats.END, add_special_tokens=False)
    assert model.config.eos_token_id == tokenizer.eos_token_id == end  # an answer ends there, and not a document
    asked = [{"role": "user", "content": "What is 3 + 4?"}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    text = tokenizer.decode(ids)
    assert text == f"{chats.START}user\nWhat is 3 + 4?{chats.END}\n{chats.START}assistant\n"
    begin = torch.tensor([[tokenizer.bos_token_id, *ids]])  # as every document begins in training
    with torch.no_grad():
        made = model.generate(begin, max_new_tokens=24, do_sample=False, pad_token_id=end)
        theirs = model(made).logits.numpy()
    assert made.shape[1] > begin.shape[1]
    # What transformers computes and takes is what the run computes, with its factors apart.
    trained = load(lora, backend=BACKEND)
    assert trained.texts.stops == {tokenizer.bos_token_id, end}
    ours = trained.predict({"tokens": made.numpy().astype(np.int32)})
    bound = 2e-5 * np.abs(ours).max()
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=bound)
    for at in range(begin.shape[1], made.shape[1]):
        row = ours[0, at - 1]
        assert row.max() - row[made[0, at]] <= 2 * bound
