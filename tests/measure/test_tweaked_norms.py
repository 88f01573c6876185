"""Norms that take gradient steps behind quantized weights: no step, planted truths, errors, exports, refusals."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sensitivity.api.exporting import export
from sensitivity.api.sweeping import sweep, with_calibration
from sensitivity.formats.verification import verify
from sensitivity.formats.writing.calibrated_codes import codes
from sensitivity.measure.activations.block_chain import BlockCalls, hidden_states, outputs
from sensitivity.measure.attribution.weight_errors import plan_changes
from sensitivity.measure.calibrate.statistics import Statistics
from sensitivity.measure.forecast.calibrating import STEP, tweaking_seconds
from sensitivity.measure.install.plan_in_model import quantized, targets
from sensitivity.measure.install.tweaked_norms import output_error, tweaked
from sensitivity.measure.memory.weight_codes import WeightCodes
from sensitivity.measure.passes.block_modules import block_paths
from sensitivity.models.discovery import inspect
from sensitivity.models.loading import load
from sensitivity.models.vlm import VLM
from sensitivity.quantize.methods import weights_of
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Plan, Scheme
from sensitivity.spec.runtimes.rules import violations

WIDTH = 12


class Block(nn.Module):
    """A norm, a feed-forward and a residual stream."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 30), nn.Linear(30, WIDTH)
        self.to(dtype).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.as_tensor(self.down(self.up(self.norm(x)).relu()))


def calls_of(block: nn.Module, *inputs: Tensor) -> BlockCalls:
    return BlockCalls(block, [((x,), {}) for x in inputs])


def norms_of(block: Block) -> dict[str, Tensor]:
    return {f"norm.{name}": value.detach().clone() for name, value in block.norm.named_parameters()}


@pytest.fixture
def planted() -> tuple[BlockCalls, list[Tensor]]:
    """A block whose weights became 1.25 times too large, and the outputs that it had before."""
    torch.manual_seed(0)
    block = Block()
    calls = calls_of(block, *torch.randn(3, 40, WIDTH).unbind())
    target = outputs([calls])
    block.up.weight *= 1.25
    return calls, target


def test_no_step_changes_nothing(planted: tuple[BlockCalls, list[Tensor]]) -> None:
    calls, target = planted
    own = norms_of(calls.module)  # type: ignore[arg-type]
    found = tweaked(calls, own, target, 0, 0.1)
    assert all(torch.equal(found[name], value) for name, value in own.items())
    assert scheme("rtn", 4, tweak=0) == scheme("rtn", 4)
    assert weights_of(scheme("rtn", 4, tweak=9, calibration={"path": "float"})) == scheme("rtn", 4)
    assert weights_of(scheme("gptq", 4, tweak=9)) == scheme("gptq", 4)
    assert scheme("norm-tweak", 3) == scheme("gptq", 3, tweak=30)


def test_a_scale_that_a_norm_can_undo_is_undone(planted: tuple[BlockCalls, list[Tensor]]) -> None:
    calls, target = planted
    own = norms_of(calls.module)  # type: ignore[arg-type]
    before = output_error(calls, own, target)
    found = tweaked(calls, own, target, 150, 3e-3)
    assert output_error(calls, found, target) < 0.05 * before
    assert torch.allclose(found["norm.weight"], torch.full((WIDTH,), 0.8), atol=0.1)
    assert all(torch.equal(value, own[f"norm.{name}"]) for name, value in calls.module.norm.named_parameters())  # type: ignore[operator, union-attr]


