"""Token importance: how much each token that a layer reads counts in its calibration statistics, instead of 1."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

from sensitivity.measure.gradients.backward import RunsOnce, add_per_token, backward_pass
from sensitivity.measure.gradients.block_error import block_errors
from sensitivity.measure.gradients.perturbation import perturbations
from sensitivity.measure.passes.attention import attention_received
from sensitivity.measure.passes.block_inputs import block_input_rms
from sensitivity.measure.passes.token_batches import ANSWER, VISION, TokenBatch
from sensitivity.models.vlm import VLM
from sensitivity.quantize.layer.linears import input_of
from sensitivity.spec.components import Weight

Key = tuple[int, str]  # a calibration example, by its number, and an input
TokenWeights = Mapping[Key, Tensor]  # the weight of each token
TINY = torch.finfo(torch.float32).tiny
MIN_WEIGHT = 0.005  # the least weight that attention gives, as in RSQ's script
# returns, by input, a number for each token of a batch
Observe = Callable[[VLM, Sequence[Weight], TokenBatch], Mapping[str, Tensor]]


@dataclass
class TokenNumbers:
    """For each calibration example and input: what was observed at each token, and its modality."""

    numbers: dict[Key, Tensor] = field(default_factory=dict)
    modalities: dict[Key, Tensor | None] = field(default_factory=dict)  # None: all are vision

    def add(self, weights: Sequence[Weight], batch: TokenBatch, observed: Mapping[str, Tensor]) -> None:
        """Add the examples of a batch, which have equal shapes."""
        parts = {input_of(weight): weight.part for weight in weights}
        for name, values in observed.items():
            modality, _ = batch.modality(parts[name], values.shape)
            tokens = len(values) // len(batch.examples)
            for row, example in enumerate(batch.examples):
                of_row = slice(row * tokens, (row + 1) * tokens)
                self.numbers[example, name] = values[of_row]
                self.modalities[example, name] = None if modality is None else modality[of_row]


def answer_gradients(vlm: VLM, weights: Sequence[Weight], batch: TokenBatch) -> dict[str, Tensor]:
    """The norm of the gradient of the answer loss, over the outputs of all layers that read an input."""
    squares: dict[str, Tensor] = {}
    once = RunsOnce()

    def visit(weight: Weight, inputs: Tensor, gradient: Tensor) -> None:
        once.check(weight)
        add_per_token(squares, weight, gradient.float().square().sum(1))

    backward_pass(vlm, weights, batch, visit)
    return {name: total.sqrt() for name, total in squares.items()}


def by_modality(seen: TokenNumbers) -> TokenWeights:
    """1 for answer tokens, lambda for vision tokens, 0 for others (MBQ, Li et al. 2025).

    A layer's lambda is the mean gradient of its vision tokens over that of its answer tokens, or the median of all
    layers' where that is larger. A layer that reads the image alone counts all its tokens alike. MBQ weights the L1
    error of a module's output in a scale search; this is the same weight in the squared error of a layer's output.
    """
    image: dict[str, list[Tensor]] = {}
    answer: dict[str, list[Tensor]] = {}
    for (example, name), norms in seen.numbers.items():
        modality = seen.modalities[example, name]
        if modality is not None and bool((modality == ANSWER).any()):
            image.setdefault(name, []).append(norms[modality == VISION])
            answer.setdefault(name, []).append(norms[modality == ANSWER])
    means = {name: (torch.cat(image[name]).mean(), torch.cat(answer[name]).mean()) for name in answer}
    # a text without an image has no mean (NaN), and an answer that the model is sure of may have none above zero
    ratios = {name: float(vision / text) for name, (vision, text) in means.items() if vision > 0 and text > 0}
    middle = median(ratios.values()) if ratios else 1.0
    token_weights = {}
    for (example, name), norms in seen.numbers.items():
        modality = seen.modalities[example, name]
        if modality is None or name not in answer:
            token_weights[example, name] = torch.ones_like(norms)
        else:
            weight = max(ratios.get(name, middle), middle)
            token_weights[example, name] = (modality == ANSWER).to(norms) + weight * (modality == VISION).to(norms)
    return token_weights


def by_gradient(seen: TokenNumbers) -> TokenWeights:
    """The norm of the loss gradient at the token, over its mean: TLQ, as inferred from its abstract."""
    return {key: norms / norms.mean().clamp(min=torch.finfo(norms.dtype).tiny) for key, norms in seen.numbers.items()}


def by_output(seen: TokenNumbers) -> TokenWeights:
    """The squared norm of the loss gradient: OAC's curvature of the loss, without terms between different tokens."""
    return {key: norms.square() for key, norms in seen.numbers.items()}


