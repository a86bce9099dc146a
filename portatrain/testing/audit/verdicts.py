"""Compare two records of a trainer, and say what is wrong: which tensor, which layer, which kind of fault."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from portatrain.errors import UserError, choice
from portatrain.testing.audit import batches
from portatrain.testing.audit.records import Record, record
from portatrain.testing.audit.tensors import constant, distance, factor, fault_of, name_factor, split

KINDS = {
    "missing": "a tensor that the first record has is gone",
    "new": "a tensor that the first record lacks is there",
    "zeroed": "a tensor is all zeros: lost moments, a layer that was not loaded",
    "swapped": "a tensor holds the values of another one",
    "transposed": "a matrix holds the transposed values",
    "sign": "signs are flipped",
    "permuted": "the same elements are in another order",
    "scaled": "every element is multiplied by one factor",
    "rounded": "the values were rounded to a narrower dtype on the way",
    "dtype": "the same values are stored in another dtype",
    "reshaped": "the same values are stored in another shape; a note, not a fault",
    "shape": "a tensor has another number of elements",
    "changed": "a tensor has other values, for no reason that the sums show",
    "non-finite": "a tensor has elements that are not finite",
    "counter": "the optimizer's count of steps is another one",
    "learning-rate": "the optimizer uses another learning rate, or another one than its schedule says",
    "setting": "a setting of the optimizer is another one",
    "schedule": "the schedule is at another step, or gives other values",
    "step": "the trainer's own count of steps is another one",
    "data": "the batch has other rows: shifted, repeated, other labels",
    "data-order": "the batch has the same rows in another order; a note, not a fault",
    "data-repeated": "two ranks have the same rows",
    "loss": "the loss of the same batch is another one",
    "gradients": "a gradient of the same batch is another one",
    "frozen": "a parameter is not trained any more",
    "thawed": "a parameter is trained that was frozen",
    "untied": "parameters are not shared any more, or newly shared",
    "rng": "the random numbers go on from another state",
    "rng-repeated": "ranks have one state of random numbers",
    "replicas": "copies of one tensor on several ranks differ",
    "repeated": "parts of a tensor on several ranks hold the same values",
    "versions": "a library has another version; a note, not a fault",
}
"""Every kind of fault, and what it means."""
NOTES = {"reshaped", "data-order", "versions"}
UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""The unit roundoff of each dtype that a model computes in."""
ROOM = 64
"""A loss may differ by so many roundoffs of itself, a gradient by so many of the norm of all gradients: two orders of
the same sums. Sums in blocks of at most 64 terms, added pairwise, stay within it."""


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong."""

    kind: str
    """A key of `KINDS`."""
    role: str
    """`params`, `buffers`, a slot of the optimizer such as `m`, or what else is at fault."""
    name: str
    """The parameter's name, or ''."""
    text: str
    """What happened, in words."""

    @property
    def layer(self) -> str:
        """The numbered layer that a parameter belongs to, else its module; '' for what is no parameter."""
        found = re.match(r"(.*?(?:^|\.)\d+)(?:\.|$)", self.name)
        return found[1] if found else self.name.rpartition(".")[0]

    def __str__(self) -> str:
        where = {"params": self.name, "": self.role}.get(
            self.role, f"{self.role} of {self.name}" if self.name else self.role
        )
        return f"{self.kind}: {where}: {self.text}"


@dataclass(frozen=True)
class Verdict:
    """What a comparison found. It is true if there is no fault; as text it is a few lines."""

    faults: list[Fault] = field(default_factory=list)
    notes: list[Fault] = field(default_factory=list)
    compared: int = 0
    """Tensors that were compared."""

    def __bool__(self) -> bool:
        return not self.faults

    @property
    def kinds(self) -> set[str]:
        """The kinds of the faults."""
        return {fault.kind for fault in self.faults}

    def __str__(self) -> str:
        head = f"audit: {len(self.faults)} faults" if self.faults else "audit: no fault"
        lines = [f"{head}, {self.compared} tensors compared"]
        lines += [f"  {line}" for line in _grouped(self.faults)]
        return "\n".join([*lines, *(f"  note: {line}" for line in _grouped(self.notes))])

    def require(self) -> None:
        """Raise UserError unless there is no fault."""
        if self.faults:
            raise UserError(
                "the audit",
                expected="the state that was recorded",
                got=f"{len(self.faults)} faults: {'; '.join(_grouped(self.faults))}",
                do="Mend the save or the restore; do not train on.",
            )


