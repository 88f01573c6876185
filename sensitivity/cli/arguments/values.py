"""Types of flag values: a function for each type of number or word, whose error names what is allowed."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable, Iterator
from typing import TypeVar

from sensitivity.spec.plan import ROUNDED

T = TypeVar("T")

# upper limits: with larger values, no run would end or fit into memory
EXAMPLES = 1_000_000
SEED = 2**31 - 1  # half of what NumPy takes, since a sweep counts up from the seed
PLANS = 20_000  # the limit of a grid too
WEIGHTS = 10**15
WORKERS = 1_000
RESAMPLES = 10_000
COLUMNS = 1_000_000  # of a weight
CHANNELS = 65_536  # of a key or value
WIDEST = 16  # bits, which means native precision
BPW = 64.0
GB = 1e6
MINUTES = 1e6
MS = 1e9
NAME, FILE_NAME, PATH = 200, 200, 3_800  # bytes; systems allow 255 and 4,096, and the files of a study make both longer

WHOLE = re.compile(r"[+-]?[0-9]{1,30}")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def error(what: str, text: str) -> argparse.ArgumentTypeError:
    """The error for a value: what the flag takes, and what was typed."""
    return argparse.ArgumentTypeError(f"takes {what}, not {shown(text)}")


def shown(text: str) -> str:
    """What was typed, for a message: quoted, short, without control characters."""
    return ascii(text) if not text.isprintable() and len(text) <= 40 else f"'{text}'" if len(text) <= 40 else _cut(text)


def _cut(text: str) -> str:
    head = text[:24] if text.isprintable() else ascii(text[:24])[1:-1]
    return f"'{head}…' ({len(text):,} characters)"


# -- numbers


def whole(low: int, high: int) -> Callable[[str], int]:
    """A whole number within limits."""
    what = f"a whole number from {low:,} to {high:,}"

    def read(text: str) -> int:
        if not WHOLE.fullmatch(text) or not low <= int(text) <= high:
            raise error(what, text)
        return int(text)

    return read


def _number(text: str, what: str, high: float, above: bool) -> float:
    """A finite number from 0, or above 0, up to a limit."""
    value = float(text) if NUMBER.fullmatch(text) else math.nan
    if not (value > 0 if above else value >= 0) or not value <= high:
        raise error(what, text)
    return value


examples = whole(1, EXAMPLES)
seed = whole(0, SEED)
plans = whole(1, PLANS)
processes = whole(1, WORKERS)  # or threads
resamples = whole(2, RESAMPLES)
weights = whole(1, WEIGHTS)
top = whole(1, 100)
pause = whole(1, 3_600)  # seconds
on_a_page = whole(1, 1_000)  # examples on a page: each has an image
channels = whole(1, CHANNELS)
draft = whole(1, 64)  # tokens
rounds = whole(6, 10_000)  # of timing: fewer give no 95 % interval of a median
few_plans = whole(2, 100)  # at least full precision and one other
checks = whole(0, 1_000)  # plans


def gigabytes(text: str) -> float:
    """An amount of memory or disk, which may be 0."""
    return _number(text, f"an amount from 0 to {GB:,.0f} GB, such as 8 or 0.5", GB, above=False)


def size(text: str) -> float:
    """A budget in GB."""
    return _number(text, f"GB above 0 and at most {GB:,.0f}, such as 2.5", GB, above=True)


def minutes(text: str) -> float:
    """A time in minutes."""
    return _number(text, f"minutes above 0 and at most {MINUTES:,.0f}, such as 5", MINUTES, above=True)


def milliseconds(text: str) -> float:
    """A limit in milliseconds."""
    return _number(text, f"milliseconds above 0 and at most {MS:,.0f}, such as 12.5", MS, above=True)


def bpw(text: str) -> float:
    """A budget in bits per weight."""
    return _number(text, f"bits per weight above 0 and at most {BPW:g}, such as 4", BPW, above=True)


def fraction(text: str) -> float:
    """A share between 0 and 1."""
    words = "a share between 0 and 1, such as 0.9"
    if (share := _number(text, words, 1.0, above=True)) == 1:
        raise error(words, text)
    return share


def width(text: str) -> int:
    """A bit width."""
    if not WHOLE.fullmatch(text) or not 1 <= int(text) <= WIDEST:
        raise error(f"whole numbers of bits from 1 to {WIDEST}, such as 2,3,4", text)
    return int(text)


def rounded_width(text: str) -> int:
    """A bit width of activations or of the cache."""
    if not WHOLE.fullmatch(text) or int(text) not in (*ROUNDED, WIDEST):
        raise error(f"whole numbers of bits from {ROUNDED[0]} to {ROUNDED[-1]}, or 16, such as 4,8,16", text)
    return int(text)


def group(text: str) -> int | str:
    """A group size: row, tensor or a number of columns."""
    if text in ("row", "tensor"):
        return text
    if not WHOLE.fullmatch(text) or not 1 <= int(text) <= COLUMNS:
        raise error(f"row, tensor, or a number of columns from 1 to {COLUMNS:,}", text)
    return int(text)


def workers_or_auto(text: str) -> int | str:
    """A number of processes, or auto."""
    return text if text == "auto" else processes(text)


# -- words


def choice(*allowed: str) -> Callable[[str], str]:
    """One of a few words."""

    def read(text: str) -> str:
        if text not in allowed:
            raise error(" or ".join(allowed), text)
        return text

    return read


def name(text: str) -> str:
    """A name that is looked up in a table later; that table's error lists the choices."""
    if not text.strip() or not text.isprintable() or len(text.encode()) > NAME:
        raise error(f"a name of 1 to {NAME} bytes that can be printed", text)
    return text.strip()


