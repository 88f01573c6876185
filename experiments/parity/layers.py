"""Linear layers of a trained model with their inputs: calibration data to quantize, evaluation data to judge."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sensitivity.measure.passes.token_batches import answer_batches, calibration_pass
from sensitivity.models.discovery import inspect
from sensitivity.models.loading import load
from sensitivity.models.vlm import VLM
from sensitivity.tasks.table import task

TASKS = ("vqa", "caption", "scene", "ground")


@dataclass(frozen=True)
class Layer:
    name: str
    weight: Tensor
    inputs: Tensor  # tokens x channels, from the calibration split
    fresh: Tensor  # from the evaluation split

    def error(self, quantized: Tensor, fresh: bool = False) -> float:
        """Mean squared error of the output, relative to its mean square."""
        x = (self.fresh if fresh else self.inputs).double()
        wrong, right = x @ (self.weight - quantized).double().T, x @ self.weight.double().T
        return float(wrong.square().mean() / right.square().mean())


def layers(model: str, n: int = 128, every: int = 1) -> list[Layer]:
    """Every `every`-th linear layer of a model, in the order of the forward pass."""
    vlm = load(model)
    names = [w.name for c in inspect(vlm, by="block").components for w in c.weights][::every]
    seen, fresh = (_inputs(vlm, names, split, n) for split in ("calibration", "evaluation"))
    return [Layer(name, vlm.model.get_parameter(name).detach().float(), seen[name], fresh[name]) for name in names]


def _inputs(vlm: VLM, names: list[str], split: str, n: int) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    with ExitStack() as hooks, torch.inference_mode():
        for name in names:

            def hook(module: Any, args: tuple[Tensor, ...], name: str = name) -> None:
                found[name].append(args[0].reshape(-1, args[0].shape[-1]).float().clone())

            module = vlm.model.get_submodule(name.rpartition(".")[0])
            hooks.callback(module.register_forward_pre_hook(hook).remove)
        data = [replace(task(name, split, n // len(TASKS), 0)) for name in TASKS]
        for batch in answer_batches(vlm, data):
            calibration_pass(vlm, batch)
    return {name: torch.cat(chunks) for name, chunks in found.items()}
