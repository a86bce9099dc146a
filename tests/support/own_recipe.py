"""The text of a small recipe of one's own, for tests that plant a mistake in it."""

GOOD = '''
"""A small recipe of one's own with every part that a user writes."""
from __future__ import annotations
from collections.abc import Mapping
from dataclasses import dataclass
import numpy as np
from portatrain import Hook, Module, Param, Stack
from portatrain.data import DataSpec
from portatrain.optim import Rule, Schedule, Slot
from portatrain.recipe import Recipe

@dataclass(frozen=True, kw_only=True)
class Points(DataSpec):
    version: str = "1"
    def __len__(self):
        return 12
    def sample(self, index):
        return {"x": np.full(4, index / 12, np.float32), "y": np.float32(index % 2)}

class Block(Module):
    def __init__(self):
        self.w = Param(embed=4, mlp=4)
    def __call__(self, ops, x_BE):
        return x_BE + ops.tanh(ops.einsum("be,em->bm", x_BE, self.w)), None

class Head(Module):
    def __init__(self):
        self.out = Param(embed=4)
    def __call__(self, ops, x_BE):
        return ops.einsum("be,e->b", x_BE, self.out)

class Net(Module):
    def __init__(self, config):
        self.blocks = Stack(Block(), 2)
        self.head = Head()
    def __call__(self, ops, batch):
        x_BE, _ = self.blocks(ops, batch["x"])
        error_B = self.head(ops, x_BE) - batch["y"]
        return ops.loss(error_B * error_B, batch["mask"])

@dataclass(frozen=True, kw_only=True)
class Config:
    wide: int = 4
    def build(self):
        return Net(self)

@dataclass(frozen=True, kw_only=True)
class Momentum(Rule):
    def slots(self, info):
        return {"m": Slot(axes=info.axes, shape=info.shape)}
    def step(self, xp, *, info, grad, param, slots, lr, count):
        m = 0.9 * slots["m"] + grad
        return lr * m, {"m": m}

@dataclass(frozen=True, kw_only=True)
class Decay(Schedule):
    def curve(self, step, steps):
        return 1.0 / (1 + step)

@dataclass(frozen=True, kw_only=True)
class Watch(Hook):
    def on_step(self, run, record):
        pass

def recipe():
    return Recipe(name="own", model=Config(), data=Points(), optimizer=Momentum(lr=0.01), schedule=Decay(),
                  hooks=(Watch(),), steps=2, batch=4, precision="fp32")
'''