def _grouped(faults: Iterable[Fault]) -> list[str]:
    """Return one line for all faults of one kind and role, with three names."""
    groups: dict[tuple[str, str], list[Fault]] = {}
    for fault in faults:
        groups.setdefault((fault.kind, fault.role), []).append(fault)
    lines = []
    for (kind, role), group in groups.items():
        layers = len({fault.layer for fault in group})
        if len(group) > 3 and len({fault.text for fault in group}) == 1:
            lines.append(f"{kind}: {role} of {len(group)} parameters in {layers} layers: {group[0].text}")
            continue
        lines += [str(fault) for fault in group[:3]]
        if len(group) > 3:
            lines.append(f"{kind}: {len(group) - 3} more of {role}, {len(group)} in {layers} layers")
    return lines


def check(
    before: Record,
    model: Any,
    optimizer: Any = None,
    *,
    names: Mapping[str, str] | Callable[[str], str] | None = None,
    allow: Collection[str] = (),
    precision: str = "float32",
    **now: Any,
) -> Verdict:
    """Record a trainer's state again and compare it with an earlier record.

    Args:
        before: the earlier record.
        model, optimizer, now: as for `record`, of the trainer after a restore, a conversion or an upgrade.
        names: this model's names of parameters as the earlier record has them, a mapping or a function.
        allow: kinds of faults that are notes here, such as "rounded" after an export in bfloat16.
        precision: the dtype that the model computes in, which says how much a loss and a gradient may differ.

    Raises UserError as `record` does.
    """
    return compare(before, record(model, optimizer, brief=True, **now), names=names, allow=allow, precision=precision)


def compare(
    before: Record,
    after: Record,
    *,
    names: Mapping[str, str] | Callable[[str], str] | None = None,
    allow: Collection[str] = (),
    precision: str = "float32",
) -> Verdict:
    """Compare two records; the arguments are those of `check`."""
    for kind in allow:
        if kind not in KINDS:
            raise choice("allow", kind, KINDS)
    if precision not in UNIT:
        raise choice("precision", precision, UNIT)
    old, new = before.data, _renamed(after.data, names)
    room = ROOM * UNIT[precision]
    found = [*_tensors(old, new), *_optimizer(old, new), *_schedule(old, new), *_trained(old, new)]
    found += [*_data(old, new), *_loss(old, new, room), *_gradients(old, new, room), *_rng(old, new)]
    found += list(alone(new))
    changed = [f"{n} {v} -> {new['versions'][n]}" for n, v in old["versions"].items() if new["versions"].get(n, v) != v]
    if changed:
        found.append(Fault("versions", "", "", ", ".join(changed)))
    quiet = NOTES | set(allow)
    return Verdict(
        [f for f in found if f.kind not in quiet],
        [f for f in found if f.kind in quiet],
        len(old["tensors"].keys() & new["tensors"].keys()),
    )


def look(before: Record) -> Verdict:
    """Return what is wrong within one record alone: ranks that disagree, parts that repeat, a schedule not applied."""
    return Verdict(list(alone(before.data)), [], len(before.data["tensors"]))


