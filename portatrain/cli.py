"""The commands ``portatrain`` and ``launch``: their tables, their parser, and how errors are reported.

Exit codes: 0 done, 1 a check found something, 2 a user's mistake (one paragraph on standard error), 75 storage failed
during the run, 85 stopped and resumable, 130 interrupted by Ctrl-C. A mistake in a user's own code (a recipe, a model,
a hook) is one paragraph too, with its file and line. A traceback is a bug of portatrain or a failure of the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import importlib
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn, TextIO

from portatrain.errors import STORAGE_ERRNOS, StorageError, UserError, choice, storage_error
from portatrain.system import proxies
from portatrain.system.exit_codes import INTERRUPTED
from portatrain.system.terminal import cleaned

# A new command is a line here: name -> (module, text in the list of commands).
PORTATRAIN: dict[str, tuple[str, str]] = {
    "init": ("portatrain.commands.init", "write a recipe of your own, to start from"),
    "train": ("portatrain.commands.train", "train a recipe in this process"),
    "resume": ("portatrain.commands.resume", "resume a run, with another recipe from there on if you say so"),
    "fork": ("portatrain.commands.fork", "go on from a checkpoint of a run in a new run, with another recipe"),
    "check": ("portatrain.commands.check", "check a recipe before a run: small, on every framework"),
    "bisect": ("portatrain.commands.bisect", "find where two runs part, or two settings of one recipe"),
    "blame": ("portatrain.commands.blame", "find the samples behind a spike, and train on without them"),
    "show": ("portatrain.commands.show", "show a recipe's parameters: shape, sharding, bytes per device"),
    "plan": ("portatrain.commands.plan", "plan a recipe for clusters: mesh, memory, time and cost"),
    "sample": ("portatrain.commands.sample", "continue texts with a trained model"),
    "eval": ("portatrain.commands.eval", "evaluate a trained model: loss and metrics"),
    "report": ("portatrain.commands.report", "write the report of a run as one HTML page"),
    "sweep": ("portatrain.commands.sweep", "train a recipe for every point of a grid, and compare the runs"),
    "compare": ("portatrain.commands.compare", "compare runs: a table, and one HTML page"),
    "audit": ("portatrain.commands.audit", "compare records of a trainer that is not portatrain's"),
    "data": ("portatrain.commands.data", "pack data once for many runs; show and verify what is packed"),
    "ckpt": ("portatrain.commands.ckpt", "list, verify, compare, import and export checkpoints"),
    "clusters": ("portatrain.commands.clusters", "show the chips and clusters that a plan can name"),
}
# `launch RECIPE` without the name of a command submits a job.
LAUNCH: dict[str, tuple[str, str]] = {
    "status": ("portatrain.commands.status", "show the state of a run"),
    "list": ("portatrain.commands.list_runs", "list the runs of a folder"),
    "logs": ("portatrain.commands.logs", "print the output of an attempt"),
    "cancel": ("portatrain.commands.cancel", "save and end a run"),
    "resume": ("portatrain.commands.resume", "resume a run, here or on another cluster"),
    "reconcile": ("portatrain.commands.reconcile", "make schedulers agree with the record"),
    "doctor": ("portatrain.commands.doctor", "check a cluster for problems that would break a run"),
    "clusters": ("portatrain.commands.clusters", "show the known chips and clusters"),
}
SUBMIT = ("portatrain.commands.submit", "train a recipe on a cluster")

HELP_TEXT = """\
Write the model and its sharding once; train it on TPUs, GPUs or a laptop.

commands:
{commands}

`portatrain COMMAND --help` explains one, with examples. `launch --help` explains training on a cluster.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command ``portatrain``; return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    training = words[:1] == ["train"]
    _open_streams()
    with contextlib.nullcontext() if training else cleaned():
        return _guarded(lambda: run(words), places=not training)


def launch_main(argv: Sequence[str] | None = None) -> int:
    """Run the command ``launch``; return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    _open_streams()
    with cleaned() if words[:1] and words[0] in LAUNCH else contextlib.nullcontext():
        return _guarded(lambda: _launch(words))


def run(words: list[str]) -> int:
    """Run ``portatrain WORDS``; return its exit code. Raises UserError for a user's mistake."""
    if words and words[0] in ("--version", "-V"):
        from portatrain import __version__

        print(f"portatrain {__version__}")
        return 0
    if not words or words[0] in ("--help", "-h", "help"):
        print(HELP_TEXT.format(commands=_listing(PORTATRAIN)), end="")
        return 0
    if words[0] not in PORTATRAIN:
        raise choice(f"portatrain {words[0]}: the command", words[0], PORTATRAIN)
    return _call(f"portatrain {words[0]}", PORTATRAIN[words[0]][0], words[1:])


def _launch(words: list[str]) -> int:
    if words and words[0] in LAUNCH:
        return _call(f"launch {words[0]}", LAUNCH[words[0]][0], words[1:])
    more = f"\ncommands:\n{_listing(LAUNCH)}" if LAUNCH else ""
    return _call("launch", SUBMIT[0], words, more_help=more)


def _listing(table: Mapping[str, tuple[str, str]]) -> str:
    return "\n".join(f"  {name:<10} {text}" for name, (_, text) in table.items())


