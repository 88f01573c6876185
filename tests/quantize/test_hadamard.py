"""The Hadamard rotation: exact, and the same as with the matrix written out."""

from __future__ import annotations

import pytest
import torch
from scipy.linalg import hadamard
from torch import Tensor

from sensitivity.measure.memory.weight_codes import from_tensors, tensors
from sensitivity.measure.passes.token_batches import answer_batches, calibration_pass
from sensitivity.models.discovery import inspect
from sensitivity.models.vlm import VLM
from sensitivity.quantize.layer.curvature import Curvature
from sensitivity.quantize.layer.linears import Linears
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.quantize.solving import fake_quantize, solve
from sensitivity.quantize.stored.rotated import RotatedWeight, rotate, rotate_back
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Plan
from sensitivity.spec.runtimes.rules import refusals
from sensitivity.spec.sizes import size
from sensitivity.tasks.table import task


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seen(width: int) -> Curvature:
    found = Curvature(width)
    found.add(random(300, width, seed=1) @ random(width, width, seed=2))
    return found


@pytest.mark.parametrize(("width", "block"), [(64, 64), (96, 32), (24, 8), (17, 1), (1, 1)])
def test_it_is_the_matrix_written_out(width: int, block: int) -> None:
    rows, whole = random(5, width), torch.zeros(width, width)
    for a in range(0, width, block):
        whole[a : a + block, a : a + block] = torch.from_numpy(hadamard(block)).float() / block**0.5
    signs = torch.diag(rotate(torch.eye(width)) @ whole)
    assert signs.abs().sum() == pytest.approx(width)
    torch.testing.assert_close(rotate(rows), rows @ torch.diag(signs) @ whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rotate_back(rotate(rows)), rows, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(rotate(rows).norm(dim=1), rows.norm(dim=1))


def test_gptq_under_it_is_gptq_of_the_rotated_layer() -> None:
    """W R under the statistics of R'x, where the tokens themselves are rotated one by one."""
    weight, tokens = random(6, 32), random(300, 32, seed=1) @ random(32, 32, seed=2)
    plain, turned = Curvature(32), Curvature(32)
    plain.add(tokens)
    turned.add(rotate(tokens))
    asked = scheme("gptq", 3, order="given")
    expected = rotate_back(fake_quantize(rotate(weight), asked, turned))
    found = fake_quantize(weight, scheme("gptq", 3, order="given", transform="hadamard"), plain)
    # a number on the edge between two codes may fall to either side
    error, reference = (float(((q - weight) @ tokens.T).square().sum()) for q in (found, expected))
    assert error == pytest.approx(reference, rel=0.02)
    assert float((found - expected).abs().lt(1e-4).float().mean()) > 0.9


def test_few_large_weights_cost_less_behind_it() -> None:
    weight, curvature = random(16, 64), seen(64)
    weight[:, 5] *= 30
    errors = []
    for transform in ("none", "hadamard"):
        found = fake_quantize(weight, scheme("gptq", 3, clip=False, transform=transform), curvature) - weight
        errors.append(float(torch.einsum("ij,jk,ik->", found, curvature.gram, found)))
    assert errors[1] < 0.5 * errors[0]


def test_every_transform_at_full_width_leaves_the_logits(scenes_llava: VLM) -> None:
    weights = [w for w in inspect(scenes_llava, by="part").weights if not w.is_embedding]
    batch = next(iter(answer_batches(scenes_llava, [task("vqa", "calibration", 1, 0)])))
    parameters = dict(scenes_llava.model.named_parameters())
    held = {w.name: parameters[w.name].data for w in weights}
    with torch.no_grad():
        before = calibration_pass(scenes_llava, batch).logits
        try:
            for name, own in held.items():
                parameters[name].data = rotate_back(rotate(own.float())).to(own.dtype)
            after = calibration_pass(scenes_llava, batch).logits
        finally:
            for name, own in held.items():
                parameters[name].data = own
    torch.testing.assert_close(after, before, atol=2e-3, rtol=1e-3)


def test_without_rotation_and_weights_rsq_is_gptq() -> None:
    assert scheme("rsq", 3, transform="none", importance="uniform") == scheme("gptq", 3, order="given")


def test_what_is_stored_survives_the_cache() -> None:
    ((found,),) = solve(Linears(("w",), (random(6, 32),), seen(32)), [scheme("rsq", 3)])
    assert isinstance(found, RotatedWeight)
    again = from_tensors(tensors(found))
    assert isinstance(again, RotatedWeight)
    assert torch.equal(again.dequantize(), found.dequantize())


def test_it_costs_no_bits_and_no_runtime_loads_it_packed(scenes_llava: VLM) -> None:
    parts = inspect(scenes_llava, by="part")
    plain, turned = (Plan.uniform(parts, scheme("gptq", 4, transform=name)) for name in ("none", "hadamard"))
    assert size(parts, plain).bits == size(parts, turned).bits
    (rule,) = refusals(parts["language"], scheme("gptq", 4, transform="hadamard"), "compressed-tensors")
    assert "does not rotate inputs; sweep with --set transform=none, or use --format fake" in rule
    assert not list(refusals(parts["language"], scheme("gptq", 4, transform="hadamard"), "fake"))
    with pytest.raises(UserError, match="unknown transform of gptq 'rotate'"):
        scheme("gptq", 4, transform="rotate")
