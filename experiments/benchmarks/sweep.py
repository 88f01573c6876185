"""CPU seconds of a sweep against one process per plan (load, calibrate, quantize, run) and against a lower bound.

python -m experiments.benchmarks.sweep                 # writes reports/sweep.md
python -m experiments.benchmarks.sweep --only blip2    # one of blip2, llava, embedded, drafts, workers

CPU seconds of one thread, models of random weights in the shapes at which the paper's code was measured. The plain
path is run for a few plans and multiplied; the bound is each distinct computation once: statistics, every layer at
every width, and each part of the model once for every distinct setting of it and of what comes before it. It is
given where one pass is the whole answer (vqa); drafts need fewer passes than writing captions does. The marginal plan
differs from the one before in the language model alone, and is compared with one forward pass of that.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import resource
import statistics
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

from sensitivity.api.sweeping import begin_sweep, with_calibration
from sensitivity.api.sweeping import grid as grid_
from sensitivity.measure.evaluation import answer, evaluate
from sensitivity.measure.generate.batches import batches_by_image
from sensitivity.measure.install.plan_in_model import quantized
from sensitivity.measure.loop import _SharedWork
from sensitivity.measure.memory.prefix_cache import PrefixCache
from sensitivity.models.checkpoint import model_folder
from sensitivity.models.discovery import inspect
from sensitivity.models.loading import load
from sensitivity.models.vlm import VLM
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.spec.files import overwrite
from sensitivity.spec.plan import Plan
from sensitivity.tasks.examples.types import Task
from sensitivity.tasks.table import task

ROOT = Path(__file__).parent.parent.parent
ROWS = ROOT / "runs" / "sweep-rows.json"  # delete it to measure everything again
CALIBRATION = 128
DEEP: dict[str, Any] = {"num_hidden_layers": 12, "num_attention_heads": 8, "hidden_size": 256}
WIDE = {**DEEP, "intermediate_size": 1024}
SPECIALS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# CPU seconds of the paper's released code for 27 and 9 plans at these shapes, 128 calibration examples, 64 images: once
# measured, without its start-up (3.2 s a plan) and scoring (10 s a plan)
PAPER = {("blip2", 27): 3150.0, ("llava", 9): 1157.0}
PAPER_AWQ = {("blip2", 27): 12700.0}


def blip2() -> tuple[Any, Any]:
    words = T.AutoTokenizer.from_pretrained(model_folder("embedded:scenes-llava"), local_files_only=True)
    config = T.Blip2Config(
        vision_config={**WIDE, "image_size": 64, "patch_size": 8},
        qformer_config={**WIDE, "num_hidden_layers": 6, "encoder_hidden_size": 256, "vocab_size": 256},
        text_config={"model_type": "opt", **DEEP, **SPECIALS, "ffn_dim": 1024, "word_embed_proj_dim": 256,
                     "vocab_size": len(words), "max_position_embeddings": 512},
        num_query_tokens=32,
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    pictures = BlipImageProcessorPil(size={"height": 64, "width": 64})
    return T.Blip2ForConditionalGeneration(config), T.Blip2Processor(pictures, words, num_query_tokens=32)


def llava() -> tuple[Any, Any]:
    words = T.AutoTokenizer.from_pretrained(model_folder("embedded:scenes-llava"), local_files_only=True)
    config = T.LlavaConfig(
        vision_config=T.CLIPVisionConfig(**WIDE, image_size=64, patch_size=8),
        text_config=T.LlamaConfig(**WIDE, **SPECIALS, vocab_size=len(words), max_position_embeddings=512),
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


def folder_of(name: str, scratch: Path) -> Path | str:
    return "embedded:scenes-llava" if name == "embedded" else saved(name, scratch / "model")


def spent(action: Callable[[], Any]) -> tuple[float, Any]:
    began = time.process_time()
    found = action()
    return time.process_time() - began, found


def planned(parts: Any, method: str, bits: tuple[int, ...]) -> list[Plan]:
    """The paper's grids: all combinations of bit widths over the parts, without LLaVA's small projector."""
    widths = [scheme(method, width) for width in bits]
    large = [part.name for part in parts.components if len(part.weights) > 8]
    every = itertools.product(widths, repeat=len(large))
    return [Plan.of(parts, dict(zip(large, chosen, strict=True))) for chosen in every]


def plain(folder: Path | str, plan: Plan, asked: str, examples: Task) -> None:
    """One plan as a process of its own would measure it."""
    vlm = load(str(folder), dtype="float32")
    parts = inspect(vlm, by="part")
    schemes = list(dict.fromkeys(one for _, one in plan.schemes if one))
    named, gathered = with_calibration(vlm, parts, schemes, [asked], CALIBRATION, against=[examples], cache_gb=0)
    facts = {None: None, **dict(zip(schemes, named, strict=True))}
    chosen = Plan(tuple((name, facts[one]) for name, one in plan.schemes))
    with quantized(vlm.model, parts, chosen, statistics=gathered):
        evaluate(vlm, examples, plain=True)


@dataclasses.dataclass
class Cost:
    calibration: float
    weights: float
    walking: float
    wall: float  # of all three
    first: float  # of `walking`: until every plan has a score
    per_plan: dict[Plan, float]

    @property
    def all(self) -> float:
        return self.calibration + self.weights + self.walking


def fast(vlm: VLM, plans: list[Plan], asked: str, n: int, out: Path) -> Cost:
    parts = inspect(vlm, by="part")
    schemes = list(dict.fromkeys(one for plan in plans for _, one in plan.schemes if one))
    examples, started = task(asked, n=n), time.perf_counter()
    calibration, (named, gathered) = spent(
        lambda: with_calibration(vlm, parts, schemes, [asked], CALIBRATION, against=[examples], cache_gb=0)
    )
    facts = {None: None, **dict(zip(schemes, named, strict=True))}
    some = [Plan(tuple((name, facts[one]) for name, one in plan.schemes)) for plan in plans]
    weights, (_, steps) = spent(lambda: begin_sweep(vlm, parts, some, [asked], out, n=n, statistics=gathered))
    began, first = time.process_time(), 0.0
    last, per_plan = began, dict[Plan, float]()
    for step in steps:
        now = time.process_time()
        per_plan[step.plan] = per_plan.get(step.plan, 0.0) + now - last
        first = now - began if len(per_plan) == len(plans) + 1 and not first else first
        last = now
    return Cost(calibration, weights, last - began, time.perf_counter() - started, first, per_plan)


def marginal(per_plan: dict[Plan, float]) -> float:
    """The median cost of a plan that differs from the one before it in the language model alone."""
    order = sorted(per_plan, key=lambda plan: [str(scheme) for _, scheme in plan.schemes])
    return statistics.median(
        per_plan[plan]
        for before, plan in itertools.pairwise(order)
        if [s for name, s in plan.schemes if name != "language"] == [s for n, s in before.schemes if n != "language"]
    )


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
    """Lower bound: every distinct computation once, priced by what a run without sharing spends in each part."""
    examples = task(asked, n=n)
    unshared = PrefixCache(vlm.model, inspect(vlm, by="part"), 0)
    unshared.stages = {}
    inner = vlm.model.model if hasattr(vlm.model, "model") else vlm.model
    connector = [getattr(inner, name) for name in ("qformer", "language_projection", "multi_modal_projector")
                 if hasattr(inner, name)]  # fmt: skip
    parts: dict[str, float] = {}
    some = list(batches_by_image(vlm, examples))
    with timed({"vision": [vlm.vision], "connector": connector}, parts):
        whole, _ = spent(lambda: [answer(vlm, examples, batch, unshared, i) for i, batch in enumerate(some)])
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
        folder = folder_of(name, Path(scratch))
        vlm = load(str(folder), dtype="float32")
        plans = planned(inspect(vlm, by="part"), method, bits)
        cost = fast(vlm, plans, asked, n, Path(scratch) / "study")
        least, parts = bound(vlm, plans, asked, n, cost)
        some, examples = plans[:: max(1, len(plans) // samples)][:samples], task(asked, n=n)
        slow = [spent(lambda plan=plan: plain(folder, plan, asked, examples))[0] for plan in some]
    each = sum(slow) / len(slow)
    paper = (PAPER if "gptq" in method else PAPER_AWQ).get((name, len(plans)))
    one_pass = asked != "caption"
    row = [
        name, method, str(len(plans)), f"{asked}, {n}", f"{each:.1f}", f"{each * len(plans):.0f}",
        f"{cost.calibration:.1f} + {cost.weights:.1f} + {cost.walking:.1f} = {cost.all:.1f}", f"{cost.wall:.0f}",
        f"{each * len(plans) / cost.all:.1f}", f"{each * len(plans) / least:.1f}" if one_pass else "",
        f"{cost.all / least:.2f}" if one_pass else "",
        f"{marginal(cost.per_plan) / parts['language']:.2f}" if one_pass else "",
        f"{cost.first / cost.all:.1%}",
        f"{paper / cost.all:.0f}" if paper and n == 64 else "",
    ]  # fmt: skip
    print(row, {k: round(v, 2) for k, v in parts.items()}, flush=True)
    return row


HEADS = (
    "shape", "method", "plans", "task, n", "plain, a plan", "plain, all", "ours: statistics + weights + plans",
    "ours, wall", "times less than plain (aim 10 at 27 plans, 30 at 216)", "the bound's times less",
    "of the bound (aim 1.25)", "marginal plan, passes of language (aim 1.3)", "first frontier (aim 5 %)",
    "times less than the paper's (aim 30, AWQ 100)",
)  # fmt: skip


def drafts(n: int = 200) -> str:
    """Captions of the embedded model, scored so that every answer must be generated to its end."""
    vlm = load("embedded:scenes-llava")
    parts = inspect(vlm, by="part")
    asked = dataclasses.replace(task("caption", n=n), exact=False)
    schemes = [scheme("gptq", width) for width in (2, 4, 8)]
    named, gathered = with_calibration(vlm, parts, schemes, ["caption"], CALIBRATION, against=[asked], cache_gb=0)
    plans = sorted(grid_(parts, schemes=named), key=lambda plan: [str(scheme) for _, scheme in plan.schemes])
    seconds = {}
    for name in (True, False):
        trial = _SharedWork(vlm, parts, [asked], plain=name, statistics=gathered)
        trial.prepare(plans)
        some = plans if not name else plans[:: len(plans) // 8]
        used, _ = spent(lambda trial=trial, some=some: [trial.run(plan, 0, trial.ends[-1]) for plan in some])
        seconds[name] = used / len(some)
    return (
        f"Captions of `embedded:scenes-llava`, n {n}, GPTQ, {len(plans)} plans: {seconds[True]:.2f} CPU s a plan by "
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


def table(heads: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


INTRODUCTION = f"""CPU seconds of one thread (torch {torch.__version__}), {CALIBRATION} calibration examples, models
with random weights in the shapes on which the paper's released code was timed. Columns:

