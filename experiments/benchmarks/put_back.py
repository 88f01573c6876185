"""Answers that a plan makes wrong, and how many are right again once what has most blame is in full precision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
from torch import Tensor

from sensitivity import Plan, inspect, scheme
from sensitivity.measure.attribution.blame import Blame, blame_of
from sensitivity.measure.attribution.weight_errors import plan_changes
from sensitivity.measure.evaluation import evaluate
from sensitivity.measure.gradients.path_integral import integrate_path
from sensitivity.measure.install.plan_in_model import quantized
from sensitivity.measure.passes.token_batches import answer_batches
from sensitivity.models.vlm import VLM
from sensitivity.spec.components import ComponentMap
from sensitivity.tasks.examples.types import Example, Task
from sensitivity.tasks.table import task as find_task

SHARE, ROUGHLY = 0.1, 0.05  # of tokens and weights; of the change of the loss that an integral may miss here
# an answer is clearly wrong if the right one's loss is above this (of each token, in nats); any change mends near ties
CLEAR_LOSS = 3.0
CLEAR_SEED, MOST_CLEAR = 100_011, 6000  # of the examples that are asked for such answers, and how many at most
# behind which module the features of the image are put back, and how many of its tokens come before the patches
BEHIND = {"llava": ("model.multi_modal_projector", 0), "blip2": ("vision_model.encoder.layers.5", 1)}


def behind(vlm: VLM) -> tuple[str, int]:
    return BEHIND["blip2" if "blip2" in vlm.name else "llava"]


def blame_on_task(vlm: VLM, parts: ComponentMap, changes: Mapping[str, Tensor], task: Task, passes: int = 32) -> Blame:
    integral = integrate_path(vlm, parts, changes, lambda: answer_batches(vlm, [task], 8), ROUGHLY, passes)
    return blame_of(parts, vlm.family, integral)


def measured(vlm: VLM, task: Task, column: str) -> np.ndarray:
    rows = evaluate(vlm, task)
    by_id = dict(zip(rows["example"], rows[column], strict=True))
    return np.array([float(by_id[example.id]) for example in task.examples])


def lost(vlm: VLM, parts: ComponentMap, plan: Plan, answers: int, clearly: bool = False) -> tuple[Task, int]:
    """So many answers that a plan turns from right to wrong, and how many examples were asked for them.

    `clearly`: only those whose right answer has a loss above CLEAR_LOSS under the plan; they are of other examples than
    the ones on which that limit was chosen.
    """
    flipped: list[Example] = []
    asked, seed = 0, CLEAR_SEED if clearly else 11
    while len(flipped) < answers and asked < (MOST_CLEAR if clearly else 2000):
        task = find_task("vqa", n=250, seed=seed + asked)
        with quantized(vlm.model, parts, plan):
            wrong = measured(vlm, task, "score") == 0
            if clearly:
                wrong &= measured(vlm, task, "nll") > CLEAR_LOSS
        wrong &= measured(vlm, task, "score") == 1
        flipped += [example for example, is_lost in zip(task.examples, wrong, strict=True) if is_lost]
        asked += 250
    return replace(task, examples=tuple(flipped[:answers])), asked


@contextmanager
def watched(vlm: VLM, change: object) -> Iterator[None]:
    handle = vlm.model.get_submodule(behind(vlm)[0]).register_forward_hook(change)
    try:
        yield
    finally:
        handle.remove()


def hidden(output: object) -> Tensor:
    found = output[0] if isinstance(output, tuple) else output
    assert isinstance(found, Tensor)
    return found


def float_features(vlm: VLM, task: Task) -> Tensor:
    kept: list[Tensor] = []
    with watched(vlm, lambda module, args, output: kept.append(hidden(output).clone())):
        evaluate(vlm, task, plain=True)
    return kept[0]


def mended_with(vlm: VLM, task: Task, features: Tensor, tokens: Sequence[int]) -> float:
    """The score of one example when these patches have their float features."""
    places = [token + behind(vlm)[1] for token in tokens]

    def change(module: object, args: object, output: object) -> object:
        found = hidden(output).clone()
        found.reshape(-1, found.shape[-1])[places] = features.reshape(-1, found.shape[-1])[places].to(found.dtype)
        return (found, *output[1:]) if isinstance(output, tuple) else found

    with watched(vlm, change):
        (score,) = evaluate(vlm, task, plain=True)["score"]
    return float(score)


def most(values: Tensor) -> list[int]:
    found: list[int] = values.topk(max(1, round(SHARE * len(values)))).indices.tolist()
    return found


def tokens(vlm: VLM, answers: int, bits: int, clearly: bool = False) -> dict[str, object]:
    parts = inspect(vlm, by="part")
    chosen = {"vision": scheme("rtn", bits)} | ({} if "blip2" in vlm.name else {"connector": scheme("rtn", bits)})
    plan = Plan.of(parts, chosen)
    task, asked = lost(vlm, parts, plan, answers, clearly)
    found = blame_on_task(vlm, parts, plan_changes(vlm.model, parts, plan), task)
    grids = {i: grid.flatten() for i, grid in found.regions.items()}
    draw, hits = np.random.default_rng(0), {"most": 0.0, "random": 0.0, "least": 0.0, "all": 0.0}
    for i, example in enumerate(task.examples):
        one, length = replace(task, examples=(example,)), len(grids[i])
        own = float_features(vlm, one)
        picks = {
            "most": [most(grids[i])],
            "random": [draw.choice(length, len(most(grids[i])), replace=False).tolist() for _ in range(3)],
            "least": [most(-grids[i])],
            "all": [list(range(length))],
        }
        with quantized(vlm.model, parts, plan):
            for name, choices in picks.items():
                hits[name] += sum(mended_with(vlm, one, own, choice) for choice in choices) / len(choices)
    return {"asked": asked, "flipped": len(task.examples), **hits}


def parts_back(vlm: VLM, answers: int, bits: int = 3, clearly: bool = False) -> dict[str, object]:
    parts = inspect(vlm, by="linear")
    coarse = scheme("rtn", bits)
    plan = Plan.uniform(parts, coarse)
    task, asked = lost(vlm, parts, plan, answers, clearly)
    # blame is of other examples than those that are mended: half of them
    half = len(task.examples) // 2
    blamed, mended = (replace(task, examples=some) for some in (task.examples[:half], task.examples[half:]))
    shares = blame_on_task(vlm, parts, plan_changes(vlm.model, parts, plan), blamed).components
    sizes = {component.name: component.numel for component in parts.components}
    draw = np.random.default_rng(0)
    orders = {
        "most": [sorted(shares, key=lambda name: -shares[name] / sizes[name])],
        "random": [draw.permutation(list(sizes)).tolist() for _ in range(5)],
        "least": [sorted(shares, key=lambda name: shares[name] / sizes[name])],
    }
    hits = {}
    for name, choices in orders.items():
        scores = []
        for order in choices:
            back = first_that_fit(order, sizes, SHARE * sum(sizes.values()))
            with quantized(vlm.model, parts, Plan(tuple((n, None if n in back else coarse) for n in sizes))):
                scores.append(measured(vlm, mended, "score").sum())
        hits[name] = float(np.mean(scores))
    return {"asked": asked, "flipped": len(mended.examples), **hits, "all": len(mended.examples)}


def first_that_fit(order: Sequence[str], sizes: Mapping[str, int], room: float) -> set[str]:
    found: set[str] = set()
    for name in order:
        if sizes[name] <= room:
            found.add(name)
            room -= sizes[name]
    return found
