"""A cache that is rounded for later tokens alone: against attention written out, and the same from a cache."""

from __future__ import annotations

import dataclasses
import math
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import saved_vlms
import torch
from few import few
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from sensitivity.api.sweeping import sweep, with_calibration
from sensitivity.measure.calibrate.calibration import calibration_statistics
from sensitivity.measure.evaluation import evaluate
from sensitivity.measure.install.past_cache import _divided, cache_magnitudes
from sensitivity.measure.install.plan_in_model import quantized
from sensitivity.measure.passes.past_attention import past_hooks
from sensitivity.models.discovery import inspect
from sensitivity.models.loading import load
from sensitivity.models.vlm import VLM
from sensitivity.quantize.run_time.keys_and_values import round_cached
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Plan
from sensitivity.spec.sizes import size
from sensitivity.tasks.table import TASKS, task

ROUND = partial(round_cached, bits=3, group=8)


class Attention(nn.Module):
    """A rotated self-attention with a cache, as models have it."""

    def __init__(self, heads: int, shared: int, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads, self.shared, self.width, self.scaling = heads, shared, width, 1.7
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(12, count * width, dtype=torch.float64) for count in (heads, shared, shared)
        )

    def rotated(self, vectors: Tensor, start: int) -> Tensor:
        """Pairs of channels turned by the position."""
        angle = torch.arange(start, start + vectors.shape[2], dtype=torch.float64)[:, None] * torch.tensor(
            [1.0, 0.3, 0.1, 0.03], dtype=torch.float64
        )
        first, second = vectors.chunk(2, -1)
        return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)

    def forward(
        self, x: Tensor, cache: list[Tensor] | None = None, mask: Tensor | None = None, start: int = 0
    ) -> Tensor:
        def by_head(made: Tensor) -> Tensor:
            return made.reshape(*made.shape[:2], -1, self.width).transpose(1, 2)

        query = self.rotated(by_head(self.q_proj(x)) * self.scaling, start)
        key, value = self.rotated(by_head(self.k_proj(x)), start), by_head(self.v_proj(x))
        if cache:
            key, value = torch.cat([cache[0], key], 2), torch.cat([cache[1], value], 2)
        if cache is not None:
            cache[:] = [key, value]
        causal = mask is None and x.shape[1] == key.shape[2]
        return scaled_dot_product_attention(query, key, value, mask, is_causal=causal, enable_gqa=True)


def rounded(attention: nn.Module) -> AbstractContextManager[object]:
    """The attention with keys and values that are rounded for later tokens."""
    hooks = ExitStack()
    root = nn.ModuleDict({"a": attention})
    layers = {"query": "a.q_proj", "key": "a.k_proj", "value": "a.v_proj"}
    for hook in past_hooks(root, "a", layers, {"key": ROUND, "value": ROUND}):
        hooks.callback(hook.remove)
    return hooks


def tokens(count: int) -> Tensor:
    return torch.randn(2, count, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def slow(attention: Attention, x: Tensor) -> Tensor:
    """Token by token: earlier ones rounded, its own as it is."""
    found = []
    for t in range(x.shape[1]):
        made = [attention.k_proj(x[:, : t + 1]), attention.v_proj(x[:, : t + 1])]
        stored = [torch.cat([ROUND(m[:, :t]), m[:, t:]], 1) if t else m for m in made]
        key, value = (s.reshape(2, t + 1, -1, attention.width).transpose(1, 2) for s in stored)
        key, times = attention.rotated(key, 0), attention.heads // attention.shared
        key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
        query = attention.q_proj(x[:, t : t + 1]).reshape(2, 1, -1, attention.width).transpose(1, 2)
        query = attention.rotated(query * attention.scaling, t)
        logits = query @ key.mT / math.sqrt(attention.width)
        found.append(logits.softmax(-1) @ value)
    return torch.cat(found, 2)


@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (4, 2), (3, 1)])
def test_it_is_attention_written_out(heads: int, shared: int) -> None:
    attention, x = Attention(heads, shared), tokens(7)
    with torch.no_grad():
        native = attention(x)
        with rounded(attention):
            found = attention(x)
        torch.testing.assert_close(found, slow(attention, x))
        assert not torch.allclose(found, native, atol=1e-3)
        assert torch.equal(attention(x), native)  # no hook is left


