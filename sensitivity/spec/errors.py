"""UserError: says what was wrong, what is allowed and what to type next; makes messages of other errors printable."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterable
from numbers import Integral
from os import PathLike
from typing import TypeVar, cast

T = TypeVar("T")
QUOTED = 300  # characters of a library's message that a sentence of ours quotes
LONGEST_WORD = 300  # characters of one word that a message keeps; a word can be a path or a whole file
ARGUMENTS = {  # a class of which arguments of public functions are -> in words, with what makes one
    "VLM": "a VLM, such as load({})",
    "Study": "a Study, such as Study({})",
    "ComponentMap": "a ComponentMap, such as inspect(vlm)",
    "Plan": "a Plan, such as choice.plan of a recommendation or one of grid(parts)",
    "Recommendation": "a Recommendation, such as recommend(study)",
    "Scheme": "a Scheme, such as scheme('rtn', 4)",
    "str": "a name, such as 'vqa'",
    "PathLike": "a name or a path",
    "Module": "the module itself, such as vlm.model",
    "Mapping": "a dict",
    "bool": "True or False",
    "Integral": "a whole number",
    "Real": "a number",
}
TOO_LONG = re.compile(rf"\S{{{LONGEST_WORD + 1},}}")


class UserError(Exception):
    """An error that the user can fix; shown as one sentence, without a traceback.

    Examples:
        >>> from sensitivity import UserError
        >>> try:
        ...     scheme("gtpq", 4)
        ... except UserError as error:
        ...     print(error)
        unknown method 'gtpq'...did you mean gptq?)
    """


class Failed(UserError):
    """An operation that failed although the request was right, such as a verification, or writing to a full disk."""


class NoSpace(Failed):
    """A full disk; only the command line knows whether its verb goes on from what was stored before."""


class Partly(UserError):
    """What of a request could not be met, where the rest was; `facts` is the rest's result, which --json prints."""

    def __init__(self, message: str, facts: dict[str, object]) -> None:
        super().__init__(message)
        self.facts = facts


class Notice(UserWarning):
    """A warning that the command line shows once, as one line; the work goes on."""


def unknown(what: str, name: object, allowed: Iterable[object]) -> UserError:
    """The error for a name that is not in a table: it lists the choices and suggests the nearest one."""
    names = [str(choice) for choice in allowed]
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return UserError(f"unknown {what} '{name}'; choose from {', '.join(names)}{hint}")


def check_is(name: str, value: object, kind: type) -> None:
    """Raise an error unless an argument of a public function, by its name, is of the class that it must be of."""
    if not isinstance(value, kind):
        shown = value if isinstance(value, str) else "..."
        given = repr(value) if isinstance(value, str | bool | int | float | None) else f"a {type(value).__name__}"
        raise UserError(f"{name} must be {ARGUMENTS[kind.__name__].format(repr(shown))}, not {given}")


def check_is_path(name: str, value: object) -> None:
    """Raise an error unless an argument is a path, or the text of one."""
    if not isinstance(value, str):
        check_is(name, value, PathLike)


def each_is(name: str, values: object, kind: type[T]) -> list[T]:
    """Several arguments of a class as a list, or the only one; an error names what each of them must be."""
    several = list(values) if isinstance(values, Iterable) and not isinstance(values, kind | str) else [values]
    for value in several:
        check_is(f"each of {name}", value, kind)
    return cast(list[T], several)


def check_options(function: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise an error where a public function has no option of some name."""
    for name in given:
        if name not in (names := list(known)):
            raise unknown(f"option of {function}", name, names)


def check_least(name: str, value: object, least: int) -> None:
    """Raise an error unless an argument is a whole number, and at least so large."""
    check_is(name, value, Integral)
    if int(value) < least:  # type: ignore[call-overload]
        raise UserError(f"{name} must be at least {least}, not {value}")


def printable(message: str) -> str:
    """A message as one line that is safe to print: no control characters, no lone surrogates, no overlong words."""
    line = " ".join(message.split())
    shown = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)
    return TOO_LONG.sub(lambda word: f"{word[0][:LONGEST_WORD]}…", shown)


def os_message(error: OSError) -> str:
    """An operating system's error as a sentence: its str() would begin with [Errno 28]."""
    what = error.strerror or str(error) or type(error).__name__
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    return f"{' and '.join(names)}: {what}" if names else what


def reason(error: BaseException) -> str:
    """The first line of an exception's message, for use inside a sentence of ours.

    Where that line ends with a colon, the next line is added.
    """
    text = os_message(error) if isinstance(error, OSError) else str(error)
    lines = (text.strip() or type(error).__name__).splitlines()
    first = " ".join(line.strip() for line in lines[: 2 if lines[0].rstrip().endswith(":") else 1])
    if isinstance(error, LookupError) and not isinstance(error, UserError):  # a KeyError's message is only the key
        first = f"{type(error).__name__}: {first}"
    first = first.encode("utf-8", "backslashreplace").decode()  # half of a surrogate pair cannot be printed
    return first if len(first) <= QUOTED else f"{first[:QUOTED]}..."


def is_defect(error: Exception) -> bool:
    """Whether an error is a defect of this package rather than of a model or an input.

    Python raises these types for wrong code. Raised in a library, they may still come from an input: a model that is
    given a shape or a file it does not expect.
    """
    if not isinstance(error, AssertionError | AttributeError | NameError | TypeError):
        return False
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and str(frame.tb_frame.f_globals.get("__name__")).partition(".")[0] == "sensitivity"


def shell_word(value: object) -> str:
    """A path or a name as one word of a command that a message tells to type, in quotes where the shell needs them."""
    return shlex.quote(str(value))
