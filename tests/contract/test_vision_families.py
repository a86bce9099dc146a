"""A ViT and a SigLIP are transformers' classes: random small models give the same logits, loss, gradients and step of
AdamW, and weights that go in and out keep their bits."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints_format import Box
from portatrain.backends import reference
from portatrain.backends.state import full_name
from portatrain.checkpoint.interop import huggingface
from portatrain.checkpoint.interop.families import sizes_from
from portatrain.cli import main
from portatrain.errors import UserError
from portatrain.model.module import describe
from portatrain.recipe import Recipe, load_recipe
from portatrain.testing.tolerance import amplification, tolerance
from recipes.arrays import NpzFile
from tests.support import hub_judge
from tests.support.hub_models import as_ours, in_and_out
from tests.support.running import BACKENDS, Running, microbatches
from tests.support.vision_models import VISION, batch_of, by_file_names, given_to, made, random_config

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CLASS = {"vit": "AutoModelForImageClassification", "siglip": "AutoModel"}


@dataclass(frozen=True)
class Case:
    """A random model of a family, in transformers, in a folder and as ours."""

    kind: str
    theirs: Any
    folder: Path
    recipe: Recipe
    params: dict[str, np.ndarray]
    batch: dict[str, np.ndarray]

    def run(self, method: str, values: dict[str, np.ndarray]) -> Any:
        return reference.forward(describe(self.recipe.model.build()), values, self.batch, method=method).value

    def logits(self, *values: np.ndarray) -> np.ndarray:
        """The oracle's logits, per class or per pair."""
        named = dict(zip(self.params, values, strict=True))
        found = self.run("predict", named)
        if self.kind == "vit":
            return found
        return found[:, 0] @ found[:, 1].T * np.exp(named["scale"]) + named["bias"]


def case(kind: str, seed: int, folder: Path) -> Case:
    rng = np.random.default_rng([seed, VISION.index(kind)])
    theirs = made(random_config(kind, rng), seed)
    if kind == "vit":
        names = [f"kind {n}" for n in range(theirs.config.num_labels)]
        theirs.config.id2label, theirs.config.label2id = dict(enumerate(names)), {n: i for i, n in enumerate(names)}
    theirs.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5]}')
    sizes = sizes_from(json.loads((folder / "config.json").read_text()))
    recipe = replace(load_recipe("tiny-vit"), model=sizes)
    shapes = {full_name(role, name): t.shape for (role, name), t in describe(sizes.build()).tensors.items()}
    read = huggingface.read(folder, recipe, shapes)
    params = {name: read[f"params/{name}"](Box.whole(shapes[f"params/{name}"])) for name in recipe.describe().params}
    return Case(
        kind, theirs, folder, recipe, {n: a.astype(np.float64) for n, a in params.items()}, batch_of(sizes, rng)
    )


def logits_of(model: Any, c: Case) -> Any:
    out = model(**given_to(model, c.batch))
    return out.logits if c.kind == "vit" else out.logits_per_image


def loss_of(model: Any, c: Case) -> Any:
    """The mean loss: of a ViT the cross-entropy, which transformers leaves to a regression for one class."""
    if c.kind == "vit":
        return torch.nn.functional.cross_entropy(logits_of(model, c), torch.tensor(c.batch["label"]).long())
    return model(**given_to(model, c.batch), return_loss=True).loss


def gradients_of(model: Any, c: Case) -> tuple[float, dict[str, np.ndarray]]:
    model.zero_grad()
    loss = loss_of(model, c)
    loss.backward()
    held = {name: p.grad.numpy() for name, p in model.named_parameters()}
    return float(loss.detach()), ours_of(c, held)


