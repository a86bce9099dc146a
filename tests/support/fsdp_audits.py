"""A plain trainer with FSDP2 on two gloo ranks: honest saves, and faults, as calls of `tests.hall.ranks`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import state_dict as sd
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from portatrain.testing import audit
from tests.support.audited import Torch, rows, torch_optimizers, torch_schedules

FULL = sd.StateDictOptions(full_state_dict=True, cpu_offload=True)


class Fsdp(Torch):
    """The plain loop, with its parameters split over all ranks; each rank has its rows."""

    def __init__(self, model: str = "mlp", optimizer: str = "AdamW", schedule: str = "cosine", seed: int = 0) -> None:
        super().__init__(model, optimizer, schedule, seed)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in list(self.model.children()):
            if isinstance(layer, torch.nn.Linear) and model != "tied":
                fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.optimizer = torch_optimizers()[optimizer](self.model.parameters())
        self.schedule = torch_schedules()[schedule](self.optimizer)

    def rows(self, step: int) -> Any:
        return torch.from_numpy(rows(step)).chunk(dist.get_world_size())[dist.get_rank()]

    def loss(self, step: int) -> Any:
        return self.model(self.rows(step)).square().mean()

    def parts(self) -> dict[str, Any]:
        parts = super().parts()
        dist.all_reduce(parts["loss"])
        parts["loss"] /= dist.get_world_size()
        around = {k: self.rows(abs(self.step + k)) for k in (-1, 1)}
        return {**parts, "batch": self.rows(self.step), "around": around}


def shared_folder() -> Path:
    names = [tempfile.mkdtemp(prefix="audit-") if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(names)
    return Path(names[0])


def save(trainer: Fsdp, how: str, folder: Path) -> None:
    if how == "sharded":
        model, optimizer = sd.get_state_dict(trainer.model, trainer.optimizer)
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder / "dcp")
    else:
        saved = sd.get_state_dict(trainer.model, trainer.optimizer, options=FULL)
        if dist.get_rank() == 0:
            torch.save(saved, folder / "full")
    dist.barrier()
    torch.save([trainer.schedule.state_dict(), trainer.step], folder / f"rest-{dist.get_rank()}")


def restore(trainer: Fsdp, how: str, folder: Path) -> None:
    if how == "sharded":
        model, optimizer = sd.get_state_dict(trainer.model, trainer.optimizer)
        dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=folder / "dcp")
        sd.set_state_dict(trainer.model, trainer.optimizer, model_state_dict=model, optim_state_dict=optimizer)
    else:
        model, optimizer = torch.load(folder / "full", weights_only=True)
        sd.set_state_dict(
            trainer.model, trainer.optimizer, model_state_dict=model, optim_state_dict=optimizer, options=FULL
        )
    schedule, trainer.step = torch.load(folder / f"rest-{dist.get_rank()}", weights_only=True)
    trainer.schedule.load_state_dict(schedule)


def honest(case: str) -> audit.Verdict:
    """Save and restore in the way `MODEL,OPTIMIZER,SCHEDULE,HOW`; then take a step on both sides."""
    model, optimizer, schedule, how = case.split(",")
    one, other = (Fsdp(model, optimizer, schedule, seed=seed) for seed in (0, 1))
    one.take(2)
    before, folder = audit.record(**one.parts()), shared_folder()
    save(one, how, folder)
    assert not audit.check(before, **other.parts())
    restore(other, how, folder)
    verdict = audit.check(before, **other.parts())
    if not verdict:
        return verdict
    one.take(1)
    other.take(1)
    return audit.compare(audit.record(**one.parts()), audit.record(**other.parts()))


def moved(folder: str) -> audit.Verdict:
    """Save a record and a checkpoint for a process that has the same model whole."""
    one = Fsdp()
    one.take(2)
    audit.record(one.model, one.optimizer, batch=one.rows(2), step=2).save(Path(folder) / "before.json")
    save(one, "sharded", Path(folder))
    return audit.check(audit.load(Path(folder) / "before.json"), one.model, one.optimizer, batch=one.rows(2), step=2)


def planted(fault: str) -> audit.Verdict:
    """Plant a fault on rank 1 alone, or in its shards."""
    one = Fsdp()
    one.take(2)
    before, last = audit.record(**one.parts()), dist.get_rank() == 1
    parts, weight = one.parts(), one.model[2].weight
    if fault == "shard":
        with torch.no_grad():
            weight.to_local().mul_(1.5 if last else 1.0)
    elif fault == "moments":
        one.optimizer.state[weight]["exp_avg"].to_local().mul_(0.0 if last else 1.0)
    elif fault == "rate":
        one.optimizer.param_groups[0]["lr"] = 0.5 if last else one.optimizer.param_groups[0]["lr"]
    elif fault == "rows":
        parts["batch"] = torch.from_numpy(rows(2)).chunk(2)[0]
    return audit.check(before, **{**parts, "loss": None})
