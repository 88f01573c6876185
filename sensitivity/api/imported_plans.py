"""Plans of imported tables, made plans of a model: a table says which parts it has, and not their weights."""

from __future__ import annotations

from dataclasses import replace

from sensitivity.analysis.allocate.budget import Candidate
from sensitivity.analysis.allocate.infeasibility import NothingFits
from sensitivity.analysis.allocate.legal import best_legal_plan
from sensitivity.models.discovery import inspect
from sensitivity.models.vlm import VLM
from sensitivity.quantize.methods import METHODS, needs_data
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.errors import UserError, shell_word
from sensitivity.spec.plan import Plan
from sensitivity.spec.runtimes.table import files_of
from sensitivity.spec.sizes import budget_bits, size
from sensitivity.study.study import Study


def plan_of_model(study: Study, plan: Plan, model: VLM | str | None, format: str) -> tuple[ComponentMap, Plan]:
    """The components of the model, and the plan for them; those that the table does not name stay native."""
    if format == "plan":
        raise UserError(
            f"{study.path} was imported from a table and holds no weights. To write the plan alone, name a file: --out "
            "plan.json. To write weights, name a --format other than plan, and the model: --model MODEL"
        )
    without = ""
    for scheme in plan.distinct_schemes:
        if scheme.method not in METHODS or needs_data(scheme):
            why = "needs calibration data, which a table does not name" if scheme.method in METHODS else "is no method"
            without = (
                f"'{scheme.method}' {why}: import the table, into another --out, with --method, such as --method rtn"
            )
    if model is None:
        raise UserError(
            f"{study.path} was imported from a table and holds no weights: name the model that the table is about, "
            f"--model MODEL{f'; and {without}' if without else ''}"
        )
    if without:
        raise UserError(without)
    parts = inspect(model, by=study.parts.by)
    whole = _of_all(parts, plan)
    whole.check(parts)
    return parts, whole


def best_of_model(study: Study, best: Candidate, runtime: str, model: VLM | str | None, format: str) -> Candidate:
    """The best plan for a budget whose files keep to it with all that they store, given the best one by codes alone.

    A table has no shapes, so that scales can be counted only here. Each further plan has fewer bits of codes.
    """
    asked = best.budget
    parts, _ = plan_of_model(study, best.plan, model, format)
    while (stored := size(parts, _of_all(parts, best.plan), files_of(runtime))).bits > budget_bits(parts, asked):
        try:
            best = best_legal_plan(study, runtime, (best.size.bits - 1) / study.parts.numel)
        except NothingFits:
            raise UserError(
                f"no plan fits {asked:g} bpw with all that {format} files store: {best.plan.describe()} takes "
                f"{stored.bpw:.3f}; ask for more"
            ) from None
    return replace(best, budget=asked)


def over_budget(study: Study, parts: ComponentMap, plan: Plan, asked: object, runtime: str) -> str:
    """That files take more than the budget for which a plan was chosen by codes alone; else an empty string."""
    stored = size(parts, plan, files_of(runtime))
    if not study.parts.sized or not isinstance(asked, float | int) or stored.bits <= budget_bits(parts, asked):
        return ""
    return (
        f"the plan takes {stored.bpw:.3f} bpw {stored.counted}, more than the {asked:g} for which it was chosen: the "
        f"table has no shapes, so that scales were not counted; `sensitivity export {shell_word(study.path)} --bpw "
        f"{asked:g} --format NAME --model MODEL --out DIR` keeps to it"
    )


def _of_all(parts: ComponentMap, plan: Plan) -> Plan:
    """A plan of some components, with the others native."""
    return Plan(tuple({**dict.fromkeys(parts.names), **dict(plan.schemes)}.items()))
