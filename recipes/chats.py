"""Write a small set of chats, for tiny-chat and tiny-dpo: questions after sums, with a tokenizer and a chat template.

    python -m recipes.chats chats

writes chats/chats.jsonl (chats of one to three questions), chats/pairs.jsonl (a right and a wrong answer to each
question) and the folder chats/tokenizer. A token is a byte, or one of three special tokens, so nothing is learned for
the tokenizer. The sets are the same wherever they are written.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from portatrain.errors import UserError

TEXT, START, END = SPECIAL = ("<|text|>", "<|im_start|>", "<|im_end|>")
"""The tokens that open a document, and open and end a message."""
VOCAB = 264
"""Rows of a table for these tokens: 256 bytes and `SPECIAL`, rounded up to a multiple of 8."""
TEMPLATE = """\
{%- for m in messages %}
    {%- if m.role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('a message of the role ' + m.role + '; roles are system, user and assistant') }}
    {%- endif %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.role == 'assistant' %}
        {%- generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}
    {%- else %}
        {{- m.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
ASKED = ("What is {a} + {b}?", "{a} + {b} = ?", "Please add {a} and {b}.")
SYSTEM = {"role": "system", "content": "You add numbers."}


def turn(a: int, b: int, asked: str) -> list[dict[str, str]]:
    """Return a question after a sum, and its answer."""
    answer = f"{a} + {b} = {a + b}"
    return [{"role": "user", "content": asked.format(a=a, b=b)}, {"role": "assistant", "content": answer}]


def chats(count: int = 600) -> list[list[dict[str, str]]]:
    """Return chats of one to three questions, some of them after a message of the system."""
    draw = random.Random(0)
    made = []
    for _ in range(count):
        turns = [turn(draw.randrange(20), draw.randrange(20), draw.choice(ASKED)) for _ in range(draw.randint(1, 3))]
        made.append([*([SYSTEM] if draw.random() < 0.3 else []), *itertools.chain(*turns)])
    return made


def pairs(count: int = 400) -> list[dict[str, Any]]:
    """Return questions with the right answer and one that is wrong, or none."""
    draw = random.Random(1)
    made = []
    for _ in range(count):
        a, b = draw.randrange(20), draw.randrange(20)
        asked, right = turn(a, b, draw.choice(ASKED))
        wrong = draw.choice((f"{a} + {b} = {a + b + draw.choice((-1, 1, 10))}", "I do not know."))
        made.append({"chosen": [asked, right], "rejected": [asked, {"role": "assistant", "content": wrong}]})
    return made


def write(folder: Path) -> None:
    """Write the sets, the tokenizer and its template into `folder`."""
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir(parents=True, exist_ok=True)
    _tokenizer().save(str(tokenizer / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": TEXT, "eos_token": END}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    (tokenizer / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    for name, rows in (("chats", [{"messages": chat} for chat in chats()]), ("pairs", pairs())):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def _tokenizer() -> Any:
    try:
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    except ImportError as error:
        raise UserError(
            "recipes.chats", expected="the package tokenizers", got="none", do="Run: pip install 'portatrain[data]'"
        ) from error
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={symbol: number for number, symbol in enumerate(symbols)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return made


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m recipes.chats", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the folder to write into")
    folder = parser.parse_args(words).folder
    write(folder)
    print(f"{folder}: chats.jsonl, pairs.jsonl, tokenizer")


if __name__ == "__main__":
    main()
