"""The straight line from a vision-language model to a recommended mixed-precision plan."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

from sensitivity.threads import sleep_while_waiting

__version__ = "0.1.0"
sleep_while_waiting()  # before anything imports torch

# name -> where it lives; imported when first asked for, so that `import sensitivity` loads neither torch nor pandas
_HOMES = {
    "load": "models",
    "inspect": "models",
    "VLM": "models",
    "grid": "verbs",
    "one_at_a_time": "verbs",
    "sweep": "verbs",
    "recommend": "verbs",
    "verify": "exporting",
    "export": "exporting",
    "rank": "importance",
    "report": "report",
    "quantized": "quantize",
    "scheme": "quantize",
    "Component": "components",
    "ComponentMap": "components",
    "Scheme": "plan",
    "Plan": "plan",
    "Size": "plan",
    "size": "plan",
    "Study": "trials",
    "task": "tasks",
    "UserError": "errors",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sensitivity' has no attribute '{name}'")
    globals()[name] = found = getattr(importlib.import_module(f"sensitivity.{_HOMES[name]}"), name)
    return found


class _Package(ModuleType):
    """Python binds a module that was imported in its package; one of a public name's name would hide it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
