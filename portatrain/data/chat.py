"""Chats as text: messages rendered by a tokenizer's own chat template, and where in the text the answers are.

Templates are written for transformers, so they run as there (`apply_chat_template`): Jinja in a sandbox, with the
special tokens by name, `messages` and `add_generation_prompt`; `raise_exception` and the filter `tojson` are the same.
The time is not given (`strftime_now`), because a corpus must not depend on the day; templates that ask whether it is
defined then use a date of their own.

The answers are what stands between ``{% generation %}`` and ``{% endgeneration %}``. In a template without these, the
answer of a message of the role `assistant` is what rendering appends for it: from the end of the chat before it, with
the prompt for an answer, to the end of the chat with it. White space after the special token that ends it is left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portatrain.data.spec import DataSpec, Preferences
from portatrain.errors import UserError, of_reading
from portatrain.system import json_files
from portatrain.system.paths import expand

if TYPE_CHECKING:
    from portatrain.data.encode import Encoding

Span = tuple[int, int]
ROLE = "assistant"
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MARKS = [chr(c) for c in range(0xFDD0, 0xFDF0)]
"""Characters that no text is meant to have (Unicode 23.7); two that a chat lacks mark its answers as it is rendered."""


class ChatTemplate:
    """A function from messages to (text, answers). name: how messages call the template."""

    def __init__(self, source: str, special: Mapping[str, str], ends: Sequence[str], name: str) -> None:
        self._name, self._special, self._ends = name, special, tuple(ends)
        jinja2 = jinja_module(name)
        try:
            made = environment(jinja2.Undefined, tags=True)
            self._template = made.from_string(source)
            self._marked = re.search(r"{%[-+]?\s*generation\s*[-+]?%}", source) is not None
        except jinja2.TemplateError as error:
            raise failed(name, error, source) from error

    def __call__(self, messages: Any, where: str) -> tuple[str, list[Span]]:
        """Return the text of a chat and the spans of its answers in characters. Raises UserError if it has none."""
        chat = _checked(messages, where)
        if not self._marked:
            return self._by_role(chat, where)
        held = json.dumps(chat, ensure_ascii=False, default=str)
        left, right = [mark for mark in MARKS if mark not in held][:2]
        text, spans, at = [], [], 0
        for part in self._render(chat, where, marks=(left, right)).split(left):
            answer, found, rest = part.partition(right)
            if found:
                spans.append((at, at + len(answer)))
            text.append(answer + rest)
            at += len(answer) + len(rest)
        return "".join(text), [span for span in spans if span[0] < span[1]]

    def _by_role(self, chat: list[dict[str, Any]], where: str) -> tuple[str, list[Span]]:
        whole, spans = self._render(chat, where), []
        for i, message in enumerate(chat):
            if message["role"] != ROLE:
                continue
            before = self._render(chat[:i], where, add_generation_prompt=True) if i else ""
            after = self._render(chat[: i + 1], where)
            if not (after.startswith(before) and whole.startswith(after)):
                raise UserError(
                    self._name,
                    expected="a template that marks its answers by {% generation %}, or one that only appends",
                    got=f"another text for the messages before message {i} of {where} once later ones follow",
                    do="Copy the template, put {% generation %} and {% endgeneration %} around its answers, and name "
                    "the copy by chat_template.",
                )
            end = len(after.rstrip())
            spans.append((len(before), end if after[:end].endswith(self._ends) else len(after)))
        return whole, [span for span in spans if span[0] < span[1]]

    def _render(
        self, chat: list[dict[str, Any]], where: str, *, marks: tuple[str, str] | None = None, **more: object
    ) -> str:
        given = {"add_generation_prompt": False, **more, "portatrain_marks": marks}
        try:
            return str(self._template.render(messages=chat, **self._special, **given))
        except Exception as error:  # a template is a program: it may fail in any way
            if type(error) is jinja_module(self._name).TemplateError:  # it calls raise_exception
                raise UserError(
                    where,
                    expected=f"a chat that {_bare(self._name)} accepts",
                    got=f"its refusal: {error}",
                    do="Correct the chat; or change a copy of the template, and name the copy by chat_template.",
                ) from error
            raise failed(f"{self._name} on {where}", error, "") from error


def _bare(name: str) -> str:
    return name if name.startswith("the ") else f"the {name}"


def _checked(messages: Any, where: str) -> list[dict[str, Any]]:
    """Return messages without fields that are null, as rows of a table have them. Raises UserError for what is none."""
    ok = isinstance(messages, list) and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages)
    if not ok:
        got = type(messages).__name__
        if isinstance(messages, list):
            bad = next(m for m in messages if not (isinstance(m, dict) and isinstance(m.get("role"), str)))
            got = f"one with {', '.join(map(str, bad)) or 'nothing'}" if isinstance(bad, dict) else type(bad).__name__
        raise UserError(
            where,
            expected="a list of messages, each an object with role and content",
            got=got,
            do="Name the field that holds the messages, or write them in this form.",
        )
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def chat_template(tokenizer: str | None, path: str | None) -> ChatTemplate:
    """Return the chat template in the file ``path``, or else the tokenizer's. Raises UserError if there is none."""
    folder = None
    if tokenizer is not None:
        file = expand(tokenizer)
        if not file.exists():
            raise UserError(
                f"tokenizer {tokenizer}",
                expected="a tokenizer.json or a folder that has one",
                got="no such file or folder",
                do="Check the path; relative paths start at the working directory.",
            )
        folder = file if file.is_dir() else file.parent
    config = _config(folder / "tokenizer_config.json") if folder else {}
    special = {name: _content(config[name]) for name in SPECIAL if config.get(name) is not None}
    ends = sorted({*special.values(), *_special_tokens(folder)})
    if path is not None:
        return ChatTemplate(_text(expand(path)), special, ends, f"chat template {path}")
    if folder is not None:
        file = folder / "chat_template.jinja"
        if file.is_file():
            return ChatTemplate(_text(file), special, ends, f"chat template {file}")
        found = config.get("chat_template")
        if isinstance(found, list):  # several templates by name
            found = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}.get("default")
        if isinstance(found, str):
            return ChatTemplate(found, special, ends, f"chat template of {tokenizer}")
    raise UserError(
        f"tokenizer {tokenizer}" if tokenizer else "chat template",
        expected="a chat template: chat_template.jinja beside it, or chat_template in tokenizer_config.json",
        got="none" if tokenizer else "neither a tokenizer nor chat_template",
        do="Copy it there from the model's repository, or name a file of yours by chat_template.",
    )


