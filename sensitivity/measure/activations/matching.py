"""Two scalars that match attention's logits and outputs to the float model's after quantizing (QuantVLA)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sensitivity.measure.passes.attention_hooks import attending_hooks

# limits of the released code: factors are clamped between LEAST_* and MOST_*; those within NEAR_* of 1 are not applied
LEAST_LOGIT, MOST_LOGIT, NEAR_LOGIT = 0.7, 1.4, 0.02
MOST_OUTPUT, NEAR_OUTPUT = 0.30, 0.03  # the same, of the logarithm of the factor
MASKED = -1e4  # logits below this are masked


@dataclass(frozen=True)
class AttentionScale:
    """The standard deviation of each head's logits in an attention, and the root mean square of its output."""

    logits: Tensor | None
    output: float


def attention_scales(
    model: nn.Module, outputs: Mapping[str, str], passes: Callable[[], Iterable[object]]
) -> dict[str, AttentionScale]:
    """The scale of each attention over all passes, by path; `outputs` maps each path to the attention's last layer."""
    logits: dict[str, _LogitSums] = {path: _LogitSums() for path in outputs}
    squares: dict[str, list[float]] = {path: [0.0, 0.0] for path in outputs}

    def attend(path: str) -> Callable[[Tensor, Tensor | None], None]:
        return lambda seen, value: logits[path].add(seen)

    def output(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, found: Tensor) -> None:
            squares[path][0] += float(found.square().sum(dtype=torch.float64))
            squares[path][1] += found.numel()

        return hook

    with ExitStack() as hooks:
        for path, last in outputs.items():
            for hook in attending_hooks(model.get_submodule(path), attend(path)):
                hooks.callback(hook.remove)
            hooks.callback(model.get_submodule(last).register_forward_hook(output(path)).remove)
        for _ in passes():
            pass
    return {
        path: AttentionScale(logits[path].deviation, math.sqrt(total / max(count, 1)))
        for path, (total, count) in squares.items()
    }


def factors(float_: AttentionScale, quantized: AttentionScale) -> tuple[Tensor | None, float]:
    """The factors of each head's logits and of the outputs: 1 where they are close, and never beyond the limits."""
    output = 1.0
    if float_.output > 0 and quantized.output > 0:
        log = math.log(float_.output / quantized.output)
        output = math.exp(max(-MOST_OUTPUT, min(MOST_OUTPUT, log))) if abs(log) >= NEAR_OUTPUT else 1.0
    if float_.logits is None or quantized.logits is None:
        return None, output
    ratio = (float_.logits / (quantized.logits + 1e-6)).clamp(LEAST_LOGIT, MOST_LOGIT)
    return torch.where((ratio - 1).abs() < NEAR_LOGIT, torch.ones_like(ratio), ratio), output


class _LogitSums:
    """Number, sum and sum of squares of each head's logits, without masked ones."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None  # number, sum and sum of squares by head

    def add(self, logits: Tensor) -> None:
        values = logits.double() if logits.device.type != "mps" else logits.float()
        seen = values > MASKED
        values = values.where(seen, values.new_zeros(()))
        sums = torch.stack([one.sum((0, 2, 3)) for one in (seen.to(values), values, values.square())])
        # for a single query, heads may be packed into another shape; such a pass is left out
        self.sums = sums if self.sums is None else self.sums + sums if sums.shape == self.sums.shape else self.sums

    @property
    def deviation(self) -> Tensor | None:
        """The standard deviation of each head's logits; None where no logits were seen."""
        if self.sums is None:
            return None
        number, total, squares = self.sums
        variance: Tensor = squares / number - (total / number).square()
        return variance.clamp(min=0).sqrt()
