"""Record a trainer's state as sums, settings and counters: small JSON that another process can compare with its own."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from portatrain.errors import UserError
from portatrain.testing.audit import batches
from portatrain.testing.audit.leaves import is_array, is_torch, leaf_of, loaded, torch_numpy
from portatrain.testing.audit.states import State, plain_name, state_of
from portatrain.testing.audit.sums import BLOCKS, SIGNS, WORDS, Sums, sums_of

FORMAT = 1
NEAR = (-2, -1, 0, 1, 2)
"""Steps around the next one at which a schedule that is a function is asked."""
LIBRARIES = ("torch", "jax", "jaxlib", "flax", "optax", "transformers", "accelerate", "deepspeed", "numpy")


@dataclass(frozen=True)
class Record:
    """What an audit knows of a trainer at one moment. `data` is plain JSON."""

    data: dict[str, Any]

    def save(self, path: Path | str) -> None:
        """Write the record to a file; every process of a group may call it, and the file is whole at any time."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f"{path.name}.{os.getpid()}.new")
        new.write_text(json.dumps(self.data, allow_nan=True), encoding="utf-8")
        os.replace(new, path)

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read a record from a file; raises UserError if it is none."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise _no_record(path, str(error)) from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise _no_record(path, "other content")
        if (lacks := _damage(data)) is not None:
            raise _no_record(path, f"a damaged record: {lacks}")
        return cls(data)


_KINDS: dict[str, type | tuple[type, ...]] = {
    "framework": str,
    "versions": dict,
    "ranks": int,
    "step": (int, type(None)),
    "optimizer": bool,
    "tensors": dict,
    "gradients": dict,
    "disagree": list,
    "settings": dict,
    "counters": dict,
    "trained": dict,
    "ties": list,
    "schedule": (dict, type(None)),
    "loss": (int, float, type(None)),
    "batch": (dict, type(None)),
    "around": dict,
    "rng": (list, type(None)),
}
_SUMS: dict[str, type | tuple[type, ...]] = {
    "shape": list,
    "dtype": str,
    "words": dict,
    "blocks": list,
    "signs": list,
    "count": int,
    "zeros": int,
    "bad": int,
    "norm": (int, float),
    "low": (int, float),
    "high": (int, float),
}


def _damage(data: Mapping[str, Any]) -> str | None:
    """Return the first field of a record that is missing or of another kind; None if there is none."""
    for name, kind in _KINDS.items():
        if name not in data or not isinstance(data[name], kind):
            return name
    for part in ("tensors", "gradients"):
        for key, tensor in data[part].items():
            for name, kind in _SUMS.items():
                if not isinstance(tensor, dict) or not isinstance(tensor.get(name), kind):
                    return f"{name} of {key}"
            sizes = len(tensor["blocks"]), len(tensor["signs"])
            if sizes != (BLOCKS, SIGNS) or not set(WORDS) <= tensor["words"].keys():
                return f"the sums of {key}"
    batches = [*([] if data["batch"] is None else [data["batch"]]), *data["around"].values()]
    inner = {
        "disagree": all(_words(item) and len(item) == 3 for item in data["disagree"]),
        "ties": all(_words(group) and group for group in data["ties"]),
        "batch": all(map(_is_batch, batches)),
        "rng": _words(data["rng"] or []),
    }
    return next((name for name, good in inner.items() if not good), None)


def _words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_batch(batch: Any) -> bool:
    """Return whether these are rows as `batches.joined` gives them."""
    if not isinstance(batch, dict) or not isinstance(arrays := batch.get("arrays"), dict):
        return False
    sizes = batch.get("rank_rows")
    return all(map(_words, arrays.values())) and isinstance(sizes, list) and all(isinstance(n, int) for n in sizes)


def load(path: Path | str) -> Record:
    """Read a record from a file that `Record.save` wrote; raises UserError if it is none."""
    return Record.load(path)


