"""Importance beside the answer loss: a block's error, attention, perturbation; and squared gradients of weights."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import saved_vlms
import torch
from few import few
from torch import Tensor, nn

from sensitivity.api.sweeping import sweep
from sensitivity.measure.calibrate.calibration import calibration_statistics
from sensitivity.measure.gradients.block_error import block_errors
from sensitivity.measure.gradients.fisher import squared_gradients
from sensitivity.measure.gradients.perturbation import PROBE, probe_error, token_attribution
from sensitivity.measure.gradients.token_importance import TokenNumbers, by_attention, by_block, by_perturbation
from sensitivity.measure.passes.attention import attention_received
from sensitivity.measure.passes.block_modules import block_paths
from sensitivity.measure.passes.token_batches import TokenBatch, answer_batches, calibration_pass
from sensitivity.models.discovery import inspect
from sensitivity.models.loading import load
from sensitivity.models.vlm import VLM
from sensitivity.quantize.grids.gwq import quantize_gwq
from sensitivity.quantize.layer.linears import Linears, input_of
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.quantize.solving import fake_quantize
from sensitivity.quantize.stored.sparse import SparseWeight
from sensitivity.spec.components import Weight
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Plan
from sensitivity.tasks.table import task

FAMILIES = [name for name in saved_vlms.BUILDERS if name != "blip2_itm"]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layers(vlm: VLM) -> list[Weight]:
    return [weight for weight in inspect(vlm, by="part").weights if not weight.is_embedding]


def batch_of(vlm: VLM, n: int = 2) -> TokenBatch:
    return next(iter(answer_batches(vlm, [task("vqa", "calibration", n, 0)])))


def test_the_error_of_a_block_is_differentiated_as_by_hand(scenes_llava: VLM) -> None:
    """One block in the middle, with everything kept: its float inputs, rounded weights, and autograd."""
    weights, batch = layers(scenes_llava), batch_of(scenes_llava)
    found = block_errors(scenes_llava, weights, batch)
    path = block_paths(scenes_llava.model, weights)["language", 1]
    module, own = scenes_llava.model.get_submodule(path), [w for w in weights if (w.part, w.block) == ("language", 1)]
    called: list[Any] = []
    with torch.no_grad():
        hook = module.register_forward_hook(lambda m, a, k, out: called.append((a, k, out)), with_kwargs=True)
        calibration_pass(scenes_llava, batch)
        hook.remove()
    (args, kwargs, output), outputs = called[0], {}
    held = {w.name: scenes_llava.model.get_parameter(w.name).data for w in own}
    with ExitStack() as hooks:
        for w in own:
            scenes_llava.model.get_parameter(w.name).data = fake_quantize(held[w.name], PROBE)

            def keep(m: nn.Module, a: object, out: Tensor, name: str = w.name) -> Tensor:
                out = out.detach().requires_grad_() + 0 if not out.requires_grad else out.clone()
                out.retain_grad()
                outputs[name] = out
                return out

            hooks.callback(scenes_llava.model.get_submodule(w.reader).register_forward_hook(keep).remove)
        again = module(*args, **kwargs)
        first = again[0] if isinstance(again, tuple) else again
        (first - (output[0] if isinstance(output, tuple) else output)).square().sum().backward()
    expected: dict[str, Tensor] = {}
    for w in own:
        scenes_llava.model.get_parameter(w.name).data = held[w.name]
        gradient = outputs[w.name].grad
        assert gradient is not None
        values = gradient.flatten(0, -2).abs().mean(1)
        expected[input_of(w)] = expected.get(input_of(w), 0) + values
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-3, atol=1e-6)
    assert set(found) == {input_of(w) for w in weights}
    assert all(torch.equal(scenes_llava.model.get_parameter(name), own) for name, own in held.items())


def test_outside_blocks_the_gradient_is_that_of_the_layers_own_error(scenes_llava: VLM) -> None:
    weights, batch = layers(scenes_llava), batch_of(scenes_llava)
    (connector, *_) = (w for w in weights if w.part == "connector")
    found, read = block_errors(scenes_llava, weights, batch), []
    layer = scenes_llava.model.get_submodule(connector.reader)
    hook = layer.register_forward_pre_hook(lambda m, args: read.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        calibration_pass(scenes_llava, batch)
    hook.remove()
    error = probe_error(scenes_llava.model.get_parameter(connector.name).detach())
    outputs = (read[0] @ error.T).requires_grad_()
    outputs.square().sum().backward()
    assert outputs.grad is not None
    torch.testing.assert_close(found[input_of(connector)], outputs.grad.abs().mean(1))


def test_attribution_is_the_integral_in_many_steps() -> None:
    inputs, error, steps = random(5, 8), 0.1 * random(6, 8, seed=1), 200
    total = torch.zeros_like(inputs)
    for step in range(steps):
        x = ((step + 0.5) / steps * inputs).requires_grad_()
        (x @ error.T).abs().mean(1).sum().backward()
        assert x.grad is not None
        total += x.grad / steps
    torch.testing.assert_close(token_attribution(inputs, error), (inputs * total).abs().mean(1))
    # completeness of integrated gradients: the shares of all channels add up to the whole error of a token
    torch.testing.assert_close((inputs * total).sum(1), (inputs @ error.T).abs().mean(1))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("name", few(FAMILIES, ["llava", "blip2_opt", "qwen2_vl"]))
def test_attention_is_that_of_the_models_own_probabilities(name: str, tmp_path: Path) -> None:
    vlm = load(str(saved_vlms.save(name, tmp_path / "model")), dtype="float32")
    weights, batch = layers(vlm), batch_of(vlm)
    found = attention_received(vlm, weights, batch)
    assert found
    assert all((values >= 0).all() for values in found.values())
    # rows of probabilities sum to 1: what all tokens of a block receive is heads times queries
    for values in found.values():
        assert float(values.sum()) == pytest.approx(round(float(values.sum())), abs=1e-2)
    if vlm.encoder_decoder:
        return
    vlm.model.set_attn_implementation("eager")
    eager = attention_received(vlm, weights, batch)
    assert eager.keys() == found.keys()
    for key, values in found.items():
        torch.testing.assert_close(values, eager[key], rtol=1e-3, atol=1e-4)


def test_attention_of_a_language_model_is_what_it_returns(scenes_llava: VLM) -> None:
    weights, batch = layers(scenes_llava), batch_of(scenes_llava)
    found = attention_received(scenes_llava, weights, batch)
    before = scenes_llava.model.config.get_text_config()._attn_implementation
    try:
        scenes_llava.model.set_attn_implementation("eager")
        with torch.no_grad():
            returned = scenes_llava.model(**batch.inputs, use_cache=False, output_attentions=True).attentions
    finally:
        scenes_llava.model.set_attn_implementation(before)
    checked = 0
    for w in weights:
        if w.part == "language" and w.block is not None and input_of(w) in found:
            torch.testing.assert_close(
                found[input_of(w)], returned[w.block].sum((1, 2)).flatten(), rtol=1e-3, atol=1e-4
            )
            checked += 1
    assert checked > 10


def planted(*values: list[float]) -> TokenNumbers:
    seen = TokenNumbers()
    for example, one in enumerate(values):
        seen.numbers[example, "layer"] = torch.tensor(one)
    return seen


def test_weights_of_planted_tokens() -> None:
    attention = by_attention(planted([0.0, 5.0, 10.0], [4.0, 4.0, 4.0]))
    raw = torch.tensor([0.005, 0.5025, 1.0])
    torch.testing.assert_close(attention[0, "layer"], raw / raw.mean())
    assert attention[1, "layer"].tolist() == [1.0, 1.0, 1.0]
    clipped = by_perturbation(planted([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 93.0]))[0, "layer"]
    assert clipped.tolist() == pytest.approx([1.0] * 8)  # the quartiles are equal, so all is cut to them
    spread = by_perturbation(planted([1.0, 2.0, 3.0, 4.0]))[0, "layer"]
    assert spread.tolist() == pytest.approx([0.4, 0.8, 1.2, 1.6])
    blocks = by_block(planted([1.0, 3.0], [5.0, 7.0]))
    assert [blocks[i, "layer"].tolist() for i in (0, 1)] == [[0.25, 0.75], [1.25, 1.75]]


def test_squared_gradients_are_those_of_autograd(scenes_llava: VLM) -> None:
    """Example by example, so that G of a batch is not mistaken for that of its examples."""
    weights, data = layers(scenes_llava), list(answer_batches(scenes_llava, [task("vqa", "calibration", 3, 0)]))
    few_weights = [w for w in weights if w.part == "connector" or (w.part == "language" and w.block == 1)]
    found = squared_gradients(scenes_llava, few_weights, data)
    expected = {w.name: torch.zeros(w.rows, w.cols) for w in few_weights}
    for one in answer_batches(scenes_llava, [task("vqa", "calibration", 3, 0)], rows=1):
        parameters = [scenes_llava.model.get_parameter(w.name).requires_grad_() for w in few_weights]
        assert one.targets is not None
        logits = calibration_pass(scenes_llava, one).logits[:, -one.targets.shape[1] :].double()
        loss = -logits.log_softmax(-1).gather(-1, one.targets[..., None]).mean()
        gradients = torch.autograd.grad(loss, parameters)
        for w, parameter, gradient in zip(few_weights, parameters, gradients, strict=True):
            parameter.requires_grad_(False)
            expected[w.name] += gradient.square()
    for name, values in found.items():
        assert float(values.sum()) > 0
        torch.testing.assert_close(values, expected[name], rtol=2e-2, atol=1e-2 * float(expected[name].max()))


def test_gwq_keeps_the_largest_gradients() -> None:
    weight, fisher = random(8, 40).half(), random(8, 40, seed=1).square()

    def stored(scale: float = 1.0) -> SparseWeight:
        linears = Linears(("w",), (weight,), fisher=(scale * fisher,))
        ((found,),) = quantize_gwq(linears, [scheme("gwq", 3, outliers=0.05)])
        assert isinstance(found, SparseWeight)
        return found

    found = stored()
    first = sorted(range(320), key=lambda i: -float(fisher.view(-1)[i]))[:16]
    assert found.index.tolist() == sorted(first)
    assert torch.equal(found.dequantize().view(-1)[found.index], weight.float().view(-1)[found.index])
    assert torch.equal(stored(7.0).dequantize(), found.dequantize())  # whatever the scale of the loss
    ((plain,),) = quantize_gwq(Linears(("w",), (weight,), fisher=(fisher,)), [scheme("gwq", 3, outliers=0)])
    assert plain is not None
    assert torch.equal(plain.dequantize(), fake_quantize(weight.float(), scheme("rtn", 3, group=128, symmetric=False)))
    with pytest.raises(UserError, match="w: gwq needs gradients of the answer loss"):
        quantize_gwq(Linears(("w",), (weight,)), [scheme("gwq", 3)])


@pytest.mark.parametrize("path", few(["float", "both"], ["float"]))
def test_every_row_that_observes_tokens_runs_exactly(scenes_llava: VLM, path: str, tmp_path: Path) -> None:
    """In one plan, on each path; the fast path scores as the plain one, and gradients are those of the float model."""
    parts = inspect(scenes_llava, by="part")
    statistics = calibration_statistics(
        scenes_llava, parts, ["vqa"], 4, path=path, importance=("attention", "perturbation")
    )
    rows = ("rsq", "gwq", "qig"), ("rsq", "squeezellm-fisher", "gwq")
    plans = [
        Plan(tuple((n, scheme(row, 3, calibration=statistics.facts)) for n, row in zip(parts.names, one, strict=True)))
        for one in rows
    ]
    fast, plain = (
        sweep(scenes_llava, parts, plans, ["vqa"], tmp_path / how, n=4, statistics=statistics, plain=how == "plain")
        for how in ("fast", "plain")
    )
    for plan in plans:
        first, second = (study.examples(plan) for study in (fast, plain))
        assert first is not None
        assert second is not None
        assert first.set_index("example")["score"].equals(second.set_index("example")["score"])
