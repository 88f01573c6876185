"""Error planted in one quarter of the image, and how blame lies over the image in a model with shuffled weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from math import isqrt

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from experiments.benchmarks.planted_defects import Case, Changes, Subject, compared
from sensitivity.measure.calibrate.calibration import calibration_examples
from sensitivity.measure.gradients.backward import answer_loss
from sensitivity.measure.gradients.path_integral import moved
from sensitivity.measure.passes.token_batches import VISION, TokenBatch, answer_batches, calibration_pass
from sensitivity.spec.components import Weight

Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]
QUARTERS = ("upper left", "upper right", "lower left", "lower right")
ERRORS = (2.0, 4.0)  # of an error's output, as a multiple of the layer's
TENTH = 0.1
IMAGES = 48  # from which the direction is learned that tells a quarter from the others
ORDERS = 500  # random orders of the places of each image
FLAT_DRAWS = 4  # draws of examples


def quarter(subject: Subject, case: Case) -> dict[str, object]:
    """One case: the quarter with the most blame, and the one that mends most if its tokens pass float weights.

    The error acts in the first feed-forward of the tower. It has rank one: its input side is the direction that tells
    the tokens of the quarter from all others, its output side is random, as large as the layer's output times a level.
    """
    weight = next(one for one in subject.parts.weights if one.part == "vision" and one.kind == "ff")
    inputs = tower_inputs(subject, weight)
    wanted, draw = case.seed % 4, torch.Generator().manual_seed(case.seed)
    own = quarters(isqrt(inputs.shape[1]))
    direction = telling(inputs, own == wanted)
    size = (inputs @ subject.vlm.model.get_parameter(weight.name).data.float().T).square().mean().sqrt()
    output = torch.randn(weight.rows, generator=draw)
    planted = torch.outer(output / output.square().mean().sqrt() * size * case.level, direction)
    fine = subject.rounded(case.beside)
    changes = {**fine, weight.name: fine[weight.name] + planted}
    data = subject.examples(case.seed)
    found, integral = subject.blame(changes, data)
    blamed = dict.fromkeys(QUARTERS, 0.0)
    for grid in found.regions.values():
        for i, name in enumerate(QUARTERS):
            blamed[name] += float(grid.flatten()[quarters(len(grid)) == i].sum())
    mended = {name: integral.after - loss_without(subject, changes, data, i) for i, name in enumerate(QUARTERS)}
    errors = (inputs @ direction).square().mean(0)
    inside = float(errors[own == wanted].sum() / errors.sum())
    return {**compared(QUARTERS[wanted], blamed, mended, integral, data), "inside": inside}


def quarters(side: int) -> Tensor:
    """The quarter of each patch of a square image, row by row; the middle of an odd side is right and below."""
    rows, columns = torch.arange(side * side) // side, torch.arange(side * side) % side
    return 2 * (rows >= side // 2) + (columns >= side // 2)


def telling(inputs: Tensor, wanted: Tensor) -> Tensor:
    """The direction whose product with a layer's input is nearest to 1 at wanted patches and to 0 at others."""
    rows = inputs.flatten(0, 1).double()
    ridge = 1e-3 * len(rows) * rows.square().mean() * torch.eye(rows.shape[1]).double()
    return torch.linalg.solve(rows.T @ rows + ridge, rows.T @ wanted.repeat(len(inputs)).double()).float()


def tower_inputs(subject: Subject, weight: Weight) -> Tensor:
    """What a layer of the tower reads at each patch (images x patches x width), without a class token."""
    kept: list[Tensor] = []
    layer = subject.vlm.model.get_submodule(weight.reader)
    with ExitStack() as stack, torch.inference_mode():
        hook = layer.register_forward_pre_hook(lambda module, args: kept.append(args[0].float()))
        stack.callback(hook.remove)
        for batch in answer_batches(subject.vlm, calibration_examples(["scene"], IMAGES, 9)):
            calibration_pass(subject.vlm, batch)
    every = torch.cat(kept).clone()
    return every[:, every.shape[1] - isqrt(every.shape[1]) ** 2 :]


