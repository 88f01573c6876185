"""llama.cpp: a tensor type per weight, in one file for the language model and one for vision."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from sensitivity.formats.writing.job import RUNTIME_QUANTIZES, Job, Written
from sensitivity.spec.components import Weight
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Scheme

KQUANTS = {2: "q2_k", 3: "q3_k", 4: "q4_k", 5: "q5_k", 6: "q6_k", 8: "q8_0"}  # super-blocks of 256 columns
BLOCKS = {4: "q4_0", 5: "q5_0", 8: "q8_0"}  # types with blocks of 32 columns, for rows that 256 does not divide
FILES = {"language": "language.tensor-types.txt", "vision": "mmproj.tensor-types.txt"}
# not commands: they could not be run in a test, and the converter refuses some towers (see the notes)
LOAD = """\
language.tensor-types.txt   for llama-quantize --tensor-type-file, with the GGUF file of the language model
mmproj.tensor-types.txt     the same, with the GGUF file of the vision tower and the projector
"""


def write(job: Job, folder: Path) -> Written:
    """Write the files for --tensor-type-file, with tensors named as llama.cpp's converter names them (package gguf).

    As in llama.cpp, the connector is in the same file as the vision tower.
    """
    names = tensor_names(job)
    lines: dict[str, list[str]] = {file: [] for file in FILES.values()}
    for component in job.parts.components:
        for weight in component.weights:
            file = FILES["language" if weight.part == "language" else "vision"]
            gguf_type = tensor_type(job.plan[component.name], weight)
            lines[file].append(f"^{re.escape(names[weight.name])}\\.weight$={gguf_type}")
    for file, content in lines.items():
        (folder / file).write_text("\n".join(dict.fromkeys(content)) + "\n", encoding="utf-8")
    notes = (
        RUNTIME_QUANTIZES,
        "llama.cpp's types have scales and groups of their own: only the widths are the plan's.",
        "Both GGUF files are made of the base model by llama.cpp's converter, which does not know the CLIP towers of "
        "models that transformers 5 saved (`Unsupported model type: clip_vision_model`).",
    )
    return Written(load=LOAD, notes=notes)


def tensor_type(scheme: Scheme | None, weight: Weight) -> str:
    """The tensor type for a scheme; k-quants need rows of a multiple of 256 columns."""
    if scheme is None:
        return "f16"
    return KQUANTS[scheme.bits] if weight.cols % 256 == 0 else BLOCKS[scheme.bits]


def tensor_names(job: Job) -> dict[str, str]:
    """The GGUF name of every weight by its parameter name.

    Raises an error for a model that the converter does not know.
    """
    try:
        from gguf.constants import MODEL_ARCH
        from gguf.tensor_mapping import get_tensor_name_map
    except ImportError:
        raise UserError("the format llama.cpp needs the package gguf for its names; pip install gguf") from None
    blocks = {
        part: max((w.blocks for w in job.parts.weights if w.part == part), default=0) for part in ("vision", "language")
    }
    # the map of names depends on the architecture; LLaMA's stands in for one that gguf does not know
    text = job.source.config.get("text_config")
    model_type = (text if isinstance(text, Mapping) else job.source.config).get("model_type", "")
    architecture = getattr(MODEL_ARCH, str(model_type).upper(), MODEL_ARCH.LLAMA)
    maps = {
        "language": get_tensor_name_map(architecture, blocks["language"]).mapping,
        "vision": get_tensor_name_map(MODEL_ARCH.MMPROJ, blocks["vision"]).mapping,
    }
    keys = {tensor.parameter: tensor.key for tensor in job.source.tensors}
    gguf_names, unknown = {}, []
    for weight in job.parts.weights:
        known = maps["language" if weight.part == "language" else "vision"]
        name = _name(weight.module, known) or _name(keys[weight.name].removesuffix(".weight"), known)
        if name is None:
            unknown.append(weight.module)
        else:
            gguf_names[weight.name] = name
    if unknown:
        more = f" and {len(unknown) - 4} more" if len(unknown) > 4 else ""
        raise UserError(
            f"llama.cpp's converter has no names for {', '.join(unknown[:4])}{more}: it does not know this model; use "
            "--format compressed-tensors"
        )
    return gguf_names


def _name(module: str, known: Mapping[str, tuple[object, str]]) -> str | None:
    """The GGUF name of a module, found by the longest suffix of its path that matches only one tensor.

    Prefixes differ between model classes, so whole paths rarely match. Suffixes that equal a key of gguf's table are
    tried first, then suffixes with which a key ends.
    """
    words = module.split(".")
    ends = [".".join(words[start:]) for start in range(len(words))]
    # without the tensors of audio towers (a., mm.a.), which would make other names ambiguous
    names_by_key = {key: value[1] for key, value in known.items() if not value[1].startswith(("a.", "mm.a."))}
    for whole in (True, False):
        for end in ends:
            names = {
                name for key, name in names_by_key.items() if key == end or (not whole and key.endswith("." + end))
            }
            if len(names) == 1:
                return names.pop()
            if names:
                break  # a shorter suffix would match even more names
    return None