@pytest.mark.parametrize("cut", [1, 4, 6])
def test_tokens_that_are_read_later_from_the_cache_read_the_same(cut: int) -> None:
    attention, x, cache = Attention(4, 2), tokens(7), list[Tensor]()
    with torch.no_grad(), rounded(attention):
        whole = attention(x)
        before = attention(x[:, :cut], cache)
        mask = torch.ones(7, 7, dtype=torch.bool).tril()[cut:]
        later = attention(x[:, cut:], cache, mask, start=cut)
    torch.testing.assert_close(torch.cat([before, later], 2), whole, atol=1e-12, rtol=1e-12)


def test_positions_change_nothing() -> None:
    """What is padded on the left moves all positions, and no level."""
    attention, x = Attention(4, 2), tokens(7)
    with torch.no_grad(), rounded(attention):
        torch.testing.assert_close(attention(x, start=5), attention(x), atol=1e-12, rtol=1e-12)


def test_the_first_token_reads_what_no_cache_holds() -> None:
    attention, x = Attention(4, 4), tokens(3)
    with torch.no_grad():
        native = attention(x)
        with rounded(attention):
            torch.testing.assert_close(attention(x)[:, :, 0], native[:, :, 0])


def test_a_mask_of_numbers_hides_padding() -> None:
    """The first token is padding: rows that may read nothing give zeros, all others the same as without it."""
    attention, x = Attention(2, 2), tokens(5)
    mask = torch.zeros(5, 5, dtype=torch.float64).masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -math.inf)
    mask[:, 0] = -math.inf
    with torch.no_grad(), rounded(attention):
        found, alone = attention(x, mask=mask), attention(x[:, 1:])
    assert found[:, :, 0].abs().max() == 0
    torch.testing.assert_close(found[:, :, 1:], alone)


def test_keys_that_are_changed_before_attention_are_refused() -> None:
    class Normed(Attention):
        def rotated(self, vectors: Tensor, start: int) -> Tensor:
            return torch.nn.functional.normalize(super().rotated(vectors, start), dim=-1)

    attention = Normed(4, 4)
    with torch.no_grad(), rounded(attention), pytest.raises(UserError, match="cannot be kept; leave cache_past out"):
        attention(tokens(4))


# -- in a model


def test_channels_are_divided_by_the_largest_value_that_calibration_saw(scenes_llava: VLM) -> None:
    parts = inspect(scenes_llava, by="part")
    statistics = calibration_statistics(scenes_llava, parts, ["vqa"], 4)
    magnitudes = cache_magnitudes(scenes_llava.model, parts.weights, statistics.passes)
    made = [weight for weight in parts.weights if weight.cached]
    assert set(magnitudes) == {weight.module for weight in made}
    seen: dict[str, Tensor] = {}
    hooks = [
        scenes_llava.model.get_submodule(weight.module).register_forward_hook(
            lambda _, __, out, name=weight.module: seen.update(  # type: ignore[misc]
                {name: torch.maximum(seen.get(name, out.abs().amax((0, 1))), out.abs().amax((0, 1)))}
            )
        )
        for weight in made
    ]
    for _ in statistics.passes():
        pass
    for hook in hooks:
        hook.remove()
    for weight in made:
        torch.testing.assert_close(magnitudes[weight.module], seen[weight.module])


