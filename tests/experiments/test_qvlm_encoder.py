"""Training of an encoder under a plan: what passes through its rounding, and that the best state is kept."""

from __future__ import annotations

import pytest
import torch

from experiments.methods import qvlm_encoder
from experiments.methods.qvlm_encoder import Encoder, StraightThrough
from sensitivity.models.loading import load
from sensitivity.quantize.run_time.inputs import round_between, round_inputs


def test_gradients_pass_through_rounding_and_numbers_do_not_change() -> None:
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    low, high = torch.tensor(-2.0), torch.tensor(2.5)
    for change in (lambda t: round_inputs(t, 4), lambda t: round_between(t, 4, low, high)):
        expected = change(x.detach())
        with StraightThrough():
            found = change(x)
        torch.testing.assert_close(found.detach(), expected, rtol=0, atol=1e-6)
        (slope,) = torch.autograd.grad(found.sum(), x)
        inside = (x.detach() > low) & (x.detach() < high)
        assert float(slope[inside].mean()) == pytest.approx(1, abs=0.3)


@pytest.mark.slow
def test_a_training_that_helps_nothing_leaves_the_encoder_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a rate that ruins the encoder, no step at all is the best state; its codes are never in the model after."""
    monkeypatch.setattr(qvlm_encoder, "CALIBRATION", 16)
    monkeypatch.setattr(qvlm_encoder, "HELD_OUT", 8)
    encoder = Encoder(load("embedded:scenes-llava", dtype="float32"), "caption")
    before = {name: p.detach().clone() for name, p in encoder.vlm.model.named_parameters()}
    losses = encoder.train((1.0, 0.5, 0.5), 1, 10.0)
    assert losses[1] > losses[0] > 0
    assert all(torch.equal(before[name], p) for name, p in encoder.vlm.model.named_parameters())
    assert not any(p.requires_grad for p in encoder.vlm.model.parameters())
