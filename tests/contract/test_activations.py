"""What a measured step records of activations (`model/measured.py`), beside the same numbers by NumPy in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from portatrain.backends import kernels
from portatrain.backends.reference.guard import unwrapped
from portatrain.model.measured import KINDS
from portatrain.model.module import Module, Param, Stack
from portatrain.training.statistics import flat
from tests.support.running import BACKENDS, Running, microbatches, tokens_batch

V, E, H, K, D, F, LAYERS, B, S = 32, 16, 4, 2, 8, 24, 3, 4, 16
WINDOW = 5

SEEN: dict[str, list[Any]] | None = None
"""What the oracle's modules return and the inputs of its activation functions; the frameworks leave it alone."""


def seen(name: str, value: Any) -> Any:
    if SEEN is not None:
        SEEN.setdefault(name, []).append(np.asarray(unwrapped(value), np.float64))
    return value


class Heads(Module):
    def __init__(self) -> None:
        self.q, self.k = Param(embed=E, heads=H, head_dim=D), Param(embed=E, kv_heads=K, head_dim=D)
        self.v, self.out = Param(embed=E, kv_heads=K, head_dim=D), Param(heads=H, head_dim=D, embed=E, fan_in_axes=2)

    def __call__(self, ops, x, segments):  # type: ignore[no-untyped-def]
        q, k = ops.einsum("bse,ehd->bshd", x, self.q), ops.einsum("bse,ekd->bskd", x, self.k)
        seen("q", q), seen("k", k)
        v = ops.einsum("bse,ekd->bskd", x, self.v)
        out = ops.attention(q, k, v, window=WINDOW, segment_ids=segments, softcap=2.0)
        return seen(f"rms/{self.path}", ops.einsum("bshd,hde->bse", out, self.out))


class Units(Module):
    """Two activation functions: the second one is told apart by its number."""

    def __init__(self) -> None:
        self.up, self.bias = Param(embed=E, mlp=F), Param(mlp=F, fan_in_axes=0, init="zeros")
        self.down = Param(mlp=F, embed=E)

    def __call__(self, ops, x):  # type: ignore[no-untyped-def]
        h = ops.bias(ops.einsum("bse,ef->bsf", x, self.up), self.bias)
        y = ops.einsum("bsf,fe->bse", ops.relu(seen(f"dead/{self.path}", h)), self.down)
        return seen(f"rms/{self.path}", ops.silu(seen(f"dead/{self.path}.2", y)))


class Same(Module):
    def __call__(self, ops, x):  # type: ignore[no-untyped-def]
        return x


class Pair(Module):
    """Its two arrays are measured together; what its function of a scan calls is not."""

    def __init__(self) -> None:
        self.inner = Units()

    def __call__(self, ops, x):  # type: ignore[no-untyped-def]
        def added(carry, x_BE):  # type: ignore[no-untyped-def]
            return carry + self.inner(ops, x_BE[:, None])[:, 0], carry

        total, each = ops.scan(added, x[:, 0], x)
        seen(f"rms/{self.path}", np.concatenate([np.ravel(unwrapped(a)) for a in (total, each)])) if SEEN else None
        return total, {"each": each, "number": 3}


class Layer(Module):
    def __init__(self) -> None:
        self.heads, self.units, self.same = Heads(), Units(), Same()

    def __call__(self, ops, x, segments):  # type: ignore[no-untyped-def]
        x = x + self.heads(ops, x, segments)
        return seen(f"rms/{self.path}", x + self.units(ops, self.same(ops, x))), None


class Net(Module):
    def __init__(self) -> None:
        self.table, self.layers, self.pair = Param(vocab=V, embed=E, fan_in_axes=0), Stack(Layer(), LAYERS), Pair()
        self.gains = Param(embed=E, fan_in_axes=0, init="ones")

    def __call__(self, ops, batch):  # type: ignore[no-untyped-def]
        x = ops.gelu(seen("dead/.", ops.bias(ops.embed(self.table, batch["tokens"]), self.gains)))
        x, _ = self.layers(ops, x, batch["segment_ids"])
        total, more = self.pair(ops, x)
        return ops.cross_entropy(x + more["each"] + total[:, None], self.table, batch["targets"], mask=batch["mask"])


