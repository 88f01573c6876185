"""mlx: the `quantization` entry of a converted model, with an entry per module."""

from __future__ import annotations

from pathlib import Path

from sensitivity.formats.writing.checkpoint import save
from sensitivity.formats.writing.job import RUNTIME_QUANTIZES, Job, Written
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Scheme


def write(job: Job, folder: Path) -> Written:
    """Write the `quantization` entry of config.json: defaults, and an entry per module (False: not quantized)."""
    keys = {tensor.parameter: tensor.key.removesuffix(".weight") for tensor in job.source.tensors}
    modules: dict[str, object] = {}
    for component in job.parts.components:
        scheme = job.plan[component.name]
        for weight in component.weights:
            modules[keys[weight.name]] = _affine(scheme) if scheme is not None else False
    schemes = [scheme for _, scheme, _ in job.groups()]
    if not schemes:
        raise UserError("the plan quantizes nothing, so there is nothing to configure; use --format plan")
    # mlx-lm skips a module if the top-level group size does not divide its columns, whatever the module's own group
    # size is; so the smallest group size goes to the top level
    entry = {**_affine(min(schemes, key=lambda scheme: int(scheme.group))), **modules}
    save(folder, "quantization.json", {"quantization": entry, "quantization_config": entry})
    load = (
        "import json\nfrom mlx_vlm import convert\n\n"
        'plan = json.load(open("quantization.json"))["quantization"]\n'
        'convert(MODEL, OUT, quantize=True, q_group_size=plan["group_size"], q_bits=plan["bits"],\n'
        "        quant_predicate=lambda path, module: plan.get(path, False))\n"
    )
    notes = (
        RUNTIME_QUANTIZES,
        "Modules are named as in the base model's checkpoint; mlx-vlm renames the parts of some families.",
    )
    return Written(load=load, notes=notes)


def _affine(scheme: Scheme) -> dict[str, object]:
    return {"group_size": scheme.group, "bits": scheme.bits, "mode": "affine"}
