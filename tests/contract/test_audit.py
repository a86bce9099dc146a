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
}


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


@pytest.mark.full  # flax's modules compile for seconds
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


def test_another_order_of_the_sums_is_no_fault_and_a_missing_row_is_one() -> None:
    """A batch in 1 to 128 microbatches through twelve layers: loss and gradient stay within the bound of rounding."""
    torch.manual_seed(0)
    layers = [(torch.nn.Linear(64, 64), torch.nn.LayerNorm(64), torch.nn.GELU()) for _ in range(12)]
    net = torch.nn.Sequential(*(part for layer in layers for part in layer), torch.nn.Linear(64, 100))
    x, y = torch.randn(128, 64), torch.randint(0, 100, (128,))

    def summed(parts: int, rows: int = 128) -> audit.Record:
        net.zero_grad()
        total = 0.0
        for a, b in zip(x[:rows].chunk(parts), y[:rows].chunk(parts), strict=True):
            loss = torch.nn.functional.cross_entropy(net(a), b, reduction="sum") / 128
            loss.backward()
            total += loss.detach()
        return audit.record(net, loss=total, gradients=True)

    whole = summed(1)
    assert all(audit.compare(whole, summed(parts)) for parts in (2, 16, 128))
    assert audit.compare(whole, summed(1, rows=127)).kinds == {"loss", "gradients"}


ODD = {
    "half": lambda: torch.ones(4, 4).bfloat16(),
    "eight": lambda: torch.arange(4.0).to(torch.float8_e4m3fn),
    "complex": lambda: torch.tensor([[1 + 2j, 3 - 1j]]),
    "complex scalar": lambda: torch.tensor(1 + 2j),
    "whole numbers": lambda: torch.arange(5),
    "truth": lambda: torch.tensor([True, False]),
    "empty": lambda: torch.empty(0, 3),
    "scalar": lambda: torch.tensor(2.0),
    "mask": lambda: torch.tensor([0.0, -np.inf]),
}


def test_tensors_of_every_dtype_and_optimizers_of_every_shape() -> None:
    odd = {name: make() for name, make in ODD.items()}
    before = audit.record({"w": rows(0), **odd})
    assert audit.check(before, {"w": rows(0), **odd})
    odd["complex"] = odd["complex"].conj()
    assert [f.name for f in audit.check(before, {"w": rows(0), **odd}).faults] == ["complex"]
    net = torch.nn.Linear(4, 4)

    def closure() -> Any:
        net.zero_grad()
        loss = net(torch.ones(2, 4)).square().mean()
        loss.backward()
        return loss

    optim = torch.optim
    makers = [optim.LBFGS, optim.Rprop, optim.ASGD, optim.Adadelta, optim.Adamax, optim.RAdam]
    for make in makers:
        optimizer = make(net.parameters())
        optimizer.step(closure)
        state = audit.record(net, optimizer)
        optimizer.load_state_dict(optimizer.state_dict())
        assert audit.check(state, net, optimizer) and len(state.data["tensors"]) > 4, make
    both = [optim.SGD([net.weight], lr=1.0), optim.AdamW([net.bias])]
    assert audit.record(net, both).data["settings"].keys() == {"weight", "bias"}


@pytest.mark.full  # torch.compile imports for seconds
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of those imports
def test_a_compiled_module_is_the_module() -> None:
    net = torch.nn.Linear(4, 4)
    assert audit.check(audit.record(net), torch.compile(net))
    assert audit.check(
        audit.record({"layer": {"weight": net.weight, "bias": net.bias}}),
        torch.nn.ModuleDict({"layer": torch.compile(net)}),
    )


