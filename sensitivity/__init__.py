"""The straight line from a vision-language model to a recommended mixed-precision plan."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:  # for type checkers and editors, which cannot follow `__getattr__`
    from sensitivity.analysis.atlas.atlas_file import add_to_atlas as add_to_atlas
    from sensitivity.analysis.atlas.predicted_frontier import predict_frontier as predict_frontier
    from sensitivity.analysis.importance.ranking import rank as rank
    from sensitivity.analysis.reporting.page import report as report
    from sensitivity.api.exporting import export as export
    from sensitivity.api.recommending import recommend as recommend
    from sensitivity.api.sweeping import grid as grid
    from sensitivity.api.sweeping import one_at_a_time as one_at_a_time
    from sensitivity.api.sweeping import sweep as sweep
    from sensitivity.formats.verification import verify as verify
    from sensitivity.measure.install.plan_in_model import quantized as quantized
    from sensitivity.models.discovery import inspect as inspect
    from sensitivity.models.loading import load as load
    from sensitivity.models.vlm import VLM as VLM
    from sensitivity.quantize.scheme_settings import scheme as scheme
    from sensitivity.spec.components import Component as Component
    from sensitivity.spec.components import ComponentMap as ComponentMap
    from sensitivity.spec.errors import UserError as UserError
    from sensitivity.spec.plan import Plan as Plan
    from sensitivity.spec.plan import Scheme as Scheme
    from sensitivity.spec.sizes import Size as Size
    from sensitivity.spec.sizes import size as size
    from sensitivity.study.study import Study as Study
    from sensitivity.tasks.table import task as task


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'sensitivity' has no attribute '{name}'")
    globals()[name] = public = getattr(importlib.import_module(f"sensitivity.{_HOMES[name]}"), name)
    return public


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
