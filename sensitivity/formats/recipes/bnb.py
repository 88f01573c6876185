"""bnb: the settings of bitsandbytes, with one scheme of 4 or 8 bits and a list of modules to skip."""

from __future__ import annotations

import re
from pathlib import Path

from sensitivity.formats.writing.checkpoint import save
from sensitivity.formats.writing.job import LOAD_WITH_SETTINGS, RUNTIME_QUANTIZES, Job, Written
from sensitivity.spec.errors import UserError


def write(job: Job, folder: Path) -> Written:
    """Write the settings of bitsandbytes; modules to skip are listed by full path, so that each of them matches."""
    schemes = {scheme for _, scheme, _ in job.groups()}
    if not schemes:
        raise UserError("the plan quantizes nothing, so there is nothing to configure; use --format plan")
    (scheme,) = schemes
    skip = job.native()
    # transformers matches skipped names by prefix and suffix, which may catch a module that the plan quantizes
    if lost := [module for _, _, modules in job.groups() for module in modules if _skipped(module, skip)]:
        raise UserError(
            f"bitsandbytes skips modules by a part of their name, and would skip {lost[0]} too; use --format fake"
        )
    settings: dict[str, object] = {"quant_method": "bitsandbytes", "llm_int8_skip_modules": skip}
    if scheme.bits == 8:
        settings |= {"load_in_8bit": True, "llm_int8_threshold": scheme.get("threshold", 6.0)}
    else:
        double = bool(scheme.get("double", False))
        settings |= {"load_in_4bit": True, "bnb_4bit_quant_type": scheme.method, "bnb_4bit_use_double_quant": double}
    save(folder, "quantization_config.json", settings)
    return Written(load=LOAD_WITH_SETTINGS.format(kind="BitsAndBytesConfig"), notes=(RUNTIME_QUANTIZES,))


def _skipped(module: str, skip: list[str]) -> bool:
    """Whether transformers would skip a module: it compares the start and the end of the path."""
    return any(re.match(rf"(?:{re.escape(name)})(?=\.|$)", module) or module.endswith(name) for name in skip)
