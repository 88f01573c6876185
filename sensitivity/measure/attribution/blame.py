"""Blame: a plan's damage by component, by modality, by region of each image and by token of each question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor

from sensitivity.measure.gradients.path_integral import PathIntegral
from sensitivity.measure.passes.token_batches import MODALITIES, PROMPT, VISION
from sensitivity.models.families import Family
from sensitivity.spec.components import ComponentMap


@dataclass(frozen=True)
class Blame:
    """How much of the change of the loss comes from each component, modality, image region and token of a question.

    A token's modality is that of the position at which a layer's output has changed; all tokens of a vision tower are
    vision. Components sum to the whole change, and so do modalities. Regions leave out tokens that are not
    patches: class tokens, queries and text.
    """

    components: Mapping[str, float]
    modalities: Mapping[str, float]
    regions: Mapping[int, Tensor]  # example, by its number -> rows x columns of patches; empty where none are known
    prompts: Mapping[int, Tensor]  # example -> what comes from each token of its question, in the language model


def blame_of(parts: ComponentMap, family: Family, integral: PathIntegral) -> Blame:
    """Sum the terms of a path integral by component, by modality, by region and by token of the question."""
    components = dict.fromkeys(parts.names, 0.0)
    modalities = dict.fromkeys(MODALITIES[VISION:], 0.0)
    grids: dict[int, list[Tensor]] = {}
    prompts = {example: torch.zeros(len(ids), dtype=torch.double) for example, ids in integral.prompts.items()}
    for (example, name, length), values in integral.terms.items():
        components[name] += float(values.sum())
        kinds = integral.modalities[example, name, length]
        kinds = torch.full((length,), VISION) if kinds is None else kinds
        for number, kind in enumerate(MODALITIES):
            if number >= VISION:
                modalities[kind] += float(values[kinds == number].sum())
        if parts[name].part == "language" and (read := int((kinds == PROMPT).sum())):
            # an output head reads only the last token, so its terms belong to the end of the prompt
            prompts[example][-read:] += values[kinds == PROMPT]
        if parts[name].part in family.patches and (grid := patch_grid(values[kinds == VISION])) is not None:
            grids.setdefault(example, []).append(grid)
    regions = {example: summed_grids(grid_list) for example, grid_list in sorted(grids.items())}
    return Blame(components, modalities, regions, prompts)


def patch_grid(values: Tensor) -> Tensor | None:
    """The values of patches as rows and columns, without a class token; None if they do not fill a square."""
    for patches in (values, values[1:]):
        if len(patches) and isqrt(len(patches)) ** 2 == len(patches):
            return patches.reshape(isqrt(len(patches)), -1)
    return None


def summed_grids(grids: Sequence[Tensor]) -> Tensor:
    """The sum of grids, in rows and columns of the finest.

    The values of a coarser grid are spread evenly; it is left out if its side does not divide the finest one's.
    """
    finest = max(len(grid) for grid in grids)
    total = torch.zeros(finest, finest, dtype=grids[0].dtype)
    for grid in grids:
        times, rest = divmod(finest, len(grid))
        if not rest:
            total += torch.kron(grid, torch.full((times, times), 1 / times**2, dtype=grid.dtype))
    return total
