"""Rounded attention: probabilities, operands and two scalars, against slow versions, at 16 bits, fast against plain."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import saved_vlms
import torch
from few import few

from sensitivity.api.sweeping import sweep, with_calibration
from sensitivity.measure.activations import joint_ranges
from sensitivity.measure.calibrate.calibration import calibration_statistics
from sensitivity.measure.install.plan_in_model import quantized
from sensitivity.measure.passes.attention_functions import FUSED
from sensitivity.measure.passes.attention_hooks import attention_modules
from sensitivity.measure.passes.token_batches import answer_batches as token_batches
from sensitivity.measure.passes.token_batches import calibration_pass
from sensitivity.models.discovery import inspect
from sensitivity.models.loading import load
from sensitivity.models.vlm import VLM
from sensitivity.quantize.run_time.probabilities import round_probabilities
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Plan
from sensitivity.tasks.table import TASKS, task


def logits(vlm: VLM) -> torch.Tensor:
    batch = next(token_batches(vlm, [task("vqa", n=3)]))
    with torch.inference_mode():
        return torch.as_tensor(calibration_pass(vlm, batch).logits)


def attention(query: Any, key: Any, value: Any, attn_mask: Any = None, change: Any = None, **more: Any) -> torch.Tensor:
    """Attention written out, one query after the other."""
    times = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    found = query.new_zeros(*query.shape[:-1], value.shape[-1])
    for i in range(query.shape[2]):
        scores = (query[:, :, i, None] * key).sum(-1) * (more.get("scale") or 1 / math.sqrt(query.shape[-1]))
        if more.get("is_causal"):
            scores[..., i + 1 :] = -math.inf
        if attn_mask is not None:
            row = attn_mask[:, :, i]
            scores = scores.masked_fill(~row, -math.inf) if row.dtype == torch.bool else scores + row
        found[:, :, i] = (change(scores.softmax(-1).nan_to_num())[..., None] * value).sum(2)
    return found


def in_float64(vlm: VLM) -> VLM:
    """A copy in which no value lies between two levels by chance of rounding."""
    return dataclasses.replace(vlm, model=copy.deepcopy(vlm.model).double())


@pytest.mark.parametrize(("grid", "halving"), [("uniform", 0), ("log2", 1), ("log-sqrt2", 2)])
def test_probabilities_of_all_parts_are_rounded(
    scenes_llava: VLM, grid: str, halving: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against attention written out, which rounds by itself."""
    vlm = in_float64(scenes_llava)
    parts, before = inspect(vlm, by="part"), logits(vlm)
    found = {}
    for bits in (3, 8):
        chosen = scheme("keep", 16, activations=bits, softmax=grid)
        alone = scheme("keep", 16, activations=bits)
        with quantized(vlm.model, parts, Plan.uniform(parts, chosen)) as changed:
            assert changed == set()
            found[bits] = logits(vlm)
        with quantized(vlm.model, parts, Plan.uniform(parts, alone)), monkeypatch.context() as patched:
            patched.setattr(
                torch.nn.functional, "scaled_dot_product_attention",
                lambda *args, bits=bits, **kwargs: attention(
                    *args, change=lambda p: round_probabilities(p, bits, halving), **kwargs
                ),
            )  # fmt: skip
            assert torch.allclose(found[bits], logits(vlm), atol=1e-5)
    assert torch.equal(logits(vlm), before)  # and no hook is left
    errors = {bits: float((one - before).abs().mean()) for bits, one in found.items()}
    assert errors[3] > errors[8] > 0


def test_eager_attention_is_rounded_like_fused(scenes_llava: VLM) -> None:
    fused, eager = in_float64(scenes_llava), in_float64(scenes_llava)
    eager.model.set_attn_implementation("eager")
    parts = inspect(scenes_llava, by="kind")
    chosen = scheme("keep", 16, activations=8, softmax="log2")
    plan = Plan.of(parts, {"vision.attn": chosen, "language.attn": chosen})
    found = []
    for vlm in (fused, eager):
        with quantized(vlm.model, parts, plan):
            found.append(logits(vlm))
    assert torch.allclose(*found, atol=2e-2)
    assert not torch.allclose(found[0], logits(fused), atol=2e-2)


