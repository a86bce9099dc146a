"""Which fields of a recipe may change in a run, and how: one table, and the proof that a change leaves the past as it
was.

`ROWS` sorts every field of `Recipe` and of its parts. The reference page of it (docs/reference/changes.md) is written
from the table, and a test fails for a field that no row names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from portatrain.data.ranges import below, in_words
from portatrain.data.spec import Mixture
from portatrain.errors import UserError
from portatrain.model.lora import is_factor
from portatrain.recipe.loading import apply_overrides
from portatrain.recipe.origin import Origin
from portatrain.recipe.recipe import Recipe
from portatrain.recipe.same import changed_fields


class Kind(StrEnum):
    """What a change of a field does to a run."""

    FREE = "free"
    """It does not touch the trajectory: every attempt may change it. It is recorded."""
    LATER = "later"
    """It may leave the past as it was. If the values of all past steps prove that, every attempt may change it, and it
    is recorded; otherwise it is a change of the trajectory."""
    TRAJECTORY = "trajectory"
    """It changes the trajectory from now on: `portatrain resume --set ... --reason ...` or `portatrain fork`."""
    CORPUS = "corpus"
    """It changes the corpus. A run keeps one, packed in its folder, so only `portatrain fork` changes it."""
    RECORD = "record"
    """portatrain sets it; no command takes it."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """The kind of some fields of one class, by their names."""

    owner: str
    fields: str
    kind: Kind
    why: str


_WINDOW = "the next sample keeps its number n; sample n is then one that is cut in the new way"
_PACKED = "decides the packed corpus"
_FILES = "paths validation validation_paths"
_RECORDS = f"{_FILES} tokenizer bos field template messages chat_template"
_SOURCES = {
    "Stdlib": "validation tokenizer bos",
    "TextFiles": f"{_FILES} tokenizer bos",
    "Jsonl": _RECORDS,
    "Parquet": _RECORDS,
    "Arrow": _RECORDS,
    "ArrayRecords": _RECORDS,
    "TokenMemmap": f"{_FILES} vocab dtype separator",
    "Megatron": f"{_FILES} vocab separator",
    "PackedTokens": "path fingerprint",
}
"""The token sources, each with the fields that decide its packed corpus."""

ROWS = (
    Row(owner="Recipe", fields="name", kind=Kind.FREE, why="a name"),
    Row(owner="Recipe", fields="remat compute params", kind=Kind.FREE, why="memory and layout, not results"),
    Row(
        owner="Recipe",
        fields="eval_every eval_batches eval_final_batches",
        kind=Kind.FREE,
        why="evaluations only read the state",
    ),
    Row(
        owner="Recipe",
        fields="checkpoint_every checkpoint_every_s checkpoint_keep checkpoint_keep_every checkpoint_keep_best "
        "checkpoint_busy probe_every",
        kind=Kind.FREE,
        why="saves only read the state",
    ),
    Row(owner="Recipe", fields="statistics_every", kind=Kind.FREE, why="statistics only read the step"),
    Row(owner="Recipe", fields="hooks", kind=Kind.FREE, why="hooks run between steps"),
    Row(owner="Recipe", fields="referee", kind=Kind.FREE, why="computes steps again, and changes none"),
    Row(owner="Referee", fields="every by", kind=Kind.FREE, why="see referee of Recipe"),
    Row(owner="Spikes", fields="max_rewinds", kind=Kind.FREE, why="decides when a run gives up, and no step"),
    Row(owner="Recipe", fields="max_skips", kind=Kind.FREE, why="decides when a run gives up, and no step"),
    Row(
        owner="Recipe",
        fields="steps schedule",
        kind=Kind.LATER,
        why="the learning rates of all past steps are compared",
    ),
    Row(
        owner="Recipe",
        fields="batch accumulation batch_start batch_ramp",
        kind=Kind.LATER,
        why="the samples of all past steps are compared; another batch goes on with the next sample",
    ),
    Row(owner="Recipe", fields="optimizer", kind=Kind.TRAJECTORY, why="its slots are kept, mapped or fresh by rule"),
    Row(
        owner="Recipe",
        fields="model",
        kind=Kind.TRAJECTORY,
        why="tensors keep their shapes, except by --surgery of a fork",
    ),
    Row(
        owner="Recipe",
        fields="seed clip_norm spikes parametrization precision fp8_matmuls fp8_scaling trainable frozen lora decay "
        "no_decay ema_decay ema",
        kind=Kind.TRAJECTORY,
        why="decides every later step",
    ),
    Row(
        owner="Recipe",
        fields="leave_out",
        kind=Kind.TRAJECTORY,
        why="samples that were trained on cannot be left out; those that follow move up, with their numbers",
    ),
    Row(owner="Recipe", fields="init", kind=Kind.TRAJECTORY, why="the weights at step 0; a later step has its own"),
    Row(owner="Recipe", fields="data", kind=Kind.CORPUS, why="another class of source"),
    Row(owner="Recipe", fields="origin", kind=Kind.RECORD, why="where a changed run counts samples from"),
    Row(owner="Origin", fields="step samples tokens", kind=Kind.RECORD, why="see origin of Recipe"),
    *(
        Row(owner=owner, fields=fields, kind=kind, why=why)
        for owner, packed in _SOURCES.items()
        for fields, kind, why in (
            ("seq_len" if owner == "PackedTokens" else "seq_len packing", Kind.TRAJECTORY, _WINDOW),
            (packed, Kind.CORPUS, _PACKED),
        )
    ),
    Row(
        owner="PackedTokens",
        fields="skip_shards",
        kind=Kind.TRAJECTORY,
        why="samples keep their numbers; tokens of a shard that is skipped are blank from then on",
    ),
    Row(owner="Digits", fields="validation", kind=Kind.CORPUS, why=_PACKED),
    Row(owner="Preferences", fields="seq_len", kind=Kind.TRAJECTORY, why=_WINDOW),
    Row(
        owner="Preferences",
        fields=f"{_FILES} format chosen rejected prompt tokenizer bos chat_template",
        kind=Kind.CORPUS,
        why=_PACKED,
    ),
    Row(owner="Mixture", fields="sources", kind=Kind.CORPUS, why=_PACKED),
    Row(owner="Mixture", fields="names", kind=Kind.FREE, why="what evaluations call the sources"),
    Row(owner="Mixture", fields="exhausted", kind=Kind.FREE, why="decides whether a run begins, and no sample"),
    Row(owner="Mixture", fields="schedule", kind=Kind.LATER, why="the weights of all past blocks are compared"),
    Row(
        owner="Mixture",
        fields="weights block",
        kind=Kind.TRAJECTORY,
        why="the next sample keeps its number n; sample n is then one of the new mixture",
    ),
    *(
        Row(owner=owner, fields=fields, kind=Kind.TRAJECTORY, why="decides the update of every later step")
        for owner, fields in (
            ("AdamW", "lr weight_decay b1 b2 eps"),
            ("Lion", "lr weight_decay b1 b2"),
            ("SGD", "lr weight_decay momentum nesterov"),
            ("Adafactor", "lr weight_decay decay_rate clip eps1 eps2 relative"),
            ("Muon", "lr weight_decay momentum nesterov coefficients eps adamw"),
            ("LoRA", "rank alpha targets"),
            ("MuP", "base lr init fixed"),
            ("Spikes", "window least loss grad_norm action before after"),
        )
    ),
    *(
        Row(owner=owner, fields=fields, kind=Kind.LATER, why="the learning rates of all past steps are compared")
        for owner, fields in (
            ("Constant", "warmup"),
            ("Linear", "warmup min_ratio"),
            ("Cosine", "warmup min_ratio"),
            ("WSD", "warmup decay min_ratio shape"),
        )
    ),
)
"""Every field. A part of a class of your own has the kind of the field that holds it (`OWN`)."""

OWN = {"data": Kind.CORPUS}
"""The kind of the fields of your own classes, if it is not that of the field of `Recipe` that holds them."""

BATCH = ("batch", "accumulation", "batch_start", "batch_ramp")
"""The fields of `Recipe` that decide the number of samples of a step."""

_NONE = object()
_KINDS = {(row.owner, name): row.kind for row in ROWS for name in row.fields.split()}


def kind_of(path: str, recipe: Recipe) -> Kind:
    """Return the kind of a dotted field of `recipe`, such as 'optimizer.lr', or of 'optimizer.class', its class.

    The innermost class that the table has decides.
    """
    names = path.split(".")
    kind, value = _KINDS["Recipe", names[0]], getattr(recipe, names[0], None)
    for name in names[1:]:
        # A field that this class does not have is one of the class before it: the place decides.
        kind = _KINDS.get((type(value).__name__, name), OWN.get(names[0], kind))
        value = getattr(value, name, None)
    return kind


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What distinguishes a recipe from the one before it.

    Attributes:
        fields: dotted field -> (value before, value after, kind).
        unproved: why the past is not as it was; '' if it is, or if no field of the kind `LATER` differs.
    """

    fields: Mapping[str, tuple[Any, Any, Kind]]
    unproved: str = ""

    @property
    def kind(self) -> Kind:
        """What the whole change does: the strongest kind of its fields."""
        kinds = [Kind.TRAJECTORY if k is Kind.LATER and self.unproved else k for _, _, k in self.fields.values()]
        return max(kinds, key=list(Kind).index, default=Kind.FREE)

    @property
    def decides(self) -> bool:
        """True if it changes the trajectory."""
        return self.kind not in (Kind.FREE, Kind.LATER)

    def named(self, *kinds: Kind) -> list[str]:
        """Return the fields of these kinds; of all kinds if none is given."""
        return [name for name, (_, _, kind) in self.fields.items() if not kinds or kind in kinds]

    def as_json(self) -> dict[str, Any]:
        """Return field -> [value before, value after]."""
        return {name: [was, now] for name, (was, now, _) in self.fields.items()}


