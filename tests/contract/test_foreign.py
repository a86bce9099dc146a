"""A model that is not ours: plain torch and plain flax, saved and restored across by a table of names and axes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from portatrain.checkpoint.interop import Entry, Table
from portatrain.errors import UserError

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")
linen = pytest.importorskip("flax.linen")
optax = pytest.importorskip("optax")

TABLE = Table(
    rows=(
        Entry(name="up/kernel", axes=("features", "mlp"), torch="up.weight", jax="params/up/kernel", transposed=True),
        Entry(name="up/bias", axes=("mlp",), torch="up.bias", jax="params/up/bias"),
        Entry(name="down/kernel", axes=("mlp", "out"), torch="down.weight", jax="params/down/kernel", transposed=True),
        Entry(name="down/bias", axes=("out",), torch="down.bias", jax="params/down/bias"),
    )
)
LR, B1, B2, EPS, DECAY = 1e-2, 0.9, 0.95, 1e-8, 0.1


def data(step: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(step)
    return rng.standard_normal((32, 8)).astype(np.float32), rng.standard_normal((32, 4)).astype(np.float32)


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(8, 16), torch.nn.Linear(16, 4)

    def forward(self, x: Any) -> Any:
        return self.down(torch.tanh(self.up(x)))


class Torch:
    def __init__(self, mesh: Any = None) -> None:
        torch.manual_seed(0)
        self.net: Any = Net()
        if mesh is not None:
            from torch.distributed.fsdp import fully_shard

            fully_shard(self.net, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=LR, betas=(B1, B2), eps=EPS, weight_decay=DECAY)

    def step(self, step: int) -> float:
        x, y = (torch.from_numpy(a) for a in data(step))
        loss = ((self.net(x) - y) ** 2).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def save(self, where: Path, step: int) -> None:
        from portatrain.checkpoint.interop.plain_torch import save

        save(where, step, self.net, self.optimizer, TABLE)

    def restore(self, where: Path) -> int:
        from portatrain.checkpoint.interop.plain_torch import restore

        return restore(where, self.net, self.optimizer, TABLE)


class Flax(linen.Module):
    @linen.compact
    def __call__(self, x: Any) -> Any:
        return linen.Dense(4, name="down")(linen.tanh(linen.Dense(16, name="up")(x)))


class Jax:
    def __init__(self, seed: int = 1, sharded: bool = False) -> None:
        self.model, self.tx = Flax(), optax.adamw(LR, b1=B1, b2=B2, eps=EPS, weight_decay=DECAY)
        self.params = self.model.init(jax.random.key(seed), data(0)[0])
        if sharded:
            mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]).reshape(1), ("fsdp",))
            spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
            self.params = jax.device_put(self.params, spec)
        self.opt = self.tx.init(self.params)

    def step(self, step: int) -> float:
        x, y = data(step)

        def loss(params: Any) -> Any:
            return ((self.model.apply(params, x) - y) ** 2).mean()

        value, grads = jax.value_and_grad(loss)(self.params)
        updates, self.opt = self.tx.update(grads, self.opt, self.params)
        self.params = optax.apply_updates(self.params, updates)
        return float(value)

    def save(self, where: Path, step: int) -> None:
        from portatrain.checkpoint.interop.plain_jax import save

        save(where, step, self.params, self.opt, TABLE)

    def restore(self, where: Path) -> int:
        from portatrain.checkpoint.interop.plain_jax import restore

        step, self.params, self.opt = restore(where, self.params, self.opt, TABLE)
        return step


def tensors(where: Path) -> dict[str, bytes]:
    from portatrain.checkpoint.interop.plain_shared import open_newest

    _, reader = open_newest(where, None)
    return {n: reader.read(n).tobytes() for n in reader.names}


KINDS = {"torch": Torch, "jax": Jax}


@pytest.mark.parametrize(("first", "second"), [(a, b) for a in KINDS for b in KINDS])
def test_there_and_on_with_the_same_bits_and_the_same_curve(first: str, second: str, tmp_path: Path) -> None:
    one = KINDS[first]()
    for step in range(3):
        one.step(step)
    one.save(tmp_path / "a", 3)
    two = KINDS[second]()
    assert two.restore(tmp_path / "a") == 3
    two.save(tmp_path / "b", 3)
    assert tensors(tmp_path / "a") == tensors(tmp_path / "b")
    assert {"params/up/kernel", "opt/m/up/kernel", "opt/v/down/bias", "opt/count"} <= tensors(tmp_path / "a").keys()
    for step in range(3, 8):
        assert two.step(step) == pytest.approx(one.step(step), rel=1e-6)


def test_a_state_without_its_second_moments_is_another_curve(tmp_path: Path) -> None:
    """The test above can fail."""
    one, two = Torch(), Torch()
    for step in range(3):
        one.step(step)
    one.save(tmp_path, 3)
    two.restore(tmp_path)
    for state in two.optimizer.state.values():
        state["exp_avg_sq"].mul_(2)
    one.step(3), two.step(3)
    assert two.step(4) != pytest.approx(one.step(4), rel=1e-4)


def test_sharded_arrays_keep_their_sharding(tmp_path: Path) -> None:
    one, two = Jax(), Jax(seed=2, sharded=True)
    one.step(0)
    one.save(tmp_path, 1)
    before = jax.tree.map(lambda a: a.sharding, two.params)
    two.restore(tmp_path)
    assert jax.tree.map(lambda a: a.sharding, two.params) == before
    assert two.step(1) == pytest.approx(one.step(1), rel=1e-6)


def test_fsdp2_in_one_process(tmp_path: Path) -> None:
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        one = Torch(dist.device_mesh.init_device_mesh("cpu", (1,)))
        for step in range(3):
            one.step(step)
        one.save(tmp_path, 3)
        two = Jax()
        two.restore(tmp_path)
        assert two.step(3) == pytest.approx(one.step(3), rel=1e-6)
        back = Torch(dist.device_mesh.init_device_mesh("cpu", (1,)))
        back.restore(tmp_path)
        assert back.step(4) != back.step(5)
    finally:
        dist.destroy_process_group()


def worker(args: Any) -> int:
    """On two processes: go on from what jax left, and leave it for jax again."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    one = Torch(dist.device_mesh.init_device_mesh("cpu", (2,)))
    assert one.restore(Path(args.where)) == 3
    one.save(Path(args.there), 3)
    dist.destroy_process_group()
    return 0


