"""Write the pages of docs/reference from the code's signatures, annotations and docstrings.

    python -m docs.tools.reference             # exit code 1 if a page is old
    python -m docs.tools.reference --write

What the code says is not written a second time by hand; the examples are in docs/tools/examples.py.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from docs.tools import examples

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "reference"
NOTE = "Written by `python -m docs.tools.reference --write`; edit the docstrings, not this page."

PUBLIC = {
    "portatrain": "What a recipe and a model are written with.",
    "portatrain.data": "Data specs, and opening them.",
    "portatrain.optim": "Optimizer rules and schedules.",
    "portatrain.model.layers": "Layers to put a model together from.",
    "portatrain.recipe": "Recipes: load one, change one.",
    "portatrain.training.metrics": "Records of a run, and the sinks that take them.",
}
"""Modules whose exported names are the public surface."""


def exported(module_name: str) -> list[str]:
    """Return the public names of a module: its `__all__`, or what it re-exports as `X as X`."""
    module = importlib.import_module(module_name)
    if hasattr(module, "__all__"):
        return list(module.__all__)
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    names = [a.asname for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for a in node.names]
    return [name for name in names if name is not None]


# ---- pieces of a page


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
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        said = ""
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
            said = after.value.value
        elif "  # " in lines[node.lineno - 1]:
            said = lines[node.lineno - 1].split("  # ", 1)[1]
        found[node.target.id] = said
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


def fields_table(cls: Any, example: Callable[[str], str] | None = None) -> list[str]:
    """Return the table of a dataclass's fields."""
    if not dataclasses.fields(cls):
        return ["It has no fields."]
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        if dataclasses.is_dataclass(base):
            docs |= field_docs(base)
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
    """Return `name(arguments) -> result`, wrapped where it is long."""
    text = str(inspect.signature(function)).replace("'", "")
    text = text.replace("(self, ", "(").replace("(self)", "()")
    whole = f"{name or function.__name__}{text}"
    return whole if len(whole) <= 100 else whole.replace("(", "(\n    ", 1).replace(", ", ",\n    ")


def page(title: str, *parts: str) -> str:
    """Return a page that begins with its title and the note."""
    return "\n\n".join([f"# {title}", NOTE, *(part.strip("\n") for part in parts if part)]) + "\n"


def code(text: str, language: str = "python") -> str:
    return f"```{language}\n{text}\n```"


# ---- the pages


def recipe_page() -> str:
    from portatrain.recipe import Recipe

    def example(name: str) -> str:
        if name in examples.RECIPE_PYTHON:
            return f"`{examples.RECIPE_PYTHON[name]}`"
        return " ".join(f"`--set '{word}'`" for word in examples.RECIPE[name].split())

    return page(
        "Recipe",
        "A recipe file has a function `recipe()` that returns `portatrain.Recipe(...)`. Every field can be changed on "
        "the command line by `--set FIELD=VALUE`, fields of a part by a path such as `model.layers`. Mappings and "
        "tuples of objects (`compute`, `params`, `hooks`) are set in the file.",
        docstring(Recipe),
        "\n".join(fields_table(Recipe, example)),
        "## Methods and properties",
        *_methods(Recipe),
    )


def _methods(cls: type) -> Iterator[str]:
    for name, member in vars(cls).items():
        if name.startswith("_"):
            continue
        if isinstance(member, property):
            yield f"### `{name}`\n\n{docstring(member)}"
        elif callable(member) or isinstance(member, (staticmethod, classmethod)):
            function = getattr(cls, name)
            yield f"### `{name}`\n\n{code(signature(function), 'text')}\n\n{docstring(function)}"


def ops_page() -> str:
    from portatrain.model import ops, ops_arrays, ops_structure

    docs = field_docs(ops.Ops)
    attributes = ["| attribute | shape and type |", "|---|---|"]
    attributes += [f"| `ops.{name}` | {cell(docs[name])} |" for name in ops.Ops.__annotations__]

    def methods(cls: type, shown: dict[str, str]) -> Iterator[str]:
        for name, member in vars(cls).items():
            if name.startswith("_") or not callable(member):
                continue
            yield f"### `{name}`"
            yield code(f"ops.{signature(member)}", "text")
            yield docstring(member)
            yield code(shown[name])

    return page(
        "Ops: the operations that models are written in",
        docstring(ops),
        "## Attributes",
        "\n".join(attributes),
        "## Methods",
        "Every example runs after these lines, on the backend of NumPy in float64; in a model `ops` is the argument:",
        code(examples.OPS_SETUP.strip()),
        *methods(ops.Ops, examples.OPS),
        *methods(ops_structure.StructureOps, examples.OPS),
        "## Operations on arrays",
        docstring(ops_arrays),
        *methods(ops_arrays.ArrayOps, examples.ARRAY_OPS),
        "## What a model returns",
        f"### `Loss`\n\n{docstring(ops.Loss)}",
    )


