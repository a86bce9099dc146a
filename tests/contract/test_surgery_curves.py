"""Surgery in forks: the curve after it on every framework, beside a float64 oracle that does the same on its own state.

The models have a few dozen parameters (tests/support/tiny_decoder.py, tiny_experts.py), so the oracle trains them by
finite differences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from portatrain.backends.state import initial_box
from portatrain.cli import main
from portatrain.data import open_data
from portatrain.recipe import Recipe
from portatrain.runs.run_dir import RunDir
from portatrain.testing.parity import bound_of
from tests.support import tiny_decoder, tiny_experts, tiny_fork
from tests.support.running import BACKENDS
from tests.support.tiny_oracle import Oracle

AT, STEPS = 2, 5
Arrays = dict[str, np.ndarray]
Rule = Callable[[Arrays, Arrays, int], Arrays]
"""(parameters or slots, the parameters of a new run, 0 for parameters or the degree of a slot) -> those of the new
model."""
BLOCK = "blocks/"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs that stopped after two steps: `dense`, `decoder`, and `adapted` with LoRA."""
    folder = tiny_fork.write(tmp_path_factory.mktemp("curves"))
    text = Path(tiny_decoder.__file__).read_text()
    (folder / "decoder.py").write_text(text)
    (folder / "adapted.py").write_text(text.replace("    return plain()\n", "    return adapted()\n"))
    (folder / "dense.py").write_text(Path(tiny_experts.__file__).read_text())
    for name in ("dense", "decoder", "adapted"):
        words = [str(folder / f"{name}.py"), "--run-dir", str(folder / "runs" / name), "--backend", BACKENDS[-1]]
        assert main(["train", *words, "--stop-at", str(AT)]) == 85
    return folder / "runs"


# ---- what each surgery does, written anew


def with_experts(arrays: Arrays, start: Arrays, degree: int) -> Arrays:
    found = {name: array for name, array in arrays.items() if not name.startswith("mlp/")}
    for part in ("gate", "up", "down"):
        found[f"mlp/experts/{part}"] = np.stack([arrays[f"mlp/{part}"]] * 2) / 2.0**degree
    return {**found, "mlp/router/weight": start["mlp/router/weight"] * (degree == 0)}


def with_ids(arrays: Arrays, start: Arrays, degree: int) -> Arrays:
    def rows(table: np.ndarray) -> np.ndarray:
        return np.concatenate([table, np.tile(table.mean(0) * (degree == 0), (1, 1))])

    return {name: rows(array) if name in ("table", "out") else array for name, array in arrays.items()}


def with_layers(arrays: Arrays, start: Arrays, degree: int) -> Arrays:
    """The second layer is a copy of the first one that writes nothing."""

    def layers(name: str, array: np.ndarray) -> np.ndarray:
        silent = degree > 0 or name in ("blocks/attn/wo", "blocks/mlp/down")
        return np.concatenate([array, 0 * array if silent else array])

    return {name: layers(name, a) if name.startswith(BLOCK) else a for name, a in arrays.items()}


def with_features(arrays: Arrays, start: Arrays, degree: int) -> Arrays:
    found = dict(arrays)
    for part in ("gate", "up"):
        name = f"blocks/mlp/{part}"
        found[name] = np.concatenate([arrays[name], start[name][:, :, 2:] * (degree == 0)], axis=2)
    down = arrays["blocks/mlp/down"]
    return {**found, "blocks/mlp/down": np.concatenate([down, 0 * down[:, :1]], axis=1)}


def twice_as_wide(arrays: Arrays, start: Arrays, degree: int) -> Arrays:
    """Every feature is there twice. What reads features has half of each weight, and what makes the halves differ."""
    found = {}
    for name, array in arrays.items():
        reads = name.rpartition("/")[2] in ("wq", "wk", "wv", "gate", "up")
        axis = 1 if reads else array.ndim - 1
        whole = reads or name == "final_norm/scale"  # its gradient is the old one in each copy
        share = 0.5 if whole and degree == 0 else 1.0 if whole or degree == 0 else 0.5**degree
        found[name] = np.concatenate([share * array] * 2, axis)
        if reads and degree == 0:
            first, second = np.split(start[name], 2, axis)
            found[name] += np.concatenate([first - second, second - first], axis) / 2
    return found


def with_norms(arrays: Arrays, start: Arrays, degree: int) -> Arrays:
    found, g_LE = dict(arrays), arrays["blocks/attn_norm/scale"]
    for letter in "qk":
        squares_LEHD = (g_LE[:, :, None, None] * arrays[f"blocks/attn/w{letter}"]) ** 2
        size_L = np.sqrt(squares_LEHD.sum(1).mean((1, 2)))
        found[f"blocks/attn/{letter}_norm/scale"] = np.repeat(size_L[:, None], 2, axis=1) * (degree == 0)
    return found


def as_it_is(arrays: Arrays, start: Arrays, degree: int) -> Arrays:
    return arrays