def alone(data: Mapping[str, Any]) -> Iterable[Fault]:
    """Yield what is wrong within one record."""
    for kind, key, text in data["disagree"]:
        yield Fault(kind, *split(key), text)
    for key, tensor in data["tensors"].items():
        if tensor["bad"]:
            yield Fault("non-finite", *split(key), f"{tensor['bad']} of {tensor['count']} elements are not finite")
    plan = data["schedule"] or {}
    used, rates = plan.get("used") or [], plan.get("rates") or []
    if len(used) == len(rates):
        for number, (rate, lr) in enumerate(zip(rates, used, strict=True)):
            if not math.isclose(rate, lr, rel_tol=1e-12):
                text = f"the schedule says {rate:.9g}, the optimizer uses {lr:.9g} (group {number})"
                yield Fault("learning-rate", "schedule", "", text)
    if data["batch"] and (fault := batches.repeated(data["batch"])):
        yield Fault(fault[0], "batch", "", fault[1])
    if data["rng"] and len(set(data["rng"])) < len(data["rng"]):
        same = [r for r, word in enumerate(data["rng"]) if data["rng"].count(word) > 1]
        yield Fault("rng-repeated", "rng", "", f"ranks {', '.join(map(str, same))} have the same state")


def _renamed(data: dict[str, Any], names: Mapping[str, str] | Callable[[str], str] | None) -> dict[str, Any]:
    if names is None:
        return data
    name = names if callable(names) else lambda key: names.get(key, key)
    new = dict(data)
    for part in ("tensors", "gradients"):
        new[part] = {f"{role}/{name(n)}": t for key, t in data[part].items() for role, n in [split(key)]}
    for part in ("settings", "counters", "trained"):
        new[part] = {name(key): value for key, value in data[part].items()}
    new["ties"] = sorted(sorted(map(name, group)) for group in data["ties"])
    return new


