"""VLM-PTQ: GPTQ fitted to the float model's output; ranges are searched under the best mix of image and text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sensitivity.quantize.layer.curvature import Curvature
from sensitivity.quantize.layer.error_cost import quadratic, upper_half
from sensitivity.quantize.layer.linears import Linears
from sensitivity.quantize.layer.two_paths import TwoPaths
from sensitivity.quantize.solvers.gptq import factor_of, on_integer_grids, searched_grid, towards_float
from sensitivity.quantize.stored.integer_grid import QuantizedWeight
from sensitivity.spec.plan import Scheme

# shares of the image; .5, which weighs image and text alike, comes first and wins ties
SHARES = (0.5, 0.0, 0.25, 0.75, 1.0)


def quantize_vlm_ptq(linears: Linears, schemes: Sequence[Scheme]) -> list[list[QuantizedWeight | None]]:
    """Shift and round as GPTQ does, with the best of a few shares of image and text in the range search.

    Known from reviews that print its equations: the least-squares shift of the weights, and ranges searched under
    mu diag(H_image) + (1 - mu) diag(H_text), mu by the error of W x~ - Q x. Ours: the exact shift, where it is printed
    as a factor per column; the shares that are tried; mu for each weight, not for all that read one input.
    """
    factor, seen = factor_of(linears, schemes[0]), linears.input_statistics
    rows, half = towards_float(linears, schemes[0], factor), upper_half(seen.gram)
    sizes = [len(weight) for weight in linears.weights]
    best: list[list[QuantizedWeight | None]] = [[None] * len(sizes) for _ in schemes]
    least = torch.full((len(schemes), len(sizes)), torch.inf)
    for cost in costs(seen, linears.both_paths):

        def find(weights: Tensor, scheme: Scheme, _: Tensor, a: int, cost: Tensor = cost) -> tuple[Tensor, Tensor]:
            return searched_grid(weights, scheme, linears.dtype, cost[a : a + weights.shape[1]])

        for s, whole in enumerate(on_integer_grids(factor, rows, schemes, find)):
            error = quadratic(whole.dequantize() - rows, half)
            for w, (piece, errors) in enumerate(zip(linears.split(whole), torch.split(error, sizes), strict=True)):
                if (total := float(errors.sum())) < least[s, w]:
                    best[s][w], least[s, w] = piece, total
    return best


def costs(seen: Curvature, paths: TwoPaths) -> list[Tensor]:
    """The cost of each column's error under each share; a layer that reads only image or only text has one cost."""
    image = paths.image
    text = (seen.gram.diagonal() - image).clamp(min=0)
    # `image` and the diagonal are summed in different orders, so without text their difference is not exactly zero
    alone = bool((text <= 1e-5 * seen.gram.diagonal()).all()) or not bool(image.any())
    return [seen.gram.diagonal() / 2] if alone else [mu * image + (1 - mu) * text for mu in SHARES]