def without_factors(arrays: Arrays, start: Arrays, degree: int) -> Arrays:
    return {name: array for name, array in arrays.items() if "lora_" not in name}


def merged(arrays: Arrays, start: Arrays, degree: int) -> Arrays:
    found = without_factors(arrays, start, degree)
    for name in found if degree == 0 else ():
        if f"{name}/lora_a" in arrays:
            a, b = arrays[f"{name}/lora_a"], arrays[f"{name}/lora_b"]
            product = 2.0 * np.einsum("lir,lro->lio", a.reshape(len(a), -1, 1), b.reshape(len(b), 1, -1))
            found[name] = found[name] + product.reshape(found[name].shape)
    return found


@dataclass(frozen=True)
class Case:
    base: str
    words: tuple[str, ...]
    rule: Rule


CASES = {
    "experts": Case("dense", ("--set", "model.experts=2"), with_experts),
    "vocabulary": Case("dense", ("--set", "model.vocab=8"), with_ids),
    "layers": Case("decoder", ("--set", "model.layers=2"), with_layers),
    "width": Case("decoder", ("--set", "model.mlp=3"), with_features),
    "embed": Case("decoder", ("--set", "model.embed=4"), twice_as_wide),
    "qk-norm": Case("decoder", ("--set", "model.qk_norm=true"), with_norms),
    "rope": Case(
        "decoder", ("--set", "model.rope_scaling=LinearScaling", "--set", "model.rope_scaling.factor=2"), as_it_is
    ),
    "merge-lora": Case("adapted", ("--set", "lora=none"), merged),
    "drop-lora": Case("adapted", ("--set", "lora=none"), without_factors),
}


# ---- the curves


def operated(was: Oracle, recipe: Recipe, rule: Rule) -> Oracle:
    """The oracle's own surgery, on its parameters and on the slots of AdamW; what was not trained has slots of zero."""
    made = Oracle(recipe)
    start = {n: initial_box(t, recipe.seed, (0,) * len(t.shape), t.shape) for n, t in made.infos.items()}
    made.params = rule(was.params, start, 0)
    moved = {}
    for slot, degree in (("m", 1), ("v", 2)):
        parts = {n: was.slots[n][slot] if n in was.slots else 0.0 * a for n, a in was.params.items()}
        moved[slot] = rule(parts, start, degree)
    made.slots = {n: {slot: moved[slot][n] for slot in moved} for n in made.trained}
    made.count, made.next = was.count, was.next
    return made


@pytest.mark.usefixtures("compiled_quickly")
@pytest.mark.parametrize("what", [w if w == "vocabulary" else pytest.param(w, marks=pytest.mark.full) for w in CASES])
def test_the_curve_after_surgery_is_that_of_the_oracle(what: str, runs: Path) -> None:
    """Three steps on each framework, from one checkpoint."""
    case = CASES[what]
    old = RunDir(runs / case.base).recipe()
    split, mine = open_data(old.data, seed=0).train, Oracle(old)
    for step in range(1, AT + 1):
        mine.step(old, split, step)
    wanted: list[float] = []
    for backend in BACKENDS:
        new = RunDir(runs / f"{what}-{backend}")
        words = [*case.words, "--set", f"steps={STEPS}", "--surgery", what]
        assert main(["fork", case.base, "--runs", str(runs), "--at", str(AT), "--run", new.path.name, *words]) == 0
        assert main(["resume", new.path.name, "--runs", str(runs), "--backend", backend]) == 0
        recipe = new.recipe()
        if not wanted:
            after = operated(mine, recipe, case.rule)
            given = [recipe.microbatches(split.batch(at * recipe.batch, recipe.batch)) for at in range(AT, STEPS)]
            wanted = [after.step(recipe, split, step) for step in range(AT + 1, STEPS + 1)]
            bound = bound_of(recipe, given)
        rows = new.curve()
        assert [row["step"] for row in rows] == list(range(AT + 1, STEPS + 1))
        for row, loss in zip(rows, wanted, strict=True):
            assert abs(row["loss"] - loss) <= bound * abs(loss), (backend, row["step"], row["loss"], loss, bound)
        (resumed,) = new.events("resumed")
        assert (resumed["verdict"], resumed["tensors"], resumed["differs"]) == ("changed", "equal", [])
        worst = max(abs(row["loss"] / loss - 1) for row, loss in zip(rows, wanted, strict=True))
        print(
            f"{what}, {backend}: losses {rows[0]['loss']:.5f} to {rows[-1]['loss']:.5f}, apart {worst:.1e}, {bound:.1e}"
        )
    # With a count that begins anew the second loss is another, so the comparison can fail.
    other = operated(mine, recipe, case.rule)
    other.count = 0
    other.step(recipe, split, AT + 1)
    assert abs(other.loss(recipe, split, AT + 2) - wanted[1]) > 100 * bound