def test_a_mistake_is_one_sentence(tmp_path: Path) -> None:
    for model in (None, 3, {}, object()):
        with pytest.raises(UserError, match="without a parameter"):
            audit.record(model)
    (tmp_path / "x").write_text("[]")
    for path in (tmp_path / "none", tmp_path / "x"):
        with pytest.raises(UserError, match=r"a file that audit\.record"):
            audit.load(path)
    one = Torch()
    mistakes = {"optimizer": [5, one.model.parameters()], "loss": ["x"], "schedule": ["x"], "rng": [0.5]}
    for wrong in ({name: value} for name, values in mistakes.items() for value in values):
        with pytest.raises(UserError, match="expected"):
            recorded(one, **wrong)
    with pytest.raises(UserError, match=r"what audit.record or audit.load"):
        audit.check("before", one.model)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="one of"):
        audit.check(recorded(one), one.model, one.optimizer, allow=["round"])
    verdict = audit.check(recorded(one), one.model, one.optimizer, step=5)
    with pytest.raises(UserError, match="step: at 5, it was at 0"):
        verdict.require()
    assert json.dumps(recorded(one).data)


def test_the_command_compares_two_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from portatrain import cli

    one = Torch()
    one.take(1)
    recorded(one).save(tmp_path / "before")
    one.model[2].weight.data.neg_()
    recorded(one, loss=None).save(tmp_path / "after")
    words = ["audit", str(tmp_path / "before"), str(tmp_path / "after")]
    assert cli.main(words) == 1 and "sign: 2.weight" in capsys.readouterr().out
    assert cli.main([*words, "--allow", "sign", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["notes"][0]["layer"] == "2"
    assert cli.main(words[:2]) == 0 and "no fault" in capsys.readouterr().out
    (tmp_path / "names").write_text(json.dumps({"2.weight": "0.weight"}))
    assert cli.main([*words, "--names", str(tmp_path / "names")]) == 1
    assert "missing: 2.weight" in capsys.readouterr().out
    for wrong in (
        ["--allow", "x"],
        ["--precision", "int8"],
        ["--names", str(tmp_path / "before")],
        ["--names", "none"],
    ):
        assert cli.main([*words, *wrong]) == 2 and capsys.readouterr().err.count("\n") == 1


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    data = recorded(Torch()).data
    damaged = [{k: v for k, v in data.items() if k != name} for name in data]
    damaged += [{**data, name: "x"} for name in data if name != "framework"]
    damaged += [{**data, name: [1]} for name in ("disagree", "ties", "rng")]
    damaged += [{**data, "batch": {"a": 1}}, {**data, "around": {"1": {"arrays": {"x": 7}, "rank_rows": []}}}]
    sums = data["tensors"]["params/0.weight"]
    for name in sums:
        damaged += [{**data, "tensors": {"params/w": {**sums, name: other}}} for other in (None, [], {})]
    refused = 0
    for one in damaged:
        (tmp_path / "x").write_text(json.dumps(one))
        try:
            audit.compare(audit.load(tmp_path / "x"), audit.Record(data))
        except UserError as error:
            refused += "record" in str(error)
    assert refused >= len(damaged) - 2  # an empty shape is that of a scalar


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


def honest(kind: type, options: dict[str, str], steps: int, folder: Path, then: bool = True) -> list[audit.Verdict]:
    """Return the verdict on a save that is restored in a fresh trainer; if `then`, another one after a step of both."""
    one, other = kind(**options, seed=steps), kind(**options, seed=steps + 1)
    one.take(steps)
    before = recorded(one)
    one.save(folder / "saved")
    other.restore(folder / "saved")
    verdicts = [checked(before, other)]
    if then:
        one.take(1)
        other.take(1)
        verdicts.append(checked(recorded(one), other))
    return verdicts


@pytest.mark.parametrize("at", range(0, len(HONEST), 10))
def test_an_honest_save_is_no_fault(at: int, tmp_path: Path) -> None:
    verdicts = honest(*HONEST[at], 2, tmp_path)
    assert all(verdicts) and len(verdicts) == 2, verdicts


@pytest.mark.full
def test_no_false_alarm_in_two_hundred_honest_saves(tmp_path: Path) -> None:
    """A verdict after each restore, and for every eighth another one a step later."""
    cases = [(*case, steps) for steps in (1, 4) for case in HONEST]
    found = [v for at, case in enumerate(cases) for v in honest(*case, tmp_path, then=at % 8 == 0)]
    alarms = [str(v) for v in found if not v]
    print(f"{len(alarms)} false alarms in {len(cases)} honest saves, {len(found)} verdicts")
    assert len(cases) >= 200 and alarms == []
