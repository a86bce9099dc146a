"""The audit of foreign trainers: honest saves pass, every planted fault is named with its tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from portatrain.errors import UserError
from portatrain.testing import audit
from tests.support.audited import Jax, Torch, rows, torch_models, torch_optimizers, torch_schedules

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")


def recorded(trainer: Any, **more: Any) -> audit.Record:
    return audit.record(**{**trainer.parts(), **more})


def checked(before: audit.Record, trainer: Any, **more: Any) -> audit.Verdict:
    return audit.check(before, **{**trainer.parts(), **more})


def fresh(trainer: Any, folder: Path) -> Any:
    """Save a trainer, and return another one that restored it."""
    trainer.save(folder / "saved")
    other = type(trainer)(seed=1)
    other.restore(folder / "saved")
    return other


def change(tensor: Any, value: Callable[[Any], Any]) -> None:
    with torch.no_grad():
        tensor.copy_(value(tensor.clone()))


def slot(t: Torch, parameter: Any) -> dict[str, Any]:
    return t.optimizer.state[parameter]


def swap(t: Torch) -> None:
    a = t.model[2].weight
    one = slot(t, a)["exp_avg"].clone()
    change(slot(t, a)["exp_avg"], lambda _: slot(t, a)["exp_avg_sq"])
    change(slot(t, a)["exp_avg_sq"], lambda _: one)


def lose(t: Torch) -> None:
    change(slot(t, t.model[2].weight)["exp_avg"], torch.zeros_like)


def count_on(t: Torch) -> None:
    for state in t.optimizer.state.values():
        state["step"] += 1


W, B = "params/2.weight", "params/2.bias"
TORCH: dict[str, tuple[Callable[[Torch], Any], dict[str, Any], set[str], str]] = {
    "moments lost": (lose, {}, {"zeroed"}, "m/2.weight"),
    "moments swapped": (swap, {}, {"swapped"}, "v/2.weight"),
    "no moments": (lambda t: t.optimizer.state.clear(), {}, {"missing", "counter"}, "v/0.bias"),
    "counter": (count_on, {}, {"counter"}, "counter/4.weight"),
    "learning rate": (lambda t: t.optimizer.param_groups[0].update(lr=1e-4), {}, {"learning-rate"}, "lr/0.weight"),
    "betas": (lambda t: t.optimizer.param_groups[0].update(betas=(0.9, 0.95)), {}, {"setting"}, "betas/0.weight"),
    "schedule": (lambda t: t.schedule.step(), {}, {"schedule", "learning-rate"}, "schedule/"),
    "step": (lambda t: None, {"step": 4}, {"step"}, "step/"),
    "data": (lambda t: None, {"batch": rows(4)}, {"data"}, "batch/"),
    "transposed": (lambda t: change(t.model[2].weight, lambda w: w.T), {}, {"transposed"}, W),
    "sign": (lambda t: change(t.model[2].weight, lambda w: -w), {}, {"sign"}, W),
    "some signs": (lambda t: change(t.model[2].weight, lambda w: w * torch.where(w > 0.1, -1.0, 1.0)), {}, {"sign"}, W),
    "permuted": (lambda t: change(t.model[2].weight, lambda w: w[torch.arange(15, -1, -1)]), {}, {"permuted"}, W),
    "rounded": (lambda t: change(t.model[2].weight, lambda w: w.bfloat16()), {}, {"rounded"}, W),
    "rounded to half": (lambda t: change(t.model[2].weight, lambda w: w.half()), {}, {"rounded"}, W),
    "scaled": (lambda t: change(t.model[2].weight, lambda w: w * 0.25), {}, {"scaled"}, W),
    "one element": (lambda t: change(t.model[2].weight[3, 4], lambda w: w + 1e-6), {}, {"changed"}, W),
    "not finite": (lambda t: change(t.model[2].bias[0], lambda w: w * np.nan), {}, {"non-finite"}, B),
    "weights zeroed": (lambda t: change(t.model[2].weight, torch.zeros_like), {}, {"zeroed"}, W),
    "frozen": (lambda t: t.model[2].bias.requires_grad_(False), {}, {"frozen"}, B),
    "loss": (lambda t: None, {"loss": 4.0}, {"loss"}, "loss/"),
}  # fmt: skip


@pytest.mark.parametrize("fault", TORCH)
def test_a_fault_in_torch_is_named(fault: str, tmp_path: Path) -> None:
    plant, more, kinds, key = TORCH[fault]
    one = Torch()
    one.take(3)
    before = recorded(one)
    other = fresh(one, tmp_path)
    before.save(tmp_path / "before.json")
    before = audit.load(tmp_path / "before.json")  # as from another process
    assert checked(before, other), checked(before, other)
    plant(other)
    parts = other.parts()
    if fault not in ("loss", "schedule"):
        parts["loss"] = None  # changed weights change it too
    verdict = audit.check(before, **{**parts, **more})
    assert verdict.kinds == kinds, verdict
    assert key in {f"{f.role}/{f.name}" for f in verdict.faults}, verdict
    if key == W:
        assert {f.layer for f in verdict.faults} == {"2"} and len(verdict.faults) == 1


def test_a_thawed_and_an_untied_parameter() -> None:
    one = Torch("tied")
    one.model.layers[0].weight.requires_grad_(False)
    one.take(2)
    before = recorded(one)
    one.model.layers[0].weight.requires_grad_(True)
    one.model.out.weight = torch.nn.Parameter(one.model.out.weight.detach().clone())
    verdict = checked(before, one)
    assert {"thawed", "untied", "new"} == verdict.kinds
    assert "into.weight and out.weight" in str(verdict) and "thawed: layers.0.weight" in str(verdict)


def turned(t: Jax) -> None:
    t.params["up"]["kernel"] = t.params["up"]["kernel"].T.reshape(8, 16)


def rounded(t: Jax) -> None:
    t.params["up"]["bias"] = t.params["up"]["bias"].astype("float16").astype("float32")


JAX: dict[str, tuple[Callable[[Jax], Any], set[str], str]] = {
    "lost": (lambda t: setattr(t, "optimizer", t.transform.init(t.params)), {"zeroed", "counter"}, "v/up.kernel"),
    "transposed": (turned, {"transposed"}, "params/up.kernel"),
    "rounded": (rounded, {"rounded"}, "params/up.bias"),
    "gone": (lambda t: t.params["up"].pop("bias"), {"missing", "new"}, "params/up.bias"),
    "step": (lambda t: setattr(t, "step", t.step + 1), {"step", "schedule", "data"}, "schedule/"),
}


@pytest.mark.parametrize("fault", JAX)
def test_a_fault_in_jax_is_named(fault: str, tmp_path: Path) -> None:
    plant, kinds, key = JAX[fault]
    one = Jax()
    one.take(3)
    before = recorded(one)
    other = fresh(one, tmp_path)
    assert checked(before, other), checked(before, other)
    plant(other)
    verdict = checked(before, other)
    assert verdict.kinds == kinds and key in {f"{f.role}/{f.name}" for f in verdict.faults}, verdict
    if fault == "step":
        assert "shifted by 1" in str(verdict) and "off by +1" in str(verdict)


def test_an_nnx_module_and_its_optimizer() -> None:
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            rngs = nnx.Rngs(0)
            self.up, self.norm, self.drop = (
                nnx.Linear(4, 8, rngs=rngs),
                nnx.BatchNorm(8, rngs=rngs),
                nnx.Dropout(0.1, rngs=rngs),
            )

    model = Net()
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    before = audit.record(model, optimizer)
    assert {"params/up.kernel", "buffers/norm.mean", "buffers/drop.rngs.count", "m/up.kernel"} <= before.data[
        "tensors"
    ].keys()
    assert audit.check(before, model, optimizer)
    model.up.kernel[...] = -model.up.kernel[...]
    model.norm.mean[...] += 1
    verdict = audit.check(before, model, optimizer)
    assert [(f.kind, f.role, f.name) for f in verdict.faults] == [
        ("sign", "params", "up.kernel"),
        ("changed", "buffers", "norm.mean"),
    ]


def test_from_torch_to_jax_by_a_table_of_names() -> None:
    """A conversion: other names, transposed kernels, and the moments of optax where torch had its own."""
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4, bias=False))
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.from_numpy(rows(0))).square().mean().backward()
    optimizer.step()
    before = audit.record(net, optimizer)

    def there(get: Callable[[Any], Any]) -> dict[str, Any]:
        def kernel(p: Any) -> Any:
            return jax.numpy.asarray(get(p).detach().numpy().T)

        bias = jax.numpy.asarray(get(net[0].bias).detach().numpy())
        return {"up": {"kernel": kernel(net[0].weight), "bias": bias}, "down": {"kernel": kernel(net[1].weight)}}

    params = there(lambda p: p)
    state = optax.ScaleByAdamState(
        jax.numpy.asarray(1),
        there(lambda p: optimizer.state[p]["exp_avg"]),
        there(lambda p: optimizer.state[p]["exp_avg_sq"]),
    )
    names = {"up.kernel": "0.weight", "up.bias": "0.bias", "down.kernel": "1.weight"}
    verdict = audit.check(before, params, state, names=names, allow=["transposed"])
    assert verdict and len(verdict.notes) == 6, verdict
    wrong = state._replace(nu=state.mu)
    assert audit.check(before, params, wrong, names=names, allow=["transposed"]).kinds >= {"swapped"}


def test_data_and_gradients() -> None:
    one = Torch()
    one.take(1)
    one.loss(1).backward()
    x = rows(7, count=6)
    before = audit.record(one.model, one.optimizer, gradients=True, batch={"x": x, "y": x[:, 0]}, rng=True)

    def again(**more: Any) -> audit.Verdict:
        parts = {"gradients": True, "batch": {"x": x, "y": x[:, 0]}, **more}
        return audit.check(before, one.model, one.optimizer, **parts)

    assert again(rng=True)
    torch.rand(1)
    assert again(rng=True).kinds == {"rng"}
    rolled = again(batch={"x": np.roll(x, 1, 0), "y": np.roll(x, 1, 0)[:, 0]})
    assert rolled and [n.kind for n in rolled.notes] == ["data-order"]
    assert "y differs" in str(again(batch={"x": x, "y": np.roll(x[:, 0], 1)}))
    longer = np.concatenate([x[2:], rows(8, count=2)])
    assert "shifted by +2 of 6" in str(again(batch={"x": longer, "y": longer[:, 0]}))
    double = np.concatenate([x[:3], x[:3]])
    assert "more than once" in str(again(batch={"x": double, "y": double[:, 0]}))
    for parameter in one.model.parameters():
        parameter.grad *= 4
    scaled = again()
    assert scaled.kinds == {"gradients"} and "all are 4 times" in str(scaled) and len(scaled.faults) == 1
    for parameter in one.model.parameters():
        parameter.grad /= 4
    one.model[2].weight.grad[5] *= 1.01
    assert [(f.kind, f.name) for f in again().faults] == [("gradients", "2.weight")]


def test_a_mistake_is_one_sentence(tmp_path: Path) -> None:
    for model in (None, 3, {}, object()):
        with pytest.raises(UserError, match="without a parameter"):
            audit.record(model)
    (tmp_path / "x").write_text("[]")
    for path in (tmp_path / "none", tmp_path / "x"):
        with pytest.raises(UserError, match=r"a file that audit\.record"):
            audit.load(path)
    one = Torch()
    with pytest.raises(UserError, match="one of"):
        audit.check(recorded(one), one.model, one.optimizer, allow=["round"])
    verdict = audit.check(recorded(one), one.model, one.optimizer, step=5)
    with pytest.raises(UserError, match="step: at 5, it was at 0"):
        verdict.require()
    assert json.dumps(recorded(one).data)


def test_every_kind_is_on_the_page_and_the_other_way_round() -> None:
    page = (Path(__file__).parents[2] / "docs" / "run" / "audit.md").read_text(encoding="utf-8")
    assert [kind for kind, text in audit.KINDS.items() if f"| {kind} | {text} |" not in page] == []


# ---- honest saves

HONEST: list[tuple[type, dict[str, str]]] = [
    (Torch, {"model": m, "optimizer": o, "schedule": s})
    for m in torch_models()
    for o in torch_optimizers()
    for s in torch_schedules()
]
HONEST += [(Jax, {"transform": t}) for t in ("adamw", "clipped", "sgd", "lion", "injected", "ema")]


def honest(kind: type, options: dict[str, str], steps: int, folder: Path) -> audit.Verdict:
    """Return the verdict on a save that is restored in a fresh trainer; each may take a step, and they agree again."""
    one, other = kind(**options, seed=steps), kind(**options, seed=steps + 1)
    one.take(steps)
    before = recorded(one)
    one.save(folder / "saved")
    other.restore(folder / "saved")
    verdict = checked(before, other)
    if not verdict or steps > 2:
        return verdict
    one.take(1)
    other.take(1)
    return checked(recorded(one), other)


@pytest.mark.parametrize("at", range(0, len(HONEST), 10))
def test_an_honest_save_is_no_fault(at: int, tmp_path: Path) -> None:
    verdict = honest(*HONEST[at], 2, tmp_path)
    assert verdict, verdict


@pytest.mark.full
def test_no_false_alarm_in_two_hundred_honest_saves(tmp_path: Path) -> None:
    """A verdict after each restore, and for half of them another one step later."""
    cases = [(kind, options, steps) for steps in (1, 4) for kind, options in HONEST]
    alarms = [(c, str(v)) for c in cases if not (v := honest(*c, tmp_path))]
    print(f"{len(alarms)} false alarms in {len(cases)} honest saves, {len(cases) + len(HONEST)} verdicts")
    assert len(cases) >= 200 and alarms == []
