"""Every family is transformers' class of its model_type: random small models give the same logits, loss, gradients and
step, and weights that go in and out keep their bits."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from portatrain.backends import reference
from portatrain.checkpoint.interop.families import FAMILIES as REGISTERED
from portatrain.checkpoint.interop.families import sizes_from
from portatrain.checkpoint.interop.hub_config import differences
from portatrain.errors import UserError
from portatrain.model.module import describe
from portatrain.recipe import Recipe
from portatrain.testing.tolerance import amplification, tolerance
from tests.support import hub_judge
from tests.support.hub_models import (
    FAMILIES,
    RECURRENT,
    ROUTED,
    SEQ,
    as_ours,
    by_file_names,
    in_and_out,
    made,
    ours,
    random_config,
)
from tests.support.running import BACKENDS, Running, microbatches
from tests.support.vision_models import VISION

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

EVERY = (*FAMILIES, *ROUTED, *RECURRENT)


@dataclass(frozen=True)
class Case:
    """A random model of a family, in transformers, in a folder and as ours."""

    kind: str
    theirs: Any
    folder: Path
    recipe: Recipe
    params: dict[str, np.ndarray]
    states: dict[str, np.ndarray]
    batch: dict[str, np.ndarray]

    def forward(self, *values: np.ndarray) -> np.ndarray:
        """The oracle's logits."""
        definition = describe(self.recipe.model.build())
        named = dict(zip(self.params, values, strict=True))
        states = {**reference.initial_states(definition), **self.states}
        return reference.forward(definition, named, self.batch, states=states, method="predict").value


def case(kind: str, seed: int, folder: Path) -> Case:
    rng = np.random.default_rng([seed, EVERY.index(kind)])
    theirs = made(random_config(kind, rng), seed)
    theirs.save_pretrained(folder)
    recipe, params, states = ours(folder)
    tokens = rng.integers(0, recipe.model.vocab, (2, SEQ + 1)).astype(np.int32)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "mask": np.ones((2, SEQ), np.float32)}
    batch |= {"sample": np.arange(2, dtype=np.int64)}
    return Case(kind, theirs, folder, recipe, {n: a.astype(np.float64) for n, a in params.items()}, states, batch)


def logits_of(model: Any, batch: dict[str, np.ndarray]) -> Any:
    return model(torch.tensor(batch["tokens"], dtype=torch.long)).logits


def gradients_of(model: Any, c: Case) -> tuple[float, dict[str, np.ndarray]]:
    """The mean loss and its gradients, by our names."""
    model.zero_grad()
    targets = torch.tensor(c.batch["targets"], dtype=torch.long)
    loss = torch.nn.functional.cross_entropy(logits_of(model, c.batch).flatten(0, 1), targets.flatten())
    loss.backward()
    return float(loss.detach()), ours_of(c, {name: p.grad.numpy() for name, p in model.named_parameters()})


