"""The straight line from a vision-language model to a recommended mixed-precision plan."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

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
    importlib.import_module(f"sensitivity.{_HOMES[name]}")
    for verb, home in _HOMES.items():  # importing a module such as sensitivity.sweep hides the verb of that name
        if verb == name or isinstance(globals().get(verb), ModuleType):
            globals()[verb] = getattr(importlib.import_module(f"sensitivity.{home}"), verb)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
