"""UserError, and its one habit: say what was wrong, what is allowed, what to type next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST = 300  # letters of another's message inside a sentence of ours


class UserError(Exception):
    """Something the user can mend; shown as one sentence, without a traceback."""


class Notice(UserWarning):
    """Something to know though the work goes on; the command line shows it as one line, once."""


def unknown(what: str, name: object, allowed: Iterable[object]) -> UserError:
    """The error for a name that is not in a table: the choices, and the nearest one."""
    names = [str(choice) for choice in allowed]
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return UserError(f"unknown {what} '{name}'; choose from {', '.join(names)}{hint}")


def reason(error: BaseException) -> str:
    """The first line of an exception, for use inside a sentence; with the next where it only announces that."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    told = " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])
    if isinstance(error, LookupError) and not isinstance(error, UserError):  # else no more than a name or a number
        told = f"{type(error).__name__}: {told}"
    told = told.encode("utf-8", "backslashreplace").decode()  # half of a surrogate pair cannot be printed
    return told if len(told) <= LONGEST else f"{told[:LONGEST]}..."
