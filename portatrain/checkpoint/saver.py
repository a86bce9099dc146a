"""Save a run's logical tensors as files of `checkpoints_format`, to restore them on any backend and mesh.

    checkpoints = Checkpoints(run_dir / "checkpoints")
    checkpoints.save(10, backend, state, meta)      # copies to the host and returns; a thread writes
    step, reader = checkpoints.newest(report)       # the newest that opens and verifies
    state = backend.restore_state(reads(reader))

Names: `params/<name>`, `state/<name>`, `ema/<name>`, `opt/<slot>/<name>`, `opt/count`.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from checkpoints_format import (
    Box,
    FormatError,
    LocalStore,
    NewerFormatError,
    Reader,
    SaveLayout,
    Store,
    StoreError,
    Want,
    Writer,
    commit,
)
from checkpoints_format.manifest import MAX_RECEIPT_BYTES, decode_receipt
from checkpoints_format.packs import receipt_name
from checkpoints_format.store import read_small
from checkpoints_format.writer import COMMIT
from portatrain.backends.base import Backend, IrregularShards
from portatrain.backends.program import Program
from portatrain.backends.state import full_name
from portatrain.checkpoint import fingerprints
from portatrain.checkpoint.carry import carry
from portatrain.checkpoint.format_layout import check_step, check_tensors, format_layout, written_by
from portatrain.checkpoint.host_copies import Staging, given_budget_bytes
from portatrain.checkpoint.interop.trusted_code import is_trusted
from portatrain.checkpoint.locations import location_of
from portatrain.checkpoint.newest import newest
from portatrain.checkpoint.shared_reads import owners_of
from portatrain.errors import StorageError, UserError
from portatrain.recipe import Recipe
from portatrain.recipe.retention import Retention
from portatrain.recipe.same import deciding_changes, in_words
from portatrain.system import json_files, memory

RECEIPTS_WITHIN_S = 600.0
"""The time for which the committing process waits for the other writers."""

Read = Callable[[str, str, tuple[int, ...], tuple[int, ...]], np.ndarray]


def _is_whole(store: Store, receipt: str) -> bool:
    """Return whether a receipt is complete. A file is visible from its first byte on; an object only when it is
    whole."""
    if store.size(receipt) is None:
        return False
    if isinstance(store, LocalStore):
        try:
            decode_receipt(read_small(store, receipt, MAX_RECEIPT_BYTES), receipt)
        except FormatError:
            return False
    return True


def _meets(box: Box, others: Iterable[Box]) -> bool:
    return any(box.intersect(other) is not None for other in others)


def _boxes(backend: Backend, state: Any) -> Iterator[tuple[str, Box, Callable[[], np.ndarray]]]:
    """Yield (full name, box, copy function) of everything that this process holds, each box once."""
    seen = set()
    for box in backend.local_boxes(state):
        name = full_name(box.role, box.name)
        if (name, box.offset) not in seen:
            seen.add((name, box.offset))
            yield name, Box(box.offset, box.shape), box.fetch


def check_newest(
    where: Path | str,
    program: Program,
    recipe: Recipe,
    fingerprints_of_data: Mapping[str, str | None],
    *,
    accept_drift: bool = False,
    without: Container[int] = (),
    changed: Callable[[Mapping[str, Any]], Recorded | None] = lambda meta: None,
) -> None:
    """Raise UserError if the newest commit is not of this run, before an attempt begins. Reads only the root; damage is
    left to `Checkpoints.newest`.

    `without`: the steps whose checkpoints are not trusted. `changed` returns what the run's record says of the
    difference between a checkpoint's recipe and `recipe`.

    A newer format or another model is always refused. `accept_drift`: another recipe, other names of axes and other
    data are not. `fingerprints_of_data`: by the name in the meta's 'data'.
    """
    place = location_of(where)
    for step in reversed([s for s in place.steps() if s not in without]):
        with contextlib.ExitStack() as opened:
            try:
                store = opened.enter_context(contextlib.closing(place.open(step)))
                reader = Reader(store)
            except NewerFormatError as error:
                raise UserError.of(error) from error
            except StoreError as error:  # it may be the newest one: to check another in its place proves nothing
                raise StorageError.of(error) from error
            except FormatError:
                continue
            what = store.describe("COMMIT")
            check_step(reader, step, what)
            if (on_purpose := changed(reader.meta)) is not None:
                carry(reader, program, on_purpose.before)
                if not any(name.split(".")[0] == "data" for name in on_purpose.fields):
                    check_corpus(what, reader.meta, fingerprints_of_data)
                return
            check_tensors(reader, program, axes=not accept_drift)
            if accept_drift:
                return
            if changes := deciding_changes(reader.meta, recipe, trusted=is_trusted):
                raise another_recipe(what, changes)
            check_corpus(what, reader.meta, fingerprints_of_data)
            return


class Recorded(Protocol):
    """A change of a recipe that the record of a run has: the recipe before it, and the fields that differ."""

    @property
    def before(self) -> Recipe: ...

    @property
    def fields(self) -> Mapping[str, Any]: ...


def check_corpus(what: str, meta: Mapping[str, Any], fingerprints_of_data: Mapping[str, str | None]) -> None:
    """Raise UserError if a checkpoint with this `meta` was trained on other data."""
    saved = meta.get("data", {})
    for name, now in fingerprints_of_data.items():
        if saved.get(name) not in (None, now):
            of = "corpus" if name == "fingerprint" else "validation split"
            raise UserError(
                what,
                expected=f"a run on this {of}, fingerprint {now}",
                got=f"a run on another {of}, {saved[name]}",
                do="Give the corpus that it was trained on, or a new run directory; nothing was changed. To go "
                "on with other data all the same, give --accept-drift REASON, which is recorded.",
            )


def another_recipe(what: str, changes: Mapping[str, tuple[Any, Any]]) -> UserError:
    """Return the error for a checkpoint that was saved under another recipe, with the fields that differ."""
    return UserError(
        what,
        expected="a checkpoint that was saved with this recipe",
        got=f"one of another recipe, which differs in {in_words(changes)}",
        do="Give the recipe and --set values that it was saved with, or a new run directory; nothing was changed. To "
        "go on with this recipe all the same, give --accept-drift REASON, which is recorded.",
    )


def reads(reader: Reader) -> Read:
    """Return `read` for `Backend.restore_state`: it reads boxes of an open checkpoint and verifies them."""

    def read(role: str, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
        return reader.read_many([Want(full_name(role, name), Box(offset, shape), None)])[0]

    return read


class Checkpoints:
    """Manage the checkpoints of a run, one a step, in a folder or an object store. Two saves never overlap.

    Every process writes its own boxes. `process` 0 commits when the receipts of all writers are stored.

    Args:
        where: the folder checkpoints of the run directory, or a URL (s3://bucket/prefix).
        keep: which committed checkpoints stay.
        save_name: the name of this attempt's saves; no two attempts write one file.
        guard: entered around a commit and a removal; raises if another attempt has taken the run over.
        budget_bytes: host memory for the copy of the state (`host_copies`); None: the environment's value, else half
            of this process's share of the free memory.
    """

    def __init__(
        self,
        where: Path | str,
        *,
        keep: Retention | None = None,
        save_name: str = "a1",
        process: int = 0,
        processes: int = 1,
        guard: Callable[[], AbstractContextManager[object]] = nullcontext,
        budget_bytes: int | None = None,
    ) -> None:
        self.location, self.keep, self.save_name = location_of(where), keep or Retention(), save_name
        self.process, self.processes, self.guard = process, processes, guard
        self.budget_bytes = given_budget_bytes() if budget_bytes is None else budget_bytes
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._damaged: set[int] = set()
        self._doubted: set[int] = set()
        self.protected: int | None = None
        """The last checkpoint up to this step stays, whatever `keep` says."""
        self._committed: list[int] = []
        self._metrics: dict[int, Mapping[str, float]] = {}
        self._plan: tuple[Program, IrregularShards, SaveLayout, dict[str, list[Box]]] | None = None

    # ---- saving

    def save(
        self, step: int, backend: Backend, state: Any, meta: Mapping[str, Any], *, skip_if_busy: bool = False
    ) -> bool:
        """Copy the state to the host, then write and commit in the background; return whether a save was begun.

        If a save is still running, wait for it, or with `skip_if_busy` skip this one (on all processes, or on none).
        Raises UserError if the save before this one failed; earlier commits stay.
        """
        if skip_if_busy and backend.agree(int(self._thread is not None and self._thread.is_alive())):
            return False
        self.wait()
        layout, wanted = self._planned(backend, state)
        staging = self._staging(backend, state, layout, wanted)
        self._thread = threading.Thread(
            target=self._write, args=(step, layout, staging, dict(meta)), name="portatrain-checkpoint"
        )
        if staging.beyond_bytes:
            self._thread.start()
            staging.fill()
        else:
            staging.fill()
            self._thread.start()
        return True

    def beyond_bytes(self, backend: Backend, state: Any) -> int:
        """Return the bytes of a save of `state` for whose writing training would wait, besides the copy: an upper
        bound, 0 if the budget holds all copies."""
        layout, wanted = self._planned(backend, state)
        return self._staging(backend, state, layout, wanted).beyond_bytes

    def _staging(self, backend: Backend, state: Any, layout: SaveLayout, wanted: Mapping[str, list[Box]]) -> Staging:
        budget = self.budget_bytes if self.budget_bytes is not None else memory.free_for_process_bytes() // 2
        sizes = {t.name: t.item_bytes for t in layout.tensors if t.name in wanted}
        boxes = (b for b in _boxes(backend, state) if _meets(b[1], wanted.get(b[0], ())))
        return Staging(boxes, sizes, budget_bytes=budget)

    def _planned(self, backend: Backend, state: Any) -> tuple[SaveLayout, Mapping[str, list[Box]]]:
        """Return the layout of a save and the boxes that this process writes. If nothing moved, both come from the save
        before."""
        program, irregular_shards = backend.program, backend.irregular_shards(state)
        if self._plan is None or self._plan[0] is not program or self._plan[1] != irregular_shards:
            layout = format_layout(program, irregular_shards, self.processes, owners_of(backend))
            self._plan = program, irregular_shards, layout, written_by(layout, self.process)
        return self._plan[2], self._plan[3]

    def _write(self, step: int, layout: SaveLayout, staging: Staging, meta: Mapping[str, Any]) -> None:
        try:
            with contextlib.closing(self.location.open(step, create=True)) as store:
                sums = fingerprints.Sums()
                writer = Writer(store, layout, save=self.save_name, writer=self.process)
                writer.write(sums.counting(staging.sources()), note=sums.note)
                staging.close()
                if self.process:
                    return
                self._await_receipts(store)
                with self.guard():
                    if step in self._damaged:  # damaged or not trusted, so the new one replaces it
                        store.delete(COMMIT)
                        self._damaged.discard(step)
                        self._doubted.discard(step)
                    commit(store, layout, save=self.save_name, meta=lambda notes: _meta(meta, layout, notes))
                self._committed.append(step)
                self._metrics[step] = _metrics_of(meta)
                self._sweep_others(store)
            self._sweep(step)
        except BaseException as error:
            self._error = error
        finally:
            staging.close()

    def _await_receipts(self, store: Store) -> None:
        """Wait until every process has written. This polls the store, as a collective could collide with one of the
        step's."""
        deadline_s, pause_s = time.monotonic() + RECEIPTS_WITHIN_S, 0.01
        for writer in range(self.processes):
            while not _is_whole(store, receipt_name(self.save_name, writer)):
                if time.monotonic() > deadline_s:
                    raise UserError(
                        f"checkpoint in {self.location.name}",
                        expected=f"the receipt of process {writer}",
                        got=f"none within {RECEIPTS_WITHIN_S:.0f} s",
                        do="All processes must see one run directory.",
                    )
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, 1.0)

    def _sweep_others(self, store: Store) -> None:
        """Remove files of saves of this step that were not committed. The commit names only files of this save."""
        ours = tuple(f"{kind}-{self.save_name}" for kind in ("pack", "root", "receipt"))
        for name in list(store.list()):
            if name.startswith(("pack-", "root-", "receipt-")) and not name.startswith(
                (f"{ours[0]}-", f"{ours[1]}.", f"{ours[2]}-")
            ):
                store.delete(name)

    def _sweep(self, newest: int) -> None:
        """Remove old checkpoints and uncommitted files. Nothing is removed before the newest checkpoint is
        committed."""
        there = [s for s in self.location.steps() if s <= newest]
        good = [s for s in there if s not in self._damaged and self.location.committed(s)]
        if self.keep.best is not None:
            for step in good:
                if step not in self._metrics:
                    with contextlib.closing(self.location.open(step)) as store:
                        self._metrics[step] = _metrics_of(Reader(store).meta)
        kept = self.keep.kept(good, self._metrics) | self._doubted
        if self.protected is not None:
            kept |= {step for step in [s for s in good if s <= self.protected][-1:]}
        for step in there:
            if step not in kept:
                with self.guard():
                    self.location.remove(step)

    def remove_unfinished(self) -> None:
        """Remove the checkpoints that no commit names, before anything is saved. No lock can stop an attempt that loses
        its claim during a commit, but after this it has nothing complete to commit."""
        for step in self.location.steps():
            if not self.location.committed(step):
                self.location.remove(step)

    def newly_committed(self) -> list[int]:
        """Return the steps that were committed since the last call, for the record. Does not wait."""
        found = []
        while self._committed:
            found.append(self._committed.pop(0))
        return found

    def check(self) -> None:
        """Raise UserError if a save in the background has failed. Does not wait."""
        if self._thread is None or not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait for the running save; raise UserError if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if isinstance(error, FormatError):
            raise StorageError.of(error) from error
        if error is not None:
            raise error

    # ---- going on

    def newest(
        self, report: Callable[[str], None], agree: Callable[[int], int] = int, doubted: Iterable[int] = ()
    ) -> tuple[int, Reader] | None:
        """Return the newest valid checkpoint, see `newest.newest`. The next save of a damaged step, or of one of
        `doubted`, replaces it; until then these are kept and passed over."""
        self._doubted = set(doubted)
        self._damaged |= self._doubted
        return newest(self.location, self.process, self.processes, report, agree, self._damaged)


def _meta(meta: Mapping[str, Any], layout: SaveLayout, notes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the meta of a commit: `meta`, and the fingerprints of all tensors."""
    return {**json_files.strict(meta), fingerprints.FIELD: fingerprints.joined(layout, notes)}


def _metrics_of(meta: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics in a checkpoint's meta, non-finite ones too, without entries that are no numbers."""
    found, given = {}, meta.get("metrics")
    for name, value in given.items() if isinstance(given, Mapping) else ():
        with contextlib.suppress(ValueError):
            found[name] = json_files.number(value)
    return found
