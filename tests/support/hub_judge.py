"""Judge a model of ours beside the same one in transformers: what it predicts, and a step of AdamW."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from portatrain.optim import AdamW
from portatrain.testing.tolerance import MOVE, UNIT_ROUNDOFF, amplification, tolerance
from tests.support.running import Running

LR, EPS, DECAY = 1e-2, 1e-2, 0.1
DRAWS = 3
Arrays = Mapping[str, np.ndarray]


def check_predictions(ours: Callable[..., np.ndarray], params: Arrays, theirs: np.ndarray) -> None:
    """What transformers predicts in float32 is the oracle's within rounding; `ours`: of the parameters, in order."""
    values = list(params.values())
    exact = ours(*values)
    most = tolerance(float(np.abs(exact).max()), amplification(ours, values, exact, np.random.default_rng(0)))
    assert np.abs(theirs - exact).max() <= most, (np.abs(theirs - exact).max(), most)


def check_step(
    theirs: Any,
    params: Arrays,
    batch: Any,
    run: Callable[..., Running],
    gradients_of: Callable[[Any], tuple[float, Arrays]],
    ours_of: Callable[[Arrays], Arrays],
    loss_moves: Callable[[float, float], float] = lambda _, moved: moved,
) -> None:
    """Loss, gradients and the parameters after a step of AdamW. With eps e, a gradient that is off by d moves the
    update by at most lr d / e.

    `gradients_of`: the mean loss of a model of transformers and its gradients, by our names, as `ours_of` gives them.
    `loss_moves`: how far the loss moves with the parameters, of (the loss, how far it was seen to move).
    """
    import torch

    double = type(theirs)(theirs.config).double()
    double.load_state_dict(theirs.state_dict())
    double.set_attn_implementation("eager")
    double.eval()
    loss, exact = gradients_of(double)
    rng, change, moved = np.random.default_rng(1), dict.fromkeys(exact, 0.0), 0.0
    start = {name: p.detach().clone() for name, p in double.named_parameters()}
    for _ in range(DRAWS):
        with torch.no_grad():
            for name, p in double.named_parameters():
                p.copy_(start[name] * (1 + MOVE * torch.tensor(rng.choice((-1.0, 1.0), tuple(p.shape)))))
        near_loss, gradients = gradients_of(double)
        moved = max(moved, abs(near_loss - loss) / MOVE)
        for name, near in gradients.items():
            change[name] = max(change[name], float(np.abs(near - exact[name]).max()) / MOVE)
    most = {}
    for name in exact:
        # The gradient of a key's bias is a sum that cancels: its terms are those of wk.
        alike = [name, name.replace("/k_bias", "/wk")]
        largest = max(float(np.abs(exact[n]).max()) for n in alike)
        most[name] = 2 * tolerance(largest, max(change[n] for n in alike))  # of ours, and of its own float32 parts
    given = {"optimizer": AdamW(lr=LR, eps=EPS, weight_decay=DECAY), "decay": frozenset(exact)}
    running = run(**given)
    our_loss, found = running.backend.gradients(running.state, batch, step=1)
    assert abs(our_loss - loss) <= 2 * tolerance(abs(loss), loss_moves(loss, moved))
    wrong = {n: (float(np.abs(found[n] - exact[n]).max()), most[n]) for n in exact}
    assert not {n: w for n, w in wrong.items() if w[0] > w[1]}
    running.state, _ = running.backend.step(running.state, batch, step=1, scale=1.0)
    after = running.tensors("params")
    with torch.no_grad():
        for name, p in double.named_parameters():
            p.copy_(start[name])
    gradients_of(double)
    torch.optim.AdamW(double.parameters(), lr=LR, betas=(0.9, 0.999), eps=EPS, weight_decay=DECAY).step()
    for name, expected in ours_of({name: p.detach().numpy() for name, p in double.named_parameters()}).items():
        bound = LR * most[name] / EPS + 16 * UNIT_ROUNDOFF["fp32"] * (float(np.abs(expected).max()) + LR)
        assert np.abs(after[name] - expected).max() <= bound, name
        assert np.abs(after[name] - params[name]).max() > 0  # the step moved it
