"""Tweaks the norms of a quantized block by gradient steps, so that its outputs come close to the float block's."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from sensitivity.measure.activations.block_chain import BlockCalls, outputs, recorded_calls, squared_error
from sensitivity.measure.passes.block_modules import block_paths, float_model, hidden_states, without_hooks
from sensitivity.quantize.stored.integer_grid import as_16_bit
from sensitivity.spec.components import ComponentMap, Weight
from sensitivity.spec.plan import TWEAK, Scheme

PASSES = 8  # batches of calibration data whose hidden states are in memory at once
RATE = 1e-3  # of Adam in the first block
GROWTH = 5.0  # the last block's rate is higher by so many times that


class TweakedNorms:
    """Tweaks the norms of one model; `found` keeps them for later plans."""

    def __init__(
        self,
        model: nn.Module,
        parts: ComponentMap,
        passes: Callable[[], Iterable[object]],
        depends_on_plan: bool,
        found: dict[Hashable, dict[str, Tensor]],
    ) -> None:
        self.model, self.passes, self.depends_on_plan, self.found = model, passes, depends_on_plan, found
        self.paths = block_paths(model, parts.weights)
        self.norms = [kept.name for kept in parts.kept if kept.reason == "norm"]

    def of_block(
        self, block: Sequence[Weight], given: Mapping[str, Scheme], own: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The tweaked norms of a block whose weights are in the model as a plan stores them; `own` are the float ones.

        Every norm inside the block is tweaked if the scheme of any of its weights asks for it. Inputs are those of the
        calibration path; on the float path they, and so the norms, depend on no other block.
        """
        steps = max(int(given[weight.name].get(TWEAK) or 0) for weight in block)
        first = block[0]
        path = self.paths.get((first.part, first.block)) if first.block is not None else None
        inside = [name for name in self.norms if path and name.startswith(f"{path}.")]
        if not steps or not inside or path is None:
            return {}
        key = path, frozenset((weight.name, given[weight.name]) for weight in block)
        if key not in self.found:
            with float_model(self.model, own):
                (calls,) = recorded_calls(self.model, [path], self.passes, PASSES)
                target = outputs([calls])
            if self.depends_on_plan:
                (calls,) = recorded_calls(self.model, [path], self.passes, PASSES)
            rate = RATE * (1 + GROWTH * (first.block or 0) / first.blocks)
            norms = {name.removeprefix(f"{path}."): own[name] for name in inside}
            found = tweaked(calls, norms, target, steps, rate)
            if self.depends_on_plan:  # no other plan has these inputs
                return {f"{path}.{name}": value for name, value in found.items()}
            self.found[key] = {f"{path}.{name}": value for name, value in found.items()}
        return {name: value.clone() for name, value in self.found[key].items()}


def tweaked(
    calls: BlockCalls, norms: Mapping[str, Tensor], target: Sequence[Tensor], steps: int, rate: float
) -> dict[str, Tensor]:
    """The norms of a block, by name in it, after the step with the least squared error of the block's outputs.

    The norms before any step are compared, too, so the error never rises. A step follows the loss of Norm Tweaking: how
    far the mean and the variance of each output channel are from the float block's. Rounded activations have no
    gradient, so steps are taken on the block without that rounding; errors are measured with it.
    """
    best = {name: value.clone() for name, value in norms.items()}
    least = output_error(calls, best, target)
    with torch.inference_mode(False), torch.enable_grad():
        trained = {name: value.detach().clone().float().requires_grad_() for name, value in norms.items()}
        optimizer = torch.optim.Adam(trained.values(), lr=rate)
        wanted = [_moments(output.clone()) for output in target]
        arguments = [tree_map(_ordinary, call) for call in calls.calls]
        for _ in range(steps if arguments else 0):
            optimizer.zero_grad()
            with without_hooks(calls.module):
                for (args, kwargs), moments in zip(arguments, wanted, strict=True):
                    loss = _loss(calls.module, norms, trained, args, kwargs, moments)
                    loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            # rounded as they will be stored, so that what is measured is what is exported
            now = {name: _as_stored(value, norms[name].dtype) for name, value in trained.items()}
            if (error := output_error(calls, now, target)) < least:
                best, least = now, error
    return best


def output_error(calls: BlockCalls, norms: Mapping[str, Tensor], target: Sequence[Tensor]) -> float:
    """The squared error of a block's outputs with some norms, by name in it."""
    parameters = {name: calls.module.get_parameter(name) for name in norms}
    held = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = norms[name]
        return squared_error(outputs([calls]), target)
    finally:
        for name, parameter in parameters.items():
            parameter.data = held[name]


def _loss(
    module: nn.Module,
    norms: Mapping[str, Tensor],
    trained: Mapping[str, Tensor],
    args: tuple[object, ...],
    kwargs: dict[str, object],
    wanted: tuple[Tensor, Tensor],
) -> Tensor:
    """How far the moments of the block's output in one call are from the wanted ones."""
    own = {name: parameter.detach() for name, parameter in module.named_parameters()}
    values = {name: value.clone() if value.is_inference() else value for name, value in own.items()}
    values |= {name: value.to(norms[name].dtype) for name, value in trained.items()}
    mean, variance = _moments(hidden_states(functional_call(module, values, args, kwargs)))
    return (mean - wanted[0]).abs().mean() + (variance - wanted[1]).abs().mean()


def _as_stored(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A norm as 16 bits store it, in the model's dtype."""
    return as_16_bit(value.detach(), dtype).to(dtype)


def _moments(output: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel over all tokens."""
    tokens = output.float().flatten(0, -2)
    return tokens.mean(0), tokens.var(0, correction=0)


def _ordinary(value: object) -> object:
    """An ordinary copy of a tensor that was made in inference mode, through which no gradient may pass."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value
