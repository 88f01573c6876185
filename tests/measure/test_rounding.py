"""Rounded activations and caches in a model: against a slow version, at 16 bits, and fast against plain."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import saved_vlms
import small_vlms
import torch
from few import few
from torch import nn

from sensitivity.analysis.importance.ranking import rank
from sensitivity.analysis.observations import observations_of
from sensitivity.api.sweeping import grid, sweep, with_calibration
from sensitivity.measure.calibrate.calibration import calibration_examples, calibration_statistics
from sensitivity.measure.evaluation import evaluate
from sensitivity.measure.install.plan_in_model import quantized
from sensitivity.measure.memory.weight_codes import WeightCodes
from sensitivity.measure.passes.token_batches import answer_batches as token_batches
from sensitivity.measure.passes.token_batches import calibration_pass
from sensitivity.models.discovery import discover, inspect
from sensitivity.models.loading import load
from sensitivity.models.vlm import VLM
from sensitivity.quantize.run_time.inputs import round_inputs
from sensitivity.quantize.run_time.keys_and_values import round_cached
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.quantize.solving import fake_quantize
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Plan
from sensitivity.spec.sizes import size
from sensitivity.study.sharing import tidy
from sensitivity.tasks.table import TASKS, task


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


class Slow(nn.Module):
    """A linear layer that rounds by itself: what a scheme means, written out."""

    def __init__(self, linear: nn.Linear, activations: int, cache: int, largest: torch.Tensor | None = None) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(fake_quantize(linear.weight.detach(), scheme("rtn", 4))), linear.bias
        self.activations, self.cache, self.largest = activations, cache, largest

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x if self.activations == 16 else round_inputs(x, self.activations, self.largest)
        y = nn.functional.linear(x, self.weight, self.bias)
        return y if self.cache == 16 else round_cached(y, self.cache, 32)


def logits(vlm: VLM) -> torch.Tensor:
    batch = next(token_batches(vlm, [task("vqa", n=3)]))
    with torch.inference_mode():
        return torch.as_tensor(calibration_pass(vlm, batch).logits)


def slow(vlm: VLM, parts: ComponentMap, plan: Plan, largest: Any = None) -> VLM:
    """The model with every layer of a plan replaced."""
    model = copy.deepcopy(vlm.model)
    for component in parts.components:
        if (chosen := plan[component.name]) is not None:
            for weight in component.weights:
                cache = chosen.cache if weight.cached else 16
                reach = None if largest is None else largest[weight.shares_input or weight.reader]
                model.set_submodule(
                    weight.module, Slow(model.get_submodule(weight.module), chosen.activations, cache, reach)
                )
    return dataclasses.replace(vlm, model=model)


@pytest.mark.parametrize("by", ["part", "kind"])
def test_a_plan_rounds_what_it_says_and_nothing_else(scenes_llava: VLM, by: str) -> None:
    parts = inspect(scenes_llava, by=by)
    before = logits(scenes_llava)
    plan = Plan.of(
        parts, {"vision": scheme("rtn", 4, activations=4), "language": scheme("rtn", 4, activations=8, cache=3)}
    )
    with quantized(scenes_llava.model, parts, plan):
        found = logits(scenes_llava)
    assert torch.equal(found, logits(slow(scenes_llava, parts, plan)))
    assert not torch.equal(found, before)
    assert torch.equal(logits(scenes_llava), before)  # and afterwards the model is itself again


@pytest.mark.parametrize("what", ["activations", "cache"])
def test_each_width_alone_changes_the_answers_likelihood(scenes_llava: VLM, what: str) -> None:
    """keep leaves weights as they are: what changes is what is rounded, the more the fewer the bits."""
    parts, full = inspect(scenes_llava, by="part"), logits(scenes_llava)
    moved = []
    for bits in (2, 4, 8):
        plan = Plan.uniform(parts, scheme("keep", 16, **{what: bits}))
        with quantized(scenes_llava.model, parts, plan) as changed:
            assert changed == set()  # no weight
            moved.append(float((logits(scenes_llava) - full).abs().mean()))
    assert moved == sorted(moved, reverse=True)
    assert moved[-1] > 0


def test_16_bits_are_full_precision_and_leave_no_hook(scenes_llava: VLM) -> None:
    parts = inspect(scenes_llava, by="kind")
    plan, own = Plan.uniform(parts, scheme("keep", 16)), hooks(scenes_llava.model)
    assert plan.is_native
    assert Plan.uniform(parts, scheme("rtn", 4, activations=16, cache=16)) == Plan.uniform(parts, scheme("rtn", 4))
    with quantized(scenes_llava.model, parts, Plan.uniform(parts, scheme("rtn", 4, activations=4, cache=4))):
        assert hooks(scenes_llava.model) > own
    assert hooks(scenes_llava.model) == own


def test_a_fixed_range_is_the_largest_input_of_the_calibration_data(scenes_llava: VLM) -> None:
    parts = inspect(scenes_llava, by="part")
    statistics = calibration_statistics(scenes_llava, parts, ["vqa"], n=4)
    inputs = {weight.shares_input or weight.reader: weight for weight in parts.weights}
    seen = {name: torch.zeros(()) for name in inputs}

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            seen[name] = torch.maximum(seen[name], args[0].abs().max())

        return hook

    model = scenes_llava.model
    handles = [model.get_submodule(w.reader).register_forward_pre_hook(note(name)) for name, w in inputs.items()]
    with torch.inference_mode():
        for batch in token_batches(scenes_llava, calibration_examples(["vqa"], 4, 0)):
            calibration_pass(scenes_llava, batch)
    for handle in handles:
        handle.remove()
    how = {"activations": 4, "activation_scale": "tensor", "calibration": statistics.facts}
    plan = Plan.uniform(parts, scheme("rtn", 4, **how))
    for memory in (None, WeightCodes()):
        with quantized(model, parts, plan, memory, statistics):
            found = logits(scenes_llava)
        assert torch.equal(found, logits(slow(scenes_llava, parts, plan, seen)))
    with pytest.raises(UserError, match="rtn needs calibration data"), quantized(model, parts, plan):
        pass


def test_a_scale_search_rounds_what_the_layer_before_hands_on(scenes_llava: VLM) -> None:
    """With awq's factors inputs arrive divided, and are rounded so; at 8 bits it is nearly the same as not at all."""
    parts = inspect(scenes_llava, by="part")
    statistics = calibration_statistics(scenes_llava, parts, ["vqa"], n=4)
    memory = WeightCodes()
    found = []
    for more in ({}, {"activations": 8}, {"activations": 8, "activation_scale": "tensor"}, {"activations": 3}):
        plan = Plan.of(parts, {"language": scheme("awq", 4, calibration=statistics.facts, group=32, **more)})
        with quantized(scenes_llava.model, parts, plan, memory, statistics):
            found.append(logits(scenes_llava))
    errors = [float((one - found[0]).abs().mean()) for one in found[1:]]
    assert 0 < errors[0] < errors[1] < errors[2]
    # weights are solved once for all widths of activations
    assert len(memory) == len(parts["language"].weights)


