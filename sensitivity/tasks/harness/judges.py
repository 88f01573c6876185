"""Finds out whether a metric of lmms-eval asks a judge: another model, over the network."""

from __future__ import annotations

import types
from collections.abc import Iterator

JUDGE_MODULES = (
    "lmms_eval.llm_judge",
    "lmms_eval.verifiers",
    "openai",
    "anthropic",
    "requests",
    "httpx",
    "google.genai",
)


def judge_of(function: object) -> str | None:
    """The module through which a function, or what it calls, would ask a judge; None if it asks none."""
    seen: set[int] = set()
    waiting = [function]
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        module = one.__name__ if isinstance(one, types.ModuleType) else str(getattr(one, "__module__", ""))
        if any(module == judge or module.startswith(f"{judge}.") for judge in JUDGE_MODULES):
            return module
        waiting += _used_by(one)
    return None


def _used_by(one: object) -> Iterator[object]:
    """What to search next: globals that a function of lmms-eval reads, a class's functions, or an object's class."""
    one = getattr(one, "__wrapped__", one)
    if isinstance(one, types.FunctionType):
        if "lmms_eval" in str(one.__globals__.get("__file__", "")):
            for name in _names(one.__code__):
                if name in one.__globals__:
                    yield one.__globals__[name]
    elif isinstance(one, type):
        yield from (value for value in vars(one).values() if isinstance(value, types.FunctionType))
    elif not isinstance(one, types.ModuleType | types.BuiltinFunctionType):
        yield type(one)


def _names(code: types.CodeType) -> Iterator[str]:
    """The global names that a function reads, with those of the functions inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
