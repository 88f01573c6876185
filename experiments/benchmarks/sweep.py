"""What a sweep costs beside the plain path (load, calibrate, quantise, run, once per plan) and beside its bound.

python experiments/benchmarks/sweep.py                 # writes reports/sweep.md
python experiments/benchmarks/sweep.py --only blip2    # one of blip2, llava, drafts, workers, growth

CPU seconds of one thread, models of random weights in the shapes at which the paper's code was measured. The plain
path is run for a few plans and multiplied; the bound is each distinct computation once: statistics, every layer at
every width, and each part of the model once for every distinct setting of it and of what comes before it.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers as T
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from sensitivity import verbs
from sensitivity.evaluate import answer, batches, evaluate
from sensitivity.models import VLM, load
from sensitivity.models.checkpoint import find
from sensitivity.plan import Plan
from sensitivity.quantize import quantized, scheme
from sensitivity.tasks import Task, task

ROOT = Path(__file__).parent.parent.parent
CALIBRATION = 128
DEEP: dict[str, Any] = {"num_hidden_layers": 12, "num_attention_heads": 8, "hidden_size": 256}
WIDE = {**DEEP, "intermediate_size": 1024}
SPECIALS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# CPU seconds of the paper's code for 27 and 9 plans at these shapes, GPTQ, 128 calibration examples, 64 images
PAPER = {("blip2", 27): 3150.0, ("llava", 9): 1157.0}
PAPER_AWQ = {("blip2", 27): 12700.0}


def blip2() -> tuple[Any, Any]:
    words = T.AutoTokenizer.from_pretrained(find("embedded:scenes-llava"), local_files_only=True)
    config = T.Blip2Config(
        vision_config={**WIDE, "image_size": 64, "patch_size": 8},
        qformer_config={**WIDE, "num_hidden_layers": 6, "encoder_hidden_size": 256, "vocab_size": 256},
        text_config={"model_type": "opt", **DEEP, **SPECIALS, "ffn_dim": 1024, "word_embed_proj_dim": 256,
                     "vocab_size": 256, "max_position_embeddings": 512},
        num_query_tokens=32,
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    pictures = BlipImageProcessorPil(size={"height": 64, "width": 64})
    return T.Blip2ForConditionalGeneration(config), T.Blip2Processor(pictures, words, num_query_tokens=32)


def llava() -> tuple[Any, Any]:
    words = T.AutoTokenizer.from_pretrained(find("embedded:scenes-llava"), local_files_only=True)
    config = T.LlavaConfig(
        vision_config=T.CLIPVisionConfig(**WIDE, image_size=64, patch_size=8),
        text_config=T.LlamaConfig(**WIDE, **SPECIALS, vocab_size=256, max_position_embeddings=512),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    processor = T.LlavaProcessor(
        pictures, words, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    return T.LlavaForConditionalGeneration(config), processor


SHAPES: dict[str, Callable[[], tuple[Any, Any]]] = {"blip2": blip2, "llava": llava}


def saved(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    model, processor = SHAPES[name]()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.05)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def spent(action: Callable[[], Any]) -> tuple[float, Any]:
    began = time.process_time()
    found = action()
    return time.process_time() - began, found


def planned(parts: Any, method: str, bits: tuple[int, ...]) -> list[Plan]:
    """The paper's grids: a width for each part that LLaVA's projector, two small layers, is not counted among."""
    widths = [scheme(method, width) for width in bits]
    large = [part.name for part in parts.components if len(part.weights) > 8]
    every = itertools.product(widths, repeat=len(large))
    return [Plan.of(parts, dict(zip(large, chosen, strict=True))) for chosen in every]


def plain(folder: Path, plan: Plan, asked: str, examples: Task) -> None:
    """One plan as a process of its own would do it."""
    vlm = load(str(folder), dtype="float32")
    parts = verbs.inspect(vlm, by="part")
    schemes = list(dict.fromkeys(one for _, one in plan.schemes if one))
    named, statistics = verbs.calibrated(vlm, parts, schemes, [asked], CALIBRATION, against=[examples], cache_gb=0)
    facts = {None: None, **dict(zip(schemes, named, strict=True))}
    chosen = Plan(tuple((name, facts[one]) for name, one in plan.schemes))
    with quantized(vlm.model, parts, chosen, statistics=statistics):
        evaluate(vlm, examples, plain=True)


@dataclasses.dataclass
class Cost:
    calibration: float
    weights: float
    walking: float
    first: float  # of the walking: until every plan has a score
    per_plan: list[float]

    @property
    def all(self) -> float:
        return self.calibration + self.weights + self.walking


def fast(vlm: VLM, plans: list[Plan], asked: str, n: int, out: Path) -> Cost:
    parts = verbs.inspect(vlm, by="part")
    schemes = list(dict.fromkeys(one for plan in plans for _, one in plan.schemes if one))
    examples = task(asked, n=n)
    calibration, (named, statistics) = spent(
        lambda: verbs.calibrated(vlm, parts, schemes, [asked], CALIBRATION, against=[examples], cache_gb=0)
    )
    facts = {None: None, **dict(zip(schemes, named, strict=True))}
    some = [Plan(tuple((name, facts[one]) for name, one in plan.schemes)) for plan in plans]
    weights, (_, steps) = spent(lambda: verbs.sweeping(vlm, parts, some, [asked], out, n=n, statistics=statistics))
    began, first, seen, per_plan = time.process_time(), 0.0, set(), []
    last = began
    for step in steps:
        now = time.process_time()
        seen.add(step.plan.key)
        first = now - began if len(seen) == len(plans) + 1 and not first else first
        per_plan.append(now - last)
        last = now
    return Cost(calibration, weights, last - began, first, per_plan)


@contextmanager
def timed(modules: dict[str, list[Any]], spent_in: dict[str, float]) -> Iterator[None]:
    """CPU seconds inside some modules."""
    handles, begun = [], {}
    for name, some in modules.items():
        for module in some:
            def before(*_: Any, name: str = name) -> None:
                begun[name] = time.process_time()

            def after(*_: Any, name: str = name) -> None:
                spent_in[name] = spent_in.get(name, 0.0) + time.process_time() - begun[name]

            handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def bound(vlm: VLM, plans: list[Plan], asked: str, n: int, cost: Cost) -> tuple[float, dict[str, float]]:
    """Each distinct computation once, from the time that one run without any sharing spends in each part."""
    examples = task(asked, n=n)
    inner = vlm.model.model if hasattr(vlm.model, "model") else vlm.model
    connector = [getattr(inner, name) for name in ("qformer", "language_projection", "multi_modal_projector")
                 if hasattr(inner, name)]  # fmt: skip
    parts: dict[str, float] = {}
    some = list(batches(vlm, examples))
    with timed({"vision": [vlm.vision], "connector": connector}, parts):
        whole, _ = spent(lambda: [answer(vlm, examples, batch) for batch in some])
    parts["language"] = whole - parts["vision"] - parts["connector"]
    names = ("vision", "connector", "language")
    distinct = {
        name: len({tuple(plan[other] for other in names[: i + 1]) for plan in plans}) + 1  # and full precision
        for i, name in enumerate(names)
    }
    total = cost.calibration + cost.weights + sum(parts[name] * distinct[name] for name in names)
    return total, parts


def compare(name: str, method: str, bits: tuple[int, ...], asked: str, n: int, samples: int) -> list[str]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = saved(name, Path(scratch) / "model")
        vlm = load(str(folder), dtype="float32")
        plans = planned(verbs.inspect(vlm, by="part"), method, bits)
        cost = fast(vlm, plans, asked, n, Path(scratch) / "study")
        least, parts = bound(vlm, plans, asked, n, cost)
        some, examples = plans[:: max(1, len(plans) // samples)][:samples], task(asked, n=n)
        slow = [spent(lambda plan=plan: plain(folder, plan, asked, examples))[0] for plan in some]
    each = sum(slow) / len(slow)
    paper = (PAPER if "gptq" in method else PAPER_AWQ).get((name, len(plans)))
    marginal = sorted(cost.per_plan)[len(cost.per_plan) // 4] if len(cost.per_plan) == len(plans) + 1 else None
    row = [
        name, method, str(len(plans)), f"{asked}, {n}", f"{each:.1f}", f"{each * len(plans):.0f}",
        f"{cost.calibration:.1f} + {cost.weights:.1f} + {cost.walking:.1f} = {cost.all:.1f}",
        f"{each * len(plans) / cost.all:.1f}", f"{cost.all / least:.2f}",
        f"{cost.first / cost.all:.0%}",
        f"{paper / cost.all:.0f}" if paper and n == 64 else "",
    ]  # fmt: skip
    print(row, {k: round(v, 2) for k, v in parts.items()}, marginal, flush=True)
    return row


HEADS = (
    "shape", "method", "plans", "task, n", "plain, a plan", "plain, all", "ours: statistics + weights + plans",
    "times less than plain", "of the bound", "first frontier", "times less than the paper's",
)  # fmt: skip


def drafts(n: int = 200) -> str:
    """Captions of the embedded model, scored so that every answer must be written out."""
    vlm = load("embedded:scenes-llava")
    parts = verbs.inspect(vlm, by="part")
    plans = verbs.grid(parts, schemes=[scheme("rtn", width) for width in (3, 4, 8)])
    asked = dataclasses.replace(task("caption", n=n), exact=False)
    from sensitivity.sweep import _Trial

    seconds = {}
    for name in (True, False):
        trial = _Trial(vlm, parts, [asked], plain=name)
        trial.prepare(plans)
        some = plans if not name else plans[:: len(plans) // 8]
        used, _ = spent(lambda trial=trial, some=some: [trial.run(plan, 0, trial.ends[-1]) for plan in some])
        seconds[name] = used / len(some)
    return (
        f"Captions of `embedded:scenes-llava`, n {n}, {len(plans)} plans: {seconds[True]:.2f} CPU s a plan by "
        f"`generate`, {seconds[False]:.2f} with drafts and shared prefixes: {seconds[True] / seconds[False]:.1f} times "
        "less."
    )


def workers() -> str:
    """Wall seconds of one and of two processes on one study."""
    wall = {}
    for count in (1, 2):
        with tempfile.TemporaryDirectory() as scratch:
            words = f"sweep embedded:scenes-llava --bits 2,3,4,6,8 --method uniform --n 1000 --workers {count} --json"
            command = [sys.executable, "-m", "sensitivity", *words.split(), "--out", f"{scratch}/study"]
            began = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            wall[count] = time.perf_counter() - began
    return (
        f"125 plans of 1,000 questions, one thread a process: {wall[1]:.0f} s wall by one, {wall[2]:.0f} s by two "
        f"workers, {wall[1] / wall[2]:.2f} times faster."
    )


GROWTH = """
import resource, sys, tempfile, time
from sensitivity import verbs
from sensitivity.quantize import scheme
kind, value = sys.argv[1], int(sys.argv[2])
given = {"plans": 27, "examples": 200} | {kind: value}
vlm = verbs.load("embedded:scenes-llava")
parts = verbs.inspect(vlm, by="group")
plans = verbs.grid(parts, schemes=[scheme("rtn", w) for w in (2, 3, 4, 6)])[: given["plans"]]
began = time.process_time()
with tempfile.TemporaryDirectory() as out:
    verbs.sweep(vlm, parts, plans, ["vqa"], out, n=given["examples"])
