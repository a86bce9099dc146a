"""Mistakes in a user's own code (a recipe, model, rule, schedule, hook, sink or data source), as one paragraph.

portatrain calls such code in many places. Where an error arrives (the command line, the trainer, a process of a mesh),
`explained` looks through its traceback for code of the recipe: a line of a recipe file, or a method of a class that
derives from one of portatrain's (`hints.KINDS`). If there is one, the result is a `UserError` that names the innermost
line of the user's files, and keeps the traceback. If there is none, the error is a bug of portatrain or a failure of
the machine: it keeps its traceback and its exit code 1, with which a job tries again.
"""

from __future__ import annotations

import errno
import functools
import inspect
import linecache
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType, FunctionType, TracebackType

from portatrain.errors import STORAGE_ERRNOS, StorageError, UserError
from portatrain.errors.hints import KINDS, Hint, Place, hint, kind_of

PACKAGES = ("portatrain", "launchers", "checkpoints_format")
MACHINE = frozenset(
    {"OutOfMemoryError", "AcceleratorError", "DistBackendError", "DistError", "DistNetworkError", "DistStoreError"}
    | {"XlaRuntimeError", "JaxRuntimeError"}
)
"""Errors of frameworks that are failures of a device or of the network, by the name of their class."""
MACHINE_SAYS = re.compile(r"CUDA error|HIP error|NCCL|RCCL|out of memory|RESOURCE_EXHAUSTED|UNAVAILABLE", re.IGNORECASE)
BUGS = (AssertionError, NameError, NotImplementedError, ImportError, SyntaxError)
"""Errors that no argument of a user causes. If portatrain's own code raises one, it is a bug of portatrain."""
FILES = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG)
"""Errors of the operating system that come from a wrong path."""
LONGEST_SAID = 300
"""Characters of a framework's own message that the paragraph shows; the traceback has all of them."""


def explained(error: BaseException, what: str = "") -> UserError | None:
    """Return the paragraph for an error that comes from a user's own code; None for any other error.

    Args:
        error: an exception that has been raised.
        what: the thing at fault, such as 'hook Gradients.on_step', if the caller knows that it called a user's code.
            The error then counts as the user's although no line of theirs is in the traceback.
    """
    if isinstance(error, UserError) or not isinstance(error, Exception):
        return None
    frames = list(_frames(error.__traceback__))
    place = _place(frames, _users_line(frames, called=bool(what)), error)
    if place is None and not what:
        return None
    if isinstance(error, OSError) and error.errno not in FILES:
        return _of_storage(error, what, place)
    if is_machines(error) or (isinstance(error, BUGS) and frames and is_ours(frames[-1][0].f_code.co_filename)):
        return None
    found: Hint = hint(error, _said(error), place)
    title = f"{what} ({place.text})" if what and place else what or (place.text if place else "")
    return with_trace(UserError(title, expected=found.expected, got=found.got, do=found.do), error)


def where(error: BaseException) -> str:
    """Return the user's line at which a UserError arose, as the end of its message; '' if there is none."""
    if getattr(error, "trace", ""):
        return ""  # its message has the line
    at = at_line(error)
    return f" It arose at {at}." if at else ""


def at_line(error: BaseException, *, called: bool = False) -> str:
    """Return 'FILE, line N, in METHOD' of the user's line at which an error arose; '' if there is none.

    `called`: the caller knows that it called a user's code, of whatever class.
    """
    frames = list(_frames(error.__traceback__))
    at = _users_line(frames, called=called)
    return "" if at is None else _in_words(frames[at])


def line_of(thing: object) -> str:
    """Return ' (FILE, line N)' for a class or function of a user; '' if it is none, or its source is not known."""
    try:
        file = inspect.getsourcefile(thing) or ""  # type: ignore[arg-type]
        line = inspect.getsourcelines(thing)[1]  # type: ignore[arg-type]
    except (OSError, TypeError):
        return ""
    return f" ({shown(file)}, line {line})" if _is_users_file(file) else ""


def line_of_method(owner: object, method: str) -> str:
    """Return `line_of` the user's own definition of a method of an object; '' if there is none."""
    found = (line_of(vars(one)[method]) for one in type(owner).__mro__ if method in vars(one))
    return next((line for line in found if line), "")


def shown(file: str) -> str:
    """Return a path as messages show it: relative to the working folder if it is in it."""
    try:
        return str(Path(file).relative_to(Path.cwd()))
    except (ValueError, OSError):
        return file