def test_a_large_channel_costs_its_neighbors_nothing_behind_its_size() -> None:
    vectors = torch.randn(50, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    vectors[:, 3] *= 50
    plain, smoothed = ROUND(vectors), _divided(vectors.abs().amax(0), ROUND)(vectors)
    others = [channel for channel in range(8) if channel != 3]
    plain_error, error = (float((found - vectors)[:, others].square().mean()) for found in (plain, smoothed))
    assert error < 0.05 * plain_error
    assert torch.equal(_divided(torch.zeros(8), ROUND)(vectors), plain)  # what was always zero has no size


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("family", few(["llava", "qwen2_vl", "blip2_opt"], ["llava"]))
def test_fast_equals_plain(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Letter for letter, in float64."""
    monkeypatch.setitem(
        TASKS, "free",
        lambda *asked: dataclasses.replace(TASKS["vqa"](*asked), name="free", exact=False, max_new_tokens=4),
    )  # fmt: skip
    vlm = load(str(saved_vlms.save(family, tmp_path / "model")), dtype="float32")
    vlm = dataclasses.replace(vlm, model=vlm.model.double())
    parts = inspect(vlm, by="kind")
    smooth = {"cache_past": True, "cache_smooth": True}
    asked = [scheme("keep", 16, cache=2, cache_past=True), scheme("keep", 16, cache=2, **smooth)]
    asked += [scheme("rtn", 4, cache=2), scheme("wkv", 4)]
    schemes, statistics = with_calibration(vlm, parts, asked, ["vqa"], n=4, cache_gb=0)
    plans = [Plan.uniform(parts, one) for one in schemes]
    fast = sweep(vlm, parts, plans, ["vqa", "free"], tmp_path / "fast", n=6, statistics=statistics)
    plain = sweep(vlm, parts, plans, ["vqa", "free"], tmp_path / "plain", n=6, statistics=statistics, plain=True)
    for plan in plans:
        ours, theirs = (study.examples(plan).set_index(["task", "example"]) for study in (fast, plain))
        pd.testing.assert_frame_equal(ours[["score"]], theirs[["score"]])
        pd.testing.assert_series_equal(ours["nll"], theirs["nll"], rtol=1e-6, atol=1e-9)
        pd.testing.assert_series_equal(ours.loc["free", "answer"], theirs.loc["free", "answer"])
    assert plain.table()["free.nll"].nunique() == len(plans) + 1


def test_what_only_later_tokens_read_rounded_is_nearer_to_the_model(scenes_llava: VLM) -> None:
    parts, asked = inspect(scenes_llava, by="part"), dataclasses.replace(task("caption", n=2), exact=False)
    likely = {}
    for name, how in (("all", {"cache": 2}), ("past", {"cache": 2, "cache_past": True}), ("none", {"activations": 8})):
        with quantized(scenes_llava.model, parts, Plan.uniform(parts, scheme("keep", 16, **how))):
            likely[name] = np.array(evaluate(scenes_llava, asked)["nll"], dtype=float)
    native = np.array(evaluate(scenes_llava, asked)["nll"], dtype=float)
    assert np.abs(likely["past"] - native).mean() < np.abs(likely["all"] - native).mean()
    assert not [m for m in scenes_llava.model.modules() if any("past" in str(h) for h in m._forward_hooks.values())]


def test_sizes_are_counted_and_mistakes_are_named(scenes_llava: VLM, tmp_path: Path) -> None:
    parts = inspect(scenes_llava, by="kind")
    plain = size(parts, Plan.uniform(parts, scheme("rtn", 4, cache=4)))
    smooth = size(parts, Plan.uniform(parts, scheme("rtn", 4, cache=4, cache_past=True, cache_smooth=True)))
    assert smooth.bits == plain.bits + 16 * sum(weight.rows for weight in parts.weights if weight.cached)
    assert smooth.cache_bits == plain.cache_bits
    with pytest.raises(UserError, match="set cache_past=true beside cache_smooth"):
        scheme("rtn", 4, cache=4, cache_smooth=True)
    with pytest.raises(UserError, match="unknown setting of rtn 'cache_past'"):
        scheme("rtn", 4, cache_past=True)
    with (
        pytest.raises(UserError, match="needs calibration data"),
        quantized(
            scenes_llava.model,
            parts,
            Plan.uniform(parts, scheme("keep", 16, cache=4, cache_past=True, cache_smooth=True)),
        ),
    ):
        pass


def test_attention_that_shows_no_keys_is_named(tmp_path: Path) -> None:
    vlm = load(str(saved_vlms.save("llava", tmp_path / "model")), dtype="float32")
    vlm.model.set_attn_implementation("eager")
    parts = inspect(vlm, by="part")
    with (
        quantized(vlm.model, parts, Plan.uniform(parts, scheme("keep", 16, cache=4, cache_past=True))),
        pytest.raises(UserError, match="attn_implementation sdpa, or leave cache_past out"),
    ):
        evaluate(vlm, task("vqa", n=1))