def difference(old: Recipe, new: Recipe, step: int, *, since: int = 0) -> Difference:
    """Return how `new` differs from `old`, in a run that has trained `step` steps under `old` since step `since`.

    Raises:
        UserError: `new` ends before the present step, or leaves out what was trained on.
    """
    if new.steps < step:
        raise UserError(
            "steps",
            expected=f"at least the {step} steps that the run has trained",
            got=str(new.steps),
            do="Give a larger number, or fork the run at an earlier step.",
        )
    _check_left_out(old, new, step)
    changed = {k: v for k, v in changed_fields(old.to_json(), new).items() if k.split(".")[0] != "origin"}
    fields = {name: (was, now, kind_of(name, new)) for name, (was, now) in changed.items()}
    later = any(kind is Kind.LATER for _, _, kind in fields.values())
    return Difference(fields=fields, unproved=_unproved(old, new, step, since) if later else "")


def _check_left_out(old: Recipe, new: Recipe, step: int) -> None:
    """Raise UserError if `new` leaves out other samples, of those up to the last one that was trained on."""
    end = old.numbers_of(step)[1] if step else 0
    was, now = below(old.left_out, end), below(new.left_out, end)
    if was == now:
        return
    raise UserError(
        "leave_out",
        expected=f"samples from {end} on: those before were trained on, or left out, in the steps up to {step}",
        got=f"{', '.join(in_words(now)) or 'none'} of those before, and not {', '.join(in_words(was)) or 'none'}",
        do="Fork the run at a checkpoint before the first of these samples: portatrain fork RUN --at STEP --run NEW.",
    )


