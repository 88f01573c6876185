"""Gradients of the answer loss: those of plain autograd, whatever shares a batch; token importance on planted ones."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
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
from sensitivity.measure.gradients import token_importance
from sensitivity.measure.gradients.backward import backward_pass
from sensitivity.measure.gradients.token_importance import (
    TokenNumbers,
    answer_gradients,
    by_modality,
    by_output,
    importance_of,
)
from sensitivity.measure.passes.token_batches import (
    ANSWER,
    PROMPT,
    VISION,
    TokenBatch,
    answer_batches,
    calibration_pass,
)
from sensitivity.models.discovery import inspect
from sensitivity.models.loading import load
from sensitivity.models.vlm import VLM
from sensitivity.quantize.layer.curvature import Curvature
from sensitivity.quantize.layer.linears import input_of
from sensitivity.quantize.methods import IMPORTANCE, UNIFORM
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.spec.components import Weight
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Plan
from sensitivity.tasks.table import task

FAMILIES = [name for name in saved_vlms.BUILDERS if name != "blip2_itm"]


def loaded(name: str, folder: Path) -> VLM:
    return load(str(saved_vlms.save(name, folder / "model")), dtype="float32")


def plain(vlm: VLM, weights: list[Weight], batch: TokenBatch) -> dict[str, Tensor]:
    """The gradients of all layers' outputs by autograd alone: everything is kept in memory."""
    outputs: dict[str, Tensor] = {}
    with ExitStack() as hooks, torch.enable_grad():
        for weight in weights:

            def hook(module: nn.Module, args: Any, output: Tensor, name: str = weight.name) -> Tensor:
                output = output.clone() if output.requires_grad else output.detach().requires_grad_() + 0
                output.retain_grad()
                outputs[name] = output
                return output

            hooks.callback(vlm.model.get_submodule(weight.reader).register_forward_hook(hook).remove)
        assert batch.targets is not None
        logits = calibration_pass(vlm, batch).logits[:, -batch.targets.shape[1] :].float()
        right = logits.log_softmax(-1).gather(-1, batch.targets[..., None])[..., 0]
        (-right.mean(1).sum()).backward()
    return {name: output.grad for name, output in outputs.items() if output.grad is not None}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("name", few(FAMILIES, ["llava", "blip2_opt", "blip2_t5", "qwen2_vl", "smolvlm"]))
def test_gradients_are_those_of_plain_autograd(name: str, tmp_path: Path) -> None:
    vlm = loaded(name, tmp_path)
    weights = [weight for weight in inspect(vlm, by="part").weights if not weight.is_embedding]
    batch = next(iter(answer_batches(vlm, [task("vqa", "calibration", 2, 0)])))
    found: dict[str, Tensor] = {}
    read: dict[str, Tensor] = {}

    def visit(weight: Weight, inputs: Tensor, gradient: Tensor) -> None:
        found[weight.name], read[weight.name] = gradient, inputs

    loss = backward_pass(vlm, weights, batch, visit)
    expected = plain(vlm, weights, batch)
    assert loss > 0
    assert set(found) == set(expected)
    # a layer that no loss depends on, such as the last block of a tower whose earlier features are read, has none
    assert len(found) > 0.7 * len(weights)
    for weight, gradient in found.items():
        torch.testing.assert_close(gradient, expected[weight].flatten(0, -2), rtol=1e-3, atol=1e-6)
        assert len(read[weight]) == len(gradient)
    assert not any(p.requires_grad for p in vlm.model.parameters())
    assert all(p.grad is None for p in vlm.model.parameters())


def most_saved(run: Callable[[], object]) -> int:
    """The most bytes that autograd keeps for backward passes at one time."""
    bytes_now, most = 0, 0

    def forget(size: int) -> None:
        nonlocal bytes_now
        bytes_now -= size

    class Saved:
        """A tensor that autograd keeps; it is forgotten when its graph is freed."""

        def __init__(self, tensor: Tensor) -> None:
            nonlocal bytes_now, most
            self.tensor = tensor
            size = tensor.numel() * tensor.element_size()
            bytes_now += size
            most = max(most, bytes_now)
            weakref.finalize(self, forget, size)

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        run()
    return most


