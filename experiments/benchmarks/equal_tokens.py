"""Whether packed codes in a runtime give the tokens of the quantized model in torch, on 500 examples of several models.

python -m experiments.benchmarks.equal_tokens [--format openvino|onnx] [--n 500] [--only MODEL,...]

Writes reports/equal-tokens.md from the rows of reports/equal-tokens.csv, of which it replaces those that it measures.
Answers lie in --work (default runs/equal-tokens), and a run that was stopped goes on there; delete it to begin again.

Every answer is generated to its end by both, one example at a time, in float32 with one thread. Plans are coarse, since
one that changes no answer proves nothing: how many it changes is counted on the first 100 examples. The embedded models
are trained; the others have random weights, so that their answers mean nothing, but their tokens are as exact.
Likelihoods are those of the right answers, per token. onnx-int8 runs the files of onnx with accuracy level 4, where
what quantized layers read is rounded to 8 bits: its tokens may differ, and the row says how many answers do. A dash
stands where likelihoods were not compared.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from experiments.true_shapes import SHAPES, qwen2_vl, save, smolvlm
from sensitivity.formats.halved.model import HalvedModel
from sensitivity.formats.table import write
from sensitivity.formats.verification import FURTHER, RUNTIMES
from sensitivity.formats.writing.job import Job
from sensitivity.measure.generate.answer_tokens import end_tokens, mean_nll, with_answers
from sensitivity.measure.generate.batches import Batch, batches_by_image, on_device
from sensitivity.measure.install.plan_in_model import quantized
from sensitivity.models.discovery import inspect
from sensitivity.models.loading import load
from sensitivity.models.vlm import VLM
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.plan import Plan, Scheme
from sensitivity.tasks.examples.types import Task
from sensitivity.tasks.table import task as find_task

CHANGED = 100  # examples on which full precision is run, too
REPORT = Path(__file__).parents[2] / "reports" / "equal-tokens.md"
TABLE = REPORT.with_suffix(".csv")
FORMATS = ("openvino", "onnx")
COLUMNS = (
    "runtime", "model", "plan", "answers with equal tokens", "tokens", "different answers", "changed by the plan",
    "largest difference of log-likelihoods",
)  # fmt: skip
# the families' own wiring, tokenizers and processors, with narrow layers
SIGLIP = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
          "image_size": 128, "patch_size": 16}  # fmt: skip
QWEN2 = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 2,
         "num_key_value_heads": 1}  # fmt: skip
SHAPES |= {
    "small SmolVLM": partial(smolvlm, 192, 512, 6, 3, 1, SIGLIP),
    "small Qwen2-VL": partial(qwen2_vl, QWEN2, {"depth": 4, "embed_dim": 128, "hidden_size": 256, "num_heads": 4}),
}
TWO, TWO_IN_GROUPS = Scheme("rtn", 2, "row", True), Scheme("rtn", 2, 32, True)
THREE, FOUR, SIX = (Scheme("rtn", bits, 32, False) for bits in (3, 4, 6))
# model -> its plan
PLANS: dict[str, dict[str, Scheme]] = {
    "embedded:scenes-llava": {"vision": TWO, "connector": SIX, "language": TWO_IN_GROUPS},
    "embedded:scenes-blip2": {"vision": FOUR, "connector": THREE, "language": TWO_IN_GROUPS},
    "small SmolVLM": {"vision": FOUR, "connector": SIX, "language": THREE},
    "small Qwen2-VL": {"vision": FOUR, "connector": SIX, "language": THREE},
}


class Answered(NamedTuple):
    """What was answered to one example, and the log-likelihood of its right answer."""

    tokens: list[int]
    nll: float


def resumed(file: Path, vlm: VLM, task: Task, answer: Callable[[Batch], Answered]) -> list[Answered]:
    """The answers to all examples; those that an earlier run wrote to the file are not computed again."""
    done = file.read_text().splitlines() if file.exists() else []
    with file.open("a") as lines:
        for example in task.examples[len(done) :]:
            (batch,) = batches_by_image(vlm, replace(task, examples=(example,)), plain=True)
            done.append(json.dumps(answer(batch)))
            lines.write(f"{done[-1]}\n")
            lines.flush()
    return [Answered(*json.loads(line)) for line in done[: len(task.examples)]]


@torch.inference_mode()
def in_torch(vlm: VLM, task: Task, batch: Batch) -> Answered:
    """What transformers' greedy search generates."""
    inputs, right = on_device(vlm, batch.inputs), torch.tensor(batch.targets)
    output = vlm.model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=task.max_new_tokens)
    tokens = output[0, inputs["input_ids"].shape[1] :].tolist()
    logits = vlm.model(**with_answers(vlm, inputs, right, torch.ones_like(right))).logits
    return Answered(tokens, *mean_nll(logits[:, -right.shape[1] - 1 : -1], right))