def _unproved(old: Recipe, new: Recipe, step: int, since: int) -> str:
    """Return the first value of a past step that `new` has otherwise; '' if there is none."""
    rates = old.schedule != new.schedule or old.steps != new.steps
    batches = any(getattr(old, name) != getattr(new, name) for name in BATCH)
    for at in range(since + 1, step + 1 if rates or batches else 0):
        if rates and (was := old.lr_scale(at)) != (now := new.lr_scale(at)):
            return f"the learning rate of step {at} was {was:.6g} times that of the optimizer and would be {now:.6g}"
        if old.batch_at(at) != new.batch_at(at):
            return f"step {at} had {old.batch_at(at)} samples and would have {new.batch_at(at)}"
    if isinstance(old.data, Mixture) and isinstance(new.data, Mixture) and old.data.schedule != new.data.schedule:
        last = (old.samples_after(step) - 1) // old.data.block
        for block, (was_w, now_w) in enumerate(zip(_weights(old.data, last), _weights(new.data, last), strict=True)):
            if was_w != now_w:
                return f"block {block} of the mixture had the weights {was_w} and would have {now_w}"
    return ""


def _weights(spec: Mixture, last: int) -> Iterator[tuple[float, ...]]:
    """Yield the weights of every block up to `last`."""
    pieces = [(0, spec.weights), *spec.schedule]
    for block in range(last + 1):
        yield next(weights for first, weights in reversed(pieces) if first <= block)


