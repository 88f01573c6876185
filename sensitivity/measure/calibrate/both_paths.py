"""Statistics of both calibration paths: inputs behind quantized layers, beside those of the float model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from sensitivity.measure.calibrate.blockwise import BlockwisePass, Installed
from sensitivity.measure.calibrate.collecting import Data, collect
from sensitivity.measure.calibrate.statistics import Gather
from sensitivity.measure.gradients.token_importance import TokenWeights
from sensitivity.measure.memory.out_of_memory import run_or_halve
from sensitivity.measure.passes.block_modules import float_model, layer_input
from sensitivity.measure.passes.token_batches import ROWS, TokenBatch
from sensitivity.models.vlm import VLM
from sensitivity.quantize.layer.curvature import Curvature
from sensitivity.quantize.layer.linears import input_of
from sensitivity.spec.components import ComponentMap, Weight


def gather_both(vlm: VLM, parts: ComponentMap, data: Data, token_weights: TokenWeights | None = None) -> Gather:
    """A `Gather` of the model with the weights that it has at each call, beside the float model's inputs."""
    return _BothPaths(vlm, parts, data, token_weights).gather


class _BothPaths:
    """Two passes over the data for each block: through the float model, then through the quantized one.

    Both continue where the previous ones ended. The inputs of a block's layers in the float model are in memory for all
    batches, until the second pass has used them.
    """

    def __init__(self, vlm: VLM, parts: ComponentMap, data: Data, token_weights: TokenWeights | None) -> None:
        self.vlm, self.parts, self.data, self.token_weights, self.rows = vlm, parts, data, token_weights, ROWS
        self.own = {name: parameter.data for name, parameter in vlm.model.named_parameters()}
        self.passes: tuple[BlockwisePass, BlockwisePass] | None = None

    def gather(self, weights: Sequence[Weight], installed: Installed | None = None) -> Mapping[str, Curvature]:
        """The statistics, with half the batch size after each out-of-memory error."""

        def compute() -> Mapping[str, Curvature]:
            unquantized, quantized = self.passes = self.passes or self._begin()
            with float_model(self.vlm.model, self.own), unquantized.run_up_to(weights, ()) as forward:
                read = _inputs(self.vlm, weights, unquantized, forward)
            with quantized.run_up_to(weights, installed) as forward:
                return collect(self.vlm, weights, quantized.data, forward, self.token_weights, read)

        while (statistics := run_or_halve(compute, self.rows, "the calibration data", self.vlm.device)) is None:
            self.rows //= 2
            self.passes = None  # their recorded outputs belong to the larger batches
        return statistics

    def _begin(self) -> tuple[BlockwisePass, BlockwisePass]:
        """A pass for each path, over the same batches."""
        data, one = list(self.data(self.rows)), next(iter(self.data(1)))
        with float_model(self.vlm.model, self.own):  # both paths run the same modules in the same order
            first, second = (BlockwisePass(self.vlm, self.parts, data, exposed, one) for exposed in (False, True))
        return first, second


def _inputs(
    vlm: VLM, weights: Sequence[Weight], passes: BlockwisePass, forward: Callable[[VLM, TokenBatch], None]
) -> dict[tuple[int, str], list[Tensor]]:
    """What layers read in each batch: by id(batch) and name of the input, one tensor for each call."""
    inputs: dict[tuple[int, str], list[Tensor]] = {}
    current = 0
    with ExitStack() as hooks, torch.inference_mode():
        for name, weight in {input_of(weight): weight for weight in weights}.items():

            def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], name: str = name) -> None:
                inputs.setdefault((current, name), []).append(layer_input(args, kwargs))

            layer = vlm.model.get_submodule(weight.reader)
            hooks.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        for batch in passes.data:
            current = id(batch)
            forward(vlm, batch)
    return inputs
