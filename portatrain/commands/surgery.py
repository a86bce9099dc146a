"""Surgery in a fork: plan it, prove it on the run's next samples, and write the checkpoint that it makes."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portatrain.errors import UserError
from portatrain.recipe import Recipe
from portatrain.recipe.same import changed_fields
from portatrain.runs import changes
from portatrain.runs.run_dir import RunDir
from portatrain.system.text import si

if TYPE_CHECKING:
    from checkpoints_format import Reader
    from portatrain.checkpoint.locations import Location
    from portatrain.checkpoint.surgery import Operated, Proof

MODEL = ("model", "lora", "trainable", "frozen", "decay", "no_decay", "ema")
"""The fields that decide which tensors there are; the surgery makes them, and all others change on arrival."""

TOKENS = 2048
"""The proof takes whole samples, up to so many tokens, and at least one sample."""


@dataclass(frozen=True, kw_only=True)
class Done:
    """A surgery that has been planned and proved, and not yet written.

    Attributes:
        name: as it was given to --surgery.
        saved: the recipe of the checkpoint that it makes: the old one, with the model of the new one.
        proof: None if it was left out.
    """

    name: str
    saved: Recipe
    fields: Mapping[str, Any]
    operated: Operated
    proof: Proof | None
    meta: Mapping[str, Any]
    """That of the checkpoint before it, without the fingerprints of its tensors."""

    def as_json(self) -> dict[str, Any]:
        """Return it for the record of the fork, and for the meta of its checkpoint."""
        proof = {"function": "not measured"} if self.proof is None else self.proof.as_json()
        return {"name": self.name, "fields": self.fields, **self.operated.as_json(), "proof": proof}

    def state(self) -> dict[str, Any]:
        """Return what became of the tensors, in the words of a fork without surgery."""
        found = self.operated.as_json()
        slots = ", ".join(f"{n} {fate}" for fate, n in found.get("slots", {}).items()) or "none"
        made, gone = found["made"], found["dropped"]
        has_probe = self.meta.get("probe") is not None
        return {"optimizer": slots, "fresh": len(made), "dropped": len(gone), "examples": made[:4], "probe": has_probe}

    def lines(self) -> list[str]:
        """Return what was done and what the proof found, for a person."""
        found = self.operated.as_json()
        count = ", ".join(f"{n} {fate}" for fate, n in found["tensors"].items())
        gone = f", {len(found['dropped'])} dropped" if found["dropped"] else ""
        return [f"  surgery {self.name}: tensors {count}{gone}", *_proof_lines(self.proof)]

    def write(self, target: Location, step: int) -> None:
        """Write the checkpoint of `step`, COMMIT last."""
        from checkpoints_format import Writer, commit
        from portatrain.checkpoint import fingerprints
        from portatrain.checkpoint.format_layout import format_layout

        layout, sums = format_layout(self.operated.after), fingerprints.Sums()
        meta = {**self.meta, "recipe": self.saved.to_json(), "recipe_sha256": self.saved.sha256}
        found, earlier = self.as_json(), self.meta.get(changes.SURGERY)
        there = earlier.get("fields") if isinstance(earlier, Mapping) else None
        if isinstance(there, Mapping):  # on the same step: the probe is still the one before both
            found["fields"] = {**there, **self.fields}
        meta[changes.SURGERY] = found
        say = progress("written", sum(t.nbytes for t in layout.tensors))

        def counted(source: Callable[[Any], Any]) -> Callable[[Any], Any]:
            def read(box: Any) -> Any:
                array = source(box)
                say(array.nbytes)
                return array

            return read

        with contextlib.closing(target.open(step, create=True)) as store:
            sources = {t.name: counted(self.operated.source(t.name)) for t in layout.tensors}
            Writer(store, layout, save="surgery", writer=0).write(sums.counting(sources), note=sums.note)
            commit(
                store,
                layout,
                save="surgery",
                meta=lambda notes: {**meta, fingerprints.FIELD: fingerprints.joined(layout, notes)},
            )


def _proof_lines(proof: Proof | None) -> list[str]:
    if proof is None:
        return ["  its proof was left out: what it does to the function was not measured"]
    on = f"on {proof.samples} samples of the run"
    outputs = proof.outputs if proof.ids is None else f"{proof.outputs} of the first {proof.ids} ids"
    size = f"largest difference of {outputs} {proof.difference:.3g} (they go up to {proof.scale:.3g}), {on}"
    found = f"  the function is kept: {size}, in float64" if proof.claims else f"  the function changes: {proof.why}"
    more = [] if proof.claims else [f"  {size}, mean difference {proof.mean:.3g}"]
    if proof.claims and proof.stored > proof.difference:
        more.append(f"  as the checkpoint rounds the new tensors: {proof.stored:.3g}")
    return [found, *more, f"  loss on these samples: {proof.loss[0]:.6g} before, {proof.loss[1]:.6g} after"]


@contextlib.contextmanager
def operating(
    parent: RunDir, source: Location, step: int, old: Recipe, new: Recipe, name: str, *, proved: bool
) -> Iterator[Done]:
    """Plan the surgery `name` on the checkpoint of `step`, which was saved under `old`, and prove it. The model after
    it is that of `new`. The checkpoint stays open until the end.

    Raises:
        UserError: it does not fit the two models, or the proof contradicts it. Nothing was written.
    """
    from checkpoints_format import Reader
    from portatrain.backends.program import make_program
    from portatrain.checkpoint.errors import explained
    from portatrain.checkpoint.format_layout import check_step, check_tensors
    from portatrain.checkpoint.surgery import Operated, chosen

    transform = chosen(name)
    saved = replace(old, **{field: getattr(new, field) for field in MODEL})
    before, after = make_program(old), make_program(saved)
    make_program(new)  # reports what contradicts itself
    surgery = transform(_plain(old), _plain(saved))
    fields = {k: list(v) for k, v in changed_fields(old.to_json(), saved).items()}
    with explained(), contextlib.closing(source.open(step)) as store:
        reader = Reader(store)
        check_step(reader, step, store.describe("COMMIT"))
        check_tensors(reader, before, axes=False)
        there = {t.name: t.shape for t in reader.layout.tensors}
        operated = Operated(reader.read, there, before, after, surgery)
        proof = _proof(parent, operated, old, saved, step) if proved else None
        if proof is not None:
            proof.check(name, fields)
        yield Done(name=name, saved=saved, fields=fields, operated=operated, proof=proof, meta=_meta(reader))


def _meta(reader: Reader) -> dict[str, Any]:
    from portatrain.checkpoint import fingerprints

    return {k: v for k, v in reader.meta.items() if k != fingerprints.FIELD}


def _plain(recipe: Recipe) -> Any:
    """Return the model in float32: 8-bit operands would round what a surgery keeps."""
    return replace(recipe, precision="fp32", fp8_matmuls=None).describe()


def _proof(parent: RunDir, operated: Operated, old: Recipe, saved: Recipe, step: int) -> Proof:
    from portatrain.checkpoint.surgery import prove
    from portatrain.system import memory
    from portatrain.training.open_data import data_of

    before, after = _plain(old), _plain(saved)
    need = 8 * (before.parameters + 2 * after.parameters)
    if need > (free := memory.free_for_process_bytes()):
        raise UserError(
            f"surgery on {parent.path.name}",
            expected=f"{si(need)}B of free memory for its proof: both models in float64",
            got=f"{si(free)}B",
            do="Run it on a machine with more memory, or leave the proof out, which is recorded: --no-proof.",
        )
    if before.parameters > 20_000_000:
        print("computing the outputs before and after the surgery in float64 ...", file=sys.stderr)
    samples = min(old.batch, max(1, TOKENS // (old.data.tokens_per_sample() or 1)))
    with contextlib.ExitStack() as stack:
        packed = parent.data()
        if not packed.is_dir():  # the parent stays as it is
            packed = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "data"
        rows = data_of(old, before, packed).train.batch(old.samples_after(step), samples)
        return prove(operated, before, after, rows)


def progress(what: str, total: int) -> Callable[[int], None]:
    """Return a function that counts bytes, and prints a line every few seconds."""
    done, said_s = 0, time.monotonic()

    def say(nbytes: int) -> None:
        nonlocal done, said_s
        done += nbytes
        if time.monotonic() - said_s > 3.0:
            said_s = time.monotonic()
            print(f"{what} {si(done)}B of {si(total)}B", file=sys.stderr)

    return say
