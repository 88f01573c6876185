"""Loads what the flags name: the model, its components and the tasks."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from sensitivity.cli.processes.collector import look_as_usual

if TYPE_CHECKING:
    from sensitivity.models.vlm import VLM
    from sensitivity.spec.components import ComponentMap
    from sensitivity.tasks.examples.types import Task

EMBEDDING_NOTE = "rows of the embedding are looked up, not multiplied: methods that calibrate round them to nearest"


def loaded(args: argparse.Namespace) -> tuple[VLM, ComponentMap, list[Task]]:
    """Load the model (for a forecast, without weights), its components and the tasks, and print notes on them."""
    from sensitivity.api.sweeping import dtype_for
    from sensitivity.formats.table import CHECKS
    from sensitivity.models.config_only import without_weights
    from sensitivity.models.discovery import inspect
    from sensitivity.models.loading import load
    from sensitivity.study.table import check_task_names
    from sensitivity.tasks.table import check_distinct, task

    look_as_usual()
    if args.dtype is None:
        args.dtype, why = dtype_for(args.model, args.device, args.out)
        if why:
            print(f"note: {why}", file=sys.stderr)
    vlm = without_weights(args.model) if args.dry_run else load(args.model, device=args.device, dtype=args.dtype)
    if vlm.quantized_before:
        print(f"note: {vlm.quantized_before}", file=sys.stderr)
    if args.runtime in CHECKS:  # raises an error before calibration
        CHECKS[args.runtime](vlm)
    parts = inspect(vlm, by=args.by, include=args.include)
    if any(weight.is_embedding for weight in parts.weights):
        print(EMBEDDING_NOTE, file=sys.stderr)
    tasks = [task(name, n=args.n, seed=args.seed, whole=args.whole_answers) for name in args.task]
    check_distinct(tasks, args.task)
    check_task_names([one.name for one in tasks], parts)  # before calibration, which takes long
    for one in tasks:
        for note in one.notes:
            print(f"{one.name}: {note}", file=sys.stderr)
    return vlm, parts, tasks
