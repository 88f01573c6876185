"""The plan as our own canonical JSON: which weights, which scheme, what it weighs, where it comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sensitivity.components import ComponentMap
from sensitivity.errors import UserError
from sensitivity.export.job import Job, Written
from sensitivity.files import write_whole
from sensitivity.plan import Plan, size

VERSION = 1
SCHEMA = Path(__file__).parent / "plan.schema.json"


def document(parts: ComponentMap, plan: Plan, facts: Mapping[str, Any]) -> dict[str, Any]:
    known = {
        "version": VERSION,
        "model": parts.model,
        "by": parts.by,
        "key": plan.key,
        "plan": plan.to_json(),
        "size": size(parts, plan).to_json(),
        "weights": {component.name: [weight.name for weight in component.weights] for component in parts.components},
    }
    return {**known, **facts, **known}  # facts may come from another plan.json: what is known of this one stands


def write(job: Job, folder: Path) -> Written:
    write_file(job.parts, job.plan, job.facts, folder / "plan.json")
    return Written(load="sensitivity export FOLDER/plan.json --format compressed-tensors --out DIR\n")


def write_file(parts: ComponentMap, plan: Plan, facts: Mapping[str, Any], target: Path) -> Path:
    """One JSON file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, (json.dumps(document(parts, plan, facts), indent=2, default=str) + "\n").encode())
    return target


def why_foreign(out: Path) -> str:
    """Why something is not a plan that we wrote; an empty string where it is one."""
    if out.is_dir():
        return "it is a folder, and a file is meant"
    try:
        read(out)
    except UserError:
        return "it is no plan that `sensitivity` wrote"
    return ""


def read(path: Path) -> tuple[str, Plan, dict[str, Any]]:
    """Granularity, plan and the whole document of a plan.json."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return data["by"], Plan.from_json(data["plan"]), data
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a plan that `sensitivity recommend` or `export` wrote") from error