def loss_without(subject: Subject, changes: Changes, data: list[TokenBatch], quarter: int) -> float:
    """The loss with the tokens of one quarter computed with float weights, in every layer that reads patches."""
    total = 0.0
    weights = [one for one in subject.parts.weights if one.name in changes and one.part in subject.vlm.family.patches]
    with moved(subject.vlm.model, changes, 1.0), torch.inference_mode():
        for batch in data:
            with ExitStack() as hooks:
                for weight in weights:
                    layer = subject.vlm.model.get_submodule(weight.reader)
                    hook = float_tokens(weight, changes[weight.name], batch, quarter)
                    hooks.callback(layer.register_forward_hook(hook).remove)
                total += float(answer_loss(subject.vlm, batch))
    return total


def float_tokens(weight: Weight, change: Tensor, batch: TokenBatch, quarter: int) -> Hook:
    """A hook that takes a weight's change out of a layer's output at the patches of one quarter."""

    def hook(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        inputs, found = args[0].flatten(0, -2), output.flatten(0, -2).clone()
        for row in patches(weight, batch, len(inputs)):
            own = row[quarters(isqrt(len(row))) == quarter]
            found[own] -= inputs[own] @ change.T
        return found.reshape(output.shape)

    return hook


def patches(weight: Weight, batch: TokenBatch, tokens: int) -> Iterator[Tensor]:
    """For each example the positions of its patches among all tokens of a layer's input, as `blame` finds them."""
    kinds, _ = batch.modality(weight.part, torch.Size((tokens,)))
    place = torch.arange(tokens).reshape(len(batch.examples), -1)
    for row in place:
        vision = row if kinds is None else row[kinds[row] == VISION]
        if len(vision):
            yield vision[len(vision) - isqrt(len(vision)) ** 2 :]  # without a class token


def flat(subject: Subject) -> dict[str, object]:
    """How blame lies over the places of an image, in the trained model and with each weight's entries shuffled."""
    found: dict[str, object] = {}
    for name, one in (("trained", subject), ("shuffled", shuffled(subject))):
        grids = []
        for seed in range(FLAT_DRAWS):
            regions = one.blame(one.rounded(3), one.examples(1000 + seed))[0].regions
            grids += [(grid.abs() / grid.abs().sum()).flatten().numpy() for grid in regions.values()]
        found |= {f"{name} {key}": value for key, value in evenness(np.array(grids)).items()}
    return found


def evenness(grids: np.ndarray) -> dict[str, float]:
    """Of images x places: the share of the tenth with most blame, by image; deviation over mean of the mean image.

    The deviation's rank is the share of random orders of each image's places in which it is at least as large: a small
    one says that the same places have more blame in all images. `order` is the rank correlation of the mean image with
    the order in which the language model reads the places.
    """
    own, draw = deviation(grids), np.random.default_rng(0)
    drawn = np.array([deviation(draw.permuted(grids, axis=1)) for _ in range(ORDERS)])
    order = spearmanr(np.arange(grids.shape[1]), grids.mean(0)).statistic
    return {"tenth": tenth_with_most(grids), "deviation": own, "chance": float(drawn.mean()),
            "rank": float((drawn >= own).mean()), "order": float(order)}  # fmt: skip


def tenth_with_most(grids: np.ndarray) -> float:
    """The share of its sum that the tenth of an image's places with most blame has: the mean over images."""
    most = np.sort(grids, 1)[:, ::-1][:, : max(1, round(TENTH * grids.shape[1]))]
    return float((most.sum(1) / grids.sum(1)).mean())


def tenth_of_noise(places: int) -> float:
    """The same share where blame is normal noise, alike and independent at all places: what flat blame shows."""
    return tenth_with_most(np.abs(np.random.default_rng(0).standard_normal((10_000, places))))


def deviation(grids: np.ndarray) -> float:
    mean = grids.mean(0)
    return float(mean.std() / mean.mean())


def shuffled(subject: Subject) -> Subject:
    """The same model with the entries of every weight in random order."""
    other = Subject(subject.name, subject.by)
    other.vlm = copy.copy(subject.vlm)
    other.vlm.model = copy.deepcopy(subject.vlm.model)
    draw = torch.Generator().manual_seed(0)
    for weight in other.parts.weights:
        parameter = other.vlm.model.get_parameter(weight.name)
        entries = parameter.data.flatten()
        parameter.data = entries[torch.randperm(len(entries), generator=draw)].reshape(parameter.shape)
    return other
