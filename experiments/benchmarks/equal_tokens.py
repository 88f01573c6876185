"""Whether packed codes in OpenVINO give the tokens of the quantized model in torch, on 500 examples of several models.

python -m experiments.benchmarks.equal_tokens [--n 500] [--only MODEL,...]   writes reports/equal-tokens.md

Every answer is generated to its end by both, one example at a time, in float32 with one thread. Plans are coarse, since
one that changes no answer proves nothing: how many it changes is counted on the first 100 examples. The embedded models
are trained; the others have random weights, so that their answers mean nothing, but their tokens are as exact.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from experiments.true_shapes import SHAPES, qwen2_vl, save, smolvlm
from sensitivity.formats.openvino.run import OpenVINOModel, check_arrived
from sensitivity.formats.table import write
from sensitivity.formats.writing.job import Job
from sensitivity.measure.generate.answer_tokens import end_tokens
from sensitivity.measure.generate.batches import batches_by_image, on_device
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


def tokens_in_torch(vlm: VLM, task: Task) -> list[list[int]]:
    """The tokens that transformers' greedy search generates for each example."""
    found = []
    for example in task.examples:
        (batch,) = batches_by_image(vlm, replace(task, examples=(example,)), plain=True)
        inputs = on_device(vlm, batch.inputs)
        output = vlm.model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=task.max_new_tokens)
        found.append(output[0, inputs["input_ids"].shape[1] :].tolist())
    return found


def tokens_in_openvino(vlm: VLM, folder: Path, task: Task) -> list[list[int]]:
    """The tokens that the packed codes generate."""
    check_arrived(folder)
    model, found = OpenVINOModel(folder, torch.get_num_threads()), []
    for example in task.examples:
        (batch,) = batches_by_image(vlm, replace(task, examples=(example,)), plain=True)
        features, ids = model.image_features(**model.image_inputs(batch.inputs)), batch.inputs["input_ids"][0].tolist()
        found.append(model.generate(ids, features, end_tokens(vlm), task.max_new_tokens))
    return found


def compared(name: str, n: int, space: Path) -> str:
    """One row of the report."""
    model = str(save(name, space / "model")) if name in SHAPES else name
    vlm = load(model, dtype="float32")
    parts: ComponentMap = inspect(vlm, by="part")
    plan, task = Plan.of(parts, PLANS[name]), find_task("vqa", "evaluation", n)
    write(Job(vlm, parts, plan, {"model": model}, dtype=torch.float32), space / "out", "openvino")
    native = tokens_in_torch(vlm, replace(task, examples=task.examples[:CHANGED]))
    with quantized(vlm.model, parts, plan):
        expected = tokens_in_torch(vlm, task)
    found = tokens_in_openvino(vlm, space / "out", task)
    same = sum(a == b for a, b in zip(found, expected, strict=True))
    changed = sum(a != b for a, b in zip(native, expected, strict=False))
    distinct = len(set(map(tuple, expected)))
    row = (
        f"| {name} | {plan.describe()} | {same} of {len(expected)} | {sum(map(len, expected))} | {distinct} | "
        f"{changed} of {len(native)} |"
    )
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--only", default=",".join(PLANS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in args.only.split(","):
        with tempfile.TemporaryDirectory() as space:
            rows.append(compared(name, args.n, Path(space)))
    names = ("model", "plan", "answers with equal tokens", "tokens", "different answers", "changed by the plan")
    heads = f"| {' | '.join(names)} |\n{'|---' * len(names)}|"
    about = (__doc__ or "").split("\n\n")
    lines = [f"# {about[0].rstrip('.')}", f"    {about[1].partition('   ')[0]}", *about[2:]]
    REPORT.write_text("\n\n".join([*lines, "\n".join([heads, *rows])]).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