# ---- the lines of a traceback


def _frames(trace: TracebackType | None) -> Iterator[tuple[FrameType, int]]:
    while trace is not None:
        yield trace.tb_frame, trace.tb_lineno
        trace = trace.tb_next


def _users_line(frames: list[tuple[FrameType, int]], *, called: bool = False) -> int | None:
    """Return the index of the innermost line of a user's code; None if the code of no recipe was running.

    `called`: the caller knows that the traceback is of a user's code.
    """
    first = next((i for i, (frame, _) in enumerate(frames) if called or _is_recipes(frame)), len(frames))
    mine = (i for i in reversed(range(first, len(frames))) if _is_users(frames[i][0]))
    return next(mine, None)


def _in_words(frame: tuple[FrameType, int]) -> str:
    code = frame[0].f_code
    name = code.co_qualname.replace("<locals>.", "")
    inside = "" if name == "<module>" else f", in {name}"
    return f"{shown(code.co_filename)}, line {frame[1]}{inside}"


def _place(frames: list[tuple[FrameType, int]], at: int | None, error: Exception) -> Place | None:
    """Return the place of a user's mistake; None if the error is not of a user's code."""
    if (compiled := _compiled(error)) is not None:
        return compiled
    if at is not None:
        frame, _ = frames[at]
        ours = [f for f, _ in frames[at + 1 :] if is_ours(f.f_code.co_filename)]
        named = _values(*frames[at])
        return Place(
            text=_in_words(frames[at]),
            owner=frame.f_locals.get("self"),
            called=next((f for f in ours if _is_public_method(f)), None),
            last=at == len(frames) - 1,
            computes=any(kind_of(f.f_locals.get("self")) in ("Module", "Rule") for f, _ in frames[: at + 1]),
            numpy=any(f.f_globals.get("__name__", "").partition(".")[0] == "numpy" for f, _ in frames[at + 1 :]),
            mappings=tuple((name, one) for name, one in named if isinstance(one, Mapping)),
            classes=tuple(one for _, one in named if isinstance(one, type)),
        )
    function = _misfit(error)
    if function is not None:
        code = function.__code__
        text = f"{shown(code.co_filename)}, line {code.co_firstlineno}, {function.__qualname__}"
        return Place(text=text, owner=None, takes=str(inspect.signature(function)))
    owner = getattr(error, "obj", None) if isinstance(error, AttributeError) else None
    if _files_of(type(owner)) and (line := line_of(type(owner))):
        return Place(text=f"{type(owner).__qualname__}{line}", owner=owner, class_itself=True)
    return None


def _values(frame: FrameType, line: int) -> list[tuple[str, object]]:
    """Return the values that a line of code names, with their names."""
    words = re.findall(r"[^\W\d]\w*", linecache.getline(frame.f_code.co_filename, line))
    held = {**frame.f_globals, **frame.f_locals}
    return [(word, held[word]) for word in dict.fromkeys(words) if word in held]


def _is_public_method(frame: FrameType) -> bool:
    name = frame.f_code.co_name
    return not name.startswith("_") and hasattr(type(frame.f_locals.get("self")), name)


def _compiled(error: Exception) -> Place | None:
    """Return the user's line of an error that torch.compile raised: the error's traceback lacks what was compiled."""
    for entry in reversed(getattr(error, "real_stack", None) or ()):
        if _is_users_file(entry.filename):
            text = f"{shown(entry.filename)}, line {entry.lineno}, in {entry.name}"
            return Place(text=text, owner=None, computes=True)
    return None


_SIGNATURE = re.compile(r"^(\S+)\(\) (missing|takes|got an unexpected|got multiple|got some positional)")


def _misfit(error: Exception) -> FunctionType | None:
    """Return the user's function that was called with arguments that it does not take, from the error's message."""
    match = _SIGNATURE.match(str(error)) if isinstance(error, TypeError) else None
    if match is None:
        return None
    import gc

    # `isinstance` would ask proxies for their class, which makes them import what they stand for.
    functions: list[FunctionType] = [
        f for f in gc.get_objects() if type(f) is FunctionType and f.__qualname__ == match[1]
    ]
    mine = [f for f in functions if _is_users_file(f.__code__.co_filename) and _refuses(f, str(error))]
    named = [f for f in mine if _named(f) is f]
    loaded = list(sys.modules)  # in order: of two files that have the name, the one loaded last is in use
    return max(named or mine, key=lambda f: loaded.index(f.__module__) if f.__module__ in loaded else -1, default=None)


