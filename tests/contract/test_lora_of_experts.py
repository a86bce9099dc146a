"""LoRA on experts and on latent attention, from training to transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints_format import LocalStore, Reader
from portatrain.backends.base import Context, backend_class
from portatrain.backends.program import make_program
from portatrain.backends.reference.watched import watch_oracle
from portatrain.checkpoint.saver import reads
from portatrain.cli import main
from portatrain.model.lora import LoRA, adapt, is_factor
from portatrain.recipe import Recipe, load_recipe
from portatrain.runs.run_dir import RunDir
from portatrain.training.trainer import train
from recipes.models.mixtral import MixtralConfig
from tests.support.running import BACKENDS, Running, microbatches, tokens_batch

STEPS = 3
MIXTRAL = MixtralConfig(vocab=256, embed=24, layers=2, heads=3, experts=4, chosen=2, expert_mlp=12)


def recipes() -> dict[str, Recipe]:
    latent = load_recipe("benchmarks/resume_mixture.py")
    lora = LoRA(rank=2, alpha=8.0, targets=("*/attn/w*", "*/experts/*", "*/shared/*"))
    given: dict[str, Any] = {"steps": STEPS, "batch": 4, "ema_decay": None, "eval_every": None, "lora": lora}
    given["optimizer"] = replace(latent.optimizer, lr=0.03)
    mixtral = replace(lora, targets=("*/attn/*", "*/experts/*"))
    return {
        "latents and a mixture": replace(latent, **given),
        "Mixtral": replace(latent, model=MIXTRAL, **{**given, "lora": mixtral}),
    }


@pytest.mark.full
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("kind", "backend"), list(zip(recipes(), BACKENDS, strict=False)))
def test_what_is_trained_leaves_merged_for_transformers(kind: str, backend: str, tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    recipe, run, merged = recipes()[kind], tmp_path / "run", tmp_path / "merged"
    assert train(recipe, RunDir(run), backend=backend) == 0
    tokens = np.random.default_rng(0).integers(0, 256, (2, 16)).astype(np.int32)
    lowered = backend_class(backend)(make_program(recipe))
    with LocalStore(run / f"checkpoints/step-{STEPS:08d}") as store:
        reader = Reader(store)
        factors = {n for n in reader.names if n.startswith("params/") and is_factor(n)}
        assert len([n for n in factors if "/experts/" in n]) == 6 and all(np.any(reader.read(n)) for n in factors)
        given = {"tokens": tokens, "sample": np.arange(2, dtype=np.int64)}
        ours = lowered.predict(lowered.restore_state(reads(reader)), given)
        without = {n for n in factors if n.endswith("lora_b")}

        def plain(role: str, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
            found = reads(reader)(role, name, offset, shape)
            return np.zeros_like(found) if f"{role}/{name}" in without else found

        before = lowered.predict(lowered.restore_state(plain), given)
    assert main(["ckpt", "export", str(run), str(merged), "--to", "huggingface"]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(merged).eval()
    with torch.no_grad():
        theirs = model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    bound = 2e-5 * np.abs(ours).max()
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=bound)
    assert np.abs(before - ours).max() > 100 * bound  # what was trained matters


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_recorded_step_has_the_factors_and_their_gradients(backend: str) -> None:
    """What `portatrain bisect` judges: the call of the experts, with every weight and its two factors."""
    model = adapt(replace(MIXTRAL, layers=1, tied=False).build(), LoRA(rank=2, targets=("*/experts/*",)))
    names = [f"blocks/mlp/experts/{w}{end}" for w in ("gate", "up", "down") for end in ("", "/lora_a", "/lora_b")]
    factors = frozenset(name for name in names if is_factor(name))
    running = Running(backend, model, trainable=factors)
    batch = tokens_batch(vocab=256, batch=2, seq=8)
    (seen,) = running.backend.watch(running.state, microbatches(batch), step=1)  # type: ignore[attr-defined]
    (call,) = [c for c in seen.calls if c.name == "experts"]
    assert len(call.args) == 3 + len(names)  # tokens, their experts and weights
    for name, gradient in zip(names, call.arg_grads[3:], strict=True):
        if name in factors:
            assert gradient is not None and np.any(gradient), name
            np.testing.assert_allclose(gradient, seen.grads[name][0], rtol=1e-6, atol=0)
    context = Context(seed=5, step=1, training=True)
    calls, _ = watch_oracle(running.definition, running.params, batch, context, states=running.states)
    (oracle,) = [c for c in calls if c.name == "experts"]
    assert [tag and tag[0] for tag in oracle.tags[3:]] == names
    assert oracle.template == call.template
