"""Queries, keys and values of low rank: lossless at full rank, the best of their rank, what they store and cache."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sensitivity.api.sweeping import sweep, with_calibration
from sensitivity.measure.calibrate.statistics import Statistics
from sensitivity.measure.install.plan_in_model import quantized
from sensitivity.measure.memory.weight_codes import WeightCodes, from_tensors, tensors
from sensitivity.measure.passes.token_batches import answer_batches as token_batches
from sensitivity.measure.passes.token_batches import calibration_pass
from sensitivity.models.discovery import inspect
from sensitivity.models.vlm import VLM
from sensitivity.quantize.layer.curvature import Curvature
from sensitivity.quantize.layer.linears import Linears
from sensitivity.quantize.run_time.inputs import round_inputs
from sensitivity.quantize.run_time.keys_and_values import round_cached
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.quantize.solvers.qsvd import factors
from sensitivity.quantize.solving import fake_quantize, solve
from sensitivity.quantize.stored.low_rank import LowRankWeight
from sensitivity.spec.components import ComponentMap, Weight
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Plan, Scheme, scheme_of
from sensitivity.spec.sizes import cache_bits, component_bits
from sensitivity.spec.stored_bits import latent_rank
from sensitivity.tasks.table import task

ROWS, COLS = (40, 16, 16), 24  # queries, and keys and values of fewer heads


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attention(cols: int = COLS) -> tuple[Linears, Tensor]:
    """Weights of an attention that read one input, and that input, whose channels differ in size."""
    inputs = numbers(200, cols) @ numbers(cols, cols, seed=1) * torch.logspace(-1, 1, cols)
    seen = Curvature(cols)
    seen.add(inputs)
    weights = tuple(numbers(rows, cols, seed=2 + i) for i, rows in enumerate(ROWS))
    return Linears(("q", "k", "v"), weights, seen), inputs


def root_of(linears: Linears, damp: float) -> Tensor:
    factor = linears.input_statistics.factor(damp)
    return factor.unit * factor.importance.sqrt()


@pytest.mark.parametrize("beta", [0.0, 0.2, 1.0])
def test_full_rank_is_lossless(beta: float) -> None:
    linears, _ = attention()
    up, down = factors(linears.rows.double(), root_of(linears, 0.01).double(), COLS, beta)
    assert torch.allclose(up @ down, linears.rows.double(), atol=1e-9)


@pytest.mark.parametrize("rank", [1, 7, 20])
def test_the_error_is_that_of_the_best_product_of_its_rank(rank: int) -> None:
    """The discarded singular values, and less than with magnitudes of channels, as in the release, or none."""
    linears, inputs = attention()
    rows, x = linears.rows.double(), inputs.double()

    def error(found: Tensor) -> float:
        return float(((found - rows) @ x.T).square().sum())

    up, down = factors(rows, torch.linalg.cholesky((x.T @ x).flip(0, 1)).flip(0, 1), rank, 0.2)
    assert up.shape == (sum(ROWS), rank)
    best = error(up @ down)
    discarded = torch.linalg.svdvals(rows @ x.T)[rank:].square().sum()
    assert best == pytest.approx(float(discarded), rel=1e-6)
    for weighed in (x.abs().mean(0).sqrt(), torch.ones(COLS).double()):
        left, sizes, right = torch.linalg.svd(rows * weighed, full_matrices=False)
        assert best < error((left[:, :rank] * sizes[:rank]) @ right[:rank] / weighed)


def test_the_sign_of_an_eigenvector_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries choose it, and each processor's differs."""
    linears, _ = attention()
    root, found = root_of(linears, 0.01), torch.linalg.eigh
    expected = factors(linears.rows, root, 9, 0.2)
    signs = torch.randn(COLS, generator=torch.Generator().manual_seed(3)).sign()
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: (found(matrix)[0], found(matrix)[1] * signs))
    for one, other in zip(factors(linears.rows, root, 9, 0.2), expected, strict=True):
        assert torch.equal(one, other)


def test_more_bits_and_more_rank_err_less() -> None:
    linears, inputs = attention(64)
    for settings in ([{"bits": b, "rank": 1.0} for b in (2, 4, 8)], [{"bits": 8, "rank": r} for r in (0.25, 0.5, 1.0)]):
        errors = []
        for how in settings:
            ((*results,),) = solve(linears, [scheme("qsvd", int(how["bits"]), rank=float(how["rank"]))])
            found = torch.cat([result.dequantize() for result in results if result is not None])
            errors.append(float(((found - linears.rows) @ inputs.T).square().sum()))
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 1e-3 * float((linears.rows @ inputs.T).square().sum())


def parts_of(cols: int = COLS) -> ComponentMap:
    names = zip(("q_proj", "k_proj", "v_proj"), ROWS, strict=True)
    weights = [
        Weight(f"l.0.{n}.weight", rows, cols, "language", 0, 1, "attn", shares_input="l.0.q_proj") for n, rows in names
    ]
    weights.append(Weight("l.0.up_proj.weight", 30, cols, "language", 0, 1, "ff"))
    return ComponentMap("none", "part", tuple(weights), ())


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_bits_are_those_of_what_is_held(share: float) -> None:
    """The factor that all share is counted once; a weight of another kind is rounded to nearest."""
    linears, _ = attention()
    parts, chosen = parts_of(), scheme("qsvd", 3, rank=share)
    rank = latent_rank(chosen, COLS)
    assert rank == (16 if share < 1 else COLS)
    ((*results,),) = solve(linears, [chosen])
    assert all(isinstance(result, LowRankWeight) for result in results)
    first = results[0]
    assert isinstance(first, LowRankWeight)
    assert all(torch.equal(first.down.codes, r.down.codes) for r in results if isinstance(r, LowRankWeight))
    factors_ = [first.down, *(r.up for r in results if isinstance(r, LowRankWeight))]
    held = sum(3 * one.codes.numel() + 16 * one.scale.numel() for one in factors_)
    up = scheme_of(parts.weights[-1], chosen)
    assert (up.method, up.settings) == ("rtn", ())
    assert component_bits(parts, "language", chosen) == held + 3 * 30 * COLS + 16 * 30
    again = from_tensors(tensors(first))
    assert isinstance(again, LowRankWeight)
    assert torch.equal(again.dequantize(), first.dequantize())