def in_runtime(vlm: VLM, model: HalvedModel, task: Task, batch: Batch) -> Answered:
    """What the packed codes generate."""
    features, ids = model.image_features(**model.image_inputs(batch.inputs)), batch.inputs["input_ids"][0].tolist()
    tokens = model.generate(ids, features, end_tokens(vlm), task.max_new_tokens)
    (right,) = batch.targets
    model.forget()
    logits = torch.from_numpy(model.logits([*ids, *right[:-1]], len(right), features))
    return Answered(tokens, *mean_nll(logits[None], torch.tensor([right])))


def compared(name: str, format: str, n: int, work: Path, space: Path) -> list[list[str]]:
    """One row of the report for each runtime that reads the format."""
    model = str(save(name, space / "model")) if name in SHAPES else name
    vlm = load(model, dtype="float32")
    parts: ComponentMap = inspect(vlm, by="part")
    plan, task = Plan.of(parts, PLANS[name]), find_task("vqa", "evaluation", n)
    write(Job(vlm, parts, plan, {"model": model}, dtype=torch.float32), space / "out", format)
    first, torchs = replace(task, examples=task.examples[:CHANGED]), partial(in_torch, vlm, task)
    native = resumed(work / f"{name}-native.jsonl", vlm, first, torchs)
    with quantized(vlm.model, parts, plan):
        expected = resumed(work / f"{name}-torch.jsonl", vlm, task, torchs)
    changed = sum(a.tokens != b.tokens for a, b in zip(native, expected, strict=False))
    rows = []
    for runtime in (format, *FURTHER.get(format, ())):
        opened = RUNTIMES[runtime](space / "out").model
        found = resumed(work / f"{name}-{runtime}.jsonl", vlm, task, partial(in_runtime, vlm, opened, task))
        same = sum(a.tokens == b.tokens for a, b in zip(found, expected, strict=True))
        apart = max(abs(a.nll - b.nll) for a, b in zip(found, expected, strict=True))
        row = [
            runtime, name, plan.describe(), f"{same} of {len(expected)}", f"{sum(len(a.tokens) for a in expected)}",
            f"{len({tuple(a.tokens) for a in expected})}", f"{changed} of {len(native)}", f"{apart:.1g}",
        ]  # fmt: skip
        print(" | ".join(row), flush=True)
        rows.append(row)
    return rows


def keep(rows: list[list[str]]) -> None:
    """Write rows to the table, in the order of runtimes and models, and the report from it."""
    known = list(csv.reader(TABLE.read_text(encoding="utf-8").splitlines()))[1:] if TABLE.exists() else []
    table = {(row[0], row[1]): row for row in [*known, *rows]}
    runtimes = [runtime for format in FORMATS for runtime in (format, *FURTHER.get(format, ()))]
    ordered = [table[key] for key in ((runtime, name) for runtime in runtimes for name in PLANS) if key in table]
    with TABLE.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *ordered])
    title, command, *about = (__doc__ or "").strip().split("\n\n")
    lines = [f"| {' | '.join(row)} |" for row in [COLUMNS, ["---"] * len(COLUMNS), *ordered]]
    pieces = [f"# {title.rstrip('.')}", f"    {command}", *about[1:], "\n".join(lines)]
    REPORT.write_text("\n\n".join(pieces) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", choices=FORMATS, default="openvino")
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--only", default=",".join(PLANS))
    parser.add_argument("--work", type=Path, default=Path("runs/equal-tokens"))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for name in args.only.split(","):
        with tempfile.TemporaryDirectory() as space:
            keep(compared(name, args.format, args.n, args.work, Path(space)))


if __name__ == "__main__":
    main()
