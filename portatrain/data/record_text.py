"""What a document is: one field of a record, a template over its fields, or a chat of messages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from portatrain.data.chat import ChatTemplate, Span, chat_template, environment, failed, jinja_module
from portatrain.data.spec import ArrayRecords, _Records
from portatrain.errors import UserError, choice


@dataclass(frozen=True)
class Made:
    """The text of a document. answers: where the targets are, in characters; None if all of it are."""

    text: bytes
    answers: list[Span] | None = None


class Make(Protocol):
    """A function from a record to its document; None if there is no text, as of a null. ``where`` names the record.

    fields: the fields that it reads; () if the record itself is the text. masked: True if parts of a text are targets.
    """

    @property
    def fields(self) -> tuple[str, ...]: ...

    @property
    def masked(self) -> bool: ...

    def __call__(self, record: Any, where: str) -> Made | None: ...


def maker(spec: _Records) -> Make:
    """Return the function that makes the documents of ``spec``. Raises UserError for fields that contradict others."""
    kind = type(spec).__name__
    if spec.template is not None and spec.messages is not None:
        raise UserError(
            f"{kind} template and messages",
            expected="one of them",
            got="both",
            do="Leave one out: a chat is rendered by the chat template of the tokenizer, or by chat_template.",
        )
    if spec.messages is not None:
        return Chat(spec.messages, chat_template(spec.tokenizer, spec.chat_template))
    if spec.chat_template is not None:
        raise UserError(
            f"{kind} chat_template",
            expected="None, since documents are no chats",
            got=spec.chat_template,
            do="Name the field with the messages (messages=), or leave chat_template out.",
        )
    if spec.template is not None:
        return Template(spec.template, kind)
    if not spec.field and isinstance(spec, ArrayRecords):
        return Whole()
    return Field(spec.field)


class Whole:
    """The record itself is the text."""

    fields: tuple[str, ...] = ()
    masked = False

    def __call__(self, record: Any, where: str) -> Made | None:
        return Made(record)


class Field:
    """The text is in one field."""

    masked = False

    def __init__(self, name: str) -> None:
        self.fields = (name,)

    def __call__(self, record: Any, where: str) -> Made | None:
        (name,) = self.fields
        value = the(_object(record, where), name, where)
        if value is None:
            return None
        if not isinstance(value, (str, bytes)):
            raise UserError(
                f"{where}, field {name!r}",
                expected="a string",
                got=type(value).__name__,
                do="Name the field that holds the text, or give a template over the fields.",
            )
        return Made(value if isinstance(value, bytes) else encoded(value, f"{where}, field {name!r}"))


class Template:
    """The text is rendered by a template, in which a field that is absent or null is a mistake."""

    masked = False

    def __init__(self, source: str, kind: str) -> None:
        jinja2 = jinja_module(f"{kind} template")
        made = environment(jinja2.StrictUndefined, finalize=_not_null)
        what = f"{kind} template"
        try:
            self._template = made.from_string(source)
            self.fields = tuple(sorted(jinja2.meta.find_undeclared_variables(made.parse(source))))
        except jinja2.TemplateError as error:
            raise failed(what, error, source) from error
        if not self.fields:
            raise UserError(
                what,
                expected="a template over the fields of a record, such as '{{ title }}: {{ text }}'",
                got=f"{source!r}, which has no field",
                do="Write the names of fields in double braces.",
            )

    def __call__(self, record: Any, where: str) -> Made | None:
        try:
            text = self._template.render(_object(record, where))
        except UserError:
            raise
        except Exception as error:  # a template is a program: it may fail in any way
            raise failed(f"the template on {where}", error, ", ".join(map(str, record))) from error
        return Made(encoded(text, where)) if text else None


class Chat:
    """The text is a chat, rendered by a chat template; the answers in it are the targets."""

    masked = True

    def __init__(self, name: str, template: ChatTemplate) -> None:
        self.fields, self._template = (name,), template

    def __call__(self, record: Any, where: str) -> Made | None:
        (name,) = self.fields
        messages = the(_object(record, where), name, where)
        where = f"{where}, field {name!r}"
        if messages is None or messages == []:
            return None
        text, answers = self._template(messages, where)
        return Made(encoded(text, where), answers)


class Pair:
    """Two chats of which one was preferred. A side is a list of messages, or with a prompt also the text of an answer;
    the prompt is a list of messages, or the text of one message of the user."""

    def __init__(self, chosen: str, rejected: str, prompt: str | None, template: ChatTemplate) -> None:
        self._sides, self._prompt, self._template = (chosen, rejected), prompt, template
        self.fields = (*self._sides, *(() if prompt is None else (prompt,)))

    def __call__(self, record: Any, where: str) -> tuple[Made, Made]:
        """Return the chosen and the rejected chat; an answer that both have at the same place is not one of theirs.

        Raises UserError for a record that lacks a side or the prompt, and for what is not a chat.
        """
        held = _object(record, where)
        before = [] if self._prompt is None else self._messages(held, self._prompt, where, "user")
        (one, ours), (other, theirs) = (
            self._template([*before, *self._messages(held, name, where, "assistant")], f"{where}, field {name!r}")
            for name in self._sides
        )
        same = {span for span in {*ours} & {*theirs} if one[: span[1]] == other[: span[1]]}
        made = [
            Made(encoded(text, where), [s for s in spans if s not in same])
            for text, spans in ((one, ours), (other, theirs))
        ]
        return made[0], made[1]

    def _messages(self, record: Mapping[str, Any], name: str, where: str, role: str) -> list[Any]:
        found = record.get(name)
        if isinstance(found, str) and found and self._prompt is not None:
            return [{"role": role, "content": found}]
        if isinstance(found, list) and found:
            return found
        there = f"no such field, only {', '.join(map(str, record)) or 'an empty object'}"
        nothing = "nothing" if found is None or found in ("", []) else type(found).__name__
        raise UserError(
            f"{where}, field {name!r}",
            expected=f"a list of messages{'' if self._prompt is None else ', or a text'}, since a pair has two sides",
            got=nothing if name in record else there,
            do="If it is the text of one answer, name the field of its question: prompt='prompt'."
            if isinstance(found, str) and found
            else "Write what is missing, remove the record, or name the fields by chosen, rejected and prompt.",
        )


def the(record: Mapping[str, Any], name: str, where: str) -> Any:
    """Return a field. Raises UserError if the record does not have it."""
    if name not in record:
        raise choice(f"{where}, field", name, map(str, record))
    return record[name]


def encoded(text: str, where: str) -> bytes:
    """Return a text in UTF-8. Raises UserError for one that has no such form."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            where,
            expected="text that UTF-8 can encode",
            got=str(error),
            do="Correct its escapes: a lone surrogate is not a character.",
        ) from error


def _object(record: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(record, Mapping):
        raise UserError(where, expected="one JSON object", got=type(record).__name__, do="Correct or delete it.")
    return record


def _not_null(value: Any) -> Any:
    if value is None:
        raise ValueError("a field that is null; write {{ name or '' }} if it may be")
    if isinstance(value, bytes):
        raise TypeError("a field of bytes, which is no text")
    return value
