"""The plan itself as a format: a folder with plan.json, from which every other format can be written."""

from __future__ import annotations

from pathlib import Path

from sensitivity.formats.writing.job import Job, Written
from sensitivity.spec.plan_file import write_file


def write(job: Job, folder: Path) -> Written:
    """Write plan.json."""
    write_file(job.parts, job.plan, job.facts, folder / "plan.json")
    return Written(load="sensitivity export FOLDER/plan.json --format compressed-tensors --out DIR\n")
