"""Write exports and load each with the library that it is for, in an environment that has that library.

python experiments/parity/exports.py make /tmp/proofs            with sensitivity installed
OTHER/bin/python experiments/parity/exports.py read /tmp/proofs  with torch 2.13, transformers 5.23, gptqmodel 7.6.0,
    auto-round 0.16.1, torchao 0.18.0, bitsandbytes 0.50.2, nvidia-modelopt 0.47.0; or llmcompressor 0.14
    alone; or mlx-lm 0.32 and mlx[cpu] alone

The second prints one line per format; reports/export.md holds them.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
SCENES = ROOT / "sensitivity" / "models" / "embedded" / "scenes-llava"


def make(space: Path) -> None:
    """Export the embedded model in every format, and in gptq a small model of a family that GPTQModel supports."""
    from sensitivity.formats.table import write
    from sensitivity.formats.writing.job import Job
    from sensitivity.models.discovery import inspect
    from sensitivity.spec.plan import Plan, Scheme

    def rtn(bits: int, group: int | str = "row", symmetric: bool = True, method: str = "rtn", **more: Any) -> Scheme:
        return Scheme(method, bits, group, symmetric, tuple(more.items()))

    plans: list[tuple[str, str, dict[str, Scheme | None], Scheme | None]] = [
        ("bnb4", "bnb", {"vision": None, "connector": None}, rtn(4, 64, True, "nf4", double=False)),
        ("bnb8", "bnb", {"language.front": None}, rtn(8, "row", True, "llm-int8", threshold=6.0)),
        ("torchao", "torchao", {"vision": rtn(8), "connector": None, "language.front": rtn(3, 64, False)}, rtn(4, 32)),
        ("modelopt", "modelopt", {"vision": rtn(8), "connector": None}, rtn(4, 64)),
        ("awq", "awq", {"connector": None}, rtn(4, 32, False)),
        (
            "auto-round",
            "auto-round",
            {"vision": rtn(8, 32), "connector": None, "language.front": rtn(2, 64)},
            rtn(4, 32),
        ),
        (
            "mlx",
            "mlx",
            {"vision": rtn(8, 64, False), "connector": None, "language.front": rtn(3, 32, False)},
            rtn(4, 32, False),
        ),
        (
            "llm-compressor",
            "llm-compressor",
            {"vision": rtn(8), "connector": None, "language.front": rtn(3, 64, False, "gptq")},
            rtn(4, 32),
        ),
    ]
    model = "embedded:scenes-llava"
    parts = inspect(model)
    for name, format, choice, default in plans:
        plan = Plan.of(parts, choice, default)
        job = Job(model, parts, plan, dtype=torch.float32)
        write(job, space / name, format, force=True)
        if format in ("awq", "auto-round"):
            write(job, space / f"{name}-values", "fake", force=True)
    folded(space)
    known = small_known(space / "known")
    parts = inspect(str(known))
    for name, front in (("gptq", rtn(8)), ("gptq-planes", rtn(6, 32, False))):
        choice = {"vision": None, "connector": None, "language.front": front, "language.middle": rtn(3, 32)}
        job = Job(str(known), parts, Plan.of(parts, choice, rtn(4, 32)), dtype=torch.float16)
        write(job, space / name, "gptq", force=True)
        write(job, space / f"{name}-values", "fake", force=True)


def folded(space: Path) -> None:
    """Scales of AWQ's own search, taken over by the layers before, beside the weights as they are measured."""
    from sensitivity.formats.table import write
    from sensitivity.formats.writing.calibrated_codes import codes
    from sensitivity.formats.writing.job import Job
    from sensitivity.measure.calibrate.calibration import calibration_statistics
    from sensitivity.models.discovery import inspect
    from sensitivity.models.loading import load
    from sensitivity.quantize.scheme_settings import scheme
    from sensitivity.spec.plan import Plan

    vlm = load("embedded:scenes-llava")
    parts = inspect(vlm)
    statistics = calibration_statistics(vlm, parts, ["vqa"], n=16)
    chosen = scheme("awq", 4, group=32, scales="folded", calibration=statistics.facts)
    plan = Plan.of(parts, {"connector": None}, chosen)
    for name, format in (("awq-folded", "awq"), ("awq-folded-values", "fake")):
        with codes(vlm, parts, plan, statistics, folding=format == "awq") as found:
            job = Job(vlm, parts, plan, dtype=torch.float32, codes=found.codes, changed=found.changed)
            write(job, space / name, format, force=True)


def small_known(folder: Path) -> Path:
    import shutil

    import transformers as T

    torch.manual_seed(0)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}
    text = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 5, "head_dim": 32}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, **ids}
    vision = {"depth": 3, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "intermediate_size": 64}
    config = T.Qwen2_5_VLConfig(text_config={**text, "rope_parameters": rope}, vision_config=vision)
    T.Qwen2_5_VLForConditionalGeneration(config).half().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SCENES / name, folder)
    sizes = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2, "min_pixels": 784, "max_pixels": 78400}
    processor = {"image_processor_type": "Qwen2VLImageProcessor", **sizes}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def read(space: Path) -> None:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    try:
        import llmcompressor  # noqa: F401

        checks: dict[str, Callable[[], object]] = {"llm-compressor": lambda: recipe(space / "llm-compressor")}
    except ImportError:
        try:
            import mlx_lm  # noqa: F401
        except ImportError:
            checks = torch_checks(space)
        else:
            checks = {"mlx": lambda: mlx(space / "mlx")}
    for name, check in checks.items():
        try:
            print(f"== {name}: {check()}")
        except Exception as error:
            print(f"== {name}: FAILED, {type(error).__name__}: {str(error)[:300]}")


