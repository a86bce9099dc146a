"""Chats: the text and the targets are those of transformers, with the tag of answers and without it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portatrain.checkpoint.interop.hub_tokenizer import written
from portatrain.data import Jsonl, Parquet, open_data
from portatrain.data.chat import ChatTemplate, chat_template
from portatrain.data.corpus import streams
from portatrain.errors import UserError

pytest.importorskip("jinja2")
tokenizers = pytest.importorskip("tokenizers")

Chat = list[dict[str, Any]]

# Of the shape of ChatML (Qwen): every message is opened and closed by special tokens.
TAGGED = """\
{% for message in messages %}
    {%- if message.role == 'assistant' %}
{{- '<|im_start|>assistant\n' }}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}
    {%- else %}
{{- '<|im_start|>' + message['role'] + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
PLAIN = TAGGED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
# Of the shape of Llama and Mistral: the token that opens a text, checks of roles, tools as JSON, loop controls.
OPENED = """\
{{- bos_token }}
{%- if strftime_now is defined %}{% set day = strftime_now("%d %b %Y") %}{% else %}{% set day = "26 Jul" %}{% endif %}
{{- day }}
{%- for m in messages %}
    {%- if m.role not in ['user', 'assistant', 'tool'] %}{{ raise_exception('no role ' + m.role) }}{% endif %}
    {%- if m.role == 'tool' %}{{ '[T] ' + m | tojson + ' [/T]' }}{% continue %}{% endif %}
    {%- if m.role == 'user' %}{{ '[INST] ' + m.content | trim + ' [/INST]' }}
    {%- elif m.tool_calls is defined %}{% generation %}{{ ' ' + m.tool_calls | tojson + eos_token }}{% endgeneration %}
    {%- else %}{% generation %}{{ ' ' + m.content | trim + eos_token }}{% endgeneration %}{% endif %}
{%- endfor %}"""
UNTAGGED = OPENED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
TEMPLATES = {"tagged": TAGGED, "plain": PLAIN, "opened": OPENED, "untagged": UNTAGGED}
TAGS = {"plain": TAGGED, "untagged": OPENED}  # what a template is with the tags
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of a tokenizer for each template, as transformers saves one."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["user assistant answer question the INST and " * 3], trainer)
    out = {}
    for i, (name, source) in enumerate(TEMPLATES.items()):
        out[name] = folder = tmp_path_factory.mktemp(name)
        made.save(str(folder / "tokenizer.json"))
        about: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
        about["eos_token"] = {"content": "</s>", "lstrip": False, "special": True, "__type": "AddedToken"}
        if i % 2:
            about["chat_template"] = source
        else:
            (folder / "chat_template.jinja").write_text(source)
        (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return out


def chat(*contents: str) -> Chat:
    roles = ["user", "assistant"]
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


CHATS = [
    chat("a question", "an answer"),
    chat("what?", "the answer ", " and then\n", "<|im_end|> more \ufdd0\n", "no answer yet"),
    chat("é🙂", "an é🙂 within"),
    chat("", ""),
    [*chat("use a tool"), {"role": "assistant", "tool_calls": [{"n": 1, "name": "é"}], "content": ""}],
    [*chat("use", "it"), {"role": "tool", "content": "<&'\"é>"}, {"role": "assistant", "content": "done"}],
]


def theirs(folder: Path, template: str, messages: Chat) -> tuple[list[int], list[int]]:
    """The ids and the mask of transformers."""
    transformers = pytest.importorskip("transformers")
    made = transformers.AutoTokenizer.from_pretrained(str(folder))
    found = made.apply_chat_template(
        messages, chat_template=template, return_assistant_tokens_mask=True, return_dict=True, tokenize=True
    )
    return found["input_ids"], found["assistant_masks"]


def ours(folder: Path, messages: Any, tmp: Path, **more: Any) -> tuple[list[int], list[int]]:
    """The ids, with the one that opens the document, and the targets, as they are packed."""
    (tmp / "chats.jsonl").write_text(json.dumps({"chat": messages}) + "\n")
    fields = {"messages": "chat", "tokenizer": str(folder), "bos": "<s>", "validation": 0, **more}
    stream = streams(Jsonl(paths=str(tmp / "chats.jsonl"), seq_len=2, **fields), None)["train"]
    assert stream.targets is not None and stream.bytes is None
    return stream.tokens.tolist(), stream.targets.tolist()


@pytest.mark.parametrize("messages", CHATS, ids=range(len(CHATS)))
@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_and_targets_are_those_of_transformers(
    tmp_path: Path, folders: dict[str, Path], name: str, messages: Chat
) -> None:
    tagged = TAGS.get(name, TEMPLATES[name])
    # Their template sees the date of today if it asks; ours never does.
    ids, mask = theirs(folders[name], tagged.replace("strftime_now is defined", "false"), messages)
    if not any(mask):  # an empty answer of a template that writes nothing after it
        with pytest.raises(UserError, match="chats without an answer"):
            ours(folders[name], messages, tmp_path)
        return
    opens = ids[0] == 0  # bos is written once, by the template or by us
    assert ours(folders[name], messages, tmp_path) == (ids if opens else [0, *ids], mask if opens else [0, *mask])


@given(
    contents=st.lists(st.text("ab \n<|im_end|>é🙂\ufdd0\ufdd1{}%", max_size=9), min_size=2, max_size=6),
    name=st.sampled_from(list(TEMPLATES)),
)
@settings(max_examples=40, deadline=None)
def test_answers_are_where_they_were_written(folders: dict[str, Path], contents: list[str], name: str) -> None:
    """Without a tokenizer's help: every answer stands in its span, in order, and spans do not overlap."""
    messages = chat(*contents)
    made = chat_template(str(folders[name]), None)
    text, spans = made(messages, "here")
    plain = ChatTemplate(
        TEMPLATES[name].replace("{% generation %}", "").replace("{% endgeneration %}", ""),
        {"bos_token": "<s>", "eos_token": "</s>"},
        SPECIAL,
        "plain",
    )
    assert text == plain(messages, "here")[0]
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    trimmed = name in ("opened", "untagged")
    end, lead = ("</s>", " ") if trimmed else ("<|im_end|>", "")
    assert [text[a:b] for a, b in spans] == [lead + (c.strip() if trimmed else c) + end for c in answers]
    assert all(a < b for a, b in spans) and all(p[1] <= q[0] for p, q in itertools.pairwise(spans))


def test_batches_have_the_mask(tmp_path: Path, folders: dict[str, Path]) -> None:
    made = tokenizers.Tokenizer.from_file(str(folders["tagged"] / "tokenizer.json"))
    with (tmp_path / "chats.jsonl").open("w") as file:
        for n in range(30):
            rows = [*chat(f"question {n}", f"answer {n * n}", "and?", "no"), {"role": "user", "content": None}][:4]
            file.write(json.dumps({"chat": rows}) + "\n")
        file.write(json.dumps({"chat": chat("never answered")}) + "\n" + json.dumps({"chat": None}) + "\n")
    for packing in ("windows", "best-fit", "single"):
        spec = Jsonl(
            paths=str(tmp_path / "chats.jsonl"),
            seq_len=64,
            messages="chat",
            tokenizer=str(folders["tagged"]),
            bos="<s>",
            validation=0.3,
            packing=packing,  # type: ignore[arg-type]
        )
        data = open_data(spec, seed=0, pack_dir=tmp_path / "pack")  # one pack serves every way to fill samples
        assert any("2 chats without an answer" in said for said in data.passed_over)
        targets: list[int] = []
        for split in (data.train, data.validation):
            assert split is not None and split.bytes_per_target is None
            for batch in split.once(4):
                targets += batch["targets"][batch["mask"] > 0].tolist()
        want = [f"answer {n * n}<|im_end|>" for n in range(30)] + ["no<|im_end|>"] * 30
        assert sorted(made.decode([i]) for i in targets) == sorted(
            made.decode([i]) for text in want for i in made.encode(text).ids
        )


def test_messages_in_a_table(tmp_path: Path, folders: dict[str, Path]) -> None:
    """Rows of a table have every field in every message; a field that is null is left out."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"chat": CHATS[4]}, {"chat": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    given = {"seq_len": 2, "messages": "chat", "tokenizer": str(folders["opened"]), "bos": "<s>", "validation": 0}
    stream = streams(Parquet(paths=str(tmp_path / "a.parquet"), **given), None)["train"]
    assert (stream.tokens.tolist(), stream.targets.tolist()) == ours(folders["opened"], CHATS[4], tmp_path)  # type: ignore[union-attr]


def test_bytes_need_a_template_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}")
    (tmp_path / "a.jsonl").write_text(json.dumps({"c": chat("é?", "ü!", "x", "y")}))
    spec = Jsonl(
        paths=str(tmp_path / "a.jsonl"), seq_len=2, messages="c", chat_template=str(tmp_path / "t.jinja"), validation=0
    )
    stream = streams(spec, None)["train"]
    text = bytes(stream.tokens.tolist())
    assert text == b"\0" + "u:é?\na:ü!\nu:x\na:y\n".encode() and stream.targets is not None
    # Nothing but the role tells where an answer begins, so the name of the role is one of its targets.
    assert bytes(stream.tokens[np.flatnonzero(stream.targets)].tolist()) == "a:ü!\na:y\n".encode()


def test_an_export_has_the_template_of_the_training(tmp_path: Path, folders: dict[str, Path]) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "mine.jinja").write_text("{% for m in messages %}{{ m.content }};{% endfor %}")
    given = {"paths": "x", "seq_len": 2, "messages": "c", "tokenizer": str(folders["plain"]), "bos": "<s>"}
    for more, text in (({}, None), ({"chat_template": str(tmp_path / "mine.jinja")}, "a question;an answer;")):
        out = tmp_path / f"out-{len(more)}"
        out.mkdir()
        _, names = written(Jsonl(**given, **more), out)
        assert set(names) == {path.name for path in out.iterdir()} and len(names) == len(set(names))
        made = transformers.AutoTokenizer.from_pretrained(str(out))
        want = text or chat_template(str(folders["plain"]), None)(CHATS[0], "")[0]
        assert made.apply_chat_template(CHATS[0], tokenize=False) == want


THINKING = """\
{%- for m in messages %}
{%- if m.role == 'assistant' and not loop.last %}{{ 'A:' + m.content.split('</think>')[-1] }}
{%- else %}{{ m.role[0] + ':' + m.content }}{% endif %}
{%- endfor %}"""


@pytest.mark.parametrize(
    ("template", "messages", "said"),
    [
        ("{{ x", CHATS[0], "expected a Jinja template that renders, got TemplateSyntaxError"),
        ("{% generation %}", CHATS[0], "TemplateSyntaxError.*endgeneration"),
        (
            "{{ raise_exception('roles must alternate') }}",
            CHATS[0],
            "a chat that .* accepts, got its refusal: roles must alt",
        ),
        ("{{ messages[9].content }}", CHATS[0], "UndefinedError"),
        ("{{ strftime_now('%d') }}", CHATS[0], "'strftime_now' is undefined"),
        ("{{ messages.append(1) }}", CHATS[0], "SecurityError"),
        ("{{ ''.__class__.__mro__ }}", CHATS[0], "SecurityError|is unsafe"),
        (THINKING, chat("q", "hm</think>a", "q", "b"), "another text for the messages before message 1.*generation %"),
        (TAGGED, "no list", "field 'chat': expected a list of messages, .* got str"),
        (TAGGED, [{"from": "human", "value": "x"}], "got one with from, value"),
        (TAGGED, ["x"], "got str"),
        (TAGGED, [{"role": "user", "content": "\ud800"}], "UTF-8 can encode"),
        (None, CHATS[0], "expected a chat template: chat_template.jinja beside it"),
        ("nowhere", CHATS[0], "a file of text that can be read"),
        ("no tokenizer", CHATS[0], "expected a tokenizer.json or a folder that has one, got no such file"),
    ],
)
def test_bad_chats_end_in_one_paragraph(
    tmp_path: Path, folders: dict[str, Path], template: str | None, messages: Any, said: str
) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes((folders["plain"] / "tokenizer.json").read_bytes())
    more = {}
    if template == "nowhere":
        more["chat_template"] = str(tmp_path / "nowhere")
    elif template == "no tokenizer":
        folder.rename(tmp_path / "elsewhere")
    elif template is not None:
        (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match=said) as caught:
        ours(folder, messages, tmp_path, **more)
    assert "\n" not in str(caught.value)
