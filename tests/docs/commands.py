"""The command lines of a page: each is read by the parser that would read it."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

from docs.tools.reference import parser_of
from portatrain import cli
from portatrain.recipe import apply_overrides, load_recipe, shipped_recipes
from tests.docs.pages import ROOT


def lines(text: str) -> list[str]:
    """Return the commands of a block: joined at backslashes and within quotes, without comments."""
    found: list[str] = []
    left = ""
    for line in text.split("\n"):
        left = f"{left}\n{line}" if left else line
        if left.endswith("\\"):
            left = left[:-1]
            continue
        try:
            words = shlex.split(left, comments=True)
        except ValueError:  # a quotation goes on in the next line
            continue
        if words:
            found.append(left.strip())
        left = ""
    assert not left.strip(), f"a quotation is not closed: {left}"
    return found


def check(command: str, folder: Path) -> None:
    """Raise an error if no program of this repository would take the command. `folder` holds the page's own files."""
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    program = Path(words[0]).name
    if program in ("portatrain", "launch"):
        _check_ours(words, folder)
    elif program == "make":
        targets = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        wanted = [word for word in words[1:] if "=" not in word]
        assert set(wanted) <= set(targets), f"no such target: {wanted}"
    elif program in ("python", "python3", "torchrun"):
        _check_python(words, folder)
    elif program == "pip":
        _check_extras(command)
    elif program in ("pytest", ".ci/run", "run", "git", "cd", "pre-commit", "ruff", "mypy"):
        paths = [w for w in words[1:] if "/" in w and not w.startswith("-") and program == "pytest"]
        assert all((ROOT / p.split("::")[0]).exists() for p in paths), f"no such path: {paths}"
    else:
        raise AssertionError(f"the test does not know the program {program!r}; is it output? Then fence it as text.")


def _check_ours(words: list[str], folder: Path) -> None:
    program, *rest = words
    if not rest or rest[0] in ("--help", "--version"):
        return
    table = cli.PORTATRAIN if program.endswith("portatrain") else cli.LAUNCH
    if rest[0] in table:
        name, module, rest = f"{program} {rest[0]}", table[rest[0]][0], rest[1:]
    else:
        assert program.endswith("launch"), f"portatrain has no command {rest[0]!r}"
        name, module = "launch", cli.SUBMIT[0]
    if "--help" in rest:
        return
    args = parser_of(name, module).parse_args(rest)
    recipe = getattr(args, "recipe", None)
    if isinstance(recipe, str):
        _check_recipe(recipe, getattr(args, "overrides", None) or [], folder)


def _check_recipe(name: str, overrides: list[str], folder: Path) -> None:
    """A file of the page must load with its overrides, and so must a shipped recipe; others are the reader's."""
    if (folder / name).is_file() or name in shipped_recipes():
        apply_overrides(load_recipe(name, cwd=folder), overrides)
    else:
        assert name.endswith(".py"), f"no such recipe: {name}"


def _check_python(words: list[str], folder: Path) -> None:
    if "-c" in words:
        compile(words[words.index("-c") + 1], "-c", "exec")
    elif "-m" in words:
        module = words[words.index("-m") + 1]
        assert module in ("venv", "pip", "pytest") or _is_module(module), f"no such module: {module}"
        if module == "portatrain.cli":
            _check_ours(["portatrain", *words[words.index("-m") + 2 :]], folder)
    else:
        assert (ROOT / words[1]).is_file() or (folder / words[1]).is_file(), f"no such file: {words[1]}"


def _is_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _check_extras(command: str) -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for group in re.findall(r"(?:portatrain|\.)\[([a-z0-9,-]+)\]", command):
        unknown = set(group.split(",")) - set(extras)
        assert not unknown, f"no such extra: {', '.join(unknown)}"
