"""torchao: a config per weight, by name, in the JSON that torchao itself writes."""

from __future__ import annotations

from pathlib import Path

from sensitivity.formats.writing.checkpoint import save
from sensitivity.formats.writing.job import LOAD_WITH_SETTINGS, RUNTIME_QUANTIZES, Job, Written
from sensitivity.spec.plan import Scheme


def write(job: Job, folder: Path) -> Written:
    """Write FqnToConfig as torchao serializes it: an entry per weight, None for those at native precision."""
    # by parameter name: transformers would apply a module's name to its bias too, which torchao cannot quantize
    weights: dict[str, object] = {
        f"{module}.weight": _intx(scheme) for _, scheme, names in job.groups() for module in names
    }
    weights |= {f"{module}.weight": None for module in job.native()}
    quant_type = {
        "_type": "FqnToConfig",
        "_version": 1,
        "_data": {"fqn_to_config": weights, "module_fqn_to_config": {}},
    }
    settings = {
        "quant_method": "torchao", "quant_type": {"default": quant_type}, "modules_to_not_convert": job.native(),
    }  # fmt: skip
    save(folder, "quantization_config.json", settings)
    notes = (
        RUNTIME_QUANTIZES,
        "torchao stores codes of every width as int8: below 8 bits its files and memory do not shrink.",
    )
    return Written(load=LOAD_WITH_SETTINGS.format(kind="TorchAoConfig"), notes=notes)


def _intx(scheme: Scheme) -> dict[str, object]:
    """A scheme as torchao's IntxWeightOnlyConfig in JSON."""

    def record(kind: str, **data: object) -> dict[str, object]:
        return {"_type": kind, "_version": 1, "_data": data}

    def member(kind: str, name: str) -> dict[str, str]:
        return {"_type": kind, "_data": name}

    whole = scheme.group == "row"
    data = {
        "weight_dtype": member("torch.dtype", f"int{scheme.bits}"),
        "granularity": record("PerAxis", axis=0) if whole else record("PerGroup", group_size=scheme.group),
        "mapping_type": member("MappingType", "SYMMETRIC" if scheme.symmetric else "ASYMMETRIC"),
        "scale_dtype": None,
        "intx_packing_format": member("IntxPackingFormat", "UNPACKED_TO_INT8"),
        "intx_choose_qparams_algorithm": member("IntxChooseQParamsAlgorithm", "AFFINE"),
    }
    return {"_type": "IntxWeightOnlyConfig", "_version": 2, "_data": data}
