"""Minutes and memory to calibrate and quantize a random model of LLaVA-1.5-7B's shape at several bit widths.

python -m experiments.benchmarks.seven_billion [--device cuda] [--shrink 8] [--examples 128] [--out REPORT.md]

It runs anywhere with --shrink; figures at the true shape want a large GPU, and none are recorded yet.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers as T

from sensitivity.measure.calibrate.calibration import GRAM_BYTES, gather_float
from sensitivity.measure.calibrate.statistics import Statistics
from sensitivity.measure.install.plan_in_model import prepare
from sensitivity.measure.memory.weight_codes import WeightCodes
from sensitivity.measure.passes.token_batches import PROMPT, VISION, TokenBatch
from sensitivity.models.discovery import inspect
from sensitivity.models.families import family_of
from sensitivity.models.loading import set_cudnn
from sensitivity.models.vlm import VLM
from sensitivity.quantize.layer.linears import input_of
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.spec.files import overwrite
from sensitivity.spec.plan import Plan

ROWS, WORDS, IMAGE = 4, 24, 32000  # examples of a batch, words of each, and the token that stands for the image


def llava(shrink: int, device: str, dtype: torch.dtype, image: int = IMAGE) -> VLM:
    """LLaVA with every width and depth divided by `shrink`; the number of tokens stays the same."""
    text = T.LlamaConfig(
        vocab_size=32064, hidden_size=4096 // shrink, intermediate_size=11008 // shrink, num_hidden_layers=32 // shrink,
        num_attention_heads=32, num_key_value_heads=32, head_dim=128 // shrink,
    )  # fmt: skip
    vision = T.CLIPVisionConfig(
        hidden_size=1024 // shrink, intermediate_size=4096 // shrink, num_hidden_layers=24 // shrink,
        num_attention_heads=16, image_size=336, patch_size=14,
    )  # fmt: skip
    usual = torch.get_default_dtype()
    set_cudnn()
    torch.manual_seed(0)
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            config = T.LlavaConfig(vision_config=vision, text_config=text, image_token_index=image)
            model = T.LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(usual)
    model = model.eval().requires_grad_(False)
    return VLM(f"LLaVA-1.5-7B / {shrink}", model, None, family_of(model), "random", 16)


def batches(vlm: VLM, examples: int, at_once: int = ROWS) -> Iterator[TokenBatch]:
    """Random images and tokens of the size of real examples."""
    for start in range(0, examples, at_once):
        rows = min(at_once, examples - start)
        g = torch.Generator().manual_seed(start)
        ids = torch.cat([torch.full((rows, 576), IMAGE), torch.randint(3, IMAGE, (rows, WORDS), generator=g)], 1)
        pixels = torch.randn(rows, 3, 336, 336, generator=g)
        inputs = {"pixel_values": pixels.to(vlm.device, vlm.model.dtype), "input_ids": ids.to(vlm.device),
                  "attention_mask": torch.ones_like(ids, device=vlm.device)}  # fmt: skip
        yield TokenBatch(inputs, [("language", torch.where(ids == IMAGE, VISION, PROMPT).to(vlm.device))])


def gigabytes(device: str) -> float:
    """Peak memory so far, in GB."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shrink", type=int, default=1, help="divide widths and depths by 2, 4 or 8")
    parser.add_argument("--examples", type=int, default=128)
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--bits", default="2,3,4,5,6,8")
    parser.add_argument("--room", type=float, default=GRAM_BYTES / 1e9, help="GB of Gram matrices in memory at once")
    parser.add_argument("--out", help="write a report to this file")
    args = parser.parse_args()
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    vlm = llava(args.shrink, args.device, dtype)
    parts = inspect(vlm, by="block")
    inputs = {input_of(weight): weight for weight in parts.weights}.values()
    blocks = [sum(4 * w.cols**2 for w in inputs if w.component_name("block") == name) / 1e9 for name in parts.names]
    facts = {"path": "float"}
    loaded, began = gigabytes(args.device), time.perf_counter()
    gather = gather_float(vlm, parts, lambda rows: batches(vlm, args.examples, rows), {}, None, int(args.room * 1e9))
    statistics = Statistics(facts, gather)
    widths = [int(bits) for bits in args.bits.split(",")]
    for name in parts.names:  # block by block, so that no more than one block's results are held
        plans = [Plan.of(parts, {name: scheme(args.method, bits, calibration=facts)}) for bits in widths]
        prepare(vlm.model, parts, plans, WeightCodes(), statistics)
        print(f"{time.perf_counter() - began:.1f} s, {name}", file=sys.stderr, flush=True)
    if args.device.startswith("cuda"):
        torch.cuda.synchronize()
    seconds, peak = time.perf_counter() - began, gigabytes(args.device)
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{torch.get_num_threads()} threads"
    lines = [
        "# Calibrating and quantizing LLaVA-1.5-7B's shape",
        "",
        f"`python -m experiments.benchmarks.seven_billion --device {args.device} --shrink {args.shrink} "
        f"--examples {args.examples} --method {args.method} --bits {args.bits} --room {args.room:g}`",
        f"(torch {torch.__version__}, {device}, {dtype})",
        "",
        "| weights | examples | widths | minutes | model | most beyond it | all Gram matrices | those of one block |",
        "|---|---|---|---|---|---|---|---|",
        f"| {sum(w.numel for w in parts.weights) / 1e9:.3f}e9 | {args.examples} | {len(widths)} | {seconds / 60:.2f} | "
        f"{loaded:.2f} GB | {peak - loaded:.2f} GB | {sum(blocks):.2f} GB | {max(blocks):.2f} GB |",
    ]
    print("\n".join(lines))
    if args.out:
        overwrite(Path(args.out), "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
