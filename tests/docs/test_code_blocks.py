"""Every fenced block of every page: Python is run, commands are parsed and the marked ones run, data is read.

A block of one page goes on where the one before it ended. A block with a title is a file: it is written into the page's
folder and, if it has a recipe, loaded. A block below `<!-- run -->` is carried out.
"""

from __future__ import annotations

import json
import os
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from portatrain import cli
from portatrain.plan.clusters import clusters_toml
from portatrain.recipe import load_recipe
from portatrain.training.trainer import make_program
from tests.docs import commands
from tests.docs.pages import Block, blocks, name_of, pages

LANGUAGES = ("python", "shell", "toml", "json", "yaml", "text")
WITH_BLOCKS = [page for page in pages() if blocks(page)]
FRAGMENTS = {"README.md"}
"""Pages whose Python shows a part of a class: it is compiled, not run."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to work in; modules and paths that a page brings are forgotten at the end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    modules, path = set(sys.modules), list(sys.path)
    sys.path.insert(0, str(tmp_path))
    yield tmp_path
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        file = getattr(sys.modules[name], "__file__", None) or ""
        if file.startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_every_block_says_what_it_is(page: Path) -> None:
    wrong = [block.where for block in blocks(page) if block.language not in LANGUAGES]
    assert not wrong, f"expected one of {LANGUAGES} behind the fence: {wrong}"


@pytest.mark.parametrize("page", WITH_BLOCKS, ids=name_of)
def test_blocks(page: Path, folder: Path) -> None:
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks(page):
        try:
            _check(block, folder, names)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            raise AssertionError(f"{block.where}: {type(error).__name__}: {error}") from error


def _check(block: Block, folder: Path, names: dict[str, object]) -> None:
    if block.language == "python":
        _python(block, folder, names)
    elif block.language == "shell":
        _shell(block)
        for command in commands.lines(block.text):
            commands.check(command, folder)
            if block.run:
                _carry_out(command)
    elif block.language == "toml":
        _toml(block, folder)
    elif block.language == "json":
        json.loads(block.text)
    elif block.language == "yaml":
        yaml = pytest.importorskip("yaml")
        yaml.safe_load(block.text)


def _python(block: Block, folder: Path, names: dict[str, object]) -> None:
    code = compile(block.text, block.where, "exec", dont_inherit=True)  # the page has no __future__ import
    if block.title:
        (folder / block.title).write_text(block.text)
        if "def recipe(" in block.text:
            make_program(load_recipe(block.title, cwd=folder))
    elif block.page not in FRAGMENTS:
        exec(code, names)


def _shell(block: Block) -> None:
    """A shell reads more than `shlex`: it refuses `--set hooks=()`, for example."""
    read = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True, timeout=60, check=False)
    assert read.returncode == 0, f"the shell does not take it: {read.stderr.strip()}"


def _toml(block: Block, folder: Path) -> None:
    read = tomllib.loads(block.text)
    if any(isinstance(entry, dict) and "chip" in entry for entry in read.values()):
        path = folder / "clusters.toml"
        path.write_text(block.text)
        assert set(clusters_toml.read(path)) == set(read)
        path.unlink()


def _carry_out(command: str) -> None:
    words = shlex.split(command, comments=True)
    if words[0] == "python":
        runpy.run_path(words[1], run_name="__main__")
        return
    main = {"portatrain": cli.main, "launch": cli.launch_main}[words[0]]
    before = dict(os.environ)
    try:
        assert main(words[1:]) == 0, f"`{command}` failed"
    finally:
        os.environ.clear()
        os.environ.update(before)
