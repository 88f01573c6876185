"""The straight line from a vision-language model to a recommended mixed-precision plan."""

from __future__ import annotations

import importlib

from sensitivity.spec.threads import sleep_while_waiting
from sensitivity.spec.version import __version__ as __version__

sleep_while_waiting()  # before anything imports torch: its threads read this once

# public name -> the module that defines it, imported on first use: `import sensitivity` loads neither torch nor pandas
_HOMES = {
    "load": "models.loading",
    "inspect": "models.discovery",
    "VLM": "models.vlm",
    "grid": "api.sweeping",
    "one_at_a_time": "api.sweeping",
    "sweep": "api.sweeping",
    "recommend": "api.recommending",
    "verify": "formats.verification",
    "export": "api.exporting",
    "rank": "analysis.importance.ranking",
    "report": "analysis.reporting.page",
    "add_to_atlas": "analysis.atlas.atlas_file",
    "predict_frontier": "analysis.atlas.predicted_frontier",
    "quantized": "measure.install.plan_in_model",
    "scheme": "quantize.scheme_settings",
    "Component": "spec.components",
    "ComponentMap": "spec.components",
    "Scheme": "spec.plan",
    "Plan": "spec.plan",
    "Size": "spec.sizes",
    "size": "spec.sizes",
    "Study": "study.study",
    "task": "tasks.table",
    "UserError": "spec.errors",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'sensitivity' has no attribute '{name}'")
    globals()[name] = public = getattr(importlib.import_module(f"sensitivity.{_HOMES[name]}"), name)
    return public


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
