"""Token importance: how much each token that a layer reads counts in its calibration statistics, beside 1 for all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

from sensitivity.measure.gradients.backward import backward
from sensitivity.measure.passes.token_batches import ANSWER, VISION, TokenBatch
from sensitivity.models.vlm import VLM
from sensitivity.quantize.layer.linears import input_of
from sensitivity.spec.components import Weight
from sensitivity.spec.errors import UserError

Key = tuple[int, str]  # a calibration example, by its number, and an input
TokenWeights = Mapping[Key, Tensor]  # the weight of each token


@dataclass
class TokenGradients:
    """For each calibration example and input: the norm of the loss gradient at each token, and its modality."""

    norms: dict[Key, Tensor] = field(default_factory=dict)
    modalities: dict[Key, Tensor | None] = field(default_factory=dict)  # None: all are vision

    def add(self, vlm: VLM, weights: Sequence[Weight], batch: TokenBatch) -> None:
        """Add the examples of a batch: per input, the norm over the outputs of all layers that read it."""
        squares: dict[str, Tensor] = {}
        parts: dict[str, str] = {}
        reached: set[str] = set()

        def visit(weight: Weight, inputs: Tensor, gradient: Tensor) -> None:
            if weight.name in reached:
                raise UserError(
                    f"{weight.reader} runs several times in a forward pass, and the importance of its tokens is not "
                    "known then; choose importance=uniform"
                )
            reached.add(weight.name)
            name = input_of(weight)
            each = gradient.float().square().sum(1)
            squares[name] = squares[name] + each if name in squares else each
            parts[name] = weight.part

        backward(vlm, weights, batch, visit)
        for name, total in squares.items():
            modality, _ = batch.modality(parts[name], total.shape)
            tokens = len(total) // len(batch.examples)  # examples of a batch have equal shapes
            for row, example in enumerate(batch.examples):
                own = slice(row * tokens, (row + 1) * tokens)
                self.norms[example, name] = total[own].sqrt()
                self.modalities[example, name] = None if modality is None else modality[own]


def by_modality(seen: TokenGradients) -> TokenWeights:
    """1 for answer tokens, lambda for vision tokens, 0 for others (MBQ, Li et al. 2025).

    A layer's lambda is the mean gradient of its vision tokens over that of its answer tokens, or the median of all
    layers' where that is larger. A layer that reads the image alone counts all its tokens alike. MBQ weights the L1
    error of a module's output in a scale search; this is the same weight in the squared error of a layer's output.
    """
    image: dict[str, list[Tensor]] = {}
    answer: dict[str, list[Tensor]] = {}
    for (example, name), norms in seen.norms.items():
        modality = seen.modalities[example, name]
        if modality is not None and bool((modality == ANSWER).any()):
            image.setdefault(name, []).append(norms[modality == VISION])
            answer.setdefault(name, []).append(norms[modality == ANSWER])
    means = {name: (torch.cat(image[name]).mean(), torch.cat(answer[name]).mean()) for name in answer}
    # a text without an image has no mean (NaN), and an answer that the model is sure of may have none above zero
    ratios = {name: float(vision / text) for name, (vision, text) in means.items() if vision > 0 and text > 0}
    middle = median(ratios.values()) if ratios else 1.0
    found = {}
    for (example, name), norms in seen.norms.items():
        modality = seen.modalities[example, name]
        if modality is None or name not in answer:
            found[example, name] = torch.ones_like(norms)
        else:
            weight = max(ratios.get(name, middle), middle)
            found[example, name] = (modality == ANSWER).to(norms) + weight * (modality == VISION).to(norms)
    return found


def by_gradient(seen: TokenGradients) -> TokenWeights:
    """The norm of the loss gradient at the token (TLQ, known from its abstract: that it is this norm is inferred)."""
    return {key: norms / norms.mean().clamp(min=torch.finfo(norms.dtype).tiny) for key, norms in seen.norms.items()}


def by_output(seen: TokenGradients) -> TokenWeights:
    """The squared norm of that gradient: OAC's curvature of the loss, without the terms between different tokens."""
    return {key: norms.square() for key, norms in seen.norms.items()}


# each gives the weight of every token of every example and input
IMPORTANCE: Mapping[str, Callable[[TokenGradients], TokenWeights]] = {
    "modality": by_modality, "gradient": by_gradient, "output": by_output,
}  # fmt: skip


def importance_of(
    vlm: VLM, weights: Sequence[Weight], data: Iterable[TokenBatch], names: Iterable[str]
) -> dict[str, TokenWeights]:
    """Every importance that is asked for, from one backward pass over the data; without inputs that have none.

    The loss does not reach all layers: blocks of a tower behind the one whose features are read, for example.
    """
    seen = TokenGradients()
    for batch in data:
        seen.add(vlm, weights, batch)
    found: dict[str, TokenWeights] = {}
    for kind in names:
        weighed = IMPORTANCE[kind](seen)
        reached = {name for (_, name), values in weighed.items() if bool((values > 0).any())}
        found[kind] = {(example, name): values for (example, name), values in weighed.items() if name in reached}
    return found


def of_batch(found: TokenWeights, batch: TokenBatch, name: str) -> Tensor | None:
    """The weights of the tokens that a batch has at one input, in the order in which its layer reads them.

    None where the loss does not reach the input: then all its tokens count alike.
    """
    if any((example, name) not in found for example in batch.examples):
        return None
    return torch.cat([found[example, name] for example in batch.examples])