def changed(old: Recipe, overrides: Sequence[str], step: int, *, shapes: bool = True) -> Recipe:
    """Return the recipe that `overrides` make of `old` after `step` steps. `shapes`: False allows another model, of
    which a surgery makes the tensors.

    Raises:
        UserError: an unknown field, a value that does not fit, a change of shapes, or no change at all.
    """
    for word in overrides:
        name = word.partition("=")[0].strip().split(".")[0]
        if _KINDS.get(("Recipe", name)) is Kind.RECORD:
            raise UserError(
                f"override {word!r}",
                expected="a field that decides a run",
                got="one that portatrain sets when a run is changed",
                do="Leave it out.",
            )
    new = apply_overrides(old, overrides)
    if overrides and new == old:
        raise UserError(
            f"--set {' --set '.join(overrides)}",
            expected="a value that the run does not have",
            got="the values that it has",
            do="Leave --set out to go on with the same recipe.",
        )
    if shapes and (old.model != new.model or old.lora != new.lora or old.precision != new.precision):
        check_shapes(old, new)
    return with_origin(old, new, step)


def with_origin(old: Recipe, new: Recipe, step: int) -> Recipe:
    """Return `new` so that its step `step` + 1 takes the sample after the last one of `old`."""
    same = all(getattr(old, name) == getattr(new, name) for name in BATCH)
    if same and old.data.tokens_per_sample() == new.data.tokens_per_sample():
        return dataclasses.replace(new, origin=old.origin)
    per_sample = old.data.tokens_per_sample() or 1
    samples = old.samples_after(step)
    here = Origin(step=step, samples=samples, tokens=old.tokens_after(step, per_sample))
    return dataclasses.replace(new, origin=here)


def check_shapes(old: Recipe, new: Recipe) -> None:
    """Raise UserError unless the model of `new` has the parameters and states of the model of `old`.

    Factors of LoRA may be added: they start as in a new run, and do not change what the model computes.
    """
    was, now = (_shapes(recipe) for recipe in (old, new))
    gone = [name for name in was if name not in now]
    more = [name for name in now if name not in was and not is_factor(name)]
    other = [f"{n} ({list(was[n])} before, {list(now[n])} now)" for n in was if n in now and was[n] != now[n]]
    found = [
        f"{what}: {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
        for what, names in (("other shapes", other), ("not in the run", more), ("no longer in the model", gone))
        if names
    ]
    if found:
        raise UserError(
            "change of the model",
            expected="the parameters and states that the run has, each with its shape",
            got="; ".join(found),
            do="A checkpoint holds tensors of fixed shapes. A surgery makes others of them in a fork: portatrain fork "
            "... --surgery NAME (docs/run/surgery.md). Or begin a new run with these sizes.",
        )


def _shapes(recipe: Recipe) -> dict[str, tuple[int, ...]]:
    definition = recipe.describe()
    return {name: info.shape for name, info in (*definition.params.items(), *definition.states.items())}


def merged(before: Sequence[Any], asked: Any, current: Any) -> Any:
    """Return the JSON `current` with what `asked` has otherwise than all recipes in `before`.

    This is the recipe of a changed run whose command words give `asked`: `before` has the recipe that the words gave
    when the run began, and those that the run has had since. A value that the run had once is an old word, and no new
    wish.
    """
    if any(asked == one for one in before):
        return current
    same = [one for one in before if isinstance(one, Mapping) and isinstance(asked, Mapping)]
    same = [one for one in same if one.get("class") == asked.get("class")]
    if not same or not isinstance(current, Mapping) or current.get("class") != asked.get("class"):
        return asked
    found = {}
    for name in (*current, *(n for n in asked if n not in current)):
        if name in asked or any(name not in one for one in same):  # otherwise `asked` has its default again
            value = merged([one.get(name, _NONE) for one in same], asked.get(name, _NONE), current.get(name, _NONE))
            if value is not _NONE:
                found[name] = value
    return found
