"""Scores from forward passes: how quantizing each component alone, or adding noise to it, changes the answers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from sensitivity.measure.attribution.calibrated import Calibrated, Scores
from sensitivity.spec.components import Weight

NOISE = 0.01  # squared norm of the noise, as a share of the weight's: about the error of 4 bits
DRAWS = 2  # draws of noise for each component


def divergence(calibrated: Calibrated) -> Scores:
    """The divergence of the answers from the float model's with one component quantized: ModelOpt's KL."""
    changes = calibrated.one_at_a_time
    return {name: {scheme: change.divergence for scheme, change in row.items()} for name, row in changes.items()}


def loss(calibrated: Calibrated) -> Scores:
    """By how much the loss of right answers rises with one component quantized; negative where it falls."""
    changes = calibrated.one_at_a_time
    return {name: {scheme: change.loss for scheme, change in row.items()} for name, row in changes.items()}


def linear_theorem(calibrated: Calibrated) -> Scores:
    """HIGGS: the mean relative squared error of the weights, times the divergence that noise causes per unit of it.

    For a small error the damage is linear in its squared norm, and equals that of noise with the same norm. HIGGS adds
    noise to each layer; here it is each component, so that the number of passes does not grow with the model's depth.
    """
    found: Scores = {}
    for component in calibrated.parts.components:
        weights = [weight for weight in component.weights if not weight.is_embedding]
        slope = 0.0
        for draw in range(DRAWS):
            with noisy(calibrated.vlm.model, weights, draw):
                slope += calibrated.answers.now().divergence / NOISE / DRAWS
        layers = [calibrated.layers[weight.name] for weight in weights]
        found[component.name] = {
            scheme: slope * sum(one.weight_errors[i] / (one.weight or math.inf) for one in layers) / max(len(layers), 1)
            for i, scheme in enumerate(calibrated.schemes)
        }
    return found


@contextmanager
def noisy(model: nn.Module, weights: Sequence[Weight], seed: int) -> Iterator[None]:
    """Inside the `with` block, noise is added to each weight, with NOISE times the weight's squared norm."""
    draw = torch.Generator().manual_seed(seed)
    parameters = [model.get_parameter(weight.name) for weight in weights]
    own = [parameter.data for parameter in parameters]
    try:
        for parameter in parameters:
            noise = torch.randn(parameter.shape, generator=draw).to(parameter.device)
            scale = math.sqrt(NOISE) * parameter.data.float().norm() / noise.norm()
            parameter.data = (parameter.data.float() + scale * noise).to(parameter.dtype)
        yield
    finally:
        for parameter, weight in zip(parameters, own, strict=True):
            parameter.data = weight
