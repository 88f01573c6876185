"""The lines by which exports say how to load them, as they are typed: by a process that knows transformers alone."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import saved_vlms
import torch
from PIL import Image

from sensitivity.formats.table import write
from sensitivity.formats.writing.job import Job
from sensitivity.measure.generate.batches import prompt_text
from sensitivity.measure.install.plan_in_model import quantized
from sensitivity.models.discovery import inspect
from sensitivity.models.loading import load
from sensitivity.models.vlm import VLM
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.plan import NOT_ROUNDED, Plan, Scheme
from sensitivity.tasks.examples.types import Example

FAMILIES = [name for name in saved_vlms.BUILDERS if name != "blip2_itm"]  # which generates nothing
TYPED = """
import json, re, sys
import torch, transformers
as_installed = transformers.PreTrainedModel._initialize_weights
for folder in json.load(sys.stdin):
    transformers.PreTrainedModel._initialize_weights = as_installed  # which the lines of some families change
    lines = re.search(r"## How to load it\\n+```python\\n(.*?)```", open(folder + "/README.md").read(), re.DOTALL)[1]
    try:
        exec(lines, space := {"FOLDER": folder})
    except (ImportError, ValueError) as error:  # the processors of some families want it for videos
        assert "torchvision" in str(error).lower()
        exec(re.sub("processor = .*", "", lines), space := {"FOLDER": folder})
    inputs = torch.load(folder + ".pt")
    with torch.inference_mode():
        found = space["model"].generate(**inputs, do_sample=False, max_new_tokens=4)
    json.dump(found.tolist(), open(folder + ".json", "w"))
assert "sensitivity" not in sys.modules
"""

FAST = ("llava", "blip2_opt", "qwen2_5_vl")
LOW, HIGH = Scheme("rtn", 3, "row", True), Scheme("rtn", 5, "row", True)
ROUNDED = Scheme("rtn", 8, "row", True, activations=8)


REST = tuple(name for name in FAMILIES if name not in FAST)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # PaliGemma's processor
@pytest.mark.parametrize("names", [FAST, pytest.param(REST, marks=pytest.mark.slow)], ids=["few", "others"])
def test_the_lines_of_the_card_generate(names: tuple[str, ...], tmp_path: Path) -> None:
    """Of plans with one width, which transformers unpacks on loading, and of mixed ones; families at once."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 40, 3), dtype=np.uint8))
    picture.save(tmp_path / "picture.png")
    asked, expected = [], []
    for name in names:
        folder = saved_vlms.save(name, tmp_path / name)
        vlm = load(str(folder), dtype="float32")
        parts = inspect(vlm, by="part")
        question = Example("0", "0", "question", tmp_path / "picture.png", "where is the 3?", ("top left",))
        prompt = prompt_text(vlm, question)
        plans = [Plan.uniform(parts, LOW), Plan.of(parts, {"vision": LOW, "language": HIGH})]
        if name == "llava":  # equal weights, in bytes where inputs are rounded and packed elsewhere
            plans.append(Plan.of(parts, {"vision": replace(ROUNDED, activations=NOT_ROUNDED), "language": ROUNDED}))
        for plan in plans:
            out = tmp_path / f"{name}.{len(asked)}"
            write(Job(str(folder), parts, plan, dtype=torch.float32), out, "compressed-tensors")
            config = json.loads((out / "config.json").read_bytes())["quantization_config"]
            mixed = plan != Plan.uniform(parts, LOW)
            assert config.get("dequantize", False) is not mixed
            inputs = dict(vlm.processor(images=[picture], text=[prompt], return_tensors="pt"))
            torch.save(inputs, f"{out}.pt")
            asked.append(str(out))
            expected.append(_tokens(vlm, parts, plan, inputs, in_16_bits=not mixed))
    done = subprocess.run([sys.executable, "-c", TYPED], input=json.dumps(asked), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1500:]
    assert [json.loads(Path(f"{file}.json").read_bytes()) for file in asked] == expected


def _tokens(
    vlm: VLM, parts: ComponentMap, plan: Plan, inputs: dict[str, torch.Tensor], in_16_bits: bool
) -> list[list[int]]:
    """What the model generates with the plan in it; transformers multiplies codes and scales in 16 bits."""
    with quantized(vlm.model, parts, plan), torch.inference_mode():
        if in_16_bits:
            for weight in parts.weights:
                values = vlm.model.get_parameter(weight.name)
                values.data = values.data.half().float()
        found: list[list[int]] = vlm.model.generate(**inputs, do_sample=False, max_new_tokens=4).tolist()
        return found