def batch() -> dict[str, np.ndarray]:
    return tokens_batch(vocab=V, batch=B, seq=S)


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, float]]:
    """The statistics of a step of two microbatches, by backend; logits are computed in several chunks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "SCORES_BYTES", 4 * B // 2 * H * S * 4)  # four queries at a time
        made = {}
        for name in BACKENDS:
            run = dead(Running(name, Net()))
            _, result = run.backend.step(run.state, microbatches(batch(), 2), step=1, scale=1.0, statistics=True)
            assert not result.aux and not result.layers
            made[name] = {k: v for k, v in flat(result.statistics).items() if k.partition("/")[0] in KINDS}
    return made


def dead(run: Running) -> Running:
    """Give some units of every layer a bias that no input can lift."""
    for layer in range(LAYERS):
        run.params["layers/units/bias"][layer, : layer + 2] = -50.0
    run.state = run.backend.restore_state(run.read)
    return run


@pytest.fixture(scope="module")
def wanted() -> dict[str, tuple[float, float]]:
    """(value, largest error of a float32 that is right) of every statistic, in float64 over the whole batch."""
    global SEEN
    run = dead(Running(BACKENDS[0], Net()))
    SEEN = {}
    try:
        run.oracle(batch(), training=True)
        made = SEEN
    finally:
        SEEN = None
    values: dict[str, tuple[float, float]] = {}
    for name, arrays in made.items():
        if "inner" in name or "/" not in name:
            continue
        for layer, x in enumerate(arrays):
            at = f"{name}/{layer}" if "layers" in name else name
            if name.startswith("rms/"):
                values[at] = float(np.sqrt(np.mean(x * x))), 1e-6 * float(np.sqrt(np.mean(x * x)))
            else:
                values[at] = float(np.mean(x.reshape(-1, x.shape[-1]).max(0) <= 0)), 1e-7
    segments, place = batch()["segment_ids"], np.arange(S)
    behind = place[:, None] - place[None, :]
    mask = (behind >= 0) & (behind < WINDOW) & (segments[:, :, None] == segments[:, None, :])
    for layer, (q, k) in enumerate(zip(made["q"], made["k"], strict=True)):
        k = np.repeat(k, H // K, axis=2)
        logits = np.einsum("bshd,bthd->bhst", q, k) / np.sqrt(D)
        # A product of D terms is right to the size of its factors, and not to its own.
        size = np.linalg.norm(q, axis=-1).max() * np.linalg.norm(k, axis=-1).max() / np.sqrt(D)
        values[f"logit/layers/heads/{layer}"] = (
            float(logits[np.broadcast_to(mask[:, None], logits.shape)].max()),
            1e-6 * size,
        )
    return values


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_records_what_float64_gives(
    backend: str, found: dict[str, dict[str, float]], wanted: dict[str, tuple[float, float]]
) -> None:
    got = found[backend]
    assert sorted(got) == sorted(wanted)
    for name, (value, most) in wanted.items():
        assert abs(got[name] - value) <= most, (name, got[name], value)
    # The oracle's own numbers say what they should: units that are dead, more in every layer, and others that are not.
    shares = [wanted[f"dead/layers/units/{layer}"][0] for layer in range(LAYERS)]
    assert all((layer + 2) / F <= share < 1 for layer, share in enumerate(shares))


def test_other_steps_record_nothing(found: dict[str, dict[str, float]]) -> None:
    run = Running(BACKENDS[-1], Net())
    _, result = run.backend.step(run.state, microbatches(batch(), 2), step=1, scale=1.0)
    assert not result.statistics and not result.aux


# torch's compiler imports what torch calls deprecated, and looks at the .grad of every tensor it is given.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.skipif("torch" not in BACKENDS, reason="no torch")
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"remat": "block"}, id="recomputed"),
        pytest.param({"compile": True}, id="compiled", marks=(pytest.mark.full, pytest.mark.timeout(900))),
    ],
)
def test_blocks_that_are_compiled_or_recomputed_record_the_same(
    options: dict[str, Any], found: dict[str, dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = dead(Running("torch", Net(), **options))
    _, result = run.backend.step(run.state, microbatches(batch(), 2), step=1, scale=1.0, statistics=True)
    got = {k: v for k, v in flat(result.statistics).items() if k.partition("/")[0] in KINDS}
    assert sorted(got) == sorted(found["torch"])
    for name, value in found["torch"].items():
        assert abs(got[name] - value) <= 2e-6 * abs(value), name
