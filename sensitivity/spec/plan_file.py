"""plan.json: a plan with its weights, its size and its origin, as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from sensitivity.spec import schema
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.errors import UserError
from sensitivity.spec.files import finite, write_atomically
from sensitivity.spec.plan import Plan
from sensitivity.spec.sizes import size

VERSION = 1
EXPORTED = "sensitivity.json"  # in the folder of an export: its plan, and which files were written


def document(parts: ComponentMap, plan: Plan, facts: Mapping[str, object]) -> dict[str, object]:
    """The content of a plan.json; `facts` say where the plan comes from."""
    known = {
        "version": VERSION,
        "model": parts.model,
        "by": parts.by,
        "key": plan.key,
        "plan": plan.to_json(),
        "size": size(parts, plan).to_json(),
        "weights": {component.name: [weight.name for weight in component.weights] for component in parts.components},
    }
    # `known` stands first to order the keys, and last so that its values win: facts may come from another plan.json
    return {**known, **facts, **known}


def write_file(parts: ComponentMap, plan: Plan, facts: Mapping[str, object], target: Path) -> Path:
    """Write a plan.json."""
    target.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps(finite(document(parts, plan, facts)), indent=2, default=str, allow_nan=False) + "\n"
    write_atomically(target, content.encode())
    return target


def why_foreign(path: Path) -> str:
    """Why a path is not a plan that we wrote; an empty string if it is one."""
    if path.is_dir():
        return "it is a folder, not a file"
    try:
        read(path)
    except UserError:
        return "it is not a plan that `sensitivity` wrote"
    return ""


def read(path: Path) -> tuple[str, Plan, dict[str, object]]:
    """The granularity, the plan and the whole document of a plan.json, which a person may have written."""
    data = schema.read(path, "plan", "`sensitivity recommend` or `export` writes a plan.json")
    return data["by"], Plan.from_json(data["plan"]), data