def test_one_block_is_in_memory_at_a_time(scenes_llava: VLM) -> None:
    weights = [weight for weight in inspect(scenes_llava, by="block").weights if not weight.is_embedding]
    batch = next(iter(answer_batches(scenes_llava, [task("vqa", "calibration", 1, 0)])))
    order: list[int | None] = []

    def visit(weight: Weight, inputs: Tensor, gradient: Tensor) -> None:
        if weight.part == "language":
            order.append(weight.block)

    ours = most_saved(lambda: backward_pass(scenes_llava, weights, batch, visit))
    blocks = [block for block, _ in itertools.groupby(order)]
    assert blocks == sorted(blocks, key=lambda block: -1 if block is None else block, reverse=True)
    whole = most_saved(lambda: plain(scenes_llava, weights, batch))
    assert ours < whole / 3  # ten blocks, of which one is kept, and the hidden states between them


def test_every_kind_of_importance_is_computed() -> None:
    assert {UNIFORM, *token_importance.IMPORTANCE} == set(IMPORTANCE)


def test_an_example_counts_the_same_whatever_shares_its_batch(scenes_llava: VLM) -> None:
    weights = [weight for weight in inspect(scenes_llava, by="part").weights if not weight.is_embedding]
    data = [task("vqa", "calibration", 8, 0)]
    alone, together = (
        importance_of(
            scenes_llava, weights, answer_batches(scenes_llava, data, rows), list(token_importance.IMPORTANCE)
        )
        for rows in (1, 8)
    )
    for name, weighed in alone.items():
        assert weighed.keys() == together[name].keys()
        assert {example for example, _ in weighed} == set(range(8))
        for key, values in weighed.items():
            torch.testing.assert_close(values, together[name][key], rtol=1e-3, atol=1e-6)


def test_modality_weighs_the_image_by_its_share_of_the_gradient() -> None:
    """MBQ's rule on planted gradients: answers 1, the question 0, the image the larger of its ratio and the median."""
    seen = TokenNumbers()
    kinds = torch.tensor([VISION, VISION, PROMPT, ANSWER])
    for number, ratio in enumerate((0.5, 2.0, 8.0)):
        for example in (0, 1):
            seen.numbers[example, f"layer{number}"] = torch.tensor([ratio, ratio, 7.0, 1.0])
            seen.modalities[example, f"layer{number}"] = kinds
    seen.numbers[0, "eye"], seen.modalities[0, "eye"] = torch.tensor([3.0, 4.0]), None
    found = by_modality(seen)
    assert [found[0, f"layer{number}"].tolist() for number in range(3)] == [
        [2.0, 2.0, 0.0, 1.0], [2.0, 2.0, 0.0, 1.0], [8.0, 8.0, 0.0, 1.0],
    ]  # fmt: skip
    assert found[0, "eye"].tolist() == [1.0, 1.0]


def test_with_one_token_an_example_the_curvature_of_the_loss_is_exact() -> None:
    """OAC sums G'G of weight gradients G; with one token they are its squared gradient times x x'."""
    torch.manual_seed(0)
    inputs, gradients = torch.randn(6, 5), torch.randn(6, 3)
    seen, weighted, exact = TokenNumbers(), Curvature(5), torch.zeros(5, 5)
    for example in range(6):
        seen.numbers[example, "layer"] = gradients[example].norm().reshape(1)
        gradient = gradients[example][:, None] * inputs[example][None]
        exact += gradient.T @ gradient
    weights = by_output(seen)
    weighted.add(inputs, torch.cat([weights[example, "layer"] for example in range(6)]))
    torch.testing.assert_close(weighted.gram, exact)


