"""Find the checkpoint to resume from, the same for all processes: the newest commit of which every byte verifies."""

from __future__ import annotations

from collections.abc import Callable

from checkpoints_format import FormatError, NewerFormatError, NotCommittedError, StoreError
from checkpoints_format import Reader as Reader
from portatrain.checkpoint.format_layout import check_step
from portatrain.checkpoint.locations import Location
from portatrain.errors import StorageError, UserError


def newest(
    location: Location,
    process: int,
    processes: int,
    report: Callable[[str], None],
    agree: Callable[[int], int],
    damaged: set[int],
) -> tuple[int, Reader] | None:
    """Return (step, reader) of the newest valid checkpoint, or None if nothing was ever committed.

    All processes call it together: process 0 chooses a checkpoint, and each process verifies its part of the files.
    `agree` is the backend's method. `damaged` has the steps to pass over, and receives those that were skipped.
    An uncommitted checkpoint is a save that did not finish and is skipped silently. A damaged one is reported, and the
    one before it is tried.

    Raises:
        UserError: there are commits but none verifies, or one has a newer format, which is no damage.
        StorageError: a file cannot be read, which is no damage either. To continue from an earlier step would in the
            end replace this one.
    """
    errors: list[str] = []
    left = [] if process else [step for step in location.steps() if step not in damaged]

    def passed_over(step: int, error: FormatError) -> None:
        errors.append(str(error))
        damaged.add(step)
        report(f"checkpoint of step {step} is damaged and passed over: {error}")

    while True:
        step, reader = _next_of(location, left, passed_over)
        if not process and reader is None and errors:
            raise UserError(
                f"checkpoints in {location.name}",
                expected="one that verifies",
                got=f"none: {errors[0]}",
                do="Restore the folder from a copy, or begin a new run under another name.",
            )
        step = agree(step)
        if step < 0:
            return None
        reader, error = _tried(location, step, reader, process, processes)
        unread = isinstance(error, StoreError)
        who = agree(0 if error is None else 1 + process + processes * unread)
        if not who:
            assert reader is not None
            return step, reader
        if who <= processes and not process and error is None:
            # A process that read other files checks the doubtful ones itself: it names the damage, or there is none.
            reader, error = _tried(location, step, reader, who - 1, processes)
            unread = error is None or isinstance(error, StoreError)
        if agree(int(who > processes or (not process and unread))):
            number = (who - 1) % processes
            if process != (number if who > processes else 0):
                agree(0)  # a process that knows the cause raises here and does not join the exchange
            raise _unreadable(location, step, error, number)
        if error is not None and not process:
            passed_over(step, error)


def _next_of(
    location: Location, left: list[int], passed_over: Callable[[int, FormatError], None]
) -> tuple[int, Reader | None]:
    """Return the newest committed step of `left` that opens, else -1. Takes it and all later steps off `left`."""
    while left:
        step = left.pop()
        try:
            reader = Reader(location.open(step))
            check_step(reader, step, reader.store.describe("COMMIT"))
            return step, reader
        except NotCommittedError:
            continue
        except NewerFormatError as error:  # its steps are valid, and to continue before them would replace it
            raise UserError.of(error) from error
        except StoreError as error:
            raise StorageError.of(error) from error
        except FormatError as error:
            passed_over(step, error)
    return -1, None


def _tried(
    location: Location, step: int, reader: Reader | None, part: int, processes: int
) -> tuple[Reader | None, FormatError | None]:
    """Return (the opened checkpoint of `step`, the error in process `part`'s part of its files or None)."""
    try:
        reader = reader or Reader(location.open(step))
    except FormatError as error:  # process 0 has opened it
        return None, StoreError(error.what, expected=error.expected, got=error.got, do=error.do)
    found: FormatError | None = None
    for _ in range(2):  # damage is read a second time, because one bad read must not condemn a valid checkpoint
        try:
            reader.verify_all(part, processes)
            return reader, None
        except FormatError as error:
            found = error
            if isinstance(error, StoreError):
                break
    return reader, found


def _unreadable(location: Location, step: int, error: FormatError | None, who: int) -> StorageError:
    if isinstance(error, StoreError):
        return StorageError.of(error)
    return StorageError(
        f"checkpoint of step {step} in {location.name}",
        expected="files that all processes read alike",
        got=f"process {who} reads damage in files that process 0 can read",
        do="Check the storage from that process's host; the checkpoint was not changed.",
    )
