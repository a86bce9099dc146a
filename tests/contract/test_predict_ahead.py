"""Multi-token prediction: the losses and gradients of the paper, computed document by document in float64, on every
backend and for every microbatch; its tensors under the names that DeepSeek-V3's files have."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints_format import LocalStore, Reader
from portatrain.backends import reference
from portatrain.backends.base import Context
from portatrain.checkpoint.interop import export_import, huggingface
from portatrain.checkpoint.interop.families import sizes_from
from portatrain.errors import UserError
from portatrain.model.module import describe
from portatrain.testing.tolerance import MOVE, tolerance
from recipes.models import ahead
from recipes.models.deepseek_v3 import DeepseekV3Config
from tests.support.hub_models import as_ours, by_file_names, recipe_for
from tests.support.running import BACKENDS, Running, microbatches, tokens_batch

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.support.ahead_oracle import CONFIG, Oracle  # noqa: E402

DRAWS, WEIGHT, DEPTH = 3, 0.3, 2
BATCH = tokens_batch(vocab=CONFIG["vocab_size"], batch=4, seq=16, seed=3)


@dataclass
class Truth:
    """The sizes, parameters and States of ours, and what the oracle says in float64."""

    sizes: DeepseekV3Config
    params: dict[str, np.ndarray]
    states: dict[str, np.ndarray]
    main_B: np.ndarray
    ahead_B: list[np.ndarray]
    loss: float
    gradients: dict[str, np.ndarray]
    most: dict[str, float]


@cache
def truth() -> Truth:
    oracle = Oracle(layers=2, depth=DEPTH)
    config, held = oracle.folder()
    sizes = replace(sizes_from(config), predict_depth=DEPTH, predict_weight=WEIGHT)
    hub, definition = sizes.huggingface(), describe(sizes.build())
    shapes = {name: t.shape for name, t in definition.params.items()}
    files = by_file_names("deepseek_v3", {name: t.numpy() for name, t in held.items()})
    params = as_ours(hub, shapes, files)
    states = {**reference.initial_states(definition)}
    for row in hub.rows:
        if row.state:
            states[row.ours][row.leading] = files[row.theirs]
    oracle.double()
    start = {name: p.detach().clone() for name, p in oracle.named_parameters()}

    def gradients() -> tuple[Any, dict[str, np.ndarray]]:
        oracle.zero_grad()
        main, more = oracle.losses(BATCH)
        loss = (main.sum() + WEIGHT / DEPTH * sum(m.sum() for m in more)) / float(BATCH["mask"].sum())
        loss.backward()
        found = {name: p.grad.numpy().copy() for name, p in oracle.named_parameters()}
        return (main, more, loss), as_ours(hub, shapes, by_file_names("deepseek_v3", found))

    (main, more, loss), exact = gradients()
    rng, change = np.random.default_rng(0), dict.fromkeys(exact, 0.0)
    for _ in range(DRAWS):
        with torch.no_grad():
            for name, p in oracle.named_parameters():
                p.copy_(start[name] * (1 + MOVE * torch.tensor(rng.choice((-1.0, 1.0), tuple(p.shape)))))
        for name, near in gradients()[1].items():
            change[name] = max(change[name], float(np.abs(near - exact[name]).max()) / MOVE)
    # Of ours, and of the float32 parts that transformers keeps.
    most = {name: 2 * tolerance(float(np.abs(g).max()), change[name]) for name, g in exact.items()}
    main_B, ahead_B = main.detach().numpy(), [m.detach().numpy() for m in more]
    return Truth(sizes, params, states, main_B, ahead_B, float(loss.detach()), exact, most)


def forward(*, training: bool) -> Any:
    t = truth()
    context = Context(seed=1, step=1, training=training)
    return reference.forward(describe(t.sizes.build()), t.params, BATCH, context, states=t.states)


def off() -> float:
    """How far the float64 backend is from the oracle, over the loss."""
    t, found = truth(), forward(training=True).value
    due_B = t.main_B + WEIGHT / DEPTH * sum(t.ahead_B)
    return float(np.abs(np.asarray(found.loss_B) - due_B).max() / np.abs(due_B).max())


def test_every_document_has_the_loss_that_it_has_alone() -> None:
    t, found = truth(), forward(training=False)
    assert off() < 1e-6  # transformers' norms and router are float32
    np.testing.assert_allclose(found.value.loss_B, t.main_B, rtol=1e-6)  # of the next token, in an evaluation
    np.testing.assert_allclose(found.value.weight_B, BATCH["mask"].sum(1), rtol=1e-12)


WRONG = {
    "targets in the next document": lambda ops, batch, depth: whole(ops, {**batch, "segment_ids": None}, depth),
    "targets past the end": lambda ops, batch, depth: ops.roll(batch["mask"], -depth, axis=1),
    "the weight of the token before": lambda ops, batch, depth: whole(ops, batch, depth - 1),
}
whole = ahead.mask_of


@pytest.mark.parametrize("wrong", WRONG)
def test_the_oracle_sees(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "mask_of", WRONG[wrong])
    assert off() > 1e-3


@pytest.mark.parametrize(("backend", "n"), [(b, n) for b in BACKENDS for n in ((1, 2) if b == "torch" else (2,))])
def test_backends_have_its_gradients_for_any_microbatch(backend: str, n: int) -> None:
    t = truth()
    running = Running(backend, t.sizes.build())
    running.params, running.states = t.params, t.states
    running.state = running.backend.restore_state(running.read)
    loss, found = running.backend.gradients(running.state, microbatches(BATCH, n), step=1)
    assert abs(loss - t.loss) <= 2 * tolerance(t.loss, 10 * t.loss)
    wrong = {name: (float(np.abs(found[name] - g).max()), t.most[name]) for name, g in t.gradients.items()}
    assert not {name: w for name, w in wrong.items() if w[0] > w[1]}
    assert all(np.abs(g).max() > 0 for g in t.gradients.values())
    evaluated = running.backend.eval(running.state, BATCH)
    recorded: dict[str, Any] = {}
    if backend == "torch":  # jax would compile once more; on meshes it is held to one device
        running.state, result = running.backend.step(running.state, microbatches(BATCH, n), step=1, scale=1.0)
        recorded = dict(result.aux)
    np.testing.assert_allclose(evaluated["loss_B"], t.main_B, rtol=1e-5)
    for depth, due_B in enumerate(t.ahead_B, start=1):
        weight_B = sum_of_weights(depth)
        mean_B = due_B / np.where(weight_B > 0, weight_B, 1.0)
        np.testing.assert_allclose(evaluated[f"predict_loss_{depth}"], mean_B, rtol=1e-5)
        if recorded:
            np.testing.assert_allclose(float(recorded[f"predict_loss_{depth}"]), mean_B.mean(), rtol=1e-5)


def sum_of_weights(depth: int) -> np.ndarray:
    """The weights of the targets of a depth, document by document."""
    found = np.zeros(len(BATCH["tokens"]))
    for row, segments in enumerate(BATCH["segment_ids"]):
        for document in np.unique(segments):
            found[row] += BATCH["mask"][row][segments == document][depth:].sum()
    return found


# ---- files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as DeepSeek-V3's: its experts one by one, and its tables again in each further layer."""
    from safetensors.numpy import save_file

    config, held = Oracle(layers=2, depth=1).folder()
    there = tmp_path / "hub"
    there.mkdir()
    (there / "config.json").write_text(json.dumps(config))
    files = by_file_names("deepseek_v3", {name: t.detach().numpy() for name, t in held.items()})
    save_file({name: np.ascontiguousarray(a) for name, a in files.items()}, there / "model.safetensors")
    return there


