"""Validates our own JSON files against their schemas, with messages that say what is wrong and where."""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypedDict

from sensitivity.spec.errors import UserError
from sensitivity.spec.fields import InvalidValue, content, parsed, quoted

FOLDER = Path(__file__).parent / "schemas"
LARGEST = 256 * 2**20  # bytes; our files have kilobytes, so a larger one is not ours and is not read
# the keywords of JSON Schema that our schemas use
Schema = TypedDict(
    "Schema",
    {
        "$defs": dict[str, "Schema"],
        "$ref": str,
        "additionalProperties": "Schema | bool",
        "anyOf": list["Schema"],
        "const": object,
        "description": str,
        "enum": list[object],
        "exclusiveMinimum": float,
        "items": "Schema",
        "maximum": float,
        "minItems": int,
        "minLength": int,
        "minProperties": int,
        "minimum": float,
        "pattern": str,
        "properties": dict[str, "Schema | bool"],
        "required": list[str],
        "type": str | list[str],
    },
    total=False,
)
# JSON Schema's types as Python reads them; bool is excluded from numbers, since Python counts it as an int. NaN passes
# here, but is within no limit.
# The validator is written by hand so that its message is one plain sentence about the first fault.
IS_TYPE: dict[str, Callable[[object], bool]] = {
    "object": lambda value: isinstance(value, Mapping),
    "array": lambda value: isinstance(value, list | tuple),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
}


@cache
def schema_of(name: str) -> Schema:
    """A schema by its name."""
    content: Schema = json.loads((FOLDER / f"{name}.schema.json").read_bytes())
    return content


def read(path: Path, name: str, remedy: str) -> Any:
    """Read a JSON file and check it against its schema; the caller annotates the type, often as a TypedDict.

    `remedy` says what the user can do, and ends each message.
    """
    what = f"{path} cannot be used"
    try:
        raw = content(path, LARGEST)
    except InvalidValue as error:
        raise UserError(f"{what}: {error}; {remedy}") from error
    try:
        value = parsed(raw)
    except InvalidValue as error:
        raise UserError(f"{what}: it is not JSON, or was cut short ({error}); {remedy}") from error
    check(value, name, what, remedy)
    return value


def why_foreign(path: Path, name: str) -> str:
    """Why a file is not one that we wrote by this schema; an empty string if it is one."""
    try:
        read(path, name, "")
    except UserError:
        return "`sensitivity` did not write it"
    return ""


def check(value: object, name: str, what: str, remedy: str) -> None:
    """Raise an error with the first fault of a value."""
    if wrong := fault(value, schema_of(name), name):
        raise UserError(f"{what}: {wrong}; {remedy}")


def fault(value: object, wanted: Schema | bool, home: str, at: str = "") -> str | None:
    """The first fault of a value as part of a sentence; None if the schema accepts it.

    `home` is the schema whose file a `$ref` without a file name refers to; `at` is the path of the value in the
    document.
    """
    if wanted is True:
        return None
    if wanted is False:
        return f"'{at}' is not a known field"
    if ref := wanted.get("$ref"):
        home, wanted = _resolved(ref, home)
    if options := wanted.get("anyOf"):
        faults = [fault(value, option, home, at) for option in options]
        # if the value and an option are both objects, the fault inside says more than a list of the options
        inside = [
            one for one, option in zip(faults, options, strict=True) if one and _is_this_object(value, option, home)
        ]
        return None if None in faults else (inside[0] if inside else _mismatch(value, wanted, home, at))
    if not _fits(value, wanted):
        return _mismatch(value, wanted, home, at)
    if isinstance(value, Mapping):
        return _of_object(value, wanted, home, at)
    if isinstance(value, list | tuple) and "items" in wanted:
        return _first(fault(item, wanted["items"], home, f"{at}[{i}]") for i, item in enumerate(value))
    return None


def _first(faults: Iterable[str | None]) -> str | None:
    return next((one for one in faults if one), None)