def optimizers_page() -> str:
    from portatrain.model.module import Normal, TensorInfo
    from portatrain.optim import Rule, Schedule, base, rules, schedules

    def info(name: str, fan_in_axes: int, **axes: int) -> TensorInfo:
        return TensorInfo(
            name=name,
            role="params",
            shape=tuple(axes.values()),
            axes=tuple(axes),
            batch_dims=int("layers" in axes),
            fan_in_axes=fan_in_axes,
            init=Normal(std=1.0),
        )

    tensors = [
        ("a stacked weight", info("blocks/mlp/up", 1, layers=4, embed=128, mlp=384)),
        ("an embedding", info("embed/table", 0, vocab=256, embed=128)),
        ("a norm's scale", info("final_norm/scale", 0, embed=128)),
    ]
    parts = [
        "## Rules",
        docstring(Rule),
        "### `Rule.slots`",
        code(signature(Rule.slots), "text"),
        docstring(Rule.slots),
    ]
    for method in (Rule.step, Rule.update, Rule.rule_for):
        parts += [f"### `Rule.{method.__name__}`", code(signature(method), "text"), docstring(method)]
    for cls in subclasses(Rule, rules):
        rule = eval(examples.RULES[cls.__name__], vars(rules))
        parts += [f"### `{cls.__name__}`", docstring(cls), "\n".join(fields_table(cls))]
        table = ["| tensor | slot | axes | shape | dtype |", "|---|---|---|---|---|"]
        for what, about in tensors:
            for slot, made in rule.slots(about).items():
                axes = ", ".join(made.axes) or "none"
                table.append(f"| {what} | `{slot}` | {axes} | `{made.shape}` | {made.dtype} |")
        parts += [f"Slots of `{examples.RULES[cls.__name__]}`:", "\n".join(table)]
        imports = "AdamW, Muon" if cls.__name__ == "Muon" else cls.__name__
        parts.append(code(f"from portatrain.optim import {imports}\n\noptimizer = {examples.RULES[cls.__name__]}"))
    parts += ["## What a rule may know of a tensor", docstring(base.Info)]
    rows = ["| attribute | type | meaning |", "|---|---|---|"]
    for name, member in vars(base.Info).items():
        if isinstance(member, property):
            result = inspect.signature(member.fget).return_annotation if member.fget else ""
            rows.append(f"| `info.{name}` | `{result}` | {cell(docstring(member))} |")
    parts += ["\n".join(rows), "## A slot", docstring(base.Slot), "\n".join(fields_table(base.Slot))]
    parts += ["## The functions that a rule may call", docstring(base.ArrayNamespace)]
    parts += [
        code("\n".join(f"xp.{signature(m)}" for n, m in vars(base.ArrayNamespace).items() if n[0] != "_"), "text")
    ]
    parts += ["## Schedules", docstring(schedules)]
    for cls in subclasses(Schedule, schedules):
        example = examples.RULES[cls.__name__]
        parts += [f"### `{cls.__name__}`", docstring(cls), "\n".join(fields_table(cls))]
        parts.append(code(f"from portatrain.optim import {cls.__name__}\n\nschedule = {example}"))
    return page("Optimizers and schedules", *parts)


def subclasses(base: type, module: Any) -> list[Any]:
    """Return the classes of a module that derive from `base`, in the order of the file."""
    return [c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, base) and c is not base]


def data_page() -> str:
    from portatrain.data import DataSpec, own, spec

    parts = [docstring(spec)]
    for cls in subclasses(DataSpec, spec):
        imports = "Mixture, Stdlib, TextFiles" if cls.__name__ == "Mixture" else cls.__name__
        parts += [f"## `{cls.__name__}`", docstring(cls), "\n".join(fields_table(cls))]
        parts.append(code(f"from portatrain.data import {imports}\n\ndata = {examples.DATA[cls.__name__]}"))
    parts += ["## A source of your own", docstring(own)]
    for contract in (own.DocumentSource, own.ArraySource):
        parts += [f"### `{contract.__name__}`", docstring(contract)]
        for name, member in vars(contract).items():
            if isinstance(member, property):
                parts.append(f"- `{name}`: {docstring(member)}")
            elif name in ("__len__", "documents", "sample"):
                parts.append(f"- `{signature(member)}`: {docstring(member)}")
    return page("Data specs", *parts)


def hooks_page() -> str:
    from portatrain.training import hooks
    from portatrain.training.metrics import EvalRecord, RunInfo, Sink, StepRecord

    parts = ["## Hook", docstring(hooks.Hook)]
    for name, member in vars(hooks.Hook).items():
        if inspect.isfunction(member) and not name.startswith("_"):
            parts += [f"### `{name}`", code(signature(member), "text"), docstring(member)]
    for cls in subclasses(hooks.Hook, hooks):
        parts += [f"## `{cls.__name__}`", docstring(cls), "\n".join(fields_table(cls))]
    parts += ["## Sink", docstring(Sink)]
    parts += [code("\n".join(signature(m) for n, m in vars(Sink).items() if n[0] != "_"), "text")]
    for cls in (RunInfo, StepRecord, EvalRecord):
        parts += [f"## `{cls.__name__}`", docstring(cls), "\n".join(fields_table(cls))]
    return page("Hooks, sinks and records", *parts)


