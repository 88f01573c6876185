"""Standard error with --json: every line is a JSON object, also those that libraries print."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast


@contextlib.contextmanager
def on_standard_error(wanted: bool) -> Iterator[None]:
    """Until the block ends, a line on standard error that is no JSON object becomes `{"note": line}`, where wanted."""
    if not wanted or sys.stderr is None:
        yield
        return
    lines = JsonLines(sys.stderr)
    with contextlib.redirect_stderr(cast(TextIO, lines)):
        try:
            yield
        finally:
            lines.end()


class JsonLines:
    """A stream that passes on JSON objects, and wraps every other line into one."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.begun = stream, ""

    def __getattr__(self, name: str) -> Any:
        """All but writing is that of the stream: whether it is a terminal, its file descriptor."""
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Print the lines that end in this text, and keep the beginning of the next one."""
        if self.begun and _is_object(text):  # what a library began and did not end is a line of its own
            text = f"\n{text}"
        *lines, self.begun = (self.begun + text).split("\n")
        for line in lines:
            if line.strip():
                note = {"note": line.strip().removeprefix("note: ")}
                self.stream.write(f"{line if _is_object(line) else json.dumps(note)}\n")
        return len(text)

    def end(self) -> None:
        """Print a last line that has no end."""
        with contextlib.suppress(OSError, ValueError):  # nobody reads it
            self.write("\n")
            self.stream.flush()


def _is_object(text: str) -> bool:
    """Whether a text is a JSON object."""
    with contextlib.suppress(ValueError, RecursionError):
        return text.startswith("{") and isinstance(json.loads(text), dict)
    return False