def _tensors(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterable[Fault]:
    words = {t["words"]["ordered"]: key for key, t in old["tensors"].items() if not constant(t)}
    for key, before in old["tensors"].items():
        role, name = split(key)
        if role not in ("params", "buffers") and not new["optimizer"]:
            continue  # a check of the model alone, as after a conversion
        after = new["tensors"].get(key)
        if after is None:
            lost = "" if role in ("params", "buffers") else ": the optimizer has no such slot any more"
            yield Fault("missing", role, name, f"it is gone, its norm was {before['norm']:.6g}{lost}")
        elif (found := fault_of(key, before, after, words)) is not None:
            yield Fault(found[0], role, name, found[1])
    for key in new["tensors"]:
        role, name = split(key)
        if key not in old["tensors"] and (old["optimizer"] or role in ("params", "buffers")):
            yield Fault("new", role, name, "the first record has no such tensor")


def _optimizer(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterable[Fault]:
    if not (old["optimizer"] and new["optimizer"]):
        return
    ours, theirs = old["counters"], new["counters"]
    if ours.keys() & theirs.keys() or not (ours and theirs):
        for name, count in ours.items():
            if name in theirs and theirs[name] != count:
                yield Fault("counter", "counter", name, f"at {theirs[name]}, it was at {count}")
            elif name not in theirs:
                yield Fault("counter", "counter", name, f"gone, it was at {count}")
        for name in theirs.keys() - ours.keys():
            yield Fault("counter", "counter", name, f"at {theirs[name]}, there was none")
    elif set(ours.values()) != set(theirs.values()):  # two frameworks count in different places
        yield Fault(
            "counter", "counter", "", f"at {sorted(set(theirs.values()))}, it was at {sorted(set(ours.values()))}"
        )
    for name, settings in old["settings"].items():
        for key, value in settings.items():
            there = new["settings"].get(name, {}).get(key, value)
            if there != value:
                kind = "learning-rate" if key == "lr" else "setting"
                text = f"{key} is {there}, it was {value}"
                if kind == "learning-rate" and value and there:
                    text += f" ({name_factor(there / value)} times)"
                yield Fault(kind, key, name, text)


def _schedule(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterable[Fault]:
    if old["step"] is not None and new["step"] is not None and old["step"] != new["step"]:
        yield Fault("step", "step", "", f"at {new['step']}, it was at {old['step']}")
    ours, theirs = old["schedule"], new["schedule"]
    if not ours or not theirs:
        return
    if ours["at"] and theirs["at"] and ours["at"] != theirs["at"]:
        off = theirs["at"][0] - ours["at"][0]
        yield Fault(
            "schedule", "schedule", "", f"at step {theirs['at'][0]}, it was at {ours['at'][0]}: off by {off:+d}"
        )
    near, there = ours.get("near"), theirs.get("near")
    if near and there and near["0"] != there["0"] and ours["at"] == theirs["at"]:
        off = next((k for k, v in near.items() if v == there["0"]), None)
        more = f": off by {int(off):+d} steps" if off else ""
        yield Fault(
            "schedule", "schedule", "", f"the next learning rate is {there['0']:.9g}, it was {near['0']:.9g}{more}"
        )
    if ours.get("rates") and theirs.get("rates") and ours["rates"] != theirs["rates"]:
        yield Fault("learning-rate", "schedule", "", f"{theirs['rates']}, it was {ours['rates']}")


def _trained(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterable[Fault]:
    if old["optimizer"] == new["optimizer"]:
        for name, trained in old["trained"].items():
            now = new["trained"].get(name, trained)
            if now and not trained:
                yield Fault("thawed", "params", name, "it is trained, it was frozen")
            elif trained and not now:
                yield Fault("frozen", "params", name, "it is frozen, or not in the optimizer; it was trained")
    if old["framework"] == new["framework"]:
        for group in old["ties"]:
            if group not in new["ties"]:
                yield Fault("untied", "params", group[0], f"{' and '.join(group)} do not share one parameter any more")
        for group in new["ties"]:
            if group not in old["ties"]:
                yield Fault("untied", "params", group[0], f"{' and '.join(group)} share one parameter, they did not")


def _data(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterable[Fault]:
    if old["batch"] and new["batch"]:
        fault = batches.compare(old["batch"], new["batch"], old["around"])
        if fault:
            yield Fault(fault[0], "batch", "", fault[1])


def _loss(old: Mapping[str, Any], new: Mapping[str, Any], room: float) -> Iterable[Fault]:
    ours, theirs = old["loss"], new["loss"]
    if ours is None or theirs is None or abs(theirs - ours) <= room * max(abs(ours), abs(theirs)):
        return
    text = f"{theirs:.9g}, it was {ours:.9g}"
    if ours and name_factor(theirs / ours).replace("1/", "").isdigit():
        text += f": scaled by {name_factor(theirs / ours)}"
    yield Fault("loss", "loss", "", text)


def _gradients(old: Mapping[str, Any], new: Mapping[str, Any], room: float) -> Iterable[Fault]:
    """Compare gradients with the norm of all of them: a gradient of rounding errors alone is no fault."""
    ours, theirs = old["gradients"], new["gradients"]
    if not ours or not theirs:
        return
    norm = math.sqrt(sum(t["norm"] ** 2 for t in ours.values()))
    for key in ours.keys() - theirs.keys():
        if ours[key]["norm"] > room * norm:
            yield Fault("gradients", "gradient", split(key)[1], f"gone, its norm was {ours[key]['norm']:.6g}")
    faults, factors = [], []
    for key in [k for k in ours if k in theirs]:
        far = distance(ours[key], theirs[key])
        if far <= room * norm and theirs[key]["bad"] == ours[key]["bad"]:
            continue
        c = factor(ours[key], theirs[key])
        factors.append(c)
        text = f"every element is {name_factor(c)} times what it was" if c else f"about {far / norm:.2g} of all away"
        text += f"; its norm is {theirs[key]['norm']:.6g}, it was {ours[key]['norm']:.6g}"
        faults.append(Fault("gradients", "gradient", split(key)[1], text))
    known = [c for c in factors if c is not None]
    if len(faults) > 1 and len(known) == len(faults) and max(known) - min(known) <= 1e-3 * abs(max(known)):
        yield Fault("gradients", "gradient", "", f"all are {name_factor(known[0])} times what they were")
    else:
        yield from faults


def _rng(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterable[Fault]:
    if old["rng"] and new["rng"] and len(old["rng"]) == len(new["rng"]) and old["rng"] != new["rng"]:
        differ = [str(r) for r, (a, b) in enumerate(zip(old["rng"], new["rng"], strict=True)) if a != b]
        yield Fault("rng", "rng", "", f"another state on rank {', '.join(differ)}")