* plain: every plan loads, calibrates, quantizes and runs by itself; run for one or two plans and multiplied;
* the bound: statistics once, every layer at every width once, and each part of the model once for every distinct
  setting of it and of the parts before it, priced by the seconds that a pass without sharing spends in each part. Given
  only where an answer takes one forward pass. The bound is itself measured, so a sweep can be a few percent below it;
* marginal plan: one that differs from the plan before it in the language model only;
* first frontier: when every plan has a score with an interval, as a share of the whole sweep;
* the paper's: its released code, timed once on these shapes without start-up and scoring
  ({PAPER["blip2", 27]:,.0f} CPU seconds for 27 plans of BLIP-2 by GPTQ, {PAPER_AWQ["blip2", 27]:,.0f} by AWQ,
  {PAPER["llava", 9]:,.0f} for 9 of LLaVA).

What limits the ratios: every plan runs the language model once for every example, so no sharing makes a sweep of many
examples cheaper than `the bound's times less`. Sharing gains most where examples are few, because calibration is then
most of a plan, and least with nine plans. 64 questions are about thirteen images; a first shard needs at least two
images to have an interval. A plan then takes a third of a second, a fifth of it in small calls (replacing layers,
skipped blocks, two shards). The grids of LLaVA vary two parts, since its projector is only two layers."""

GRIDS = [  # shape, method, widths, task, examples, how many plans the plain path is run for
    ("blip2", "paper-gptq", (2, 4, 8), "caption", 64, 2),
    ("blip2", "paper-gptq", (2, 4, 8), "vqa", 1000, 1),
    ("blip2", "paper-gptq", (2, 3, 4, 5, 6, 8), "vqa", 64, 1),
    ("blip2", "paper-awq", (2, 4, 8), "caption", 64, 1),
    ("llava", "paper-gptq", (2, 4, 8), "caption", 64, 2),
    ("llava", "paper-gptq", (2, 4, 8), "vqa", 1000, 1),
    ("llava", "paper-gptq", (2, 3, 4, 5, 6, 8), "vqa", 64, 1),
    ("embedded", "paper-gptq", (2, 4, 8), "caption", 64, 2),
    ("embedded", "paper-gptq", (2, 3, 4, 5, 6, 8), "vqa", 1000, 2),
]


def shapes(name: str) -> str:
    """The table of one model; rows that an earlier run measured are read from ROWS."""
    rows = json.loads(ROWS.read_text()) if ROWS.exists() else {}
    for grid in GRIDS:
        if grid[0] == name and str(grid) not in rows:
            rows[str(grid)] = compare(*grid)
            ROWS.write_text(json.dumps(rows, indent=1))
    return table(HEADS, [rows[str(grid)] for grid in GRIDS if grid[0] == name])


# the report's sections, each of which may be run alone
SECTIONS: dict[str, tuple[str, Callable[[], str]]] = {
    "blip2": ("BLIP-2", lambda: shapes("blip2")),
    "llava": ("LLaVA", lambda: shapes("llava")),
    "embedded": ("The embedded model", lambda: shapes("embedded")),
    "drafts": ("Captions by drafts", drafts),
    "workers": ("Workers", workers),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SECTIONS, help="run one section, and leave the others as they are")
    parser.add_argument("--out", type=Path, default=ROOT / "reports" / "sweep.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    text = args.out.read_text(encoding="utf-8") if args.out.exists() else ""
    found = dict(part.split("\n\n", 1) for part in text.split("\n## ")[1:])
    for name, (title, run) in SECTIONS.items():
        if args.only in (None, name):
            found[title] = run()
            print(found[title], flush=True)
            said = [f"## {one}\n\n{found[one].strip()}" for one, _ in SECTIONS.values() if one in found]
            head = f"# What a sweep costs\n\n`python -m experiments.benchmarks.sweep`: {INTRODUCTION}"
            overwrite(args.out, "\n\n".join([head, *said]) + "\n")
    print(f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


if __name__ == "__main__":
    main()