def _of_object(value: Mapping[str, object], wanted: Schema, home: str, at: str) -> str | None:
    """The first fault of an object: a property that is missing, unknown or wrong."""
    for name in wanted.get("required", ()):
        if name not in value:
            return f"'{_member(at, name)}' is missing"
    known, other = wanted.get("properties", {}), wanted.get("additionalProperties", True)
    return _first(fault(item, known.get(name, other), home, _member(at, name)) for name, item in value.items())


def _member(at: str, name: str) -> str:
    return f"{at}.{name}" if at else str(name)


def _fits(value: object, wanted: Schema) -> bool:
    """Whether a value's type, limits, length and pattern fit; the caller checks its items and properties."""
    if (kinds := _types(wanted)) and not any(IS_TYPE[kind](value) for kind in kinds):
        return False
    # True == 1 in Python, but not in JSON
    if "const" in wanted and (value != wanted["const"] or isinstance(value, bool)):
        return False
    if "enum" in wanted and value not in wanted["enum"]:
        return False
    if isinstance(value, int | float) and not isinstance(value, bool):
        return all(within(value, limit) for _, within, limit in _limits(wanted))
    if isinstance(value, str):
        fits = re.search(wanted.get("pattern", ""), value) is not None
        return fits and len(value) >= wanted.get("minLength", 0)
    if isinstance(value, Mapping):
        return len(value) >= wanted.get("minProperties", 0)
    return not isinstance(value, list | tuple) or len(value) >= wanted.get("minItems", 0)


def _limits(wanted: Schema) -> list[tuple[str, Callable[[float, float], bool], float]]:
    """The limits of a number: a word for the message, the comparison that a value must pass, and the limit."""
    limits = (
        ("from", operator.ge, wanted.get("minimum")),
        ("above", operator.gt, wanted.get("exclusiveMinimum")),
        ("to", operator.le, wanted.get("maximum")),
    )
    return [(word, within, limit) for word, within, limit in limits if limit is not None]


def _types(wanted: Schema) -> list[str]:
    kinds = wanted.get("type", [])
    return [kinds] if isinstance(kinds, str) else list(kinds)


def _is_this_object(value: object, wanted: Schema, home: str) -> bool:
    """Whether a value and an option are both objects: only then is the fault inside the value worth reporting."""
    if ref := wanted.get("$ref"):
        _, wanted = _resolved(ref, home)
    return "object" in _types(wanted) and isinstance(value, Mapping)


def _resolved(ref: str, home: str) -> tuple[str, Schema]:
    """What a `$ref` points to, in this schema file or in another, and the name of that file."""
    file, _, place = ref.partition("#/$defs/")
    home = file.removesuffix(".schema.json") or home
    return home, schema_of(home)["$defs"][place] if place else schema_of(home)


def _mismatch(value: object, wanted: Schema, home: str, at: str) -> str:
    named = f"'{at}'" if at else "it"
    return f"{named} is {quoted(value)}, and should be {_expected(wanted, home)}"


def _expected(wanted: Schema, home: str) -> str:
    """What a schema asks for, in words."""
    if ref := wanted.get("$ref"):
        home, wanted = _resolved(ref, home)
    if options := wanted.get("anyOf"):
        return " or ".join(dict.fromkeys(_expected(option, home) for option in options))
    if "const" in wanted:
        return json.dumps(wanted["const"])
    if "enum" in wanted:
        return "one of " + ", ".join(json.dumps(one) for one in wanted["enum"])
    plain = {"object": "an object", "array": "a list", "string": "a text", "boolean": "true or false"}
    plain |= {"null": "null", "integer": "a whole number", "number": "a number"}
    words = " or ".join(plain[kind] for kind in _types(wanted)) or "something else"
    if wanted.get("pattern") or wanted.get("minLength"):
        words += f" {wanted.get('description', 'that is not empty')}"
    return words + "".join(f" {word} {limit:,}" for word, _, limit in _limits(wanted))
