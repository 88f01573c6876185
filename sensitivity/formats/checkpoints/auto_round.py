"""auto-round: a checkpoint with bits per module in `extra_config`, and the `layer_config` of its API."""

from __future__ import annotations

import json
from pathlib import Path

from sensitivity.formats.checkpoints.fake import LOAD
from sensitivity.formats.checkpoints.gptq import packed_layout
from sensitivity.formats.writing.checkpoint import bytes_beside_tensors, write_checkpoint
from sensitivity.formats.writing.job import Job, Written
from sensitivity.spec.components import VOCABULARY
from sensitivity.spec.plan import Scheme

API = """\
# from transformers, with auto-round installed:
{load}
# or to tune the rounding with AutoRound itself:
import json
from auto_round import AutoRound

AutoRound(MODEL, layer_config=json.load(open("layer_config.json"))).quantize_and_save(OUT, format="auto_round")
"""


def write(job: Job, folder: Path) -> Written:
    """Write a checkpoint in GPTQ's tensor layout, which AutoRound calls auto_round:auto_gptq."""
    weight, hashes = write_checkpoint(job, folder, packed_layout("gptq"), {"quantization_config": config(job)})
    api = json.dumps(layer_config(job), indent=1) + "\n"
    (folder / "layer_config.json").write_text(api, encoding="utf-8")
    notes = ["This layout also stores a zero point for every group, and four bytes per column that name its group."]
    load = API.format(load=LOAD.format(dtype=job.dtype_name).rstrip())
    return Written(load=load, bytes=weight, hashes=hashes, headers=bytes_beside_tensors(folder, weight), notes=notes)


def config(job: Job) -> dict[str, object]:
    """The settings: the most common scheme as the default, and an entry for each module that differs from it."""
    common = job.most_common_scheme()
    extra = {module: {"bits": 16, "data_type": "float"} for module in job.native()}
    for _, scheme, modules in job.groups():
        if scheme != common:
            extra |= {module: quantization_settings(scheme) for module in modules}
    return {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
        **quantization_settings(common),
        "autoround_version": "0.16.1",
        "block_name_to_quantize": ",".join(block_paths(job)),
        "extra_config": extra,
    }


def layer_config(job: Job) -> dict[str, object]:
    """An entry for every module, in the form that AutoRound's API takes."""
    native: dict[str, object] = {module: {"bits": 16, "data_type": "float"} for module in job.native()}
    return native | {module: quantization_settings(scheme) for _, scheme, modules in job.groups() for module in modules}


def quantization_settings(scheme: Scheme) -> dict[str, object]:
    """A scheme as AutoRound's settings; a group size of -1 means the whole row."""
    group = -1 if scheme.group == "row" else int(scheme.group)
    return {"bits": scheme.bits, "group_size": group, "sym": scheme.symmetric, "data_type": "int"}


def block_paths(job: Job) -> list[str]:
    """The path of each list of blocks (without a block's number), and of each module outside any block."""
    layers = [w for w in job.parts.weights if w.kind not in VOCABULARY]
    paths = [w.module if w.block is None else _before(w.module, w.block) for w in layers]
    return list(dict.fromkeys(paths))


def _before(module: str, block: int) -> str:
    words = module.split(".")
    return ".".join(words[: words.index(str(block))]) if str(block) in words else module