def ours_of(c: Case, held: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    shapes = {name: a.shape for name, a in c.params.items()}
    return as_ours(c.recipe.model.huggingface(), shapes, by_file_names(c.kind, held))


def check_logits(c: Case) -> None:
    with torch.no_grad():
        hub_judge.check_predictions(c.logits, c.params, logits_of(c.theirs, c).numpy())


def check_step(c: Case) -> None:
    hub_judge.check_step(
        c.theirs,
        c.params,
        microbatches(c.batch),
        partial(running_on, "torch", c),
        lambda model: gradients_of(model, c),
        partial(ours_of, c),
    )


def running_on(backend: str, c: Case, **options: Any) -> Running:
    running = Running(backend, c.recipe.model.build(), **options)
    running.params = c.params
    running.state = running.backend.restore_state(running.read)
    return running


def check_round_trip(c: Case, tmp_path: Path, dtype: str) -> None:
    """The folder into a checkpoint and out: the same tensors, bit for bit, which transformers loads with the same
    logits; and the same sizes from the new config.json."""
    source, out, kind = c.folder, tmp_path / "out", getattr(torch, dtype)
    if dtype != "float32":
        source = tmp_path / dtype
        c.theirs.to(kind).save_pretrained(source)  # the last use of it
        (source / "preprocessor_config.json").write_text('{"image_mean": [0.5]}')
    before, after = in_and_out(source, out, c.recipe, tmp_path / "checkpoint", dtype)
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == kind and after[name].shape == tensor.shape
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name
    config = json.loads((out / "config.json").read_text())
    assert sizes_from(config) == c.recipe.model
    assert config.get("id2label") == json.loads((source / "config.json").read_text()).get("id2label")
    assert json.loads((out / "preprocessor_config.json").read_text()) == {"image_mean": [0.5]}
    found = []
    for folder in (source, out):
        model, told = getattr(transformers, CLASS[c.kind]).from_pretrained(
            folder, output_loading_info=True, attn_implementation="eager"
        )
        assert not told["missing_keys"] and not told["unexpected_keys"]
        with torch.no_grad():
            found.append(logits_of(model, c))
    assert torch.equal(*found)


def check(kind: str, seed: int, tmp_path: Path) -> None:
    c = case(kind, seed, tmp_path / "hub")
    check_logits(c)
    check_step(c)
    check_round_trip(c, tmp_path, "bfloat16" if seed % 2 else "float32")


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", VISION)
def test_a_random_model_is_transformers(kind: str, seed: int, tmp_path: Path) -> None:
    check(kind, seed, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("kind", VISION)
def test_two_hundred_random_models_are_transformers(kind: str, tmp_path: Path) -> None:
    for seed in range(100, 300):
        check(kind, seed, tmp_path / str(seed))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", VISION)
def test_backends_compute_what_the_oracle_does(kind: str, backend: str, tmp_path: Path) -> None:
    """Predictions and the loss, which for pairs is over all images and texts, of one and of three microbatches."""
    c = case(kind, 5, tmp_path / "hub")
    values = list(c.params.values())
    running = running_on(backend, c)

    def predicted(*given: np.ndarray) -> np.ndarray:
        return c.run("predict", dict(zip(c.params, given, strict=True)))

    exact = predicted(*values)
    most = tolerance(float(np.abs(exact).max()), amplification(predicted, values, exact, np.random.default_rng(0)))
    assert np.abs(running.backend.predict(running.state, c.batch) - exact).max() <= most

    def losses(*given: np.ndarray) -> np.ndarray:
        return np.asarray(c.run("__call__", dict(zip(c.params, given, strict=True))).sum / len(c.batch["sample"]))

    loss = losses(*values)
    most = tolerance(float(abs(loss)), amplification(losses, values, loss, np.random.default_rng(0)))
    for cut in (1, 3):
        found, _ = running.backend.gradients(running.state, microbatches(c.batch, cut), step=1)
        assert abs(found - loss) <= most, cut


@pytest.mark.parametrize("kind", VISION)
def test_a_field_that_a_family_cannot_compute_is_named(kind: str) -> None:
    config = transformers.AutoConfig.for_model(**random_config(kind, np.random.default_rng(2))).to_dict()
    sizes_from(config)
    inner = config if kind == "vit" else config["vision_config"]
    for name, value in (("hidden_act", "quick_gelu"), ("a_new_option", 3), ("patch_size", [2, 3]), ("image_size", 7)):
        more = {name: value}
        with pytest.raises(UserError, match=name if name != "patch_size" else "square"):
            sizes_from(config | more if kind == "vit" else config | {"vision_config": inner | more})


def test_towers_that_end_apart_are_refused() -> None:
    config = random_config("siglip", np.random.default_rng(2))
    config["text_config"]["projection_size"] += 2
    with pytest.raises(UserError, match=r"text_config\.projection_size"):
        sizes_from(config)


def test_a_folder_becomes_a_recipe_that_trains(tmp_path: Path) -> None:
    """`init --from`, with a file of images in place of texts; the run begins with the weights, and goes out again."""
    theirs = made(random_config("vit", np.random.default_rng(4)), 4)
    theirs.save_pretrained(tmp_path / "hub")
    (tmp_path / "hub" / "preprocessor_config.json").write_text('{"image_mean": [0.5], "image_std": [0.25]}')
    sizes = sizes_from(json.loads((tmp_path / "hub" / "config.json").read_text()))
    batch = batch_of(sizes, np.random.default_rng(0), rows=12)
    np.savez(tmp_path / "images.npz", image=batch["image"], label=batch["label"])
    file, words = str(tmp_path / "tune.py"), ["--paths", str(tmp_path / "images.npz")]
    assert main(["init", file, "--from", str(tmp_path / "hub"), *words]) == 0
    text = Path(file).read_text()
    assert "(value / 255 - [0.5]) / [0.25]" in text
    assert f"image (samples, {sizes.rows}, {sizes.columns}, {sizes.channels}), label (samples,)" in text
    recipe = load_recipe(file)
    assert recipe.model == sizes and recipe.init == str(tmp_path / "hub")
    run = ["--run-dir", str(tmp_path / "run"), "--backend", "torch"]
    small = [f"--set={word}" for word in ("steps=2", "batch=4", "schedule.warmup=1", "data.validation=0")]
    assert main(["train", file, *run, *small]) == 0
    assert main(["ckpt", "export", str(tmp_path / "run"), str(tmp_path / "out"), "--to", "huggingface"]) == 0
    tuned = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    pairs = zip(tuned.parameters(), theirs.parameters(), strict=True)
    far = max(float((a - b).detach().abs().max()) for a, b in pairs)
    assert 0 < far < 1e-3 and (tmp_path / "out" / "preprocessor_config.json").is_file()  # two steps of 2e-5


def test_a_file_of_arrays_that_is_none_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "uneven.npz", image=np.zeros((3, 2)), label=np.zeros(2))
    (tmp_path / "text.npz").write_text("no archive")
    for name, said in (("none.npz", "none.npz"), ("text.npz", "a .npz file"), ("uneven.npz", "one row a sample")):
        with pytest.raises(UserError, match=said):
            len(NpzFile(path=str(tmp_path / name)))
