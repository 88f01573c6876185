"""Fields of JSON that others wrote: each has a type and limits, which are checked when it is read."""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

LONGEST_TEXT = 1_000_000  # characters of a text
LARGEST = 2**53  # the largest whole number: a float does not hold all larger ones, so JSON readers may round them
LARGEST_COORDINATE = 1e9  # pixels
MISSING, FOLDER = "it is not there", "it is a folder"
SHOWN = 60  # characters of a wrong value that a message quotes


class InvalidValue(ValueError):
    """What is wrong with a value or a file, as a part of a sentence; the caller adds the rest."""


@dataclass(frozen=True)
class Kind:
    """A type with its limits: how a message names it, and a function that tests a value."""

    expected: str
    fits: Callable[[object], bool]


def _is_text(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and value.strip() != "" and len(value) <= LONGEST_TEXT and _encodes(value)


def _encodes(value: str) -> bool:
    """Whether a text can be encoded as UTF-8.

    JSON can write one half of a surrogate pair (\\ud800), which is no character: tokenizers and files refuse it.
    """
    return value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value)


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST


def _is_number(value: object) -> bool:
    # the comparison also refuses NaN
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST_COORDINATE


def _is_file_inside(value: object) -> bool:
    """Whether a field of JSON names a file inside its data set's folder: a relative path without `..`."""
    return (
        _is_text(value)
        and "\0" not in value
        and not PurePosixPath(value).is_absolute()
        and ".." not in PurePosixPath(value).parts
    )


TEXT = Kind("text that is not empty", _is_text)
ANY_TEXT = Kind("text", lambda value: value == "" or (isinstance(value, str) and not value.strip()) or _is_text(value))
WHOLE = Kind("a whole number", _is_whole)
COUNT = Kind("a whole number from 0", lambda value: _is_whole(value) and value >= 0)
NUMBER = Kind(f"a number between -{LARGEST_COORDINATE:g} and {LARGEST_COORDINATE:g}", _is_number)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
NAME = Kind("text or a whole number", lambda value: _is_text(value) or _is_whole(value))
FILE = Kind("the name of a file", lambda value: _is_text(value) and "\0" not in value)
FILE_INSIDE = Kind("the name of a file inside the folder", _is_file_inside)
OBJECT = Kind("an object", lambda value: isinstance(value, dict))


def list_of(kind: Kind, fewest: int = 1) -> Kind:
    """A list of at least `fewest` values of a kind."""

    def fits(value: object) -> bool:
        return isinstance(value, list) and len(value) >= fewest and all(map(kind.fits, value))

    return Kind(f"a list of {kind.expected}", fits)


def either(*kinds: Kind) -> Kind:
    """A value of any one of several kinds."""
    return Kind(" or ".join(kind.expected for kind in kinds), lambda value: any(kind.fits(value) for kind in kinds))


def one_of(*names: str) -> Kind:
    """One of a few names."""
    return Kind(f"one of {', '.join(names)}", lambda value: isinstance(value, str) and value in names)


def check(value: object, required: Mapping[str, Kind], optional: Mapping[str, Kind] = {}, what: str = "it") -> Any:
    """Return the value if it is an object whose fields are of these kinds; raise InvalidValue otherwise.

    An optional field may be null. Fields that are not named are allowed, since data sets have more of them than we
    read.
    """
    if not isinstance(value, dict):
        raise InvalidValue(f"{what} is {quoted(value)} instead of an object")
    # missing fields are reported first, all at once: they show that the file has another layout
    if missing := [name for name in required if name not in value]:
        raise InvalidValue(f"{what} has no {' and no '.join(map(repr, missing))}")
    for name, kind in required.items():
        if not kind.fits(value[name]):
            raise InvalidValue(f"{name} is {quoted(value[name])} instead of {kind.expected}")
    for name, kind in optional.items():
        if value.get(name) is not None and not kind.fits(value[name]):
            raise InvalidValue(f"{name} is {quoted(value[name])} instead of {kind.expected}")
    return value


def quoted(value: object) -> str:
    """A wrong value for a message: as JSON, short, on one line, in ASCII."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = ascii(value) if isinstance(value, str | bytes | int | float) else f"a {type(value).__name__}"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def shortened(text: str) -> str:
    """A name for a message, shortened where it is long."""
    return text if len(text) <= 2 * SHOWN else f"{text[:SHOWN]}..."


def parsed(text: str | bytes) -> Any:
    """The value of a JSON text, with or without a byte-order mark.

    Raises InvalidValue if the text is not JSON, holds NaN, or is nested beyond Python's recursion limit.
    """
    try:
        plain = text.decode("utf-8-sig") if isinstance(text, bytes) else text.removeprefix("\ufeff")
        return json.loads(plain, parse_constant=_constant)
    except UnicodeDecodeError as error:
        raise InvalidValue(f"byte {error.start:,} is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise InvalidValue(f"{error.msg} at line {error.lineno}, column {error.colno}") from error
    except RecursionError as error:
        raise InvalidValue("it is nested too deeply") from error
    except InvalidValue:
        raise
    except ValueError as error:  # Python refuses to convert a number of more than 4,300 digits
        raise InvalidValue("a number has too many digits") from error


def _constant(name: str) -> float:
    if name == "NaN":
        raise InvalidValue("NaN is not valid JSON")
    return -math.inf if name.startswith("-") else math.inf  # transformers writes infinities into config files


def content(file: Path, largest: int | None = None) -> bytes:
    """The bytes of a regular file; InvalidValue if it has more than `largest`.

    A folder or a pipe is refused, too: reading a pipe may never end.
    """
    if trouble := not_a_file(file):
        raise InvalidValue(trouble)
    try:
        if largest is not None and (size := file.stat().st_size) > largest:
            raise InvalidValue(f"it has {size:,} bytes, and such a file has a few thousand")
        return file.read_bytes()
    except OSError as error:
        raise InvalidValue(f"it cannot be read: {(error.strerror or 'no reason is given').lower()}") from error


def not_a_file(file: Path) -> str | None:
    """Why a path is not a regular file; None if it is one."""
    try:
        mode = file.stat().st_mode
    except PermissionError:
        return "it may not be read"
    except (OSError, ValueError):  # also for a name that is too long or holds a zero byte, which no file can have
        return MISSING
    if stat.S_ISREG(mode):
        return None
    return FOLDER if stat.S_ISDIR(mode) else "it is a pipe or a device, not a file"


def read(file: Path) -> Any:
    """The value of a JSON file."""
    return parsed(content(file))
