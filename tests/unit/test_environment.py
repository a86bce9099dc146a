"""Environment variables have one table: it is complete, its page is up to date, and a wrong value is one paragraph."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from launchers import rank_entry
from portatrain.cli import main
from portatrain.errors import UserError
from portatrain.system import environment, processes
from portatrain.system.environment import VARIABLES, Variable, whole_number

ROOT = Path(__file__).parents[2]
NAME = re.compile(r"\bPORTATRAIN_[A-Z0-9_]+\b")
NUMBERS = [v for v in VARIABLES if "number" in v.kind]


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    names = listed.stdout.split() if not listed.returncode else [str(p) for p in ROOT.rglob("*") if p.is_file()]
    return [ROOT / n for n in names if n.endswith((".py", ".md", ".txt", ".toml", "Makefile", ".sh")) and n[0] != "."]


def test_no_file_names_a_variable_that_the_table_lacks() -> None:
    known = {v.name for v in VARIABLES}
    found = {
        (str(path.relative_to(ROOT)), name)
        for path in tracked()
        if path.is_file()
        for name in NAME.findall(path.read_text(encoding="utf-8"))
        if name not in known
    }
    assert not found


@pytest.mark.parametrize("folder", ["portatrain", "launchers", "checkpoints_format"])
def test_product_code_takes_the_names_from_the_table(folder: str) -> None:
    table = ROOT / "portatrain" / "system" / "environment.py"
    texts = {p: p.read_text(encoding="utf-8") for p in (ROOT / folder).rglob("*.py") if p != table}
    assert not [f"{p.relative_to(ROOT)}: {n}" for p, text in texts.items() for n in NAME.findall(text)]


def test_the_page_is_what_the_table_prints() -> None:
    assert (ROOT / "docs" / "run" / "environment.md").read_text(encoding="utf-8") == environment.page()


def test_every_variable_is_described() -> None:
    assert len({v.name for v in VARIABLES}) == len(VARIABLES) >= 20
    for v in VARIABLES:
        assert v.about.endswith(".") and v.kind and v.otherwise and v.set_by, v.name


@pytest.mark.parametrize("variable", VARIABLES, ids=lambda v: v.name)
def test_nothing_is_the_default(variable: Variable[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(variable.name, raising=False)
    assert variable.get() == variable.default
    monkeypatch.setenv(variable.name, "")
    assert variable.get() == variable.default


@pytest.mark.parametrize("text", ["abc", "-1", "nan", "inf", "1e999", "²", "٣", "0x10", "9" * 40, "1 2"])
@pytest.mark.parametrize("variable", NUMBERS, ids=lambda v: v.name)
def test_what_is_no_number_is_one_paragraph(
    variable: Variable[object], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable.name, text)
    try:
        assert isinstance(variable.get(), float) and text in ("٣", "9" * 40)  # Python's float reads these
    except UserError as error:
        assert variable.name in str(error) and repr(text) in str(error)


def test_objects_and_flags() -> None:
    assert environment.CLUSTER.get({"PORTATRAIN_CLUSTER": '{"job": 1}'}) == {"job": 1}
    for text in ("[1]", "{", '"x"', "[" * 100_000):
        with pytest.raises(UserError, match="JSON object"):
            environment.CLUSTER.get({"PORTATRAIN_CLUSTER": text})
    assert environment.READ_ONCE.get({"PORTATRAIN_READ_ONCE": "0"}) is False
    with pytest.raises(UserError, match="one of 0, 1"):
        environment.READ_ONCE.get({"PORTATRAIN_READ_ONCE": "yes"})


def test_taking_a_variable_removes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORTATRAIN_PARENT", "7")
    assert environment.PARENT.take() == 7 and environment.PARENT.get() is None


@pytest.mark.parametrize(
    "env", [{"RANK": "abc", "WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "two"}, {"RANK": "2", "WORLD_SIZE": "2"}]
)
def test_a_wrong_rank_ends_training_in_one_paragraph(
    env: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "tiny-lm", "--run-dir", str(tmp_path / "run"), "--backend", "jax", "--mesh", "fsdp=2"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert "environment variable" in said and not (tmp_path / "run").exists()
    with pytest.raises(UserError):
        processes.rank()


@pytest.mark.parametrize(
    "env",
    [
        {"SLURM_PROCID": "x", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "²", "SLURM_LOCALID": "0"},
        {"JOB_COMPLETION_INDEX": "first", "PORTATRAIN_HOSTS": "2"},
        {"JOB_COMPLETION_INDEX": "0", "PORTATRAIN_HOSTS": "two"},
        {"TPU_WORKER_ID": "-1", "TPU_WORKER_HOSTNAMES": "a,b"},
        {"SKYPILOT_NODE_RANK": "1.5", "SKYPILOT_NUM_NODES": "2"},
    ],
    ids=str,
)
def test_a_scheduler_that_sets_no_number_is_one_paragraph(env: dict[str, str]) -> None:
    with pytest.raises(UserError):
        rank_entry.rank_variables(env)


def test_a_scheduler_number_that_is_missing_is_named() -> None:
    with pytest.raises(UserError, match="TPU_WORKER_ID"):
        whole_number({}, "TPU_WORKER_ID")
