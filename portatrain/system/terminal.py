"""Output to a terminal in which no text of a record can move the cursor, change a title or hide a line."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from portatrain.errors import visible


class Cleaned:
    """A text stream that writes control characters as escapes (`portatrain.errors.visible`)."""

    def __init__(self, stream: TextIO) -> None:
        self.rich_proxied_file = stream
        """The stream below, to which rich writes its own control sequences; `console` cleans what rich is given."""

    def write(self, text: str) -> int:
        self.rich_proxied_file.write(visible(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)


@contextlib.contextmanager
def cleaned() -> Iterator[None]:
    """Clean what is printed within the block, on standard output and standard error."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Cleaned(sys.stdout), Cleaned(sys.stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def console(width: int) -> Any:
    """Return a console of rich on standard output, `width` columns wide unless that is a terminal."""
    from rich.console import Console
    from rich.segment import Segment

    class CleanConsole(Console):
        def render(self, *args: Any, **options: Any) -> Iterable[Any]:
            for segment in super().render(*args, **options):
                if segment.control:
                    yield segment
                else:
                    yield Segment(visible(segment.text), segment.style)

    made = CleanConsole()
    return made if made.is_terminal else CleanConsole(width=width)