def ours_of(c: Case, held: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    shapes = {name: a.shape for name, a in c.params.items()}
    return as_ours(c.recipe.model.huggingface(), shapes, by_file_names(c.kind, held))


def check_logits(c: Case) -> None:
    with torch.no_grad():
        hub_judge.check_predictions(c.forward, c.params, logits_of(c.theirs, c.batch).numpy())


def check_step(c: Case) -> None:
    hub_judge.check_step(
        c.theirs,
        c.params,
        microbatches(c.batch),
        partial(running_on, "torch", c),
        lambda model: gradients_of(model, c),
        partial(ours_of, c),
        loss_moves=lambda loss, _: 10 * abs(loss),
    )


def running_on(backend: str, c: Case, **options: Any) -> Running:
    made = Running(backend, c.recipe.model.build(), **options)
    made.params, made.states = c.params, {**made.states, **c.states}
    made.state = made.backend.restore_state(made.read)
    return made


def check_round_trip(c: Case, tmp_path: Path, dtype: str) -> None:
    """The folder into a checkpoint and out: the same tensors, bit for bit, which transformers loads with the same
    logits; and the same sizes from the new config.json."""
    source, out, kind = c.folder, tmp_path / "out", getattr(torch, dtype)
    if dtype != "float32":
        source = tmp_path / dtype
        c.theirs.to(kind).save_pretrained(source)  # the last use of it: its rotary table is rounded as well
    before, after = in_and_out(source, out, c.recipe, tmp_path / "checkpoint", dtype)
    assert after.keys() >= before.keys()  # transformers leaves out a second name of a tied table
    for name, tensor in before.items():
        if name.endswith("correction_bias"):  # a state of the router, which stays float32
            assert torch.equal(after[name], tensor.float())
            continue
        assert after[name].dtype == kind and torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert sizes_from(json.loads((out / "config.json").read_text())) == c.recipe.model
    found, eager = [], {"attn_implementation": "eager", "experts_implementation": "eager"}
    for folder in (source, out):
        known = transformers.AutoConfig.from_pretrained(folder)
        if getattr(known, "activation_function", None) == "gelu_pytorch_tanh":
            known.activation_function = "gelu_new"  # the same function, which transformers has twice, rounded otherwise
        model, told = transformers.AutoModelForCausalLM.from_pretrained(
            folder, config=known, output_loading_info=True, **eager
        )
        assert not told["missing_keys"] and not told["unexpected_keys"]
        with torch.no_grad():
            found.append(logits_of(model, c.batch))
    assert torch.equal(*found)


def check(kind: str, seed: int, tmp_path: Path) -> None:
    c = case(kind, seed, tmp_path / "hub")
    check_logits(c)
    check_step(c)
    check_round_trip(c, tmp_path, "bfloat16" if seed % 2 else "float32")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", EVERY)
def test_a_random_model_is_transformers(kind: str, seed: int, tmp_path: Path) -> None:
    check(kind, seed, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("kind", EVERY)
def test_two_hundred_random_models_are_transformers(kind: str, tmp_path: Path) -> None:
    for seed in range(100, 300):
        check(kind, seed, tmp_path / str(seed))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "kind", ["gemma3_text", "olmo2", "deepseek_v3", "gpt_oss", "olmo_hybrid"]
)  # Stacks of several kinds; norms
def test_backends_compute_what_the_oracle_does(kind: str, backend: str, tmp_path: Path) -> None:
    c = case(kind, 5, tmp_path / "hub")
    values = list(c.params.values())
    exact = c.forward(*values)
    most = tolerance(float(np.abs(exact).max()), amplification(c.forward, values, exact, np.random.default_rng(0)))
    running = running_on(backend, c)
    assert np.abs(running.backend.predict(running.state, c.batch) - exact).max() <= most


def test_the_table_of_cases_has_every_family() -> None:
    assert {*EVERY, *VISION} == set(REGISTERED.ours)


def test_a_model_that_no_family_covers_is_told_the_nearest() -> None:
    config = random_config("llama", np.random.default_rng(0))
    with pytest.raises(UserError) as told:
        sizes_from({**config, "model_type": "granite", "embedding_multiplier": 12.0, "residual_multiplier": 0.22})
    assert "nearest is llama" in str(told.value) and "embedding_multiplier 12.0" in str(told.value)


@pytest.mark.parametrize("kind", EVERY)
def test_a_field_that_a_family_cannot_compute_is_named(kind: str) -> None:
    config = transformers.AutoConfig.for_model(**random_config(kind, np.random.default_rng(2))).to_dict()
    sizes_from(config)
    activation = {"gpt2": "activation_function", "gemma2": "hidden_activation", "gemma3_text": "hidden_activation"}
    for name, value in ((activation.get(kind, "hidden_act"), "quick_gelu"), ("a_new_option", 3)):
        with pytest.raises(UserError, match=name):
            sizes_from({**config, name: value})


@pytest.mark.parametrize("kind", EVERY)
def test_a_field_that_is_missing_has_the_default_of_transformers(kind: str) -> None:
    """Every field of every family, left out or null: the function that transformers makes of it, or a refusal."""
    known = transformers.AutoConfig.for_model(**random_config(kind, np.random.default_rng(7)))
    full = {**json.loads(known.to_json_string(use_diff=False)), "model_type": kind}
    wrong, refused = [], 0
    for name in sorted(full.keys() - {"model_type"}):
        for config in ({n: v for n, v in full.items() if n != name}, {**full, name: None}):
            try:
                made = type(known).from_dict(json.loads(json.dumps(config)))
            except Exception:
                continue  # transformers takes no such config
            meant = {**json.loads(made.to_json_string(use_diff=False)), "model_type": kind}
            try:
                mine = sizes_from(config)
            except UserError:
                refused += 1
                continue
            if list(differences(mine.huggingface().config, sizes_from(meant).huggingface().config, {})):
                wrong.append((name, config.get(name, "left out"), meant.get(name)))
    assert not wrong and refused < 2 * len(full) / 3


@pytest.mark.parametrize("scaling", [{"rope_type": "dynamic", "factor": 2.0}, {"rope_type": "yarn", "factor": 4.0}])
def test_a_length_that_a_scaling_reads_is_not_guessed(scaling: dict[str, Any]) -> None:
    full = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}
    full |= {"vocab_size": 64, "intermediate_size": 48, "rope_scaling": scaling}
    assert sizes_from({**full, "max_position_embeddings": 512}).rope_scaling.original == 512
    with pytest.raises(UserError, match="max_position_embeddings"):
        sizes_from(full)
