"""What others' files must hold: JSON, and the type and limits of each of its fields, checked on reading."""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

LONGEST = 1_000_000  # letters of a text
LARGEST = 2**53  # of whole numbers: beyond it, not every one is a number of its own
FARTHEST = 1e9  # of places in an image, in pixels
MISSING, FOLDER = "it is not there", "it is a folder"
SHOWN = 60  # letters of a wrong value that a message repeats


class Misfit(ValueError):
    """What is wrong with something that was read, as part of a sentence."""


@dataclass(frozen=True)
class Kind:
    """A type with its limits: how a message names it, and whether a value is of it."""

    expected: str
    fits: Callable[[Any], bool]


def _text(value: Any) -> bool:
    return isinstance(value, str) and value.strip() != "" and len(value) <= LONGEST and _encodes(value)


def _encodes(value: str) -> bool:
    """JSON can write half of a pair of surrogates, which is no letter: no tokenizer and no file takes it."""
    return value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= FARTHEST  # so no NaN


def _file_name(value: Any) -> bool:
    """Of a file inside its data set's folder."""
    return (
        _text(value)
        and "\0" not in value
        and not PurePosixPath(value).is_absolute()
        and ".." not in PurePosixPath(value).parts
    )


TEXT = Kind("text that is not empty", _text)
ANY_TEXT = Kind("text", lambda value: value == "" or (isinstance(value, str) and not value.strip()) or _text(value))
WHOLE = Kind("a whole number", _whole)
COUNT = Kind("a whole number from 0", lambda value: _whole(value) and value >= 0)
NUMBER = Kind(f"a number between -{FARTHEST:g} and {FARTHEST:g}", _number)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
NAME = Kind("text or a whole number", lambda value: _text(value) or _whole(value))
FILE = Kind("the name of a file", lambda value: _text(value) and "\0" not in value)
FILE_INSIDE = Kind("the name of a file inside the folder", _file_name)
OBJECT = Kind("an object", lambda value: isinstance(value, dict))


def listed(kind: Kind, fewest: int = 1) -> Kind:
    def fits(value: Any) -> bool:
        return isinstance(value, list) and len(value) >= fewest and all(map(kind.fits, value))

    return Kind(f"a list of {kind.expected}", fits)


def either(*kinds: Kind) -> Kind:
    return Kind(" or ".join(kind.expected for kind in kinds), lambda value: any(kind.fits(value) for kind in kinds))


def one_of(*names: str) -> Kind:
    return Kind(f"one of {', '.join(names)}", lambda value: isinstance(value, str) and value in names)


def check(value: Any, required: Mapping[str, Kind], optional: Mapping[str, Kind] = {}, what: str = "it") -> Any:
    """The value, an object with these fields of these kinds; an optional field may be null."""
    if not isinstance(value, dict):
        raise Misfit(f"{what} is {shown(value)} instead of an object")
    if missing := [name for name in required if name not in value]:
        raise Misfit(f"{what} has no {' and no '.join(map(repr, missing))}")
    for name, kind in required.items():
        if not kind.fits(value[name]):
            raise Misfit(f"{name} is {shown(value[name])} instead of {kind.expected}")
    for name, kind in optional.items():
        if value.get(name) is not None and not kind.fits(value[name]):
            raise Misfit(f"{name} is {shown(value[name])} instead of {kind.expected}")
    return value


def shown(value: Any) -> str:
    """A value as JSON would write it, short, on one line and in letters that any terminal shows."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = ascii(value) if isinstance(value, str | bytes | int | float) else f"a {type(value).__name__}"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def cut(text: str) -> str:
    """A name as a message repeats it."""
    return text if len(text) <= 2 * SHOWN else f"{text[:SHOWN]}..."


def parsed(text: str | bytes) -> Any:
    """What JSON says, with or without a byte-order mark; NaN is none, and nothing is nested beyond reason."""
    try:
        plain = text.decode("utf-8-sig") if isinstance(text, bytes) else text.removeprefix("\ufeff")
        return json.loads(plain, parse_constant=_constant)
    except UnicodeDecodeError as error:
        raise Misfit(f"byte {error.start:,} is no UTF-8") from error
    except json.JSONDecodeError as error:
        raise Misfit(f"{error.msg} at line {error.lineno}, column {error.colno}") from error
    except RecursionError as error:
        raise Misfit("too many brackets inside each other") from error
    except Misfit:
        raise
    except ValueError as error:  # Python's own limit on the digits of a number
        raise Misfit("a number of too many digits") from error


def _constant(name: str) -> float:
    if name == "NaN":
        raise Misfit("NaN is no JSON")
    return -math.inf if name.startswith("-") else math.inf  # configurations have them, as transformers writes them


def content(file: Path) -> bytes:
    """All of a file; of nothing else, as a folder has no content and a pipe may never end."""
    if trouble := not_a_file(file):
        raise Misfit(trouble)
    try:
        return file.read_bytes()
    except OSError as error:
        raise Misfit(f"it cannot be read: {(error.strerror or 'no reason is given').lower()}") from error


def not_a_file(file: Path) -> str | None:
    """Why a path is no file that can be read; None where it is one."""
    try:
        mode = file.stat().st_mode
    except PermissionError:
        return "it may not be read"
    except (OSError, ValueError):  # no such file, and none can have a name too long or with a zero in it
        return MISSING
    if stat.S_ISREG(mode):
        return None
    return FOLDER if stat.S_ISDIR(mode) else "it is no file, but a pipe or a device"


def read(file: Path) -> Any:
    """What a JSON file says."""
    return parsed(content(file))
