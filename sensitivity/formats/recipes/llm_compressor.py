"""llm-compressor: a recipe with one modifier per method, which lists the components that use it."""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict

from sensitivity.formats.checkpoints.compressed_tensors import quantization_args
from sensitivity.formats.writing.checkpoint import save
from sensitivity.formats.writing.job import RUNTIME_QUANTIZES, Job, Written
from sensitivity.spec.errors import UserError

MODIFIERS = {
    "rtn": "QuantizationModifier",
    "clip": "QuantizationModifier",
    "gptq": "GPTQModifier",
    "awq": "AWQModifier",
}


class Modifier(TypedDict):
    """One modifier of a recipe: the settings of each group of modules, and the modules that it does not quantize."""

    config_groups: dict[str, object]
    ignore: list[str]


def write(job: Job, folder: Path) -> Written:
    """Write recipe.yaml as JSON, which is valid YAML."""
    stages: dict[str, Modifier] = {}
    for name, scheme, modules in job.groups():
        modifier = stages.setdefault(MODIFIERS[scheme.method], {"config_groups": {}, "ignore": job.native()})
        modifier["config_groups"][name] = {"targets": modules, "weights": quantization_args(scheme)}
    if not stages:
        raise UserError("the plan quantizes nothing, so there is no recipe to write; use --format plan")
    save(folder, "recipe.yaml", {"quant_stage": {"quant_modifiers": stages}})
    load = 'from llmcompressor import oneshot\n\noneshot(model=MODEL, recipe="recipe.yaml", output_dir=OUT)\n'
    return Written(load=load, notes=(RUNTIME_QUANTIZES,))