def _refuses(function: FunctionType, message: str) -> bool:
    """Return whether a function would refuse a call with this message: another one may have its name."""
    code = function.__code__
    arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    if taken := re.search(r"takes (?:from \d+ to )?(\d+) positional", message):
        return code.co_argcount == int(taken[1])
    in_it = [name in arguments for name in re.findall(r"'(\w+)'", message.partition("()")[2])]
    return not any(in_it) if "unexpected keyword" in message else all(in_it)


def _named(function: FunctionType) -> object:
    """Return what the function's module has under its name: the function itself, unless the file was loaded again."""
    found: object = sys.modules.get(function.__module__)
    for part in function.__qualname__.split("."):
        found = getattr(found, part, None)
    return found


# ---- whose file it is


def _is_recipes(frame: FrameType) -> bool:
    """Return True for code of a recipe: of its file, or of a class that a package has for recipes."""
    if "__source__" in frame.f_globals or frame.f_globals.get("__name__", "").startswith("recipes."):
        return True
    return frame.f_code.co_filename in _files_of(type(frame.f_locals.get("self")))


def _is_users(frame: FrameType) -> bool:
    if frame.f_code.co_filename == "<string>":  # a method that @dataclass made
        return False
    return _is_users_file(frame.f_code.co_filename) or _is_recipes(frame)


def _files_of(kind: type) -> set[str]:
    """Return the files of the classes of an object that derive from one of `KINDS` and are not portatrain's own."""
    found = set()
    for one in kind.__mro__:
        if not _is_portatrains(one) and any(_is_portatrains(b) and b.__name__ in KINDS for b in one.__mro__):
            found.add(getattr(sys.modules.get(one.__module__), "__file__", None) or "")
    return found


def _is_portatrains(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in PACKAGES


def _is_users_file(file: str) -> bool:
    return not (file.startswith("<") or is_ours(file) or file.startswith(_libraries()))


def is_ours(file: str) -> bool:
    """Return whether a file is of portatrain's own packages."""
    return file.startswith(_our_folders())


@functools.cache
def _our_folders() -> tuple[str, ...]:
    here = Path(__file__).parents[1]
    return tuple(f"{here.parent / name}/" for name in PACKAGES)


@functools.cache
def _libraries() -> tuple[str, ...]:
    import site
    import sysconfig

    paths = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    paths |= {*site.getsitepackages(), site.getusersitepackages()}
    # A virtual environment has the standard library of another folder.
    paths |= {str(Path(re.__file__).parents[1]), *(str(Path(path).resolve()) for path in paths if path)}
    return tuple(f"{path}/" for path in paths if path)


# ---- what it says


def _said(error: Exception) -> str:
    """Return the class and the first paragraph of the message of an error, on one line."""
    first = " ".join(str(error).strip().split("\n\n")[0].split())
    if hasattr(error, "real_stack") and (inner := re.search(r"got (\w+)\((['\"])(.*?)\2\)", first)):
        return f"{inner[1]}: {inner[3]}"[:LONGEST_SAID]
    if isinstance(error, KeyError):
        first = f"no key {first}"
    if len(first) > LONGEST_SAID:
        first = f"{first[:LONGEST_SAID]} ..."
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def is_machines(error: Exception) -> bool:
    """Return whether an error is a failure of a device, its memory or the network."""
    if isinstance(error, MemoryError) or any(kind.__name__ in MACHINE for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and MACHINE_SAYS.search(str(error)) is not None


def _of_storage(error: OSError, what: str, place: Place | None) -> UserError | None:
    """Return the error for storage or a service that a user's code could not reach, with which a job tries again."""
    if error.errno in STORAGE_ERRNOS:
        return None  # the command line has a message for it
    title = f"{what} ({place.text})" if what and place else what or (place.text if place else "")
    found = StorageError(
        title,
        expected="a file or a service that answers",
        got=_said(error),
        do="Repair it, and resume the run; a job tries again by itself.",
    )
    return with_trace(found, error)


def with_trace(found: UserError, error: Exception) -> UserError:
    """Return `found`, with the traceback of `error`, its cause."""
    import traceback

    found.trace = "".join(traceback.format_exception(error)).rstrip()
    found.__cause__ = error
    return found
