"""The files of the project's doors: workflows, hooks of git, the changelog, the one version."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib

import pytest

from tests.docs.pages import ROOT

yaml = pytest.importorskip("yaml")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.name)
def test_a_workflow_runs_what_there_is(path) -> None:
    read = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert read["permissions"] == {"contents": "read"}  # no workflow may write or open anything
    steps = [step for job in read["jobs"].values() for step in job["steps"]]
    commands = "\n".join(step.get("run", "") for step in steps)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"\bmake ([a-z-]+)", commands):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for script in re.findall(r"\.ci/\w+", commands):
        assert (ROOT / script).is_file()


def test_other_files_of_yaml_are_read() -> None:
    files = [*(ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"), ROOT / ".pre-commit-config.yaml"]
    assert len(files) == 4 and all(yaml.safe_load(path.read_text(encoding="utf-8")) for path in files)


def test_the_changelog_is_by_kind() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    section = text.split("## Unreleased\n", 1)[1].split("\n## ")[0]
    kinds = re.findall(r"^### (.*)$", section, re.MULTILINE)
    assert kinds and kinds == [k for k in ("Added", "Changed", "Fixed", "Removed") if k in kinds]


def test_the_version_stands_once() -> None:
    version = PROJECT["version"]
    sources = [*(ROOT / "portatrain").rglob("*.py"), *(ROOT / "launchers").rglob("*.py"), ROOT / "mkdocs.yml"]
    assert [str(p) for p in sources if version in p.read_text(encoding="utf-8")] == []


def test_importing_the_package_does_not_look_for_its_version() -> None:
    code = "import sys, portatrain; print('importlib.metadata' in sys.modules, portatrain.__version__ != '')"
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True"], done.stderr


def test_extras_of_the_documents_are_pinned() -> None:
    pinned = {
        line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().split("\n") if "==" in line
    }
    wanted = {re.split(r"[>=<\[]", need)[0].lower() for need in PROJECT["optional-dependencies"]["docs"]}
    assert wanted and wanted <= pinned