def _no_record(path: Path | str, got: str) -> UserError:
    return UserError(
        f"the record {path}",
        expected=f"a file that audit.record(...).save wrote, of format {FORMAT}",
        got=got,
        do="Record again before the save, and pass the path of that file.",
    )


def record(
    model: Any,
    optimizer: Any = None,
    *,
    batch: Any = None,
    around: Mapping[int, Any] | None = None,
    loss: Any = None,
    gradients: Any = None,
    step: int | None = None,
    schedule: Any = None,
    rng: Any = None,
    per_rank: Sequence[str] = (),
    brief: bool = False,
) -> Record:
    """Record a trainer's state. Nothing is changed; of every tensor only sums are kept.

    In a group of torch processes all call it together, and all get the same record.

    Args:
        model: a torch module (plain, compiled, under DDP or FSDP2), a flax nnx module, or a tree of arrays.
        optimizer: a torch optimizer or a list of them, an nnx.Optimizer, or the state of an optax transformation.
        batch: the next batch, a tree of arrays of which the first axis is the sample; this rank's rows.
        around: other batches by their distance from `batch` in steps, so that a shift of the data can be named.
        loss: the loss of `batch`, a number, the same on all ranks.
        gradients: True for those in `parameter.grad` (torch), or a tree of arrays, of `batch`.
        step: the number of steps that were taken.
        schedule: a torch scheduler or a list of them, a function from a step to a learning rate, or the learning rate.
        rng: True for torch's own generators, or a torch.Generator, a jax key, an array or bytes: this rank's.
        per_rank: shell patterns of parameters of which each rank has a part of its own that is no DTensor.
        brief: leave out the sums that only the earlier of two records needs.

    Raises UserError if the model or the optimizer is of another kind.
    """
    state = state_of(model, optimizer)
    variants = not brief
    mine: dict[str, Any] = {
        "tensors": _local(state.tensors, variants),
        "gradients": _local(_gradients(gradients, model), False) if gradients is not None else {},
        "rows": batches.rows_of(batch) if batch is not None else None,
        "around": {str(k): batches.rows_of(b) for k, b in (around or {}).items()},
        "rng": _rng(rng),
        "loss": None if loss is None else _number("loss", loss),
        "settings": state.settings,
        "counters": state.counters,
        "trained": state.trained,
        "schedule": _schedule(schedule, step, state),
    }
    ranks = _gathered(mine)
    tensors, disagree = _merged([rank["tensors"] for rank in ranks], per_rank)
    grads, more = _merged([rank["gradients"] for rank in ranks], per_rank)
    for name in ("settings", "counters", "trained"):
        disagree += _disagreeing(name, [rank[name] for rank in ranks])
    losses = [rank["loss"] for rank in ranks if rank["loss"] is not None]
    data = {
        "format": FORMAT,
        "framework": state.framework,
        "versions": {name: str(m.__version__) for name in LIBRARIES if hasattr(m := loaded(name), "__version__")},
        "ranks": len(ranks),
        "step": step,
        "optimizer": state.optimizer,
        "tensors": tensors,
        "gradients": grads,
        "disagree": disagree + more,
        "settings": _union(rank["settings"] for rank in ranks),
        "counters": _union(rank["counters"] for rank in ranks),
        "trained": _union(rank["trained"] for rank in ranks),
        "ties": state.ties,
        "schedule": ranks[0]["schedule"],
        "loss": math.fsum(losses) / len(losses) if losses else None,
        "batch": batches.joined([rank["rows"] for rank in ranks]) if batch is not None else None,
        "around": {k: batches.joined([rank["around"][k] for rank in ranks]) for k in mine["around"]},
        "rng": [rank["rng"] for rank in ranks] if rng is not None else None,
    }
    return Record(json.loads(json.dumps(data)))