@pytest.mark.meshes
def test_fsdp2_on_two_processes(tmp_path: Path) -> None:
    from portatrain.system.processes import run_processes

    one = Jax()
    for step in range(3):
        one.step(step)
    one.save(tmp_path / "a", 3)
    where = {"where": str(tmp_path / "a"), "there": str(tmp_path / "b")}
    assert run_processes(2, "tests.contract.test_foreign:worker", where) == 0
    assert tensors(tmp_path / "a") == tensors(tmp_path / "b")


@pytest.mark.parametrize("kind", list(KINDS))
def test_what_does_not_fit_is_one_paragraph(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = Table(
        rows=(
            Entry(name="other", axes=("features", "mlp"), torch="up.weight", jax="params/up/kernel", transposed=True),
            *TABLE.rows[1:],
        )
    )
    one = KINDS[kind]()
    one.step(0)
    with pytest.raises(UserError, match="one that is committed"):
        one.restore(tmp_path / "none")
    monkeypatch.setitem(globals(), "TABLE", Table(rows=TABLE.rows[1:]))
    with pytest.raises(UserError, match="table"):
        one.save(tmp_path / "a", 1)
    assert not (tmp_path / "a").exists()
    monkeypatch.undo()
    one.save(tmp_path / "b", 1)
    monkeypatch.setitem(globals(), "TABLE", wide)
    with pytest.raises(UserError, match="no params/other"):
        KINDS[kind]().restore(tmp_path / "b")


def test_tables_that_are_wrong() -> None:
    with pytest.raises(UserError, match="once"):
        Table(rows=(TABLE.rows[0], TABLE.rows[0]))
    with pytest.raises(UserError, match="two axes"):
        Entry(name="x", axes=("a",), transposed=True)
    table = Table(rows=(Entry(name="b/w", axes=("layers", "a", "b"), torch="blocks.{i}.w"),))
    assert table.by_torch("blocks.12.w") == (table.rows[0], 12)
    for name in ("blocks.w", "blocks..w", "blocks.x.w", "blocks.1.w.q"):
        with pytest.raises(UserError, match="table"):
            table.by_torch(name)
