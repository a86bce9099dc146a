"""Steps of a model with packed documents under FlexAttention: the gradients, and one block mask for all layers.

There is no GPU here: the backend believes that it runs on one, and the operator's own reference runs on the CPU, as in
test_flex_attention.py. So the kernel of Triton is not tested, and all around it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from portatrain.backends import choose_kernel
from recipes.models.decoder import DecoderConfig
from tests.support.running import Running, microbatches, tokens_batch

torch = pytest.importorskip("torch")

from portatrain.backends.torch import flex, one_device  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own code asks

KEEP = "keep:attention+hidden"
LAYERS = 3
MODEL = DecoderConfig(vocab=64, embed=32, layers=LAYERS, heads=2, kv_heads=1, head_dim=16, mlp=48, softcap=5.0)
BATCH = microbatches(tokens_batch(vocab=64, batch=4, seq=40), 2)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = one_device.Site.of

    def of(program: Any, *, device: str, **given: Any) -> Any:
        return dataclasses.replace(plain(program, device=device, **given), device="cuda")

    monkeypatch.setattr(one_device.Site, "of", of)


@pytest.fixture
def masks_made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    made: list[int] = []

    def counted(*given: Any) -> Any:
        made.append(1)
        return plain(*given)

    plain = flex.block_mask
    monkeypatch.setattr(flex, "block_mask", counted)
    return made


def same(found: tuple[float, Any], expected: tuple[float, Any]) -> None:
    assert abs(found[0] - expected[0]) <= 1e-6 * abs(expected[0])
    for name, gradient in expected[1].items():
        apart = np.linalg.norm(found[1][name] - gradient)
        assert apart <= 2e-6 * np.linalg.norm(gradient), name


@pytest.fixture(scope="module")
def expected() -> tuple[float, Any]:
    running = Running("torch", MODEL.build())
    return running.backend.gradients(running.state, BATCH, step=3)


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("remat", ["none", "block", KEEP])
def test_layers_share_a_block_mask(remat: str, expected: Any, masks_made: list[int]) -> None:
    running = Running("torch", MODEL.build(), remat=remat)
    choose_kernel.taken()
    same(running.backend.gradients(running.state, BATCH, step=3), expected)
    assert {c["kernel"] for c in choose_kernel.taken()} == {"flex"}
    assert len(masks_made) == 2  # one a microbatch, also where layers are computed again


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("remat", [*(pytest.param(r, marks=pytest.mark.full) for r in ("none", "block")), KEEP])
def test_compiled_layers_hand_the_block_mask_on(remat: str, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.backends.debugging import aot_eager

    torch._dynamo.reset()
    sorts: list[int] = []

    def counted(self: Any, graph: Any, inputs: Any) -> Callable[..., Any]:
        text = "\n".join(m.code for m in graph.modules() if hasattr(m, "code"))
        if "flex_attention" in text:
            sorts.append(text.count("torch.sort("))
        return aot_eager(graph, inputs)

    monkeypatch.setattr(one_device.OneDevice, "_counted", counted)
    running = Running("torch", MODEL.build(), remat=remat, compile=True)
    same(running.backend.gradients(running.state, BATCH, step=3), expected)
    # The first layer makes the mask: four lists of blocks. All others share a graph that makes none.
    assert sorts == [4, 0]
    same(running.backend.gradients(running.state, BATCH, step=3), expected)
    assert len(sorts) == 2
