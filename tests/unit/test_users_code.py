"""A mistake in a user's own code ends in one paragraph with file, line and method, on every backend and command."""

from __future__ import annotations

import inspect
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType

import numpy as np
import pytest

from portatrain.backends.base import check_loss
from portatrain.backends.program import make_program
from portatrain.backends.reference.run import forward
from portatrain.cli import main
from portatrain.errors import StorageError, UserError
from portatrain.errors.users_code import explained, where
from portatrain.recipe import load_recipe
from tests.support.own_recipe import GOOD


@dataclass(frozen=True)
class Mistake:
    """Replace `old` by `new` in GOOD. The paragraph must have `says`, and the line of `at`, by default that of `new`.

    also: the commands beside `train` that come upon it. torch: False if torch computes it without an error.
    """

    old: str
    new: str
    says: str
    at: str = ""
    also: tuple[str, ...] = ()
    torch: bool = True

    @property
    def line(self) -> int:
        text = GOOD.replace(self.old, self.new, 1)
        at = self.at or self.new.strip().splitlines()[0].strip()
        return text[: text.index(at)].count("\n") + 1


TANH = 'ops.tanh(ops.einsum("be,em->bm", x_BE, self.w))'
FROZEN = "@dataclass(frozen=True, kw_only=True)\n"
ANY = ("show", "plan")
MISTAKES = {
    "unknown op": Mistake("ops.tanh(", "ops.tanhh(", r"ops\.tanhh\. Did you mean ops\.tanh\?.*which-ops\.md"),
    "op of torch": Mistake(TANH, "ops.maxpool(x_BE)", r"Block\.__call__.*ops\.maxpool.*ops\.pool.*which-ops\.md"),
    "einsum letters": Mistake(
        '"be,em->bm"', '"bse,em->bm"', r"Block\.__call__.*3 letters 'bse' for the 2 axes of \(\d, 4"
    ),
    "einsum output": Mistake('"be,em->bm"', '"be,em->bq"', r"Block\.__call__.*ops\.einsum of q, which no operand has"),
    "einsum with two letters for one axis": Mistake(
        '"be,em->bm"',
        '"be,fm->bm"',
        r"ops\.einsum: expected one letter .* got e in 'be' and f in 'fm'.*the same letter",
    ),
    "einsum output twice": Mistake('"be,em->bm"', '"be,em->bb"', r"Block\.__call__.*ops\.einsum of b more than once"),
    "einsum shapes": Mistake(
        '"be,em->bm", x_BE, self.w',
        '"be,em->bm", x_BE[:, :3], self.w',
        r"one size for the letter e of .*einsum of 3 in 'be', \(\d, 3\), and 4 in 'em', \(4, 4\)",
    ),
    "einsum operands": Mistake('"be,em->bm"', '"be->bm"', r"1 operands, as many as .*einsum of 2, of \(\d, 4\)"),
    "einsum without an arrow": Mistake('"be,em->bm"', '"be,em"', r"a letter for each axis.*got 'be,em'"),
    "einsum with dots": Mistake('"be,em->bm"', '"...e,em->...m"', r"a letter for each axis.*`\.\.\.` is not one"),
    "einsum without a spec": Mistake(
        '"be,em->bm", x_BE', "x_BE", r"ops\.einsum: .*got an array in the place of the spec", at="return x_BE + ops"
    ),
    "einsum of None": Mistake('"be,em->bm", x_BE, self.w', '"be,em->bm", None, self.w', r"Block\.__call__"),
    "shapes in arithmetic": Mistake("x_BE + ops", "x_BE[:, :3] + ops", r"Block\.__call__"),
    "concat shapes": Mistake(TANH, "ops.concat([x_BE, x_BE[:, None]], axis=1)", r"ops\.concat of .*4\)"),
    "reshape": Mistake(TANH, "x_BE.reshape(-1, 7)", r"Block\.__call__"),
    "a param that is not there": Mistake("x_BE, self.w", "x_BE, self.ww", r"no attribute `ww`.*self\.w\?.*__init__"),
    "NumPy in the model": Mistake(TANH, "np.tanh(self.w)[0]", r"Block\.__call__.*which-ops\.md"),
    "NumPy on data": Mistake(TANH, "np.tanh(x_BE * self.w[0])", r"Block\.__call__.*which-ops\.md"),
    "a condition": Mistake(TANH, "(x_BE if x_BE.sum() > 0 else -x_BE)", r"which-ops\.md", torch=False),
    "a layer that returns None": Mistake(
        'return ops.einsum("be,e->b", x_BE, self.out)', "x_BE = x_BE", "None.*return", at="error_B ="
    ),
    "a layer of a stack without out": Mistake(
        f"return x_BE + {TANH}, None", f"return x_BE + {TANH}", r"Block\.__call__.*\(carry, out\)", at="def __call__"
    ),
    "no return": Mistake(
        "return ops.loss(error_B", "ops.loss(error_B", r"Net\.__call__", at="def __call__(self, ops, batch"
    ),
    "a loss that is an array": Mistake(
        'return ops.loss(error_B * error_B, batch["mask"])',
        "return error_B",
        r"Net\.__call__.*array of shape \(4,\)",
        at="def __call__(self, ops, batch",
    ),
    "a loss that is a number": Mistake("ops.loss(error_B * error_B,", "ops.loss(0.5,", r"ops\.loss.*float"),
    "a loss that is no vector": Mistake("ops.loss(error_B * error_B,", "ops.loss(x_BE,", r"ops\.loss.*\(4, 4\)"),
    "other arguments": Mistake("__call__(self, ops, batch)", "__call__(self, batch)", r"Net\.__call__.*\(ops, batch\)"),
    "another key": Mistake('batch["y"]', 'batch["xs"]', r"a key of `batch`: .*x, y, got .*'xs'\. Did you mean x\?"),
    "a key as an attribute": Mistake(
        'batch["y"]', "batch.y", r"a key in brackets.*Write \[\"y\"\] in the place of \.y\."
    ),
    "a block with other arguments": Mistake(
        "ops, x_BE):\n        return x_BE +",
        "x_BE):\n        return x_BE +",
        r"Block\.__call__\(\) takes",
        at="x_BE, _ =",
    ),
    "no build": Mistake("def build", "def built", r"Config .*build\(\)", at=f"{FROZEN}class Config", also=ANY),
    "build that raises": Mistake("return Net(self)", "return Net(self.width)", r"Config\.build.*width", also=ANY),
    "build of another type": Mistake("return Net(self)", "return 3", r"Config\.build", at="def build", also=ANY),
    "a slot that is not declared": Mistake('slots["m"]', 'slots["v"]', r"Momentum\.step.*slots\(info\)"),
    "a slot that is missing": Mistake('{"m": m}', "{}", r"Momentum\.step.*'m'", at="def step"),
    "a slot of another shape": Mistake('{"m": m}', '{"m": m[0]}', r"Momentum\.step.*'m'", at="def step"),
    "no slots": Mistake("return lr * m, {", "return lr * m #", r"Momentum\.step", at="def step"),
    "slots that raises": Mistake("axes=info.axes,", "axes=info.axis,", r"Momentum\.slots.*axis", also=ANY),
    "NumPy in the rule": Mistake(
        "m = 0.9 * slots", "m = np.abs(grad) + 0.9 * slots", r"Momentum\.step.*which-ops\.md", torch=False
    ),
    "a rule with other arguments": Mistake("lr, count):", "lr):", r"Momentum\.step.*count", at="def step"),
    "division by zero": Mistake("1.0 / (1 + step)", "1.0 / (step - 1)", r"Decay\.curve.*ZeroDivisionError.*steps"),
    "a schedule without result": Mistake("return 1.0 / (1 + step)", "pass", "Decay.*None", at=f"{FROZEN}class Decay"),
    "a schedule with other arguments": Mistake(
        "curve(self, step, steps)", "curve(self, step)", r"Decay\.curve", at="def curve"
    ),
    "a check of a schedule that fails": Mistake(
        "    def curve(",
        "    def check(self, steps):\n        int('one')\n\n    def curve(",
        r"Decay\.check: expected `check` to return, or to raise UserError.*'one'",
        at="int('one')",
        also=ANY,
    ),
    "a refusal without its texts": Mistake(
        "    def curve(",
        "    def check(self, steps):\n"
        "        from portatrain.errors import UserError\n        raise UserError('long')\n\n"
        "    def curve(",
        r"Decay\.check: expected UserError\(what, expected=.*Give all four texts",
        at="raise UserError",
        also=ANY,
    ),
    "an attribute that the run does not have": Mistake(
        "        pass\n",
        "        run.steppe\n",
        r"hook Watch\.on_step.*: [^.]*definition, .*step.* Did you mean step.*Correct that line\. PORTA",
        at="run.steppe",
    ),
    "a hook that raises": Mistake(
        "        pass\n", "        record.losses\n", r"hook Watch\.on_step.*losses", at="record.losses"
    ),
    "a hook that is not frozen": Mistake(
        f"{FROZEN}class Watch",
        "@dataclass\nclass Watch",
        r"a frozen dataclass.*@dataclass\(frozen=True",
        at="@dataclass\nclass Watch",
        also=ANY,
    ),
    "a hook that keeps something": Mistake(
        "        pass\n",
        "        self.last = record.loss\n",
        r"hook Watch\.on_step.*whose fields never change",
        at="self.last",
    ),
    "a hook beside a tuple": Mistake(
        "hooks=(Watch(),)",
        "hooks=Watch()",
        r"field hooks.*a tuple, such as hooks=\(Watch\(\.\.\.\),\)",
        at="return Recipe(",
        also=ANY,
    ),
    "a hook without parentheses": Mistake(
        "hooks=(Watch(),)",
        "hooks=(Watch,)",
        r"field hooks.*got the class Watch.*Watch\(\.\.\.\)",
        "return Recipe(",
        ANY,
    ),
    "hooks in a list": Mistake(
        "hooks=(Watch(),)", "hooks=[Watch()]", r"hooks=\(Watch\(\.\.\.\),\).*in place of the br", "return Recipe(", ANY
    ),
    "a model without parentheses": Mistake(
        "model=Config()", "model=Config", r"field model.*got the class Config", "return Recipe(", ANY
    ),
    "an event with an array": Mistake(
        "        pass\n",
        "        run.event('seen', each=[np.ones(3)])\n",
        r"event 'seen', field each, element 0: expected numbers.*ndarray of shape \(3,\).*x\.tolist\(\)",
        at="run.event",
    ),
    "a hook with other arguments": Mistake(
        "(self, run, record)", "(self, run)", r"hook Watch\.on_step", at="def on_step"
    ),
    "a sample of another shape": Mistake(
        "np.full(4,", "np.full(4 + index % 2,", r"Points\.sample\(\d+\), key 'x'", at=""
    ),
    "a sample of text": Mistake("np.float32(index % 2)", '"one"', r"Points\.sample\(\d+\), key 'y'", at=""),
    "a source that raises": Mistake("return {", "return 1 / 0 or {", r"Points\.sample.*ZeroDivisionError"),
    "a source that misses a file of NumPy": Mistake(
        "return {", 'return np.load("gone.npy") or {', r"Points\.sample.*expected a data source that returns.*gone\.npy"
    ),
    "a source with NumPy": Mistake(
        "return {",
        "return np.linalg.inv(np.zeros((2, 2))) or {",
        r"Points\.sample.*expected a data source that returns samples",
    ),
    "a source with None": Mistake(
        "return {", "return None + 1 or {", r"Points\.sample.*expected a data source.*NoneType.*Correct that line"
    ),
    "a hook with None": Mistake(
        "        pass\n",
        "        None.x\n",
        r"hook Watch\.on_step.*expected a hook that returns.*NoneType",
        at="None.x",
    ),
    "NumPy in a function of the model": Mistake(
        f"return x_BE + {TANH}, None",
        "return with_numpy(self.w), None\n\ndef with_numpy(w):\n    return np.tanh(w)[0]",
        r"with_numpy.*which-ops\.md",
        at="return np.tanh(w)",
    ),
    "a source that misses a file": Mistake("return {", 'return open("gone.txt") or {', r"Points\.sample.*gone\.txt"),
    "a source without length": Mistake("return 12", "return self.count", r"Points\.__len__.*count"),
    "a syntax error": Mistake("return Net(self)", "return Net(self", "recipe file.*SyntaxError", also=ANY),
    "an import error": Mistake("import numpy as np", "import nosuchpackage", "nosuchpackage", also=ANY),
    "an error at the top": Mistake("class Block(", "WIDE = 1 / 0\nclass Block(", "ZeroDivisionError", also=ANY),
    "no recipe()": Mistake("def recipe()", "def my_recipe()", "a function recipe", at="", also=ANY),
    "recipe() that raises": Mistake(
        "    return Recipe(", "    [].pop()\n    return Recipe(", "in recipe.*IndexError", also=ANY
    ),
    "recipe() of another type": Mistake("    return Recipe(", "    return dict(", "dict", at="def recipe", also=ANY),
    "a field that there is not": Mistake(
        "steps=2",
        "step=2",
        r"recipe.*arguments of Recipe: .*got step\. Did you mean steps",
        at="return Recipe(",
        also=ANY,
    ),
}
WITHOUT_LINE = ("a sample of another shape", "a sample of text", "no recipe()")


