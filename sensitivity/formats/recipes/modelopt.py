"""modelopt: hf_quant_config.json, with an algorithm for every quantized module."""

from __future__ import annotations

from pathlib import Path

from sensitivity.formats.writing.checkpoint import save
from sensitivity.formats.writing.job import RUNTIME_QUANTIZES, Job, Written
from sensitivity.spec.plan import Scheme


def write(job: Job, folder: Path) -> Written:
    """Write hf_quant_config.json."""
    layers = {module: _algorithm(scheme) for _, scheme, modules in job.groups() for module in modules}
    quantization = {
        "quant_algo": "MIXED_PRECISION",
        "kv_cache_quant_algo": None,
        "exclude_modules": job.native(),
        "quantized_layers": layers,
    }
    save(
        folder,
        "hf_quant_config.json",
        {"producer": {"name": "modelopt", "version": "0.47.0"}, "quantization": quantization},
    )
    load = (
        "from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format\n\n"
        "# the settings as ModelOpt, and engines that read its checkpoints, understand them\n"
        'settings = convert_hf_quant_config_format(json.load(open("hf_quant_config.json")))\n'
    )
    return Written(load="import json\n" + load, notes=(RUNTIME_QUANTIZES,))


def _algorithm(scheme: Scheme) -> dict[str, object]:
    if scheme.bits == 8:
        return {"quant_algo": "W8A16"}
    return {"quant_algo": "W4A16_AWQ", "group_size": scheme.group, "has_zero_point": False, "pre_quant_scale": True}
