"""Small trainers that are not portatrain's, with a save and a restore of their own, for the audit."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def rows(step: int, width: int = 8, count: int = 8) -> np.ndarray:
    """Return the rows of a step, which depend on nothing else."""
    return np.random.default_rng(step).standard_normal((count, width)).astype(np.float32)


def torch_models() -> dict[str, Callable[[], Any]]:
    from torch import nn

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.layers = nn.Linear(8, 8, bias=False), nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
            self.out = nn.Linear(8, 8, bias=False)
            self.out.weight = self.into.weight

        def forward(self, x: Any) -> Any:
            x = self.into(x)
            for layer in self.layers:
                x = x + layer(x).tanh()
            return self.out(x)

    return {
        "mlp": lambda: nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)),
        "norms": lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.LayerNorm(8), nn.Linear(8, 4)),
        "conv": lambda: nn.Sequential(nn.Unflatten(1, (1, 8)), nn.Conv1d(1, 4, 3), nn.Flatten(), nn.Linear(24, 4)),
        "recurrent": lambda: _First(nn.GRU(8, 6, batch_first=True)),
        "tied": Tied,
    }


def _First(module: Any) -> Any:
    from torch import nn

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, x: Any) -> Any:
            return self.inner(x)[0]

    return First()


def torch_optimizers() -> dict[str, Callable[[Any], Any]]:
    import torch

    return {
        "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
        "Adam": lambda p: torch.optim.Adam(p, lr=1e-2, foreach=False),
        "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
        "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-2),
        "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.5, centered=True),
        "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
        "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    }


def torch_schedules() -> dict[str, Callable[[Any], Any]]:
    from torch.optim import lr_scheduler as lr

    return {
        "cosine": lambda o: lr.CosineAnnealingLR(o, 50),
        "warmup": lambda o: lr.LambdaLR(o, lambda step: min(1.0, (step + 1) / 10)),
        "chain": lambda o: lr.SequentialLR(o, [lr.LinearLR(o, 0.1, total_iters=2), lr.StepLR(o, 3)], [2]),
    }


class Torch:
    """A plain loop in torch. `take(n)` takes steps; `parts()` is what an audit records."""

    def __init__(self, model: str = "mlp", optimizer: str = "AdamW", schedule: str = "cosine", seed: int = 0) -> None:
        import torch

        torch.manual_seed(seed)
        self.model = torch_models()[model]()
        self.optimizer = torch_optimizers()[optimizer](self.model.parameters())
        self.schedule = torch_schedules()[schedule](self.optimizer)
        self.step = 0

    def loss(self, step: int) -> Any:
        import torch

        return (self.model(torch.from_numpy(rows(step))) ** 2).mean()

    def take(self, steps: int) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.loss(self.step).backward()
            self.optimizer.step()
            self.schedule.step()
            self.step += 1

    def parts(self) -> dict[str, Any]:
        import torch

        was = self.model.training
        self.model.eval()  # a batch norm in training mode would change
        with torch.no_grad():
            loss = self.loss(self.step)
        self.model.train(was)
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "step": self.step,
            "batch": rows(self.step),
            "loss": loss,
            "around": {k: rows(abs(self.step + k)) for k in (-1, 1)},
        }

    def save(self, path: Path) -> None:
        import torch

        torch.save(self.state(), path)

    def state(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule}
        return {"step": self.step, **{name: part.state_dict() for name, part in parts.items()}}

    def restore(self, path: Path) -> None:
        import torch

        saved = torch.load(path, weights_only=True)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])
        self.step = saved["step"]


def jax_transforms() -> dict[str, Callable[[], Any]]:
    import optax

    return {
        "adamw": lambda: optax.adamw(optax.cosine_decay_schedule(1e-2, 50)),
        "clipped": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)),
        "sgd": lambda: optax.sgd(1e-2, momentum=0.9, nesterov=True),
        "lion": lambda: optax.lion(1e-3),
        "injected": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=1e-2),
        "ema": lambda: optax.chain(optax.adam(1e-2), optax.ema(0.9)),
    }


class Jax:
    """A plain loop in jax and optax, on a tree of parameters."""

    def __init__(self, transform: str = "adamw", seed: int = 0) -> None:
        import jax.numpy as jnp

        rng = np.random.default_rng(seed)
        shapes = {"up": {"kernel": (8, 16), "bias": (16,)}, "down": {"kernel": (16, 4)}}
        self.params = {
            a: {b: jnp.asarray(rng.standard_normal(s), jnp.float32) for b, s in t.items()} for a, t in shapes.items()
        }
        self.transform = jax_transforms()[transform]()
        self.optimizer = self.transform.init(self.params)
        self.step = 0

    def take(self, steps: int) -> None:
        """Take steps with gradients in closed form: no program is compiled but optax's small ones."""
        import jax
        import optax

        for _ in range(steps):
            grads = jax.tree.map(lambda p: 0.1 * p + float(rows(self.step)[0, 0]), self.params)
            updates, self.optimizer = self.transform.update(grads, self.optimizer, self.params)
            self.params = optax.apply_updates(self.params, updates)
            self.step += 1

    def parts(self) -> dict[str, Any]:
        import optax

        return {
            "model": self.params,
            "optimizer": self.optimizer,
            "step": self.step,
            "batch": rows(self.step),
            "schedule": optax.cosine_decay_schedule(1e-2, 50),
            "around": {k: rows(abs(self.step + k)) for k in (-1, 1)},
        }

    def save(self, path: Path) -> None:
        import jax

        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves((self.params, self.optimizer))]
        path.write_bytes(pickle.dumps((self.step, leaves)))

    def restore(self, path: Path) -> None:
        import jax
        import jax.numpy as jnp

        self.step, leaves = pickle.loads(path.read_bytes())
        structure = jax.tree.structure((self.params, self.optimizer))
        self.params, self.optimizer = jax.tree.unflatten(structure, [jnp.asarray(leaf) for leaf in leaves])
