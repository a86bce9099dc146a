"""A diffusion transformer's flow: what it is trained towards, what is hidden of the classes, and Euler's method."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from portatrain.backends import reference
from portatrain.backends.base import Context
from portatrain.backends.reference.ops import ReferenceOps
from portatrain.errors import UserError
from portatrain.model.module import describe
from recipes.models.dit import DiT, DiTConfig, sampled
from recipes.pictures import LENGTH, Pictures
from recipes.sample_images import main, page
from tests.support.running import image_batch

SIZES = DiTConfig(rows=8, columns=8, channels=1, patch=4, classes=5, embed=8, layers=1, heads=1, unlabelled=0.5)


class Plain(DiT):
    """A velocity that shows what the model was given: the image, its time and its label."""

    def velocity(self, ops: Any, image: Any, time_B: Any, label_B: Any) -> Any:
        return image + 10 * time_B[:, None, None, None] + 100 * label_B[:, None, None, None]


@pytest.mark.parametrize("training", [True, False])
def test_the_loss_is_that_of_the_straight_line(training: bool) -> None:
    """Written out in float64: x_t = (1 - t) noise + t image, and the target image - noise."""
    batch = image_batch(classes=5, batch=64)
    definition = describe(Plain(SIZES))
    step = 3 if training else 0
    found = reference.forward(
        definition, reference.initial(definition), batch, Context(seed=1, step=step, training=training)
    )
    ops = ReferenceOps(seed=1, step=step, sample=batch["sample"], training=training)
    site = definition.model.site
    noise = ops.noise(8, 8, 1, site=site).astype(np.float64)
    time, drawn = (ops.noise(1, site=site, kind="uniform", draw=n)[:, 0].astype(np.float64) for n in (1, 2))
    label = np.where(drawn < (0.5 if training else 0.0), 5, batch["label"])
    image = batch["image"].astype(np.float64) * 2 - 1
    t, c = (a[:, None, None, None] for a in (time, label))
    velocity = (1 - t) * noise + t * image + 10 * t + 100 * c
    assert np.allclose(found.value.loss_B, ((velocity - (image - noise)) ** 2).mean((1, 2, 3)), rtol=1e-12, atol=0)
    assert (found.value.weight_B == 1).all()
    assert (label == 5).sum() == (0 if not training else (drawn < 0.5).sum()) and 20 < (drawn < 0.5).sum() < 44


def test_a_fresh_model_predicts_no_velocity() -> None:
    definition = describe(SIZES.build())
    batch = {**image_batch(classes=5, batch=3), "time": np.full(3, 0.3, np.float32)}
    found = reference.forward(definition, reference.initial(definition), batch, method="predict").value
    assert found.shape == (3, 8, 8, 1) and not found.any()


@pytest.mark.parametrize("steps", [1, 7])
def test_euler_follows_straight_lines_exactly(steps: int) -> None:
    """A velocity that leads to an image by time 1 leads Euler's method there, in any number of steps."""
    images = np.random.default_rng(0).random((3, 8, 8, 1))
    asked = []

    def predict(batch: Any) -> np.ndarray:
        asked.append((float(batch["time"][0]), batch["label"].tolist()))
        target = images if batch["label"].max() < 5 else 0 * images + 0.5
        return (2 * target - 1 - batch["image"]) / (1 - batch["time"][:, None, None, None])

    labels = np.array([0, 4, 2])
    assert np.allclose(sampled(predict, SIZES, labels, steps=steps), images, atol=1e-5)
    assert asked == [(pytest.approx(n / steps), [0, 4, 2]) for n in range(steps)]
    # The line that guidance follows leads as much further as it weighs the class: here to free + 0.5 (own - free).
    half = sampled(predict, SIZES, labels, steps=steps, guidance=0.5)
    assert np.allclose(half, 0.5 + 0.5 * (images - 0.5), atol=1e-5)


def test_an_image_does_not_depend_on_the_others() -> None:
    def predict(batch: Any) -> np.ndarray:
        return -0.5 * batch["image"]

    many = sampled(predict, SIZES, np.array([0, 1, 2]), steps=3)
    assert (sampled(predict, SIZES, np.array([0, 1]), steps=3) == many[:2]).all()
    assert (sampled(predict, SIZES, np.array([0, 1, 2]), steps=3, seed=1) != many).any()


def test_mistakes(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for labels, steps in (([6], 2), ([-1], 2), ([], 2), ([0], 0)):
        with pytest.raises(UserError):
            sampled(lambda batch: batch["image"], SIZES, np.array(labels), steps=steps)
    for wrong in ({"unlabelled": 1.0}, {"frequencies": 0}, {"heads": 3}, {"layers": 0}, {"classes": 0}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            DiTConfig(**{**vars(SIZES), **wrong})
    assert main([str(tmp_path / "none")]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_the_page_has_every_pixel() -> None:
    images = np.zeros((4, 2, 3, 1), np.float32)
    images[2, 1, 2] = 1
    found = page(images, 2)
    assert found.count("<rect") == 24 and found.count("#ffffff") == 1


def test_pictures_are_what_their_texts_say() -> None:
    """The same at every call, and all texts fit."""
    source = Pictures(count=300)
    texts = []
    for index in range(len(source)):
        sample = source.sample(index)
        text = bytes(sample["tokens"].tolist()).rstrip(b"\0").decode()
        texts.append(text)
        assert sample["image"].shape == (16, 16, 3) and sample["tokens"].shape == (LENGTH,) and len(text) <= LENGTH
        first, second = (half.split() for half in text.replace("left of", "|").replace("above", "|").split(" | "))
        halves = np.split(sample["image"], 2, axis=0 if "above" in text else 1)
        for (colour, _), half in zip((first, second), halves, strict=True):
            bright = half.reshape(-1, 3)[half.max(-1).ravel() > 0.5].mean(0)  # the pixels of the shape
            red, green, blue = bright > 0.15
            assert {
                "red": (red, green, blue) == (True, False, False),
                "green": (red, green, blue) == (False, True, False),
                "blue": (red, green) == (False, False),
                "yellow": (red, green, blue) == (True, True, False),
                "white": bright.min() > 0.9,
                "pink": red and blue and not green,
            }[colour], (text, bright)
    assert len(set(texts)) > 200