def by_block(seen: TokenNumbers) -> TokenWeights:
    """The gradient of a block's own error, over its mean: SalQ-VLM, as inferred from its abstract and reviews.

    The mean is over all data, so that an example with larger gradients counts more.
    """
    totals: dict[str, list[Tensor]] = {}
    for (_, name), values in seen.numbers.items():
        totals.setdefault(name, []).append(values)
    means = {name: torch.cat(values).mean().clamp(min=TINY) for name, values in totals.items()}
    return {(example, name): values / means[name] for (example, name), values in seen.numbers.items()}


def by_attention(seen: TokenNumbers) -> TokenWeights:
    """The attention that a token receives, mapped to [0.005, 1], then divided by its mean (RSQ, Sung et al. 2025)."""
    token_weights = {}
    for key, values in seen.numbers.items():
        low, high = values.min(), values.max()
        ranged = (values - low) / (high - low).clamp(min=TINY) * (1 - MIN_WEIGHT) + MIN_WEIGHT
        ranged = torch.ones_like(values) if high <= low else ranged
        token_weights[key] = ranged / ranged.mean()
    return token_weights


def by_perturbation(seen: TokenNumbers) -> TokenWeights:
    """A token's share of the example, clipped to 1.5 interquartile ranges around the quartiles, with mean 1 (QIG)."""
    token_weights = {}
    for key, values in seen.numbers.items():
        share = values / values.sum().clamp(min=TINY)
        first, third = _quartiles(share)
        reach = 1.5 * (third - first)
        share = share.clamp(min=(first - reach).clamp(min=0), max=third + reach)
        token_weights[key] = share / share.mean().clamp(min=TINY)
    return token_weights


def _quartiles(values: Tensor) -> Tensor:
    """The first and the third quartile."""
    return torch.quantile(values, torch.tensor([0.25, 0.75], device=values.device, dtype=values.dtype))


def by_filter(seen: TokenNumbers) -> TokenWeights:
    """1 for tokens of examples within 1.5 interquartile ranges of the quartiles, 0 for the others (QuantVGGT).

    Quartiles of fewer than four examples say little, so then all count.
    """
    means: dict[str, list[Tensor]] = {}
    for (_, name), values in seen.numbers.items():
        means.setdefault(name, []).append(values.mean())
    fences = {}
    for name, of_examples in means.items():
        first, third = _quartiles(torch.stack(of_examples).double())
        reach = 1.5 * (third - first)
        fences[name] = (first - reach, third + reach) if len(of_examples) >= 4 else None
    found = {}
    for (example, name), values in seen.numbers.items():
        fence = fences[name]
        inside = fence is None or bool(fence[0] <= values.mean().double() <= fence[1])
        found[example, name] = torch.full_like(values, float(inside))
    return found


# for each kind: the function that observes the tokens of a batch, and the one that turns observations into weights
IMPORTANCE: Mapping[str, tuple[Observe, Callable[[TokenNumbers], TokenWeights]]] = {
    "modality": (answer_gradients, by_modality),
    "gradient": (answer_gradients, by_gradient),
    "output": (answer_gradients, by_output),
    "block": (block_errors, by_block),
    "attention": (attention_received, by_attention),
    "perturbation": (perturbations, by_perturbation),
    "filtered": (block_input_rms, by_filter),
}


def importance_of(
    vlm: VLM, weights: Sequence[Weight], data: Iterable[TokenBatch], names: Sequence[str]
) -> dict[str, TokenWeights]:
    """The token weights of each kind of importance; kinds that observe the same share one pass over the data.

    Inputs that the loss does not reach are left out, such as those of a tower's blocks after the one whose features
    are read.
    """
    seen = {IMPORTANCE[kind][0]: TokenNumbers() for kind in names}
    for batch in data:
        for observe, numbers in seen.items():
            numbers.add(weights, batch, observe(vlm, weights, batch))
    by_kind: dict[str, TokenWeights] = {}
    for kind in names:
        observe, weigh = IMPORTANCE[kind]
        weighed = weigh(seen[observe])
        reached = {name for (_, name), values in weighed.items() if bool((values > 0).any())}
        by_kind[kind] = {(example, name): values for (example, name), values in weighed.items() if name in reached}
    return by_kind


def weights_of_batch(token_weights: TokenWeights, batch: TokenBatch, name: str) -> Tensor | None:
    """The weights of the tokens that a batch has at one input, in the order in which its layer reads them.

    None where the loss does not reach the input: then all its tokens count alike.
    """
    if any((example, name) not in token_weights for example in batch.examples):
        return None
    return torch.cat([token_weights[example, name] for example in batch.examples])