def torch_checks(space: Path) -> dict[str, Callable[[], object]]:
    return {
        "bnb4": lambda: settings(space / "bnb4", "BitsAndBytesConfig"),
        "bnb8": lambda: settings(space / "bnb8", "BitsAndBytesConfig"),
        "torchao": lambda: settings(space / "torchao", "TorchAoConfig"),
        "modelopt": lambda: modelopt(space / "modelopt"),
        "awq": lambda: logits(space / "awq"),
        "awq-folded": lambda: logits(space / "awq-folded"),
        "auto-round": lambda: logits(space / "auto-round"),
        "gptq": lambda: gptq(space / "gptq"),
        "gptq-planes": lambda: gptq(space / "gptq-planes"),
    }


def kinds(model: Any) -> dict[str, int]:
    """How many linear layers of each class and bit width every part has."""
    count: Counter[str] = Counter()
    for path, module in model.named_modules():
        if "linear" in type(module).__name__.lower() or hasattr(module, "qweight"):
            part = path.split(".")[1] if path.startswith("model.") else path
            weight = getattr(module, "weight", None)
            bits = getattr(module, "bits", None) or str(getattr(weight, "target_dtype", "")).removeprefix("torch.")
            count[" ".join(filter(None, (part, type(module).__name__, str(bits or ""))))] += 1
    return dict(count)


def settings(folder: Path, name: str) -> object:
    import transformers

    config = getattr(transformers, name).from_dict(json.loads((folder / "quantization_config.json").read_bytes()))
    return kinds(transformers.AutoModelForImageTextToText.from_pretrained(SCENES, quantization_config=config))


def modelopt(folder: Path) -> object:
    from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format

    found = convert_hf_quant_config_format(json.loads((folder / "hf_quant_config.json").read_bytes()))
    return [(group["weights"], len(group["targets"])) for group in found["config_groups"].values()]


@torch.inference_mode()
def logits(folder: Path) -> object:
    """Layers by class, and how far the logits are from those of the dequantized weights."""
    from transformers import AutoModelForImageTextToText

    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 160, (1, 48), generator=draw)
    ids[0, :36] = 4
    pixels = torch.randn(1, 3, 48, 48, generator=draw)
    found = []
    for one in (folder, folder.with_name(f"{folder.name}-values")):
        model = AutoModelForImageTextToText.from_pretrained(one, dtype=torch.float32).eval()
        found.append((kinds(model), model(input_ids=ids, pixel_values=pixels).logits))
    (layers, ours), (_, values) = found
    return f"{layers}; logits differ by {(ours - values).abs().max():.3f} of {values.abs().max():.1f}"


def gptq(folder: Path) -> object:
    """Layers by class, and how far the weights that GPTQModel unpacks are from ours."""
    from gptqmodel import BACKEND, GPTQModel
    from transformers import Qwen2_5_VLForConditionalGeneration

    values = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder.with_name(f"{folder.name}-values"))
    own = dict(values.named_parameters())
    model = GPTQModel.load(str(folder), device="cpu", backend=BACKEND.TORCH, dtype=torch.float16).model
    packed = {path: module for path, module in model.named_modules() if hasattr(module, "qweight")}
    far = max(float((m.dequantize_weight().T - own[f"{path}.weight"]).abs().max()) for path, m in packed.items())
    return f"{kinds(model)}; weights differ by {far}"


def recipe(folder: Path) -> object:
    from llmcompressor.recipe import Recipe

    found = Recipe.create_instance(str(folder / "recipe.yaml"))
    return {
        type(modifier).__name__: {
            name: (group.weights.num_bits, str(group.weights.strategy), len(group.targets))
            for name, group in modifier.config_groups.items()
        }
        for modifier in found.modifiers
    }


def mlx(folder: Path) -> object:
    """Layers by class after mlx-lm converts the model; our entry must equal the one that the conversion writes."""
    import mlx.core as mx
    from mlx import nn
    from mlx_lm.utils import quantize_model

    entry = json.loads((folder / "quantization.json").read_bytes())["quantization"]
    model = nn.Module()
    for key, value in mx.load(str(SCENES / "model.safetensors")).items():
        path, leaf = key.rpartition(".")[::2]
        if leaf == "weight" and value.ndim == 2:
            place(model, path.split("."), nn.Linear(value.shape[1], value.shape[0], bias=False), nn.Module)
    converted, written = quantize_model(
        model, {}, entry["group_size"], entry["bits"], quant_predicate=lambda path, module: entry.get(path, False)
    )
    found = {p: m for p, m in converted.named_modules() if hasattr(m, "bits")}
    asked = {path: value for path, value in entry.items() if isinstance(value, dict)}
    assert {path: (m.group_size, m.bits, m.mode) for path, m in found.items()} == {
        path: (value["group_size"], value["bits"], value["mode"]) for path, value in asked.items()
    }
    assert {path: value for path, value in written["quantization"].items() if isinstance(value, dict)} == asked
    count = Counter(f"{p.split('.')[0]} {type(m).__name__} {m.bits} in {m.group_size}" for p, m in found.items())
    return f"{dict(count)}; every layer as in the entry, and in the entry that mlx-lm writes"


def place(module: Any, path: list[str], leaf: Any, new: Callable[[], Any]) -> None:
    """Put a layer into a tree of modules; numbers in the path are indices into lists."""
    name, rest = path[0], path[1:]
    if not rest:
        module[name] = leaf
        return
    if rest[0].isdigit():
        layers = module.setdefault(name, [])
        layers += [new() for _ in range(int(rest[0]) + 1 - len(layers))]
        place(layers[int(rest[0])], rest[1:], leaf, new)
    else:
        place(module.setdefault(name, new()), rest, leaf, new)


if __name__ == "__main__":
    {"make": make, "read": read}[sys.argv[1]](Path(sys.argv[2]))
