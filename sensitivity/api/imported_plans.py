"""Plans of imported tables, made plans of a model: a table says which parts it has, and not their weights."""

from __future__ import annotations

from sensitivity.models.discovery import inspect
from sensitivity.models.vlm import VLM
from sensitivity.quantize.methods import METHODS, needs_data
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Plan
from sensitivity.study.study import Study


def plan_of_model(study: Study, plan: Plan, model: VLM | str | None, format: str) -> tuple[ComponentMap, Plan]:
    """The components of the model, and the plan for them; those that the table does not name stay native."""
    if format == "plan":
        raise UserError(
            f"{study.path} was imported from a table and holds no weights. To write the plan alone, name a file: --out "
            "plan.json. To write weights, name a --format other than plan, and the model: --model MODEL"
        )
    if model is None:
        raise UserError(
            f"{study.path} was imported from a table and holds no weights: name the model that the table is about, "
            "--model MODEL"
        )
    for scheme in plan.distinct_schemes:
        if scheme.method not in METHODS or needs_data(scheme):
            why = "needs calibration data, which a table does not name" if scheme.method in METHODS else "is no method"
            raise UserError(f"'{scheme.method}' {why}: import the table with --method, such as --method rtn")
    parts = inspect(model, by=study.parts.by)
    native = dict.fromkeys(parts.names)
    whole = Plan(tuple({**native, **dict(plan.schemes)}.items()))
    whole.check(parts)
    return parts, whole
