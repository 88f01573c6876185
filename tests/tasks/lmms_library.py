"""lmms-eval's own run of tasks on model folders, by its own model class; writes answers and scores as JSON.

python lmms_library.py TASKS MODEL..., where TASKS holds a YAML file for each task.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")


def run(model: str, tasks: Path) -> dict[str, Any]:
    from lmms_eval import evaluator
    from lmms_eval.tasks import TaskManager

    evaluator._enable_reentrant_filelocks = lambda: None  # it looks into filelock, whose newer versions differ
    names = sorted(file.stem for file in tasks.glob("*.yaml"))
    found = evaluator.simple_evaluate(
        model="llava_hf",
        model_args=f"pretrained={model},device=cpu,device_map=cpu,dtype=float32",
        tasks=names,
        task_manager=TaskManager(include_defaults=False, include_path=str(tasks)),
        batch_size=1,
        log_samples=True,
        bootstrap_iters=0,
    )
    return {name: {"samples": found["samples"][name], "results": found["results"][name]} for name in names}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    (folder / "results.json").write_text(json.dumps([run(model, folder) for model in sys.argv[2:]], default=str))