def ending(spec: DataSpec, encode: Encoding) -> int | None:
    """Return the id that ends an answer, that of the eos_token beside the tokenizer of a source of chats; None if there
    is none, or if it is no such source."""
    path = getattr(spec, "tokenizer", None)
    if path is None or not (isinstance(spec, Preferences) or getattr(spec, "messages", None)):
        return None
    file = expand(path)
    token = _config((file if file.is_dir() else file.parent) / "tokenizer_config.json").get("eos_token")
    ids = [] if token is None else encode(_content(token).encode(), f"eos_token of {path}").tolist()
    return int(ids[0]) if len(ids) == 1 else None


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json_files.loads(_text(path))
    except ValueError as error:
        raise UserError(
            f"data file {path}",
            expected="a JSON object",
            got=str(error),
            do="Copy it again from the model's repository.",
        ) from error
    return found if isinstance(found, dict) else {}


def _special_tokens(folder: Path | None) -> list[str]:
    found = _config(folder / "tokenizer.json").get("added_tokens") if folder else None
    rows = found if isinstance(found, list) else []
    contents = [one.get("content") for one in rows if isinstance(one, dict) and one.get("special")]
    return [content for content in contents if content and isinstance(content, str)]


def _content(token: Any) -> str:
    return str(token.get("content", "")) if isinstance(token, dict) else str(token)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise of_reading(error)(
            f"data file {path}", expected="a file of text that can be read", got=str(error), do="Check the path."
        ) from error


def jinja_module(what: str) -> Any:
    """Return jinja2. Raises UserError if it is not installed."""
    try:
        import jinja2
        import jinja2.ext
        import jinja2.meta
        import jinja2.nodes
        import jinja2.sandbox
    except ImportError as error:
        raise UserError(
            what, expected="the package jinja2", got="none", do="Run: pip install 'portatrain[data]'"
        ) from error
    return jinja2


def failed(what: str, error: Exception, source: str) -> UserError:
    """Return the error for a template that fails. source: the template, or the fields that it could use."""
    line = getattr(error, "lineno", None)
    got = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return UserError(
        what,
        expected="a Jinja template that renders",
        got=f"{got} (line {line})" if line else got,
        do=f"Correct it. It has {source!r}." if source and len(source) < 200 else "Correct it.",
    )


def environment(undefined: type, *, tags: bool = False, finalize: Callable[[Any], Any] | None = None) -> Any:
    """Return the sandbox in which templates run, with the tag {% generation %} if ``tags``."""
    jinja2 = jinja_module("a template")

    class Generation(jinja2.ext.Extension):  # type: ignore[name-defined]
        """The tag around an answer."""

        tags = {"generation"}  # noqa: RUF012  # as jinja2 declares it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            marks = jinja2.nodes.ContextReference()
            return jinja2.nodes.CallBlock(self.call_method("_marked", [marks]), [], [], body).set_lineno(line)

        def _marked(self, context: Any, caller: Any) -> str:
            marks = context.get("portatrain_marks")
            return f"{marks[0]}{caller()}{marks[1]}" if marks else str(caller())

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=tags,
        lstrip_blocks=tags,
        keep_trailing_newline=not tags,
        undefined=undefined,
        finalize=finalize,
        extensions=[Generation, jinja2.ext.loopcontrols] if tags else [],
    )
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    return made