def _local(tensors: Mapping[str, Any], variants: bool) -> dict[str, Any]:
    """Return the sums of every box that this process holds."""
    found = {}
    for name, tensor in tensors.items():
        leaf = leaf_of(tensor)
        boxes = []
        for held in leaf.boxes:
            array, shape, offset = held.fetch(), leaf.shape, held.offset
            if array.ndim > len(shape):  # complex numbers, as pairs
                shape, offset = (*shape, 2), (*offset, 0)
            boxes.append((held.offset, held.shape, sums_of(array, shape, offset, variants=variants)))
        found[name] = {"shape": list(leaf.shape), "dtype": leaf.dtype, "boxes": boxes}
    return found


def _gathered(mine: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what every process of the group has, by rank."""
    torch, jax = loaded("torch"), loaded("jax")
    dist = torch.distributed if torch is not None else None
    if dist is not None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, mine)
        return found
    # jax.process_count() would start jax's devices, which a trainer in torch has no use for.
    client = getattr(getattr(jax, "_src", None), "distributed", None)
    if client is not None and (getattr(client.global_state, "num_processes", 1) or 1) > 1:
        raise UserError(
            "an audit of several jax processes",
            expected="one jax process, with any number of devices",
            got=f"{client.global_state.num_processes} processes",
            do="Restore the checkpoint in one process, and record there.",
        )
    return [mine]


def _merged(ranks: Sequence[Mapping[str, Any]], per_rank: Sequence[str]) -> tuple[dict[str, Any], list[list[str]]]:
    """Return the sums of whole tensors, and what ranks disagree about: (kind, name, sentence)."""
    names = list(dict.fromkeys(name for rank in ranks for name in rank))
    merged: dict[str, Any] = {}
    disagree: list[list[str]] = []
    for name in names:
        own = any(fnmatch.fnmatch(name.partition("/")[2], pattern) for pattern in per_rank)
        holders = {r: rank[name] for r, rank in enumerate(ranks) if name in rank}
        if own and len(ranks) > 1:
            for r, tensor in holders.items():
                merged[f"{name} @ rank {r}"] = _whole(name, {r: tensor}, disagree)
            _repeats(name, [(f"rank {r}", t["boxes"][0][2]) for r, t in holders.items()], disagree)
        else:
            merged[name] = _whole(name, holders, disagree)
    return merged, disagree


def _whole(name: str, holders: Mapping[int, Any], disagree: list[list[str]]) -> dict[str, Any]:
    first = next(iter(holders.values()))
    boxes: dict[tuple[Any, Any], tuple[int, Sums]] = {}
    for rank, tensor in holders.items():
        for offset, shape, sums in tensor["boxes"]:
            if not math.prod(shape):
                continue
            there, known = boxes.setdefault((tuple(offset), tuple(shape)), (rank, sums))
            if known.words["ordered"] != sums.words["ordered"]:
                disagree.append(["replicas", name, f"the copies on ranks {there} and {rank} differ"])
    total = Sums(words=dict.fromkeys(WORDS, 0))
    for _, sums in boxes.values():
        total.add(sums)
    if len(boxes) > 1:
        _repeats(name, [(f"the part at {list(at)}", sums) for (at, _), (_, sums) in boxes.items()], disagree)
    return {"shape": first["shape"], "dtype": first["dtype"], **total.as_json()}


def _repeats(name: str, parts: Sequence[tuple[str, Sums]], disagree: list[list[str]]) -> None:
    """Note two parts of a tensor that hold the same values; parts of one value are often equal on purpose."""
    seen: dict[int, str] = {}
    for where, sums in parts:
        if sums.count < 2 or sums.low == sums.high:
            continue
        if (other := seen.setdefault(sums.words["bag"], where)) != where:
            disagree.append(["repeated", name, f"{other} and {where} hold the same values"])
            return


def _disagreeing(what: str, ranks: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    found = []
    for number, rank in enumerate(ranks[1:], start=1):
        common = [name for name in ranks[0] if name in rank and rank[name] != ranks[0][name]]
        if common:
            name = common[0]
            text = (
                f"rank 0 has {_short(ranks[0][name], rank[name])}, rank {number} {_short(rank[name], ranks[0][name])}"
            )
            kind = {"settings": "setting", "counters": "counter", "trained": "frozen"}[what]
            found.append([kind, f"{what}/{name}", text])
    return found


def _short(value: Any, other: Any) -> str:
    """Return a value, of a mapping only what differs from the other."""
    if isinstance(value, Mapping) and isinstance(other, Mapping):
        return ", ".join(f"{k}={v}" for k, v in value.items() if other.get(k) != v)
    return str(value)


def _union(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in parts:
        found = {**part, **found}
    return found


def _number(what: str, value: Any) -> float:
    """Return a number of any framework as a float."""
    try:
        if is_torch(value):
            return float((value.full_tensor() if hasattr(value, "full_tensor") else value).detach())
        return float(np.asarray(value))
    except (TypeError, ValueError, RuntimeError):
        raise UserError(
            what,
            expected="one number, or an array of one",
            got=f"{type(value).__name__} {str(value)[:60]}",
            do="Pass a number.",
        ) from None


def _gradients(gradients: Any, model: Any) -> dict[str, Any]:
    if gradients is not True:
        return {key: value for key, value in state_of(gradients, None).tensors.items() if key.startswith("params/")}
    if not hasattr(model, "named_parameters"):
        raise UserError(
            "gradients=True",
            expected="a torch module, of which the parameters have .grad",
            got=type(model).__name__,
            do="Pass the gradients themselves, as a tree like that of the parameters.",
        )
    module = getattr(model, "module", model) if type(model).__name__ == "DistributedDataParallel" else model
    return {f"params/{plain_name(n)}": p.grad for n, p in module.named_parameters() if p.grad is not None}


def _rng(rng: Any) -> str | None:
    torch, jax = loaded("torch"), loaded("jax")
    if rng is None:
        return None
    if rng is True and torch is not None:
        states = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else ())]
        raw = b"".join(torch_numpy(state).tobytes() for state in states)
    elif hasattr(rng, "get_state") and torch is not None:
        raw = torch_numpy(rng.get_state()).tobytes()
    elif is_array(rng):
        key = jax is not None and isinstance(rng, jax.Array) and jax.dtypes.issubdtype(rng.dtype, jax.dtypes.prng_key)
        raw = np.asarray(jax.random.key_data(rng) if key and jax is not None else rng).tobytes()
    elif isinstance(rng, (bytes, int, str)):
        raw = str(rng).encode()
    else:
        raise UserError(
            "rng",
            expected="True, a torch.Generator, a jax key, an array or bytes",
            got=type(rng).__name__,
            do="Pass the generator of this rank.",
        )
    return hashlib.sha256(raw).hexdigest()[:16]


def _schedule(schedule: Any, step: int | None, state: State) -> dict[str, Any] | None:
    if schedule is None:
        return None
    several = schedule if isinstance(schedule, (list, tuple)) else [schedule]
    if all(hasattr(one, "get_last_lr") for one in several):
        rates = [_number("the rate of the schedule", lr) for one in several for lr in one.get_last_lr()]
        return {"at": [int(one.last_epoch) for one in several], "rates": rates, "used": state.rates}
    if callable(schedule):
        at = step if step is not None else max(state.counters.values(), default=None)
        if at is None:
            raise UserError(
                "schedule",
                expected="the number of steps that were taken, to ask the schedule for the next learning rate",
                got="no step, and an optimizer that counts none",
                do="Pass step=...",
            )
        return {
            "at": [at],
            "near": {str(k): _number("the value of the schedule", schedule(at + k)) for k in NEAR if at + k >= 0},
        }
    return {"at": [], "rates": [_number("schedule", schedule)], "used": []}
