"""The pytest fixture for other trainers: it passes an honest save, and fails for each way to get one wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from portatrain.testing.pytest import Continuity
from portatrain.testing.pytest import continuity as continuity
from tests.support.audited import Torch, rows

torch = pytest.importorskip("torch")
seeds = iter(range(1000))


def arguments(**more: Any) -> dict[str, Any]:
    return {
        "make": lambda: Torch(seed=next(seeds)),
        "step": lambda t: t.take(1),
        "parts": lambda t: t.parts(),
        "save": lambda t, folder: t.save(folder / "saved"),
        "restore": lambda t, folder: t.restore(folder / "saved"),
        **more,
    }


def test_an_honest_save(continuity: Continuity) -> None:
    verdict = continuity(**arguments())
    assert verdict and verdict.compared == 24


def only(*names: str) -> Callable[[Any, Any], None]:
    def restore(t: Torch, folder: Any) -> None:
        saved = torch.load(folder / "saved", weights_only=True)
        for name in names:
            getattr(t, name).load_state_dict(saved[name])
        t.step = saved["step"]

    return restore


def counting(t: Torch, folder: Any) -> None:
    t.save(folder / "saved")
    for state in t.optimizer.state.values():
        state["step"] += 1


class Skips(Torch):
    """After a restore, the data begins one step too late, in a place that no part shows."""

    late = 0

    def restore(self, path: Any) -> None:
        super().restore(path)
        self.late = 1

    def loss(self, step: int) -> Any:
        return (self.model(torch.from_numpy(rows(step + self.late))) ** 2).mean()

    def parts(self) -> dict[str, Any]:
        return {k: v for k, v in super().parts().items() if k not in ("batch", "loss", "around")}


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"restore": only("model", "schedule")}, "The restored trainer is not .*\n.*\n.*missing: m of 0.weight"),
        ({"restore": only("optimizer", "schedule")}, "changed: 0.weight"),
        ({"restore": only("model", "optimizer")}, "(?s)schedule: .*off by -2"),
        ({"save": counting}, "The save changed the trainer.*\n.*\n.*counter"),
        ({"make": Torch, "steps": 0}, "cannot fail"),
        ({"make": lambda: Skips(seed=next(seeds))}, "step 1 after it is another one"),
    ],
    ids=["no optimizer", "no weights", "no schedule", "a save that counts", "nothing to restore", "data too late"],
)
def test_a_wrong_save_fails(more: dict[str, Any], says: str, continuity: Continuity) -> None:
    with pytest.raises(pytest.fail.Exception, match=says):
        continuity(**arguments(**more))