def model_or_task(text: str) -> str:
    """A model or a task: a name, or the path of its files."""
    readable = text.strip() and text.isprintable() and len(text.encode()) <= PATH
    if not readable or max(len(piece.encode()) for piece in text.split("/")) > FILE_NAME:
        what = f"a name or a path that can be printed, at most {PATH:,} bytes, and {FILE_NAME} between slashes"
        raise error(what, text)
    return text


def comma_separated(one: Callable[[str], T]) -> Callable[[str], tuple[T, ...]]:
    """Values of a type, separated by commas; repeated ones count once."""

    def read(text: str) -> tuple[T, ...]:
        return tuple(dict.fromkeys(one(piece.strip()) for piece in text.split(",")))

    return read


LIBRARIES = ("lmms-eval:", "vlmeval:")  # prefixes that also apply to the names after them


def task_names(text: str) -> tuple[str, ...]:
    """Tasks, separated by commas; the prefix of an evaluation library applies to the tasks after it, too."""
    names, library = [], ""
    for name in dict.fromkeys(model_or_task(piece.strip()) for piece in _without_cutting_files(text.split(","))):
        if ":" in name or name.endswith(".jsonl"):
            library = next((one for one in LIBRARIES if name.startswith(one)), "")
            names.append(name)
        else:
            names.append(library + name)
    return tuple(dict.fromkeys(names))


def _without_cutting_files(pieces: list[str]) -> Iterator[str]:
    """The pieces, of which those that together name a file or folder that is there, with commas, are one."""
    while pieces:
        for count in range(len(pieces), 0, -1):
            name = ",".join(pieces[:count]).strip()
            head, _, rest = name.partition(":")
            places = (name if name.endswith(".jsonl") else "", "" if "," in head else rest)
            if count == 1 or any(place and os.path.exists(os.path.expanduser(place)) for place in places):
                yield name
                pieces = pieces[count:]
                break


def pair(text: str) -> tuple[str, str]:
    """NAME=VALUE as two strings."""
    left, equals, right = text.partition("=")
    if not (equals and left.strip() and right.strip() and text.isprintable() and len(text.encode()) <= 2 * NAME):
        raise error("NAME=VALUE", text)
    return left.strip(), right.strip()


def pair_of(one: Callable[[str], T]) -> Callable[[str], tuple[str, T]]:
    """NAME=VALUE with a value of a type."""

    def read(text: str) -> tuple[str, T]:
        left, right = pair(text)
        return left, one(right)

    return read


def task_weight(text: str) -> float:
    """How much a task counts beside others."""
    return _number(text, "a weight above 0 and at most 1,000,000, such as vqa=2", 1e6, above=True)


def floor(text: str) -> float:
    """A share of full precision, which may be in percent."""
    what = "a share of full precision above 0 and at most 1, such as ground=0.95 or ground=95%"
    if text.endswith("%"):
        return _number(text[:-1], what, 100.0, above=True) / 100
    return _number(text, what, 1.0, above=True)


def allowed(text: str) -> tuple[int, ...]:
    """Bit widths, or native, separated by commas."""
    return comma_separated(lambda piece: WIDEST if piece == "native" else width(piece))(text)


def count(text: str) -> int:
    """A number of weights as tables write it: 984,023,040 or 984_023_040."""
    return weights(text.replace("_", "").replace(",", ""))


def setting(text: str) -> int | float | bool | str:
    """A number, true, false or a word; the method checks which of them a setting takes, and its limits."""
    if text in ("true", "false"):
        return text == "true"
    if WHOLE.fullmatch(text):
        return int(text)
    if NUMBER.fullmatch(text) and math.isfinite(float(text)):
        return float(text)
    if not re.fullmatch(r"[A-Za-z][\w.-]*", text) or text.lower() in ("nan", "inf", "infinity", "null", "none"):
        raise error("NAME=VALUE with a finite number, true, false or a word, such as damp=0.05", text)
    return text
