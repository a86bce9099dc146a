"""Pieces of a reference page: docstrings as Markdown, tables of fields, signatures, blocks of code."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

NOTE = "Written by `python -m docs.tools.reference --write`; edit the docstrings, not this page."


def exported(module_name: str) -> list[str]:
    """Return the public names of a module: its `__all__`, or what it re-exports as `X as X`."""
    module = importlib.import_module(module_name)
    if hasattr(module, "__all__"):
        return list(module.__all__)
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    names = [a.asname for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for a in node.names]
    return [name for name in names if name is not None]


def docstring(thing: Any) -> str:
    """Return the docstring as Markdown: what a colon pair opens is an indented block there too."""
    text = inspect.getdoc(thing) or ""
    lines = []
    for line in text.split("\n"):
        bare = line.strip()
        if bare.startswith(("bf16:", "Example:")):
            lines.append("")
        lines.append(line.rstrip()[:-1] if bare.endswith("::") else line.rstrip())
    found = "\n".join(lines).replace("``", "`")
    for title in ("Args", "Raises", "Attributes"):
        found = found.replace(f"\n{title}:\n", f"\n**{title}**\n\n").replace(f"\n\n\n**{title}", f"\n\n**{title}")
    return _lists(found)


def _lists(text: str) -> str:
    """Turn the indented entries below **Args**, **Raises** and **Attributes** into list items."""
    out: list[str] = []
    inside = False
    for line in text.split("\n"):
        if line in ("**Args**", "**Raises**", "**Attributes**"):
            inside = True
        elif inside and line and not line.startswith(" "):
            inside = False
        if inside and line.startswith("    "):
            name, colon, rest = line.strip().partition(": ")
            deeper = line.startswith("        ")
            line = f"  {line.strip()}" if deeper else f"- `{name}`: {rest}" if colon else f"- {line.strip()}"
        out.append(line)
    return "\n".join(out)


def cell(text: str) -> str:
    """Return text that may stand in a cell of a table."""
    return " ".join(text.replace("``", "`").split()).replace(" | ", " or ").replace("|", " or ")


def field_docs(cls: type) -> dict[str, str]:
    """Return what the source says of each annotated name: the string after it, or the comment behind it."""
    source = inspect.getsource(cls)
    lines = source.split("\n")
    found: dict[str, str] = {}
    body = ast.parse(textwrap.dedent(source)).body[0]
    assert isinstance(body, ast.ClassDef)
    for node, after in zip(body.body, [*body.body[1:], None], strict=True):
        # A member of an enumeration is assigned without an annotation.
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if not isinstance(target, ast.Name):
            continue
        said = ""
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
            said = after.value.value
        elif "  # " in lines[node.lineno - 1]:
            said = lines[node.lineno - 1].split("  # ", 1)[1]
        found[target.id] = said
    return found


def annotations(cls: type) -> dict[str, str]:
    """Return the annotation of each field as it stands in the source, those of base classes first."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        for name, text in vars(base).get("__annotations__", {}).items():
            found[name] = text if isinstance(text, str) else getattr(text, "__name__", str(text))
    return found


def default_of(field: dataclasses.Field[Any]) -> str:
    """Return a field's default as Python, or a dash for a field that must be given."""
    if field.default is not dataclasses.MISSING:
        return f"`{field.default!r}`"
    if field.default_factory is not dataclasses.MISSING:
        return f"`{field.default_factory()!r}`"
    return "(required)"


def listed(text: str) -> dict[str, str]:
    """Return name -> meaning of the items "- `name`: meaning" in a docstring."""
    found = re.findall(r"^- `+(\w+)`+: (.*(?:\n  .*)*)", inspect.cleandoc(text), flags=re.MULTILINE)
    return {name: meaning[:1].upper() + meaning[1:] for name, meaning in found}


def fields_table(
    cls: Any, example: Callable[[str], str] | None = None, *, shared: Mapping[str, str] | None = None
) -> list[str]:
    """Return the table of a dataclass's fields. `shared` has the meanings of fields that the class does not explain."""
    if not dataclasses.fields(cls):
        return ["It has no fields."]
    docs: dict[str, str] = dict(shared or {})
    for base in reversed(cls.__mro__[:-1]):
        if dataclasses.is_dataclass(base):
            docs |= {name: said for name, said in field_docs(base).items() if said}
    types = annotations(cls)
    head = ["field", "type", "default", "meaning", *(["example"] if example else [])]
    rows = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for field in dataclasses.fields(cls):
        cells = [
            f"`{field.name}`",
            f"`{cell(types[field.name])}`",
            cell(default_of(field)),
            cell(docs.get(field.name, "")),
        ]
        cells += [example(field.name)] if example else []
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def signature(function: Any, name: str = "") -> str:
    """Return `name(arguments) -> result`, one argument a line if it is long."""
    found = inspect.signature(function)
    arguments: list[str] = []
    kinds, positional = inspect.Parameter, False
    for parameter in found.parameters.values():
        if parameter.name == "self":
            continue
        if arguments and parameter.kind is not kinds.POSITIONAL_ONLY and positional:
            arguments.append("/")
        positional = parameter.kind is kinds.POSITIONAL_ONLY
        stars = {kinds.VAR_POSITIONAL: "*", kinds.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        if parameter.kind is kinds.KEYWORD_ONLY and not any(a.startswith("*") for a in arguments):
            arguments.append("*")
        about = "" if parameter.annotation is kinds.empty else f": {_annotation(parameter.annotation)}"
        default = ""
        if parameter.default is not kinds.empty:
            text = repr(parameter.default)
            default = f"{' = ' if about else '='}{'...' if text.startswith('<') else text}"
        arguments.append(f"{stars}{parameter.name}{about}{default}")
    if positional:
        arguments.append("/")
    result = found.return_annotation
    after = "" if inspect.isclass(function) or result is found.empty else f" -> {_annotation(result)}"
    first = f"{name or function.__name__}("
    whole = f"{first}{', '.join(arguments)}){after}"
    if len(whole) <= 100:
        return whole
    return "\n".join([first, *(f"    {argument}," for argument in arguments), f"){after}"])


def _annotation(annotation: Any) -> str:
    """Return an annotation as it stands in the source, without the quotes around a forward reference."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return text.strip("'\"") if text[:1] in "'\"" else text


def page(title: str, *parts: str) -> str:
    """Return a page that begins with its title and the note."""
    return "\n\n".join([f"# {title}", NOTE, *(part.strip("\n") for part in parts if part)]) + "\n"


def code(text: str, language: str = "python") -> str:
    return f"```{language}\n{text}\n```"


def subclasses(base: type, module: Any) -> list[Any]:
    """Return the classes of a module that derive from `base`, in the order of the file."""
    return [c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, base) and c is not base]


def methods_of(cls: type) -> Iterator[str]:
    """Yield a section for each public method and property."""
    for name, member in vars(cls).items():
        if name.startswith("_"):
            continue
        if isinstance(member, property):
            yield f"### `{name}`\n\n{docstring(member)}"
        elif callable(member) or isinstance(member, (staticmethod, classmethod)):
            function = getattr(cls, name)
            yield f"### `{name}`\n\n{code(signature(function), 'text')}\n\n{docstring(function)}"