def planted(tmp_path: Path, mistake: Mistake) -> Path:
    assert mistake.old in GOOD
    file = tmp_path / "own.py"
    file.write_text(GOOD.replace(mistake.old, mistake.new, 1))
    return file


def check(said: str, file: Path, name: str) -> None:
    mistake = MISTAKES[name]
    assert said.startswith("error: ") and said.count("\n") == 1, said
    assert re.search(mistake.says, said), said
    if name not in WITHOUT_LINE:
        assert re.search(rf"{file.name}, line {mistake.line}\b", said), (mistake.line, said)


ON_BOTH = tuple(name for name, one in MISTAKES.items() if re.search("Block|Head|Net|Momentum|ops", one.says + one.at))
"""Those that a backend comes upon; the others do not depend on it."""


@pytest.mark.filterwarnings("ignore:__array_wrap__")  # torch tells NumPy
@pytest.mark.parametrize(
    ("backend", "name"), [*(("torch", name) for name in MISTAKES), *(("jax", name) for name in ON_BOTH)]
)
def test_train(
    name: str, backend: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = planted(tmp_path, MISTAKES[name])
    code = main(["train", file.name, "--run-dir", "run", "--backend", backend])
    said = capfd.readouterr().err
    if backend == "torch" and not MISTAKES[name].torch:
        assert code == 0  # torch can compute it, and does
        return
    assert code == 2, said
    check("error: " + said.rpartition("error: ")[2], file, name)
    kept = tmp_path / "run/attempts/1/error.txt"
    if kept.exists() and "PORTATRAIN_TRACEBACK" in said:
        assert kept.read_text().startswith("Traceback") and str(kept.relative_to(tmp_path)) in said
        assert kept.read_text().splitlines()[-1] in said  # `launch status` shows the last line


@pytest.mark.parametrize("name", [name for name in MISTAKES if "arguments" in name])
@pytest.mark.parametrize("same", [False, True])
def test_another_file_has_the_same_names(
    same: bool, name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One without the mistake, and one with the same mistake: the file that runs is named."""
    monkeypatch.chdir(tmp_path)
    others = [tmp_path / f"other-{i}.py" for i in range(2)]
    for other in others:
        text = planted(tmp_path, MISTAKES[name]).read_text() if same else GOOD
        other.write_text(text.replace("import numpy", "\nimport numpy", 1))
    kept = [load_recipe(str(other)) for other in others]
    assert len(kept) == 2
    test_train(name, "torch", tmp_path, capfd, monkeypatch)


@pytest.mark.parametrize("name", MISTAKES)
def test_show_and_plan(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = planted(tmp_path, MISTAKES[name])
    for command in (["show", file.name], ["plan", file.name, "--cluster", "h100-8", "--json"]):
        code = main(command)
        said = capfd.readouterr().err
        if command[0] in MISTAKES[name].also:
            assert code == 2, said
        if code:
            check(said, file, name)
        else:
            assert not said


IN_THE_MODEL = [name for name in ON_BOTH if MISTAKES[name].line < GOOD[: GOOD.index("class Config")].count("\n")]


@pytest.mark.parametrize(
    "name", [n for n in IN_THE_MODEL if not n.startswith("slots") and "Config" not in MISTAKES[n].at]
)
def test_the_oracle(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = planted(tmp_path, MISTAKES[name])
    program = make_program(load_recipe(str(file)))
    params = {n: np.ones(t.shape) for n, t in program.definition.params.items()}
    batch = {"x": np.ones((4, 4)), "y": np.ones(4), "mask": np.ones(4), "sample": np.arange(4)}
    with pytest.raises(Exception) as caught:
        check_loss(forward(program.definition, params, batch).value, program.definition.model)
    error = caught.value.with_traceback(below(caught.value))
    found = error if isinstance(error, UserError) else explained(error)
    assert found is not None
    mine = f"error: {found}{where(found)}"
    assert re.search(rf"own\.py, line {MISTAKES[name].line}\b", mine), mine


def test_the_traceback_is_shown_on_request(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = planted(tmp_path, MISTAKES["build that raises"])
    monkeypatch.setenv("PORTATRAIN_TRACEBACK", "1")
    assert main(["show", str(file)]) == 2
    said = capfd.readouterr().err
    assert said.startswith("Traceback") and "return Net(self.width)" in said and "\nerror: " in said
    monkeypatch.setenv("PORTATRAIN_TRACEBACK", "0")
    assert main(["show", str(file)]) == 2
    assert capfd.readouterr().err.startswith("error: ")


def test_a_bug_of_portatrain_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a line of the user's, or as an error that no argument causes, it is nobody else's mistake."""
    from portatrain.backends.torch.ops import TorchOps

    file = tmp_path / "own.py"
    file.write_text(GOOD)

    def broken(self: TorchOps, x: object) -> object:
        raise AssertionError("a broken invariant")

    as_ours(monkeypatch, broken)
    monkeypatch.setattr(TorchOps, "tanh", broken)
    with pytest.raises(AssertionError, match="a broken invariant"):
        main(["train", str(file), "--run-dir", str(tmp_path / "run"), "--backend", "torch"])
    assert (tmp_path / "run/attempts/1/error.txt").read_text().startswith("Traceback")


def as_ours(monkeypatch: pytest.MonkeyPatch, function: Callable[..., object]) -> None:
    """Let a function of this test count as one of portatrain's backend."""
    file = str(Path(inspect.getfile(make_program)).with_name("planted.py"))
    monkeypatch.setattr(function, "__code__", function.__code__.replace(co_filename=file))


def below(error: BaseException) -> TracebackType | None:
    """The traceback without the line of this test, as the trainer sees it."""
    assert error.__traceback__ is not None
    return error.__traceback__.tb_next


def raised(error: Exception) -> Exception:
    def users_function() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        users_function()
    return caught.value


class OutOfMemoryError(RuntimeError):
    pass


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OutOfMemoryError("the device is full"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("NCCL communicator was aborted"),
        KeyboardInterrupt(),
        UserError("it", expected="this", got="that", do="Do it."),
    ],
    ids=lambda e: f"{type(e).__name__} {e}"[:30],
)
def test_a_failure_of_the_machine_is_tried_again(error: BaseException) -> None:
    try:
        raise error
    except BaseException as caught:
        assert explained(caught) is None and explained(caught, "hook Mine.on_step") is None


def test_a_service_that_does_not_answer_is_tried_again() -> None:
    found = explained(raised(ConnectionError("the server is away")), "hook Mine.on_step")
    assert isinstance(found, StorageError) and "users_function" in str(found) and "the server is away" in str(found)
    missing = explained(raised(FileNotFoundError(2, "No such file or directory", "gone.txt")), "hook Mine.on_step")
    assert missing is not None and missing.code == 2 and "gone.txt" in str(missing)


def test_a_class_of_an_installed_package_is_a_users() -> None:
    """Its file is among the libraries, but the class derives from one of portatrain's."""
    source = "from portatrain import Module\nclass Net(Module):\n    def __call__(self, ops):\n        return 1 / 0\n"
    file = f"{sysconfig.get_path('purelib')}/lab/models.py"
    module = ModuleType("lab_models")
    module.__file__ = file
    sys.modules[module.__name__] = module
    try:
        exec(compile(source, file, "exec"), module.__dict__)
        with pytest.raises(ZeroDivisionError) as caught:
            module.Net()(None)
        found = explained(caught.value.with_traceback(below(caught.value)))
        assert found is not None and "lab/models.py, line 4, in Net.__call__" in str(found)
    finally:
        del sys.modules[module.__name__]


def test_a_paragraph_of_an_operation_has_the_users_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "own.py"
    file.write_text(GOOD.replace("return ops.loss(", 'ops.aux("e", x_BE); return ops.loss('))
    assert main(["train", str(file), "--run-dir", str(tmp_path / "run"), "--backend", "torch"]) == 2
    said = capfd.readouterr().err
    assert re.search(r"ops\.aux.*own\.py, line 39, in Net\.__call__", said)


def test_an_error_under_torch_compile_has_the_line_of_the_model(tmp_path: Path) -> None:
    """As torch.compile raises it: with the lines that it traced, which the traceback lacks."""

    class TorchRuntimeError(RuntimeError):
        real_stack: traceback.StackSummary

    error = TorchRuntimeError(
        "RuntimeError when making fake tensor call\n  Explanation: Dynamo failed to run: "
        "got RuntimeError('einsum(): the subscripts do not fit')\n\n  Developer debug context:"
    )
    ours = traceback.FrameSummary(inspect.getfile(make_program), 40, "einsum")
    error.real_stack = traceback.StackSummary.from_list(
        [traceback.FrameSummary(str(tmp_path / "own.py"), 24, "__call__"), ours]
    )
    found = explained(error)
    assert found is not None and f"{tmp_path / 'own.py'}, line 24, in __call__" in str(found)
    assert "got RuntimeError: einsum(): the subscripts do not fit" in str(found)
