"""Whether blame is right: planted noise is found, and putting back what has most blame mends answers.

    python -m experiments.benchmarks.blame [--cases 100] [--examples 1500]

Noise: the embedded LLaVA at 4 bits by group.kind, and in one component noise of the size of its own rounding error at
2 bits; is that the component with the most blame? Answers: the vision tower and the projector at 3 bits; of each answer
that was right and is wrong now, the 10 % of image tokens with most blame, or others, get their float features back
behind the projector. Flatness: how much of all blame lies in those 10 %, beside a model whose weights are shuffled.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sensitivity import Plan, inspect, load, scheme
from sensitivity.measure.attribution.blame import blame
from sensitivity.measure.attribution.weight_errors import plan_changes
from sensitivity.measure.calibrate.calibration import calibration_examples
from sensitivity.measure.evaluation import evaluate
from sensitivity.measure.gradients.path_integral import path_integral
from sensitivity.measure.install.plan_in_model import quantized
from sensitivity.measure.passes.token_batches import batches
from sensitivity.models.vlm import VLM
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.files import overwrite
from sensitivity.tasks.examples.types import Example, Task
from sensitivity.tasks.table import task as find_task

ROOT = Path(__file__).parent.parent.parent
MODEL, SHARE = "embedded:scenes-llava", 0.1
PROJECTOR = "model.multi_modal_projector"


def found_noise(vlm: VLM, cases: int, examples: int = 8) -> list[tuple[str, str]]:
    """For each case, the component with planted noise and the one with the most blame."""
    parts = inspect(vlm, by="group.kind")
    coarse, fine = (plan_changes(vlm.model, parts, Plan.uniform(parts, scheme("rtn", bits))) for bits in (2, 4))
    pairs = []
    for case in range(cases):
        draw = torch.Generator().manual_seed(case)
        planted = parts.components[case % len(parts.components)]
        changes = dict(fine)
        for weight in planted.weights:
            noise = torch.randn(fine[weight.name].shape, generator=draw)
            changes[weight.name] = fine[weight.name] + noise * coarse[weight.name].norm() / noise.norm()
        data = calibration_examples(["vqa"], examples, case)
        integral = path_integral(vlm, parts, changes, lambda data=data: batches(vlm, data, 8))  # type: ignore[misc]
        told = blame(parts, vlm.family, integral).components
        pairs.append((planted.name, max(told, key=lambda name: told[name])))
    return pairs


def regions(vlm: VLM, parts: ComponentMap, plan: Plan, task: Task) -> dict[int, Tensor]:
    changes = plan_changes(vlm.model, parts, plan)
    integral = path_integral(vlm, parts, changes, lambda: batches(vlm, [task], 8))
    return {i: grid.flatten() for i, grid in blame(parts, vlm.family, integral).regions.items()}


def most(values: Tensor) -> Tensor:
    return values.topk(max(1, round(SHARE * len(values)))).indices


@contextmanager
def float_tokens(vlm: VLM, float_features: Tensor, tokens: Sequence[int]) -> Iterator[None]:
    """Inside the block, these image tokens leave the projector as in the float model."""

    def hook(module: object, args: object, output: Tensor) -> Tensor:
        mended = output.clone()
        mended.reshape(-1, output.shape[-1])[list(tokens)] = float_features[list(tokens)].to(output.dtype)
        return mended

    handle = vlm.model.get_submodule(PROJECTOR).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def features(vlm: VLM, task: Task) -> Tensor:
    kept: list[Tensor] = []
    handle = vlm.model.get_submodule(PROJECTOR).register_forward_hook(lambda module, args, output: kept.append(output))
    evaluate(vlm, task, plain=True)
    handle.remove()
    return kept[0].reshape(-1, kept[0].shape[-1]).clone()


def right(vlm: VLM, task: Task) -> np.ndarray:
    rows = evaluate(vlm, task)
    by_id = dict(zip(rows["example"], rows["score"], strict=True))
    return np.array([float(by_id[example.id]) for example in task.examples])


def mended(vlm: VLM, count: int) -> dict[str, object]:
    """How many flipped answers are right again when a tenth of the image tokens is put back to float."""
    parts = inspect(vlm, by="part")
    plan = Plan.of(parts, {"vision": scheme("rtn", 3), "connector": scheme("rtn", 3)})
    task = find_task("vqa", n=count, seed=11)
    with quantized(vlm.model, parts, plan):
        wrong = right(vlm, task) == 0
    wrong &= right(vlm, task) == 1
    flipped: list[Example] = [example for example, lost in zip(task.examples, wrong, strict=True) if lost]
    lost = replace(task, examples=tuple(flipped))
    grids = regions(vlm, parts, plan, lost)
    draw, hits = np.random.default_rng(0), {"most blame": 0.0, "least blame": 0.0, "at random": 0.0, "all": 0.0}
    for i, example in enumerate(flipped):
        one = replace(task, examples=(example,))
        own, length = features(vlm, one), len(grids[i])
        tokens = most(grids[i]).tolist()
        picks = {
            "most blame": [tokens],
            "least blame": [most(-grids[i]).tolist()],
            "at random": [draw.choice(length, len(tokens), replace=False).tolist() for _ in range(3)],
            "all": [list(range(length))],
        }
        with quantized(vlm.model, parts, plan):
            for name, choices in picks.items():
                for chosen in choices:
                    with float_tokens(vlm, own, chosen):
                        hits[name] += float(right_plain(vlm, one)) / len(choices)
    return {"examples": count, "flipped": len(flipped), **hits}


def right_plain(vlm: VLM, task: Task) -> float:
    (score,) = evaluate(vlm, task, plain=True)["score"]
    return float(score)


def concentration(vlm: VLM, examples: int = 64) -> float:
    """The share of all blame, without signs, that lies in the tenth of image tokens with most of it."""
    parts = inspect(vlm, by="part")
    (task,) = calibration_examples(["vqa"], examples, 5)
    grids = regions(vlm, parts, Plan.uniform(parts, scheme("rtn", 3)), task)
    return float(np.mean([float(g.abs()[most(g.abs())].sum() / g.abs().sum()) for g in grids.values()]))


def places(vlm: VLM, examples: int = 64) -> float:
    """How unevenly blame lies over the places of an image, on average over examples: deviation over mean."""
    parts = inspect(vlm, by="part")
    (task,) = calibration_examples(["vqa"], examples, 6)
    grids = regions(vlm, parts, Plan.uniform(parts, scheme("rtn", 3)), task)
    mean = torch.stack([g.abs() / g.abs().sum() for g in grids.values()]).mean(0)
    return float(mean.std() / mean.mean())


def shuffled(vlm: VLM) -> VLM:
    """The same model with the entries of every weight in random order."""
    other = copy.copy(vlm)
    other.model = copy.deepcopy(vlm.model)
    draw = torch.Generator().manual_seed(0)
    for weight in inspect(vlm, by="part").weights:
        parameter = other.model.get_parameter(weight.name)
        flat = parameter.data.flatten()
        parameter.data = flat[torch.randperm(len(flat), generator=draw)].reshape(parameter.shape)
    return other


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--examples", type=int, default=1500)
    args = parser.parse_args()
    vlm = load(MODEL, dtype="float32")
    answers = mended(vlm, args.examples)
    print(answers, flush=True)
    other = shuffled(vlm)
    flat = {name: (concentration(one), places(one)) for name, one in (("trained", vlm), ("shuffled", other))}
    print(flat, flush=True)
    pairs = found_noise(vlm, args.cases)
    hits = sum(planted == told for planted, told in pairs)
    print(hits, [pair for pair in pairs if pair[0] != pair[1]], flush=True)
    missed = ", ".join(f"{planted} (blamed: {told})" for planted, told in pairs if planted != told) or "none"
    rows = "\n".join(f"| {name} | {value:g} |" for name, value in answers.items())
    overwrite(
        ROOT / "reports" / "blame.md",
        "# Whether blame is right\n\n"
        f"`python -m experiments.benchmarks.blame --cases {args.cases} --examples {args.examples}` on {MODEL}.\n\n"
        f"Planted noise has the most blame in {hits} of {len(pairs)} cases. Missed: {missed}.\n\n"
        "Answers that vision tower and projector at 3 bits flip from right to wrong, and how many are right again\n"
        f"when {SHARE:.0%} of the image tokens get their float features back:\n\n"
        f"| what | answers |\n|---|---|\n{rows}\n\n"
        f"The {SHARE:.0%} of image tokens with most blame hold {flat['trained'][0]:.0%} of it in the trained model\n"
        f"and {flat['shuffled'][0]:.0%} in the one with shuffled weights; over places, averaged over examples, blame\n"
        f"deviates by {flat['trained'][1]:.2f} of its mean in the trained model, by {flat['shuffled'][1]:.2f} there.\n",
    )


if __name__ == "__main__":
    main()