@pytest.mark.parametrize(("cache", "group"), [(16, 32), (4, 5)])
def test_the_latent_is_cached_once(cache: int, group: int) -> None:
    parts = parts_of()
    chosen = scheme("qsvd", 4, rank=0.5, cache=cache, cache_group=None if cache == 16 else group)
    found = cache_bits(parts, Plan.uniform(parts, chosen))
    assert found == (16 * 16 if cache == 16 else 16 * cache + 32 * math.ceil(16 / group))
    assert cache_bits(parts, Plan.uniform(parts, scheme("rtn", 4))) is None
    # a plan that gives keys and values schemes of their own caches two latent vectors
    finer = parts.regroup("linear")
    plan = Plan.of(finer, {"*k_proj": chosen, "*v_proj": scheme("qsvd", 3, rank=0.5)})
    assert cache_bits(finer, plan) == (found or 0) + 16 * 16


Prepared = tuple[ComponentMap, list[Scheme], Statistics]


@pytest.fixture(scope="module")
def prepared(scenes_llava: VLM) -> Prepared:
    parts = inspect(scenes_llava, by="part")
    asked = [
        scheme("qsvd", 8, rank=1.0), scheme("qsvd", 4), scheme("qsvd", 4, cache=2, cache_group=16),
        scheme("qsvd", 4, activations=8, cache=4),
    ]  # fmt: skip
    schemes, statistics = with_calibration(scenes_llava, parts, asked, ["vqa"], n=4, cache_gb=0)
    assert statistics is not None
    return parts, schemes, statistics


def logits(vlm: VLM) -> Tensor:
    with torch.inference_mode():
        return torch.as_tensor(calibration_pass(vlm, next(token_batches(vlm, [task("vqa", n=3)]))).logits)


def test_a_model_keeps_its_logits_at_full_rank(scenes_llava: VLM, prepared: Prepared) -> None:
    parts, schemes, statistics = prepared
    before = logits(scenes_llava)
    spread = float(before.std())
    with quantized(scenes_llava.model, parts, Plan.uniform(parts, schemes[0]), None, statistics) as changed:
        assert len(changed) == len(parts.weights)
        assert float((logits(scenes_llava) - before).std()) < 0.1 * spread
    assert torch.equal(logits(scenes_llava), before)


def test_keys_and_values_are_made_of_the_rounded_latent(scenes_llava: VLM, prepared: Prepared) -> None:
    """Layer by layer, as the product of both factors gives them; queries read a latent that nobody caches."""
    parts, schemes, statistics = prepared
    memory, chosen = WeightCodes(), schemes[2]
    key = next(w for w in parts["language"].weights if w.cached and w.block == 1)
    query = next(w for w in parts["language"].weights if w.block == 1 and w.module.endswith("q_proj"))
    x = numbers(2, 5, key.cols)
    with quantized(scenes_llava.model, parts, Plan.of(parts, {"language": chosen}), memory, statistics):
        made = [scenes_llava.model.get_submodule(w.module)(x) for w in (key, query)]
        dense = scenes_llava.model.get_parameter(query.name).detach()
    (stored,) = (value for k, value in memory.items() if k[0] == key.name)
    assert isinstance(stored, LowRankWeight)
    latent = round_cached(x @ stored.down.dequantize().T, 2, 16)
    assert torch.allclose(made[0], latent @ stored.up.dequantize().T, atol=1e-5)
    assert torch.allclose(made[1], x @ dense.T, atol=1e-4)
    with quantized(scenes_llava.model, parts, Plan.of(parts, {"language": schemes[3]}), memory, statistics):
        found = scenes_llava.model.get_submodule(query.module)(x)
    (stored,) = (value for k, value in memory.items() if k[0] == query.name)
    assert isinstance(stored, LowRankWeight)
    latent = round_inputs(round_inputs(x, 8) @ stored.down.dequantize().T, 8)
    assert torch.allclose(found, latent @ stored.up.dequantize().T, atol=1e-5)


def test_a_sweep_is_the_same_fast_and_plain(scenes_llava: VLM, prepared: Prepared, tmp_path: Path) -> None:
    parts, schemes, statistics = prepared
    plans = [Plan.uniform(parts, schemes[1]), Plan.of(parts, {"vision": schemes[1], "language": schemes[2]})]
    fast, plain = (
        sweep(scenes_llava, parts, plans, ["vqa"], tmp_path / how, n=4, statistics=statistics, plain=how == "plain")
        for how in ("fast", "plain")
    )
    for plan in plans:
        first, second = (study.examples(plan) for study in (fast, plain))
        assert first is not None
        assert second is not None
        assert first["score"].tolist() == second["score"].tolist()
    assert plans[0].key in {trial.key for trial in fast.trials()}


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(UserError, match="qsvd caches the latent vector that keys and values are computed from"):
        scheme("qsvd", 4, cache=4, cache_past=True)
    with pytest.raises(UserError, match=r"rank of qsvd is a number from 0\.001 to 1, not 0"):
        scheme("qsvd", 4, rank=0.0)
    assert torch.isfinite(fake_quantize(torch.zeros(4, COLS), scheme("qsvd", 4), attention()[0].curvature)).all()