@pytest.mark.parametrize("scale", few(["token", "tensor"], ["tensor"]))
def test_the_exposed_path_calibrates_behind_rounded_layers(scenes_llava: VLM, scale: str) -> None:
    parts = inspect(scenes_llava, by="part")
    found = {}
    for path in ("float", "exposed"):
        statistics = calibration_statistics(scenes_llava, parts, ["vqa"], n=2, path=path)
        how = {"activations": 3, "activation_scale": scale, "calibration": statistics.facts}
        plan = Plan.of(parts, {"vision": scheme("gptq", 3, **how)})
        runs = []
        for memory in (WeightCodes(), None):
            with quantized(scenes_llava.model, parts, plan, memory, statistics):
                runs.append(logits(scenes_llava))
        assert torch.equal(*runs)
        found[path] = runs[0]
    assert not torch.equal(found["float"], found["exposed"])


FAMILIES = [name for name in saved_vlms.BUILDERS if name != "blip2_itm"]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("family", few(FAMILIES, ["llava"]))
def test_fast_equals_plain(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefixes, drafts and caches respect what is rounded: letter for letter, in float64.

    In float32 sums over other shapes differ in their last bits, and a value that lies between two levels by chance may
    then go to the other one, which moves an answer that was unsure.
    """
    monkeypatch.setitem(
        TASKS, "free",
        lambda *asked: dataclasses.replace(TASKS["vqa"](*asked), name="free", exact=False, max_new_tokens=4),
    )  # fmt: skip
    rng = np.random.default_rng(sum(map(ord, family)))
    vlm = load(str(saved_vlms.save(family, tmp_path / "model")), dtype="float32")
    vlm = dataclasses.replace(vlm, model=vlm.model.double())
    parts = inspect(vlm, by=str(rng.choice(["part", "kind"])))
    some = [scheme("keep", 16, activations=4), scheme("rtn", 4, activations=8), None, scheme("rtn", 8, cache=2)]
    some += [scheme("keep", 16, cache=3, cache_group=5), scheme("rtn", 3, activations=3, cache=4)]
    plans = [Plan.of(parts, {name: some[rng.integers(len(some))] for name in parts.names}) for _ in range(4)]
    fast = sweep(vlm, parts, plans, ["vqa", "free"], tmp_path / "fast", n=8)
    plain = sweep(vlm, parts, plans, ["vqa", "free"], tmp_path / "plain", n=8, plain=True)
    for plan in plans:
        ours, theirs = (study.examples(plan).set_index(["task", "example"]) for study in (fast, plain))
        pd.testing.assert_frame_equal(ours[["score"]], theirs[["score"]])
        pd.testing.assert_series_equal(ours["nll"], theirs["nll"], rtol=1e-6, atol=1e-9)
        pd.testing.assert_series_equal(ours.loc["free", "answer"], theirs.loc["free", "answer"])
    assert plain.table()["free.nll"].nunique() > 2


def test_answers_read_from_a_rounded_cache_are_those_read_at_once(scenes_llava: VLM) -> None:
    """generate() reads one token at a time with a cache; the likelihood comes from one pass without."""
    parts, asked = inspect(scenes_llava, by="kind"), dataclasses.replace(task("caption", n=4), exact=False)
    with quantized(scenes_llava.model, parts, Plan.uniform(parts, scheme("keep", 16, cache=2, cache_group=4096))):
        shared, alone = evaluate(scenes_llava, asked), evaluate(scenes_llava, asked, plain=True)
    assert shared["answer"] == alone["answer"]
    likely = np.array([one["nll"] for one in (shared, alone, evaluate(scenes_llava, asked))], dtype=float)
    assert likely[0] == pytest.approx(likely[1], rel=1e-3, abs=2e-4)
    assert np.abs(likely[0] - likely[2]).max() > 1e-2  # although these answers survive a cache of two bits


@pytest.mark.parametrize("family", small_vlms.BUILDERS)
def test_keys_and_values_of_every_family_are_known(family: str) -> None:
    """Two layers per decoder block (and two more in cross-attention); none in encoders and towers."""
    model = small_vlms.on_meta(family)
    parts = discover(model, by="linear")
    cached = [weight for weight in parts.weights if weight.cached]
    if family in ("clip", "siglip", "blip2_retrieval"):  # they generate nothing
        assert all("text" in weight.name for weight in cached)
        return
    blocks = {"blip2_t5": 2 * 4, "florence2": 2 * 3, "mllama": 7}.get(family, small_vlms.BLOCKS)
    assert len(cached) == 2 * blocks
    assert all("encoder." not in weight.module.replace("encoder_attn", "") for weight in cached)


def test_a_cache_is_counted_beside_the_weights(scenes_llava: VLM) -> None:
    parts = inspect(scenes_llava, by="kind")
    plain = Plan.uniform(parts, scheme("rtn", 4))
    rounded = Plan.uniform(parts, scheme("rtn", 4, activations=8, cache=4, cache_group=16))
    assert size(parts, plain).cache_bits is None
    assert "cache_bits" not in size(parts, plain).to_json()
    assert size(parts, rounded).bits == size(parts, plain).bits
    rows = [weight.rows for weight in parts.weights if weight.cached]
    assert size(parts, rounded).cache_bits == sum(4 * width + 32 * -(-width // 16) for width in rows)
    half = Plan.of(parts, {"*": scheme("rtn", 4), "language.attn": scheme("keep", 16, cache=8, cache_group=16)})
    assert size(parts, half).cache_bits == sum(8 * width + 32 * -(-width // 16) for width in rows)


def test_only_what_has_a_cache_gets_one(scenes_llava: VLM) -> None:
    parts = inspect(scenes_llava, by="kind")
    plan = Plan.uniform(parts, scheme("rtn", 4, cache=4))
    assert {name for name, chosen in plan.schemes if chosen and chosen.cache == 4} == {"language.attn"}
    assert plan.is_uniform_in(parts)
    finer = inspect(scenes_llava, by="group.kind")
    mixed = {"*": scheme("rtn", 4, cache=4), "language.end": scheme("rtn", 4)}
    assert not Plan.of(finer, mixed).is_uniform_in(finer)
    by_hand = Plan(tuple((name, scheme("rtn", 4, cache=4)) for name in parts.names))
    with (
        pytest.raises(UserError, match=r"vision\.attn has no keys"),
        quantized(scenes_llava.model, parts, by_hand),
    ):
        pass


def test_a_sweep_counts_and_ranks_what_it_rounds(scenes_llava: VLM, tmp_path: Path) -> None:
    """A column of the table and of the ranking for each, and fewer bits of activations decide more."""
    parts = inspect(scenes_llava, by="part")
    some = [scheme("rtn", 8, activations=a, cache=kv) for a in (2, 16) for kv in (2, 16)]
    plans = grid(parts, schemes=some)
    assert len(plans) == 2 * 2 * 4 + 1  # vision and connector have no cache to choose
    study = sweep(scenes_llava, parts, plans, ["vqa"], tmp_path / "study", n=16)
    table = study.table()
    assert set(table["vision.activations"]) == {2, 16}
    assert set(table["language.cache"]) == {2, 16}
    assert "vision.cache" not in table
    assert table["cache_bits"].notna().sum() == 8
    assert table["uniform"].sum() == 4 + 1
    assert {"bits.vision.activations", "bits.language.cache", "cache_bits"} <= set(tidy.trials(study))
    found = observations_of(study)
    assert found.names == (*parts.names, *(f"{name}.activations" for name in parts.names), "language.cache")
    ranking = rank(study, bootstraps=0)
    assert set(ranking.order) == {*(f"{name}.activations" for name in parts.names), "language.cache"} | set(parts.names)
    assert ranking.table.loc[ranking.table.index.str.contains("activations|cache"), "gain_per_mb"].isna().all()


def test_calibrated_says_which_data_a_fixed_range_is_from(scenes_llava: VLM) -> None:
    parts = inspect(scenes_llava, by="part")
    asked = [scheme("rtn", 4, activations=8, activation_scale="tensor"), scheme("rtn", 4)]
    found, statistics = with_calibration(scenes_llava, parts, asked, ["vqa"], n=2, cache_gb=0)
    assert statistics is not None
    assert found[0]["data"] == statistics.facts["data"]
    assert found[1] == asked[1]