@pytest.mark.parametrize("path", ["float", "exposed"])
def test_equal_importance_changes_nothing(scenes_llava: VLM, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the gradient is the same everywhere, a weighted method is its host, to the last bit."""
    monkeypatch.setattr(
        "sensitivity.measure.gradients.token_importance.IMPORTANCE",
        {"gradient": (answer_gradients, lambda seen: {key: torch.ones_like(x) for key, x in seen.numbers.items()})},
    )
    parts = inspect(scenes_llava, by="part")
    statistics = calibration_statistics(scenes_llava, parts, ["vqa"], 4, path=path, importance=["gradient"])
    weights = [weight for weight in parts.weights if weight.part == "connector"]
    plain, weighed = statistics.gather(weights, ()), statistics.weighted["gradient"](weights, ())
    for weight in weights:
        assert torch.equal(plain[input_of(weight)].gram, weighed[input_of(weight)].gram)
        assert plain[input_of(weight)].weight == weighed[input_of(weight)].weight


@pytest.mark.parametrize("path", few(["float", "exposed"], ["exposed"]))
def test_a_plan_mixes_kinds_of_importance(scenes_llava: VLM, path: str, tmp_path: Path) -> None:
    """Each part by a method of its own; the fast path answers as the plain one."""
    parts = inspect(scenes_llava, by="part")
    kinds = ("mbq", "tlq-gptq", "oac")
    statistics = calibration_statistics(
        scenes_llava, parts, ["vqa"], 4, path=path, importance=("modality", "gradient", "output")
    )
    mixed = Plan(
        tuple(
            (name, scheme(kind, 3, calibration=statistics.facts)) for name, kind in zip(parts.names, kinds, strict=True)
        )
    )
    host = Plan.uniform(parts, scheme("gptq", 3, calibration=statistics.facts))
    tables = [
        sweep(
            scenes_llava,
            parts,
            [mixed, host],
            ["vqa"],
            tmp_path / how,
            n=8,
            statistics=statistics,
            plain=how == "plain",
        )
        for how in ("fast", "plain")
    ]
    for plan in (mixed, host):
        fast, plain = (study.examples(plan).set_index("example") for study in tables)
        assert fast["score"].equals(plain["score"])
    assert len({study.table()["vqa.nll"].round(6).nunique() for study in tables}) == 1


def test_what_has_no_loss_is_a_sentence(tmp_path: Path, scenes_llava: VLM) -> None:
    parts = inspect(scenes_llava, by="part")
    statistics = calibration_statistics(scenes_llava, parts, ["vqa"], 2)
    asked = scheme("gptq", 3, importance="gradient", calibration=statistics.facts)
    with pytest.raises(UserError, match=r"calibrate with importance=\('gradient',\)"):
        sweep(scenes_llava, parts, [Plan.uniform(parts, asked)], ["vqa"], tmp_path / "a", n=2, statistics=statistics)
    with pytest.raises(UserError, match="unknown importance of gptq 'gradients'"):
        scheme("gptq", 3, importance="gradients")
    batch = next(iter(answer_batches(scenes_llava, [task("vqa", "calibration", 1, 0)])))
    batch.targets = None
    with pytest.raises(UserError, match="no answers in words"):
        backward_pass(scenes_llava, list(parts.weights), batch, lambda *_: None)
    matching = load("embedded:scenes-blip2-itm", dtype="float32")
    with pytest.raises(UserError, match="no answers in words"):
        calibration_statistics(matching, inspect(matching, by="part"), ["retrieval"], 2, importance=["gradient"])


def test_a_gradient_that_is_not_finite_is_a_sentence(scenes_llava: VLM) -> None:
    weights = [weight for weight in inspect(scenes_llava, by="part").weights if weight.part == "language"]
    batch = next(iter(answer_batches(scenes_llava, [task("vqa", "calibration", 1, 0)])))
    layer = scenes_llava.model.get_submodule(weights[-1].reader)
    handle = layer.register_forward_hook(lambda module, args, output: output * float("inf"))
    try:
        with pytest.raises(UserError, match=r"the gradient of the answer loss at .* is NaN or infinite; run the model"):
            backward_pass(scenes_llava, weights, batch, lambda *_: None)
    finally:
        handle.remove()
