"""Times of layers in a runtime by which plans were chosen: stored with the study, for its report on any machine."""

from __future__ import annotations

import json
from pathlib import Path

from sensitivity.spec import schema
from sensitivity.spec.files import check_may_replace, write_atomically
from sensitivity.spec.runtimes.layer_times import LayerTimes
from sensitivity.study.storage import paths

REPAIR = "delete it, and the report says nothing of time and memory"


def save(study: Path, times: LayerTimes) -> Path:
    """Write the times beside a study's trials."""
    file = paths.layer_times_file(study)
    check_may_replace(file, lambda there: schema.why_foreign(there, "layer_times"))
    write_atomically(file, (json.dumps(times.to_json(), indent=1) + "\n").encode())
    return file


def read(study: Path) -> LayerTimes | None:
    """The times of a study; None where no plan was chosen by them."""
    file = paths.layer_times_file(study)
    return LayerTimes.from_json(schema.read(file, "layer_times", REPAIR)) if file.exists() else None
