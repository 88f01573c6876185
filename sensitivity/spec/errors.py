"""UserError, and its one habit: say what was wrong, what is allowed, what to type next."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

LONGEST = 300  # letters of another's message inside a sentence of ours
KEPT = 300  # characters of a word in a message
LONG = re.compile(rf"\S{{{KEPT + 1},}}")


class UserError(Exception):
    """Something the user can mend; shown as one sentence, without a traceback.

    Examples:
        >>> from sensitivity import UserError
        >>> try:
        ...     scheme("gtpq", 4)
        ... except UserError as error:
        ...     print(error)
        unknown method 'gtpq'...did you mean gptq?)
    """


class Failed(UserError):
    """Something that was tried and did not come out, such as a check: no flag and no file is to blame."""


class Notice(UserWarning):
    """Something to know though the work goes on; the command line shows it as one line, once."""


def unknown(what: str, name: object, allowed: Iterable[object]) -> UserError:
    """The error for a name that is not in a table: the choices, and the nearest one."""
    names = [str(choice) for choice in allowed]
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return UserError(f"unknown {what} '{name}'; choose from {', '.join(names)}{hint}")


def plain(message: str) -> str:
    """A message as one line that a terminal can show: no control characters, no lone surrogates, no endless words."""
    line = " ".join(message.split())
    shown = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)
    return LONG.sub(lambda word: f"{word[0][:KEPT]}…", shown)


def said(error: OSError) -> str:
    """An error of the operating system as a sentence, which str() begins with [Errno 28]."""
    what = error.strerror or str(error) or type(error).__name__
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    return f"{' and '.join(names)}: {what}" if names else what


def reason(error: BaseException) -> str:
    """The first line of an exception, for use inside a sentence; with the next where it only announces that."""
    text = said(error) if isinstance(error, OSError) else str(error)
    lines = (text.strip() or type(error).__name__).splitlines()
    told = " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])
    if isinstance(error, LookupError) and not isinstance(error, UserError):  # else no more than a name or a number
        told = f"{type(error).__name__}: {told}"
    told = told.encode("utf-8", "backslashreplace").decode()  # half of a surrogate pair cannot be printed
    return told if len(told) <= LONGEST else f"{told[:LONGEST]}..."
