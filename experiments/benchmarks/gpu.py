"""On a GPU: every method's answers beside the CPU's, and what plans and scores of LLaVA-1.5-7B's shape cost.

python -m experiments.benchmarks.gpu rows --device cpu --out cpu.parquet
python -m experiments.benchmarks.gpu rows --device cuda --out cuda.parquet
python -m experiments.benchmarks.gpu compare cpu.parquet cuda.parquet   # a line for each row of each model
python -m experiments.benchmarks.gpu plans [--device cuda] [--shrink 8] [--n 256]
python -m experiments.benchmarks.gpu scores [--device cuda] [--shrink 8] [--n 32]

`rows` sweeps one plan for each method, all parts at 3 bits or the width next to it, in float32. Codes may differ where
a sum in another order falls on the other side of a boundary, so scores are compared, and log-likelihoods on average.
`plans` runs 16 plans of random weights, `scores` computes the scores that need a backward pass, for five widths, and
explains one plan; what they answer means nothing, what they cost does.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers as T
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from experiments.benchmarks.seven_billion import gigabytes, llava
from experiments.methods.comparison.rows import BOTH, CANNOT, MODELS, ROWS, kind, scheme_of, widths_of
from sensitivity.api.sweeping import begin_sweep, sweep, with_calibration
from sensitivity.measure.attribution.calibrated import Calibrated
from sensitivity.measure.attribution.weight_errors import plan_changes
from sensitivity.measure.calibrate.calibration import calibration_examples, calibration_statistics
from sensitivity.measure.evaluation import evaluate
from sensitivity.measure.gradients.backward import in_rows_that_fit
from sensitivity.measure.gradients.path_integral import integrate_path
from sensitivity.measure.install.plan_in_model import quantized
from sensitivity.measure.passes.token_batches import ROWS as AT_ONCE
from sensitivity.measure.passes.token_batches import TokenBatch, answer_batches
from sensitivity.models.checkpoint import model_folder
from sensitivity.models.discovery import inspect
from sensitivity.models.loading import load
from sensitivity.models.vlm import VLM
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.spec.plan import Plan
from sensitivity.tasks.table import task

EXAMPLES, BITS = 32, 3


def rows(args: argparse.Namespace) -> None:
    """Write the answers of every row, an error in place of the answers where one occurs."""
    found = [frame for model in args.models.split(",") for frame in rows_of(model, args)]
    pd.concat(found).to_parquet(args.out)


def rows_of(model: str, args: argparse.Namespace) -> list[pd.DataFrame]:
    vlm = load(model, device=args.device, dtype="float32")
    parts, asked, found = inspect(vlm, by="part"), task("vqa", n=args.n), []
    for row in args.rows.split(","):
        if (row, model) in CANNOT:
            continue
        bits = min(widths_of(row), key=lambda width: abs(width - BITS))
        path, began = "both" if kind(row, bits) == BOTH else "float", time.perf_counter()
        try:
            with tempfile.TemporaryDirectory() as scratch:
                (one,), statistics = with_calibration(
                    vlm, parts, [scheme_of(row, bits)], ["vqa"], EXAMPLES, path=path, against=[asked], cache_gb=0
                )
                plan = Plan.uniform(parts, one)
                study = sweep(vlm, parts, [plan], ["vqa"], Path(scratch) / "s", n=args.n, statistics=statistics)
                frame = study.examples(plan)
                assert frame is not None
                frame = frame[["example", "score", "answer", "nll"]].assign(error=None)
        except Exception as error:  # what fails on one device and not on the other is what this looks for
            frame = pd.DataFrame([{"example": "", "error": f"{type(error).__name__}: {error}"}])
        seconds = time.perf_counter() - began
        found.append(frame.assign(model=model, row=row, bits=bits, seconds=seconds))
        print(f"{model} {row} {seconds:.1f} s {frame['error'].iloc[0] or ''}", file=sys.stderr, flush=True)
    return found


def compare(args: argparse.Namespace) -> None:
    """Print a line for each row of each model, and what all of them have in common."""
    one, other = pd.read_parquet(args.one), pd.read_parquet(args.other)
    lines = ["| model | row | bits | equal scores | equal answers | mean difference of log-likelihood |"]
    lines += ["|---|---|---|---|---|---|"]
    for (model, row), here in one.groupby(["model", "row"], sort=False):
        there = other[(other["model"] == model) & (other["row"] == row)]
        failed = [str(e) for frame in (here, there) for e in frame["error"].dropna()]
        head = f"| {str(model).removeprefix('embedded:')} | {row} | {here['bits'].iloc[0]} | "
        if failed or there.empty:
            lines.append(f"{head}{'; '.join(failed) or 'not run'} | | |")
            continue
        both = here.merge(there, on="example", suffixes=("", "_other"), validate="one_to_one")
        scores, answers = (int((both[k] == both[f"{k}_other"]).sum()) for k in ("score", "answer"))
        off = (both["nll"] - both["nll_other"]).abs().mean()
        lines.append(f"{head}{scores} of {len(both)} | {answers} | {off:.2g} |")
    print("\n".join(lines))


def with_words(shrink: int, device: str, dtype: torch.dtype) -> VLM:
    """The model of random weights with LLaVA's image processor and the words of the embedded model."""
    words: Any = T.AutoTokenizer.from_pretrained(model_folder("embedded:scenes-llava"), local_files_only=True)
    words.model_max_length = 1024  # of the embedded model: 256
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    vlm, made = llava(shrink, device, dtype, int(words.convert_tokens_to_ids("<image>"))), T.LlavaProcessor
    vlm.processor = made(  # type: ignore[no-untyped-call]
        pictures, words, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    return vlm


def sixteen(vlm: VLM) -> tuple[Any, list[Plan]]:
    """All combinations of 3 and 4 bits for the vision tower and the three thirds of the language model."""
    parts, plans = inspect(vlm, by="group"), []
    thirds = [name for name in parts.names if name.startswith("language")]
    rest = [name for name in parts.names if name not in thirds]
    for chosen in itertools.product((3, 4), repeat=1 + len(thirds)):
        width = dict.fromkeys(rest, chosen[0]) | dict(zip(thirds, chosen[1:], strict=True))
        plans.append(Plan.of(parts, {name: scheme("rtn", bits) for name, bits in width.items()}))
    return parts, plans


def plans(args: argparse.Namespace) -> None:
    """Print what plans cost that share what they can, and what one costs by itself."""
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    vlm = with_words(args.shrink, args.device, dtype)
    parts, every = sixteen(vlm)
    examples = task("vqa", n=args.n)
    loaded = gigabytes(args.device)

    def timed(action: Callable[[], Any], what: str) -> tuple[float, Any]:
        began = time.perf_counter()
        result = action()
        if args.device.startswith("cuda"):
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        print(f"{seconds:.2f} s, {what}", file=sys.stderr, flush=True)
        return seconds, result

    with tempfile.TemporaryDirectory() as scratch:
        timed(lambda: evaluate(vlm, task("vqa", n=16), plain=True), "16 questions")  # kernels are chosen
        native, _ = timed(lambda: evaluate(vlm, examples, plain=True), "full precision")
        weights, (_, steps) = timed(
            lambda: begin_sweep(vlm, parts, every, ["vqa"], Path(scratch) / "s", n=args.n, memory_gb=args.memory_gb),
            "weights at two widths",
        )
        per_plan: dict[Plan, float] = {}
        while True:
            seconds, step = timed(lambda: next(steps, None), "a shard of a plan")
            if step is None:
                break
            per_plan[step.plan] = per_plan.get(step.plan, 0.0) + seconds
        first, *others = per_plan.values()

        def alone() -> None:
            with quantized(vlm.model, parts, every[-1]):
                evaluate(vlm, examples, plain=True)

        single, _ = timed(alone, "one plan")
    images = len({example.cluster for example in examples.examples})
    total = weights + sum(per_plan.values())
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{torch.get_num_threads()} threads"
    lines = [
        f"{len(every)} plans of {sum(w.numel for w in parts.weights) / 1e9:.2f}e9 weights (rtn, 3 and 4 bits), "
        f"{args.n} questions to {images} images; {device}, torch {torch.__version__}, {dtype}",
        f"one pass in full precision, nothing shared: {native:.2f} s; "
        f"one plan by itself, without loading: {single:.2f} s",
        f"sweep: {total:.1f} s, the first plan {first:.2f} s, the others {sum(others) / len(others):.2f} s on average "
        f"({min(others):.2f} to {max(others):.2f}); {len(per_plan) * single / total:.1f} times less than one by one",
        f"model {loaded:.2f} GB, most beyond it {gigabytes(args.device) - loaded:.2f} GB",
    ]
    print("\n".join(lines))


def scores(args: argparse.Namespace) -> None:
    """Print seconds and memory of scores at five widths and of one path integral, beside a forward pass."""
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    vlm, on_gpu = with_words(args.shrink, args.device, dtype), args.device.startswith("cuda")
    parts = inspect(vlm, by="group.kind")
    loaded, data = gigabytes(args.device), calibration_examples(["vqa"], args.n, 0)

    def timed(action: Callable[[], Any], what: str) -> Any:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        result = action()
        if on_gpu:
            torch.cuda.synchronize()
        seconds, beyond = time.perf_counter() - began, gigabytes(args.device) - loaded
        print(f"| {what} | {seconds:.2f} | {beyond:.2f} |", flush=True)
        return result

    def batches(rows: int) -> Iterator[TokenBatch]:
        return answer_batches(vlm, data, rows)

    def forward() -> None:
        with torch.inference_mode():
            for batch in batches(AT_ONCE):
                vlm.model(**batch.inputs)

    device = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} threads"
    print(f"{sum(w.numel for w in parts.weights) / 1e9:.2f}e9 weights, model {loaded:.2f} GB, {args.n} examples, ")
    print(f"widths {args.bits} ({args.method}); {device}, torch {torch.__version__}, {dtype}\n")
    print("| | s | most beyond the model, GB |\n|---|---|---|")
    timed(forward, "a forward pass, the first")
    timed(forward, "a forward pass")
    asked = [scheme(args.method, int(width)) for width in args.bits.split(",")]
    schemes, statistics = with_calibration(vlm, parts, asked, ["vqa"], args.n, 0, "float", cache_gb=0)
    statistics = statistics or calibration_statistics(vlm, parts, ["vqa"], args.n, 0, "float")
    given = Calibrated(vlm, parts, schemes, statistics, batches)
    for one in args.kinds.split(","):
        timed(partial(given.gather, one), f"`{one}` of {len(schemes)} widths")
    plan = Plan.uniform(parts, schemes[1])
    changes = plan_changes(vlm.model, parts, plan, statistics)
    integrate = partial(integrate_path, vlm, parts, changes, max_passes=args.passes)
    found = timed(lambda: in_rows_that_fit(vlm, batches, integrate), "a plan explained")
    print(f"\n{found.passes} backward passes, which miss {found.missing:.2%} of a change of {found.change:.3g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(required=True)
    p = parts.add_parser("rows")
    p.add_argument("--device", default="cuda")
    p.add_argument("--models", default=",".join(MODELS))
    p.add_argument("--rows", default=",".join(ROWS))
    p.add_argument("--n", type=int, default=100)
    p.add_argument("--out", required=True)
    p.set_defaults(run=rows)
    p = parts.add_parser("compare")
    p.add_argument("one")
    p.add_argument("other")
    p.set_defaults(run=compare)
    p = parts.add_parser("plans")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--shrink", type=int, default=1)
    p.add_argument("--n", type=int, default=256)
    p.add_argument("--memory-gb", type=float, default=40)
    p.set_defaults(run=plans)
    p = parts.add_parser("scores")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--shrink", type=int, default=1)
    p.add_argument("--n", type=int, default=32)
    p.add_argument("--method", default="rtn")
    p.add_argument("--bits", default="2,3,4,6,8")
    p.add_argument("--kinds", default="fisher,change,squares", help="parts of scores, each computed alone")
    p.add_argument("--passes", type=int, default=10, help="the most backward passes to explain a plan")
    p.set_defaults(run=scores)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
