"""AWQ by llm-compressor on a LLaVA folder; runs in an environment that has llm-compressor.

python with_llm_compressor.py ROWS.safetensors OUT.safetensors MODEL-FOLDER BITS GROUP
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

torch.Tensor.pin_memory = lambda self, *_: self  # type: ignore[method-assign]  # 0.14 pins memory without a GPU too
GROUPS = {  # norm -> layers that read it, inside a block
    r"re:.*language_model.*input_layernorm$": [r"re:.*language_model.*(q|k|v)_proj$"],
    r"re:.*language_model.*post_attention_layernorm$": [r"re:.*language_model.*(gate|up)_proj$"],
    r"re:.*vision_tower.*layer_norm1$": [r"re:.*vision_tower.*(q|k|v)_proj$"],
    r"re:.*vision_tower.*layer_norm2$": [r"re:.*vision_tower.*fc1$"],
}


def norms(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: m.weight.detach().clone() for name, m in model.named_modules() if "norm" in name.rpartition(".")[2]}


def main(source: str, target: str, folder: str, bits: str, group: str) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    rows: list[dict] = []
    with safe_open(source, "pt") as stored:
        count = json.loads(stored.metadata()["count"])
        names = json.loads(stored.metadata()["names"])
        rows = [{name: stored.get_tensor(f"{i}|{name}") for name in names} for i in range(count)]
    data = Dataset.from_list([{name: t.tolist() for name, t in row.items()} for row in rows])
    data.set_format("torch")
    before = norms(model)
    config = {
        "targets": ["Linear"],
        "weights": {
            "num_bits": int(bits), "type": "int", "symmetric": False, "strategy": "group", "group_size": int(group),
        },
    }  # fmt: skip
    began = time.perf_counter()
    oneshot(
        model=model,
        processor=AutoProcessor.from_pretrained(folder),
        dataset=data,
        recipe=[
            AWQModifier(mappings=[AWQMapping(k, v) for k, v in GROUPS.items()], duo_scaling=False),
            QuantizationModifier(
                config_groups={"all": config}, ignore=["re:.*lm_head", "re:.*multi_modal_projector.*"]
            ),
        ],
        num_calibration_samples=count,
        max_seq_length=256,
        pipeline="basic",
        data_collator=lambda batch: {name: batch[0][name].unsqueeze(0) for name in batch[0]},
    )
    seconds = time.perf_counter() - began
    after, results = norms(model), {}
    modules = dict(model.named_modules())
    for name, module in modules.items():
        leaf = name.rpartition(".")[2]
        norm = {
            "q_proj": ("input_layernorm", "layer_norm1"), "k_proj": ("input_layernorm", "layer_norm1"),
            "v_proj": ("input_layernorm", "layer_norm1"), "gate_proj": ("post_attention_layernorm",),
            "up_proj": ("post_attention_layernorm",), "fc1": ("layer_norm2",),
        }.get(leaf)  # fmt: skip
        if norm is None or not hasattr(module, "weight_scale"):
            continue
        block = name.split(".self_attn" if "self_attn" in name else ".mlp")[0]
        path = next(f"{block}.{n}" for n in norm if f"{block}.{n}" in modules)
        from compressed_tensors.quantization.lifecycle.forward import fake_quantize

        args = module.quantization_scheme.weights
        rounded = fake_quantize(module.weight, module.weight_scale, module.weight_zero_point, args)
        results[f"{name}.weight"] = (rounded * (after[path] / before[path])).float().contiguous()
    facts = {"llmcompressor": version("llmcompressor"), "transformers": version("transformers"), "seconds": seconds}
    save_file(results, target, metadata={"facts": json.dumps(facts)})


if __name__ == "__main__":
    main(*sys.argv[1:])
