"""Continue prompts with a trained model: a run, a checkpoint, or a folder of transformers.

Texts are encoded by the tokenizer of the run, and end where the model opens another document. The cache of keys and
values needs nothing of the model but a method predict(ops, batch) that returns logits. If something else than
attention connects positions (a convolution, a recurrence), a line says so, and every token runs the model on the whole
text. A draw depends on the seed, the number of the prompt and the position alone, so it is the same on jax and torch.

examples:
  portatrain sample runs/first --prompt "def " --prompt "class "
  portatrain sample first --prompts prompts.jsonl --max-tokens 200 --temperature 0.9 --top-p 0.95
  portatrain sample exported --ids 5,6,7 --temperature 0 --backend torch --json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portatrain.commands import options, trained_model
from portatrain.errors import UserError
from portatrain.system import json_files
from portatrain.system.text import counted

if TYPE_CHECKING:
    from portatrain.training.generation import Progress
    from portatrain.training.trained import Generated, TrainedModel

Prompt = str | list[int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    trained_model.add_arguments(parser)
    parser.add_argument(
        "--prompt", metavar="TEXT", action="append", default=[], help="a text to continue; repeat it for several"
    )
    parser.add_argument(
        "--ids", metavar="N,N", action="append", default=[], help="token ids to continue, taken as they are"
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="a file with a prompt in every line, or .jsonl with objects that have 'prompt'; - is standard input",
    )
    parser.add_argument("--max-tokens", metavar="N", type=int, default=100, help="tokens to add at most (100)")
    parser.add_argument(
        "--temperature", metavar="T", type=float, default=0.7, help="0 takes the likeliest token every time (0.7)"
    )
    parser.add_argument(
        "--top-p", metavar="P", type=float, default=1.0, help="draw from the likeliest tokens that reach P (1)"
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="seed of the draws (0)")
    parser.add_argument("--rows", metavar="N", type=int, default=8, help="texts that are continued together (8)")
    parser.add_argument("--no-cache", action="store_true", help="run the model on the whole text for every token")
    parser.add_argument("--json", action="store_true", help="print one JSON object a text")


def run(args: argparse.Namespace) -> int:
    options.positive("--max-tokens", args.max_tokens)
    options.positive("--rows", args.rows)
    prompts = _prompts(args)
    path = trained_model.where(args)
    model = trained_model.loaded(args, path)
    if not prompts:
        if not model.texts.opens:
            raise UserError(
                "portatrain sample", expected="a prompt", got="none", do="Give --prompt, --ids or --prompts."
            )
        prompts = [""]
    ids = [p if isinstance(p, list) else model.texts.ids(p, f"prompt {n}") for n, p in enumerate(prompts)]
    if not args.no_cache and model.recomputes:
        print(f"no cache: {model.recomputes}; every token runs the model on the whole text", file=sys.stderr)
    told, last = trained_model.Told(), {}

    def progress(now: Progress) -> None:
        last["progress"] = now
        told(lambda: f"{now.texts} of {counted(len(ids), 'texts')}, {counted(now.tokens, 'tokens')}{_speed(now)}")

    found = model.generate(
        ids,
        args.max_tokens,
        args.temperature,
        args.top_p,
        args.seed,
        rows=args.rows,
        cache=not args.no_cache,
        progress=progress,
    )
    for prompt, text in zip(prompts, found, strict=True):
        print(json.dumps(_as_json(prompt, text, model)) if args.json else _as_text(prompt, text, len(found)))
    now = last["progress"]
    print(f"{counted(now.tokens, 'tokens')}, step {model.step}, {model.backend}{_speed(now)}", file=sys.stderr)
    return 0


def _speed(now: Progress) -> str:
    speed = now.tokens_per_s
    return "" if speed is None else f", {speed:,.0f} tokens/s after the first two"


def _as_json(prompt: Prompt, text: Generated, model: TrainedModel) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "text": text.text,
        "prompt_ids": list(text.prompt),
        "ids": list(text.tokens),
        "stopped": text.stopped,
        "step": model.step,
        "backend": model.backend,
    }


def _as_text(prompt: Prompt, text: Generated, count: int) -> str:
    if text.text is None or isinstance(prompt, list):
        ids = ",".join(map(str, text.tokens))
        return ids if text.text is None else f"{ids}\n{text.text}"
    return f"{prompt}{text.text}" + ("\n---" if count > 1 else "")


def _prompts(args: argparse.Namespace) -> list[Prompt]:
    found: list[Prompt] = [*args.prompt, *map(_ids, args.ids)]
    if args.prompts is None:
        return found
    what = f"--prompts {args.prompts}"
    try:
        text = sys.stdin.read() if args.prompts == "-" else Path(args.prompts).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(what, expected="a text file", got=str(error), do="Check the path.") from error
    lines = [line for line in text.splitlines() if line.strip()]
    if not args.prompts.endswith(".jsonl"):
        return [*found, *lines]
    for number, line in enumerate(lines, start=1):
        try:
            prompt = json_files.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError) as error:
            raise _no_prompt(f"{what}: line {number}", f"{type(error).__name__}: {error}") from error
        if not isinstance(prompt, str):
            raise _no_prompt(f"{what}: line {number}", repr(prompt))
        found.append(prompt)
    return found


def _no_prompt(what: str, got: str) -> UserError:
    return UserError(what, expected='an object such as {"prompt": "def "}', got=got, do="Write one a line.")


def _ids(text: str) -> list[int]:
    try:
        ids = [int(part) for part in text.split(",")]
    except ValueError:
        ids = [-1]
    if min(ids) < 0:
        raise UserError("--ids", expected="token ids with commas, such as 5,6,7", got=text, do="Correct them.")
    return ids