@pytest.mark.parametrize("rate", [1e-3, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_never_rises(rate: float, dtype: torch.dtype) -> None:
    """Also at a rate that leads anywhere, in a half type, and where tensors were made in inference mode."""
    torch.manual_seed(1)
    with torch.inference_mode():
        x = torch.randn(2, 3, 20, WIDTH, dtype=dtype)
    block = Block(dtype)
    calls = calls_of(block, *x.unbind())
    target = outputs([calls])
    block.up.weight.data, block.down.weight.data = (
        w.sign() * w.abs().mean() for w in (block.up.weight, block.down.weight)
    )
    own = norms_of(block)
    with torch.inference_mode():
        found = tweaked(calls, own, target, 5, rate)
    assert all(value.dtype == dtype for value in found.values())
    assert output_error(calls, found, target) <= output_error(calls, own, target)
    assert rate > 1 or output_error(calls, found, target) < output_error(calls, own, target)


@pytest.fixture(scope="module")
def blocks(scenes_llava: VLM) -> ComponentMap:
    return inspect(scenes_llava, by="block")


def named(vlm: VLM, parts: ComponentMap, asked: list[Scheme], path: str = "float") -> tuple[list[Scheme], Statistics]:
    """Schemes with their calibration data, on four examples."""
    schemes, statistics = with_calibration(vlm, parts, asked, ["vqa"], n=4, path=path, cache_gb=0)
    assert statistics is not None
    return schemes, statistics


def output_of(vlm: VLM, parts: ComponentMap, block: str, statistics: Statistics) -> Tensor:
    """What a block puts out on the calibration data, in plain passes."""
    first, found = parts[block].weights[0], []
    path = block_paths(vlm.model, parts.weights)[first.part, int(first.block or 0)]

    def hook(module: nn.Module, args: object, output: object) -> None:
        found.append(hidden_states(output).double().flatten())

    handle = vlm.model.get_submodule(path).register_forward_hook(hook)
    for _ in statistics.passes():
        pass
    handle.remove()
    return torch.cat(found)


def error_of(
    vlm: VLM, parts: ComponentMap, chosen: Mapping[str, Scheme | None], block: str, statistics: Statistics
) -> float:
    """The squared error of a block's outputs under a plan."""
    target = output_of(vlm, parts, block, statistics)
    with quantized(vlm.model, parts, Plan.of(parts, chosen), None, statistics):
        return float((output_of(vlm, parts, block, statistics) - target).square().sum())


def norms_under(
    vlm: VLM, parts: ComponentMap, plan: Plan, statistics: Statistics, memory: WeightCodes | None
) -> dict[str, Tensor]:
    """The norms that a plan has changed."""
    kept = {kept.name for kept in parts.kept}
    with quantized(vlm.model, parts, plan, memory, statistics) as changed:
        return {name: vlm.model.get_parameter(name).data.clone() for name in sorted(changed & kept)}


@pytest.mark.parametrize(
    ("block", "rounded"), [("vision.00", {}), ("language.01", {}), ("language.00", {"activations": 4})]
)
def test_a_block_errs_less_in_plain_passes(
    scenes_llava: VLM, blocks: ComponentMap, block: str, rounded: dict[str, int]
) -> None:
    asked = [scheme("rtn", 2, **rounded), scheme("rtn", 2, tweak=5, **rounded)]
    (plain, tweaked_), statistics = named(scenes_llava, blocks, asked)
    before, after = (error_of(scenes_llava, blocks, {block: one}, block, statistics) for one in (plain, tweaked_))
    assert 0 < after < before
    # the model has its own norms again
    assert error_of(scenes_llava, blocks, {}, block, statistics) == 0


def test_behind_quantized_blocks_a_block_errs_less(scenes_llava: VLM, blocks: ComponentMap) -> None:
    asked = [scheme("gptq", 2), scheme("gptq", 2, tweak=5)]
    (plain, tweaked_), statistics = named(scenes_llava, blocks, asked, "exposed")
    plans = [{"language.00": tweaked_, "language.01": one} for one in (plain, tweaked_)]
    before, after = (error_of(scenes_llava, blocks, plan, "language.01", statistics) for plan in plans)
    assert 0 < after < before


def test_norms_depend_on_their_own_block_alone(scenes_llava: VLM, blocks: ComponentMap) -> None:
    """So plans share them, with a memory and without; no other parameter changes."""
    (two, three), statistics = named(scenes_llava, blocks, [scheme("rtn", b, tweak=3) for b in (2, 3)])
    memory = WeightCodes()
    first = Plan.of(blocks, {"vision.01": two, "language.*": two})
    second = Plan.of(blocks, {"vision.01": two, "language.*": three})
    found = [norms_under(scenes_llava, blocks, plan, statistics, memory) for plan in (first, second)]
    alone = norms_under(scenes_llava, blocks, second, statistics, None)
    assert found[1].keys() == alone.keys()
    assert all(torch.equal(found[1][name], value) for name, value in alone.items())
    vision = [name for name in alone if "vision" in name]
    assert len(vision) == 4  # weights and biases of two norms
    assert all(torch.equal(found[0][name], alone[name]) for name in vision)
    assert any(not torch.equal(found[0][name], alone[name]) for name in set(alone) - set(vision))


def test_a_sweep_gives_the_same_scores_fast_and_plain(scenes_llava: VLM, tmp_path: Path) -> None:
    parts = inspect(scenes_llava, by="kind")
    (chosen, bare), statistics = named(scenes_llava, parts, [scheme("rtn", 3, tweak=2), scheme("rtn", 3)])
    plans = [
        Plan.of(parts, {"*": chosen}),
        Plan.of(parts, {"*": chosen, "language.ff": None}),
        Plan.of(parts, {"*": bare}),
    ]
    fast, plain = (
        sweep(scenes_llava, parts, plans, ["vqa"], tmp_path / how, n=4, statistics=statistics, plain=how == "plain")
        for how in ("fast", "plain")
    )
    for plan in plans:
        first, second = (study.examples(plan) for study in (fast, plain))
        assert first is not None
        assert second is not None
        assert first["score"].tolist() == second["score"].tolist()
        assert first["nll"].tolist() == pytest.approx(second["nll"].tolist(), abs=1e-4)
    assert fast.table()["vqa.nll"].nunique() == len(plans) + 1


@pytest.mark.parametrize("path", ["float", "exposed"])
def test_codes_for_an_export_come_with_the_same_norms(scenes_llava: VLM, path: str) -> None:
    parts = inspect(scenes_llava, by="kind")
    (chosen,), statistics = named(scenes_llava, parts, [scheme("gptq", 3, tweak=2)], path)
    plan = Plan.of(parts, {"language.*": chosen})
    norms = norms_under(scenes_llava, parts, plan, statistics, None)
    asked = targets(parts, plan)
    with codes(scenes_llava, parts, plan, statistics) as found:
        for component in parts.regroup("block").components:
            for weight in (weight for weight in component.weights if weight.name in asked):
                found.codes(weight.name, scenes_llava.model.get_parameter(weight.name).data, asked[weight.name])
    assert found.changed.keys() == norms.keys()
    assert len(norms) == 8  # two for each of four blocks
    assert all(torch.equal(found.changed[name], value) for name, value in norms.items())


@pytest.mark.slow  # a fresh process loads the export
def test_an_export_answers_as_measured(scenes_llava: VLM, tmp_path: Path) -> None:
    parts = inspect(scenes_llava, by="part")
    (chosen,), statistics = named(scenes_llava, parts, [scheme("gptq", 4, tweak=3)], "exposed")
    plan = Plan.uniform(parts, chosen)
    study = sweep(scenes_llava, parts, [plan], ["vqa"], tmp_path / "study", n=8, statistics=statistics)
    norms = norms_under(scenes_llava, parts, plan, statistics, None)
    for name in ("fake", "compressed-tensors"):
        out = export(study, plan, tmp_path / name, name)
        assert verify(out)["verdict"] == "as measured"
    again = load(str(tmp_path / "fake"), dtype="float32").model
    assert all(torch.equal(again.get_parameter(name).data, value) for name, value in norms.items())


def test_what_cannot_be_said_is_refused(scenes_llava: VLM) -> None:
    parts = inspect(scenes_llava, by="part")
    plan = Plan.uniform(parts, scheme("rtn", 4, tweak=3))
    (message,) = violations(parts, plan, "torchao")
    assert (
        "torchao makes its files from the model's own norms; sweep with --set tweak=0, or use --format fake" in message
    )
    assert not violations(parts, plan, "compressed-tensors") + violations(parts, plan, "fake")
    with pytest.raises(UserError, match="this plan also changes norms"):
        plan_changes(scenes_llava.model, parts, plan)
    with pytest.raises(UserError, match="rtn needs calibration data"), quantized(scenes_llava.model, parts, plan):
        pass
    with pytest.raises(UserError, match="tweak of nf4 is a whole number from 0 to 10,000, not -1"):
        scheme("nf4", 4, tweak=-1)


def test_steps_are_in_the_forecast(scenes_llava: VLM) -> None:
    parts = inspect(scenes_llava, by="part")

    def seconds(steps: int, bits: tuple[int, ...], path: str = "float") -> float:
        made = [scheme("rtn", one, tweak=steps, calibration={"path": path}) for one in bits]
        return tweaking_seconds(parts, [Plan.uniform(parts, one) for one in made], 4, 1.0)

    assert seconds(0, (2, 3)) == 0
    in_blocks = sum(w.numel for w in parts.weights if w.block is not None) / sum(w.numel for w in parts.weights)
    blocks = len({(w.part, w.block) for w in parts.weights if w.block is not None})
    assert seconds(6, (2,)) == pytest.approx(4 * (blocks + STEP * 6 * in_blocks))
    assert seconds(6, (2, 2, 3)) == pytest.approx(2 * seconds(6, (2,)))
    assert seconds(6, (2, 2), "exposed") == pytest.approx(4 * (2 * blocks + STEP * 6 * in_blocks))
