"""The plan itself as a format: a folder with plan.json, from which every other format can be written."""

from __future__ import annotations

from pathlib import Path

from sensitivity.formats.writing.job import Job, Written
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan_file import read, write_file


def write(job: Job, folder: Path) -> Written:
    """Write plan.json."""
    write_file(job.parts, job.plan, job.facts, folder / "plan.json")
    return Written(load="sensitivity export FOLDER/plan.json --format compressed-tensors --out DIR\n")


def why_foreign(out: Path) -> str:
    """Why a path is not a plan that we wrote; an empty string if it is one."""
    if out.is_dir():
        return "it is a folder, not a file"
    try:
        read(out)
    except UserError:
        return "it is not a plan that `sensitivity` wrote"
    return ""