def _imported(folder: Path, depth: int, store: Path) -> tuple[Any, Path]:
    sizes = replace(sizes_from(json.loads((folder / "config.json").read_text())), predict_depth=depth)
    recipe = recipe_for(sizes)
    export_import.import_from(folder, "huggingface", recipe, lambda _: LocalStore(store, create=True))
    out = store.parent / f"out-{depth}"
    with LocalStore(store) as opened:
        export_import.export_to(Reader(opened), "huggingface", out, dtype="float32")
    return recipe, out


def _tensors(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return {name: a for file in folder.glob("*.safetensors") for name, a in load_file(file).items()}


def test_a_further_layer_is_left_out_and_told_or_comes_in_and_out_with_its_bits(folder: Path, tmp_path: Path) -> None:
    before = _tensors(folder)
    further = {name for name in before if name.startswith("model.layers.2.")}
    recipe, out = _imported(folder, 0, tmp_path / "plain")
    assert _tensors(out).keys() == before.keys() - further
    said = huggingface.left_out(folder, recipe.model.huggingface())
    assert f"{len(further)} tensors" in said and "model.predict_depth" in said and "model.layers.2." in said
    recipe, out = _imported(folder, 1, tmp_path / "whole")
    after = _tensors(out)
    assert after.keys() == before.keys()
    assert all(np.array_equal(after[name], array) for name, array in before.items())
    assert json.loads((out / "config.json").read_text())["num_nextn_predict_layers"] == 1
    assert not huggingface.left_out(folder, recipe.model.huggingface())
    with pytest.raises(UserError, match=r"not there: model\.layers\.3\."):
        _imported(folder, 2, tmp_path / "more")


@pytest.mark.parametrize("field", ["predict_depth", "predict_weight"])
def test_fewer_than_no_modules_are_refused(field: str) -> None:
    """A depth of -1 would be a model without its last layer."""
    sizes = sizes_from(CONFIG | {"num_hidden_layers": 2})
    with pytest.raises(UserError, match=rf"model\.{field}: expected .* of at least 0, got -1"):
        replace(sizes, **{field: -1})