print(time.process_time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def growth() -> list[tuple[str, int, float, float]]:
    found = []
    for kind, values in {"plans": (9, 27, 81, 243), "examples": (50, 200, 800, 3200)}.items():
        for value in values:
            words = [sys.executable, "-c", GROWTH, kind, str(value)]
            said = subprocess.run(words, check=True, capture_output=True, text=True).stdout
            seconds, peak = map(float, said.split())
            found.append((kind, value, seconds, peak))
            print(found[-1], flush=True)
    return found


def table(heads: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


GRIDS = [  # shape, method, widths, task, examples, how many plans the plain path is run for
    ("blip2", "paper-gptq", (2, 4, 8), "caption", 64, 2),
    ("blip2", "paper-gptq", (2, 4, 8), "vqa", 1000, 1),
    ("blip2", "paper-gptq", (2, 3, 4, 5, 6, 8), "caption", 64, 1),
    ("blip2", "paper-awq", (2, 4, 8), "caption", 64, 1),
    ("llava", "paper-gptq", (2, 4, 8), "caption", 64, 2),
    ("llava", "paper-gptq", (2, 4, 8), "vqa", 1000, 1),
    ("llava", "paper-gptq", (2, 3, 4, 5, 6, 8), "caption", 64, 1),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("blip2", "llava", "drafts", "workers", "growth"))
    parser.add_argument("--out", type=Path, default=ROOT / "reports" / "sweep.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [compare(*grid) for grid in GRIDS if args.only in (None, grid[0])]
    said = [table(HEADS, rows)] if rows else []
    said += [drafts()] if args.only in (None, "drafts") else []
    said += [workers()] if args.only in (None, "workers") else []
    if args.only in (None, "growth"):
        lines = [[kind, str(value), f"{seconds:.1f}", f"{peak:.0f}"] for kind, value, seconds, peak in growth()]
        said.append(table(("of", "how many", "CPU s", "peak MB"), lines))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print("\n\n".join(said), f"\n\npeak {peak:.0f} MB")
    if args.only is None:
        args.out.write_text("\n\n".join(["# What a sweep costs", *said]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