def test_attention_that_shows_nothing_is_an_error_and_leaves_the_model_whole(
    scenes_llava: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As flash attention: a kernel that no torch function stands for."""
    parts, before = inspect(scenes_llava, by="part"), logits(scenes_llava)
    kernel = torch._C._nn.scaled_dot_product_attention
    assert kernel is FUSED

    def hidden(*args: Any, **kwargs: Any) -> torch.Tensor:
        with torch._C.DisableTorchFunction():
            return torch.as_tensor(kernel(*args, **kwargs))

    plan = Plan.of(parts, {"language": scheme("keep", 16, activations=4, softmax="log2")})
    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.functional, "scaled_dot_product_attention", hidden)
        nothing = "self_attn shows no attention probabilities that could be changed, since"
        with pytest.raises(UserError, match=nothing), quantized(scenes_llava.model, parts, plan):
            logits(scenes_llava)
    assert torch.equal(logits(scenes_llava), before)


FAMILIES = [name for name in saved_vlms.BUILDERS if name != "blip2_itm"]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("family", few(FAMILIES, ["qwen2_vl"]))
def test_fast_equals_plain(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefixes, drafts and caches with rounded attention: letter for letter, in float64."""
    monkeypatch.setitem(
        TASKS, "free",
        lambda *asked: dataclasses.replace(TASKS["vqa"](*asked), name="free", exact=False, max_new_tokens=4),
    )  # fmt: skip
    monkeypatch.setattr(joint_ranges, "PERCENTILES", (1.0, 0.98))
    rng = np.random.default_rng(sum(map(ord, family)))
    vlm = load(str(saved_vlms.save(family, tmp_path / "model")), dtype="float32")
    vlm = dataclasses.replace(vlm, model=vlm.model.double())
    parts = inspect(vlm, by="part")
    assert attention_modules(vlm.model, parts.weights)
    some = [
        scheme("rtn", 4, activations=4, softmax="log-sqrt2"),
        scheme("keep", 16, activations=3, softmax="uniform"),
        scheme("keep", 16, activations=4, softmax="adaptive", attention="folded"),
        scheme("rtn", 8, activations=4, activation_scale="norm", attention="tensor"),
        scheme("rtn", 3, activations=8, match=True),
        scheme("rtn", 4, activations=4, activation_scale="blocks"),
        scheme("keep", 16, activations=4, activation_scale="released"),
    ]
    some, statistics = with_calibration(vlm, parts, some, ["vqa"], n=4, cache_gb=0)
    plans = [Plan.of(parts, {name: some[rng.integers(len(some))] for name in parts.names}) for _ in range(2)]
    plans += [Plan.of(parts, {"language": some[4]}), Plan.of(parts, {"vision": some[2], "language": some[3]})]
    plans += [Plan.of(parts, {"vision": one, "language": two}) for one, two in (some[5:], some[:4:-1])]
    how: dict[str, Any] = {"n": 6, "statistics": statistics}
    fast = sweep(vlm, parts, plans, ["vqa", "free"], tmp_path / "fast", **how)
    plain = sweep(vlm, parts, plans, ["vqa", "free"], tmp_path / "plain", plain=True, **how)
    for plan in plans:
        ours, theirs = (study.examples(plan).set_index(["task", "example"]) for study in (fast, plain))
        pd.testing.assert_frame_equal(ours[["score"]], theirs[["score"]])
        pd.testing.assert_series_equal(ours["nll"], theirs["nll"], rtol=1e-6, atol=1e-9)
        pd.testing.assert_series_equal(ours.loc["free", "answer"], theirs.loc["free", "answer"])
    assert plain.table()["free.nll"].nunique() > 2


def test_statistics_are_needed_where_something_is_searched(scenes_llava: VLM) -> None:
    parts = inspect(scenes_llava, by="part")
    for more in ({"softmax": "adaptive"}, {"attention": "folded"}, {"match": True}, {"activation_scale": "norm"}):
        plan = Plan.of(parts, {"vision": scheme("keep", 16, activations=4, **more)})
        with pytest.raises(UserError, match="keep needs calibration data"):
            quantized(scenes_llava.model, parts, plan).__enter__()
    statistics = calibration_statistics(scenes_llava, parts, ["vqa"], n=2)
    with pytest.raises(UserError, match="keep asks for calibration with calibration = None"):
        quantized(scenes_llava.model, parts, plan, statistics=statistics).__enter__()
