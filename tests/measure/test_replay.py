"""Hidden states from the last plan's path change nothing, not by a bit; what a family does with them is found out."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sensitivity.measure.evaluation import Rows, answer, example_rows
from sensitivity.measure.generate.batches import batches_by_image
from sensitivity.measure.install.plan_in_model import quantized
from sensitivity.measure.memory.prefix_cache import PrefixCache
from sensitivity.models.discovery import inspect
from sensitivity.models.loading import load
from sensitivity.models.vlm import VLM
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.spec.plan import Plan
from sensitivity.tasks.examples.types import Task
from sensitivity.tasks.table import task

WIDTHS = st.sampled_from([None, 2, 3, 8])


def run(vlm: VLM, asked: Task, parts: Any, plan: Plan, prefix_cache: PrefixCache | None, size: int = 3) -> Rows:
    """All rows of a task, a few images at a time."""
    rows: Rows = {}
    if prefix_cache:
        prefix_cache.set_plan(plan)
    clusters = list(dict.fromkeys(example.cluster for example in asked.examples))
    with quantized(vlm.model, parts, plan):
        for start in range(0, len(clusters), size):
            some = set(clusters[start : start + size])
            few = dataclasses.replace(asked, examples=tuple(e for e in asked.examples if e.cluster in some))
            for number, batch in enumerate(batches_by_image(vlm, few)):
                found = example_rows(asked, batch, *answer(vlm, asked, batch, prefix_cache, (start, number)))
                for name, values in found.items():
                    rows.setdefault(name, []).extend(values)
    return rows


def proven(vlm: VLM, parts: Any, limit: int = 1 << 30) -> PrefixCache:
    prefix_cache = PrefixCache(vlm.model, parts, limit)
    prefix_cache.set_plan(Plan.uniform(parts, None))
    asked = task("vqa", n=4)
    few = next(batches_by_image(vlm, asked))
    prefix_cache.verify_boundaries(lambda: answer(vlm, asked, few, prefix_cache, "proof"))
    return prefix_cache


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    by=st.sampled_from(["part", "group", "kind", "group.kind", "block"]),
    name=st.sampled_from(["vqa", "ground"]),
    n=st.integers(1, 12),
    size=st.integers(1, 4),
    limit=st.sampled_from([0, 200_000, 1 << 30]),
    widths=st.lists(st.lists(WIDTHS, min_size=40, max_size=40), min_size=3, max_size=3),
    shared=st.lists(st.integers(0, 20), min_size=3, max_size=3),
)
def test_bit_for_bit_what_is_computed_without(
    scenes_llava: VLM, by: str, name: str, n: int, size: int, limit: int, widths: Any, shared: list[int]
) -> None:
    parts = inspect(scenes_llava, by=by)
    asked, prefix_cache, bits = task(name, n=n), proven(scenes_llava, parts, limit), widths[0]
    for start, fresh in zip(shared, widths, strict=True):
        bits = [*bits[:start], *fresh[start:]]  # a plan that shares a prefix with the one before
        chosen = (None if width is None else scheme("rtn", width, group="tensor") for width in bits)
        plan = Plan(tuple(zip(parts.names, chosen, strict=False)))
        assert run(scenes_llava, asked, parts, plan, prefix_cache, size) == run(
            scenes_llava, asked, parts, plan, None, size
        )


@pytest.mark.parametrize("name", ["vqa", "caption"])
def test_bit_for_bit_with_a_connector_of_blocks_and_a_language_model_inside(name: str) -> None:
    """BLIP-2: questions are read on top of their images, and captions written out, by the inner model."""
    vlm = load("embedded:scenes-blip2")
    parts = inspect(vlm, by="group")
    asked, prefix_cache = dataclasses.replace(task(name, n=7), exact=False), proven(vlm, parts)
    assert all(prefix_cache.stages[part].boundaries for part in ("vision", "connector", "language"))
    bits = [8] * len(parts.names)
    answers = set()
    for place in (0, 4, 2, len(bits) - 1, len(bits) - 1):
        bits[place] = 2 if bits[place] == 8 else 3
        plan = Plan(tuple((one, scheme("rtn", width)) for one, width in zip(parts.names, bits, strict=True)))
        ours, theirs = run(vlm, asked, parts, plan, prefix_cache), run(vlm, asked, parts, plan, None)
        assert ours == theirs
        answers.add(tuple(theirs["answer"]))
    assert len(answers) > 1


def counted(vlm: VLM, action: Any) -> int:
    """How many blocks really ran."""
    blocks = [*vlm.vision.encoder.layers, *vlm.model.model.language_model.layers]
    count = 0

    def hook(*_: Any) -> None:
        nonlocal count
        count += 1

    handles = [block.mlp.register_forward_hook(hook) for block in blocks]
    action()
    for handle in handles:
        handle.remove()
    return count


def test_only_what_lies_below_the_first_difference_runs(scenes_llava: VLM) -> None:
    parts = inspect(scenes_llava, by="group")
    asked, prefix_cache = task("vqa", n=5), proven(scenes_llava, parts)
    four, three = scheme("rtn", 4), scheme("rtn", 3)
    base = Plan.uniform(parts, four)
    # vision 2 + 2 + 2 blocks; language 1 + 1 + 2, once for the image and once for the questions
    below = {
        "vision.front": 6 + 8, "vision.middle": 4 + 8, "vision.end": 2 + 8, "connector": 8, "language.front": 8,
        "language.middle": 6, "language.end": 4,
    }  # fmt: skip
    assert counted(scenes_llava, lambda: run(scenes_llava, asked, parts, base, prefix_cache)) == 14
    for name, blocks in below.items():
        run(scenes_llava, asked, parts, base, prefix_cache)
        changed = Plan.of(parts, {"*": four, name: three})
        assert (
            counted(scenes_llava, lambda plan=changed: run(scenes_llava, asked, parts, plan, prefix_cache)) == blocks
        ), name


def test_memory_does_not_grow_with_plans_and_keeps_its_limit(scenes_llava: VLM) -> None:
    parts = inspect(scenes_llava, by="group")
    asked, prefix_cache = task("vqa", n=15), proven(scenes_llava, parts)
    sizes = []
    for width in (2, 3, 4, 6):
        run(scenes_llava, asked, parts, Plan.uniform(parts, scheme("rtn", width)), prefix_cache)
        sizes.append(prefix_cache._bytes)
    assert len(set(sizes)) == 1
    tight = proven(scenes_llava, parts, limit=sizes[0] // 3)
    for width in (2, 3):
        run(scenes_llava, asked, parts, Plan.uniform(parts, scheme("rtn", width)), tight)
        assert 0 <= tight._bytes <= sizes[0] // 3
    held = sum(t.numel() * 4 for entry in tight._caches.values() for _, *kv in entry for t in kv)
    assert held <= tight._bytes


def test_a_feature_layer_that_is_not_the_last_is_found_out(scenes_llava: VLM) -> None:
    """With vision_feature_layer -2 the state after the last block is not what the connector reads."""
    other = dataclasses.replace(scenes_llava, model=copy.deepcopy(scenes_llava.model))
    other.model.config.vision_feature_layer = -2
    parts = inspect(other, by="part")
    prefix_cache = proven(other, parts)
    assert prefix_cache.stages["vision"].boundaries == [5]
    asked = task("vqa", n=5)
    for width in (4, 8):
        plan = Plan.of(parts, {"vision": scheme("rtn", 4), "language": scheme("rtn", width)})
        assert run(other, asked, parts, plan, prefix_cache) == run(other, asked, parts, plan, None)


def test_the_plain_path_of_other_families_shares_the_vision_tower(scenes_llava: VLM) -> None:
    family = dataclasses.replace(scenes_llava.family, shares_prefix=False)
    other = dataclasses.replace(scenes_llava, family=family)
    parts = inspect(other, by="part")
    asked, prefix_cache = dataclasses.replace(task("caption", n=5), exact=False), proven(other, parts)
    plans = [Plan.of(parts, {"vision": scheme("rtn", 4), "language": scheme("rtn", width)}) for width in (2, 3, 8)]
    ours = [run(other, asked, parts, plan, prefix_cache) for plan in plans]  # with the last plan's answers as drafts
    theirs = [run(other, asked, parts, plan, None) for plan in plans]  # by generate()
    assert ours == theirs
    assert len({tuple(rows["answer"]) for rows in theirs}) > 1


@pytest.mark.parametrize(
    ("module", "defect"), [("sensitivity.measure.evaluation", True), ("transformers.models", False)]
)
def test_a_defect_is_not_taken_for_a_model_that_shares_less(scenes_llava: VLM, module: str, defect: bool) -> None:
    """A replay that fails in the model's code means fewer boundaries; one that fails in ours must be seen."""
    namespace: dict[str, Any] = {"__name__": module}
    exec("def failing(): raise TypeError('wrong')", namespace)
    prefix_cache, calls = PrefixCache(scenes_llava.model, inspect(scenes_llava, by="group"), 1 << 30), []

    def run_once() -> str:
        calls.append(1)
        if len(calls) == 2:
            namespace["failing"]()
        return "an answer"

    boundaries = sum(len(stage.boundaries) for stage in prefix_cache.stages.values())
    prefix_cache.set_plan(Plan.uniform(prefix_cache.parts, None))
    if defect:
        with pytest.raises(TypeError, match="wrong"):
            prefix_cache.verify_boundaries(run_once)
    else:
        prefix_cache.verify_boundaries(run_once)
        assert sum(len(stage.boundaries) for stage in prefix_cache.stages.values()) == boundaries - 1


def test_forwards_are_put_back_after_an_exception(scenes_llava: VLM) -> None:
    prefix_cache = proven(scenes_llava, inspect(scenes_llava, by="group"))
    with pytest.raises(KeyError), prefix_cache.reuse("x", "vision", "language"):
        raise KeyError
    assert not [m for m in scenes_llava.model.modules() if isinstance(m, torch.nn.Module) and "forward" in vars(m)]