def _call(program: str, module_name: str, words: list[str], *, more_help: str = "") -> int:
    module = importlib.import_module(module_name)
    about, _, examples = (module.__doc__ or "").partition("\nexamples:")
    parser = Parser(
        prog=program,
        description=about.strip(),
        epilog=(f"examples:{examples}" if examples else "") + more_help,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # an abbreviation would change its meaning when an option is added
    )
    module.add_arguments(parser)
    return module.run(parser.parse_args(words))


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError instead of printing its own errors."""

    def error(self, message: str) -> NoReturn:
        helps = {"/".join(a.option_strings) or str(a.metavar or a.dest): a.help for a in self._actions}
        options = [option for a in self._actions for option in a.option_strings if a.dest != "help"]
        what, expected, got, hint = self.prog, "arguments that it has", message, ""
        if (unknown := message.removeprefix("unrecognized arguments: ")) != message:
            got = unknown
            near = difflib.get_close_matches(unknown.split()[0].partition("=")[0], options, n=1)
            hint = f"Did you mean {near[0]}? " if near and unknown.startswith("-") else ""
        elif (missing := message.removeprefix("the following arguments are required: ")) != message:
            expected, got = missing, "none"
            hint = "".join(f"{name}: {about}. " for name in missing.split(", ") if (about := helps.get(name)))
        elif match := re.fullmatch(r"argument ([^:]+): (?:(expected .*)|(invalid .*))", message):
            what = f"{self.prog}: {match[1]}"
            expected, got = (match[2].removeprefix("expected "), "none") if match[2] else ("a valid value", match[3])
            if invalid := re.fullmatch(r"invalid (\w+) value: (.*)", got):
                expected, got = {"int": "a whole number"}.get(invalid[1], f"a valid {invalid[1]}"), invalid[2]
            elif chosen := re.fullmatch(r"invalid choice: (.*) \(choose from (.*)\)", got):
                expected, got = f"one of {chosen[2]}", chosen[1]
        raise UserError(what, expected=expected, got=got, do=f"{hint}`{self.prog} --help` explains, with examples.")


PLACES = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.ELOOP,
    errno.ENOSPC,
    errno.EDQUOT,
)
"""Errors of the operating system that a user can fix."""


def _guarded(call: Callable[[], int], *, places: bool = True) -> int:
    """Run `call`; report its errors and return the exit code.

    `places`: treat errors of the file system as the user's mistakes. During training they are not, because a job
    retries.
    """
    proxies.bypass()  # local API servers and object stores answer no proxy
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # the name of a file may be no text, and ends no command
            stream.reconfigure(errors="backslashreplace")
    try:
        return call()
    except UserError as error:
        return _say(error)
    except BrokenPipeError:
        # The reader closed the pipe (`portatrain plan | head`); Python's flush at exit must not fail because of it.
        _to_nowhere(sys.stdout)
        return 0
    except OSError as error:
        if not places and (storage := storage_error(error)) is not None:
            return _say(storage)
        if (mistake := _explained(error)) is not None:
            return _say(mistake)
        if not places or (found := _of_files(error)) is None:
            raise
        return _say(found)
    except KeyboardInterrupt:
        _tell("\ninterrupted")
        return INTERRUPTED
    except SystemExit as end:  # argparse, after --help
        return end.code if isinstance(end.code, int) else 0
    except Exception as error:
        if (mistake := _explained(error)) is None:
            raise
        return _say(mistake)


def _of_files(error: OSError) -> UserError | None:
    """Return the paragraph for an error of the file system in a command that trains nothing; None for another error."""
    name = f" {error.filename}" if error.filename else ""
    got = f"{error.strerror or error}{name}"
    if error.errno in PLACES:
        do = "Choose another path or a shorter name, free some space, or fix the permissions."
        return UserError("the file system", expected="a path that can be used", got=got, do=do)
    if error.errno in STORAGE_ERRNOS:
        do = "Give the command again once the storage answers."
        return StorageError("the file system", expected="files that can be read and written", got=got, do=do)
    if name:
        do = "See what else uses it, and give the command again."
        return UserError("the file system", expected="files that stay as they are meanwhile", got=got, do=do)
    return None


def _explained(error: Exception) -> UserError | None:
    from portatrain.errors.users_code import explained

    return explained(error)


def _open_streams() -> None:
    """Put the null device where the caller closed a standard stream: Python has None there, which no writer expects,
    and the next file that is opened would get the stream's number, and what libraries print."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r"))  # noqa: SIM115


def _say(error: UserError) -> int:
    """Print a user's mistake as one paragraph; return its exit code."""
    from portatrain.errors.users_code import where
    from portatrain.system import environment

    more = where(error)
    if error.trace and environment.TRACEBACK.get():
        _tell(error.trace)
    elif error.trace:
        kept = f"; {error.kept} has it." if error.kept else "."
        more = f" {environment.TRACEBACK.name}=1 shows the traceback{kept}"
    _tell(f"error: {error}{more}")
    return error.code


def _tell(text: str) -> None:
    """Print to standard error. A full disk behind it, or a reader that is gone, changes no exit code."""
    try:
        print(text, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            _to_nowhere(sys.stderr)
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def _to_nowhere(stream: TextIO) -> None:
    """Drop what a stream still holds and will get: Python flushes it at exit, also one that was replaced, and must not
    fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    sys.exit(main())