def commands_page() -> str:
    from portatrain import cli

    parts = [
        "Exit codes: 0 done, 2 a mistake that the message explains, 75 storage that failed while it was used, "
        "85 stopped and resumable, 130 interrupted by Ctrl-C."
    ]
    for program, module in commands():
        parser = parser_of(program, module)
        parts += [f"## `{program}`", *command_parts(parser)]
        for subparser in subparsers(parser):
            parts += [f"### `{subparser.prog}`", *command_parts(subparser)]
    parts += ["## `portatrain`", code(cli.HELP_TEXT.format(commands=cli._listing(cli.PORTATRAIN)).strip(), "text")]
    return page("Commands", *parts)


def commands() -> list[tuple[str, str]]:
    """Return every command with the module that carries it out."""
    from portatrain import cli

    found = [(f"portatrain {name}", module) for name, (module, _) in cli.PORTATRAIN.items()]
    found.append(("launch", cli.SUBMIT[0]))
    return [*found, *((f"launch {name}", module) for name, (module, _) in cli.LAUNCH.items())]


def parser_of(program: str, module_name: str) -> argparse.ArgumentParser:
    """Return the parser of a command, as the command line makes it."""
    from portatrain import cli

    module = importlib.import_module(module_name)
    parser = cli.Parser(prog=program, description=module.__doc__, allow_abbrev=False)
    module.add_arguments(parser)
    return parser


def subparsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """Return the parsers of a command's own commands."""
    found = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return [made for action in found for made in action.choices.values()]


def command_parts(parser: argparse.ArgumentParser) -> list[str]:
    about, _, shown = (parser.description or "").partition("\nexamples:\n")
    rows = ["| option | default | meaning |", "|---|---|---|"]
    for action in parser._actions:
        if isinstance(action, (argparse._HelpAction, argparse._SubParsersAction)):
            continue
        value = "" if action.nargs == 0 else f" {action.metavar or (action.dest.upper())}"
        name = ", ".join(f"`{option}{value}`" for option in action.option_strings) or f"`{value.strip()}`"
        default = "" if action.default in (None, [], False, argparse.SUPPRESS) else f"`{action.default}`"
        text = (action.help or "") % {"default": action.default, "prog": parser.prog}
        rows.append(f"| {name} | {cell(default)} | {cell(text)} |")
    parts = [cell(about)]
    if len(rows) > 2:
        parts.append("\n".join(rows))
    if shown:
        parts.append(code(inspect.cleandoc(shown), "shell"))
    return parts


def names_page() -> str:
    """List every public name with one line; on the site each has its whole docstring, by mkdocstrings."""
    parts = [
        "Every public name, by the module to import it from. Names that stand nowhere here may change at any time."
    ]
    seen: dict[int, str] = {}
    for module_name, about in PUBLIC.items():
        parts += [f"## `{module_name}`", about]
        for name in exported(module_name):
            thing = getattr(importlib.import_module(module_name), name)
            where = f"{module_name}.{name}"
            if id(thing) in seen:
                parts.append(f"### `{where}`\n\nThe same as `{seen[id(thing)]}`.")
                continue
            seen[id(thing)] = where
            documented = inspect.isclass(thing) or inspect.isroutine(thing)
            own = getattr(thing, "__module__", "").startswith("portatrain")
            said = (inspect.getdoc(thing) or "").split("\n\n")[0] if documented and own else f"`{thing}`"
            part = f"### `{where}`\n\n{said.replace('``', '`').rstrip(':')}"
            if documented and own:
                part += f"\n\n::: {thing.__module__}.{thing.__qualname__}"
            parts.append(part)
    return page("Public names", *parts)


WRITTEN: dict[str, Callable[[], str]] = {
    "names.md": names_page,
    "recipe.md": recipe_page,
    "ops.md": ops_page,
    "optimizers.md": optimizers_page,
    "data.md": data_page,
    "hooks.md": hooks_page,
    "commands.md": commands_page,
}


def main(argv: list[str] | None = None) -> int:
    """Write or compare the pages; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m docs.tools.reference", description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write docs/reference")
    args = parser.parse_args(argv)
    old = []
    for name, made in WRITTEN.items():
        path, text = PAGES / name, made()
        if args.write:
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            old.append(f"docs/reference/{name}")
    if old:
        print(f"{', '.join(old)}: old. Run python -m docs.tools.reference --write", file=sys.stderr)
    return 1 if old else 0


if __name__ == "__main__":
    sys.exit(main())
