"""OwnWeights: a model's own parameters while a plan's stand in their place, in 16 bits where that loses nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

MIN_SIZE = 2**18  # elements of a parameter that is worth the conversion: a megabyte in float32
PIECES = 16  # in which a parameter is compared
NARROW = (torch.bfloat16, torch.float16)  # what checkpoints are stored in


class OwnWeights(Mapping[str, Tensor]):
    """The parameters of a model by name, as they were when this was made.

    A checkpoint of 16 bits is often run in float32, on most CPUs for speed. A plan adds float32 weights of its own:
    were the model's own kept in float32, too, it would be in memory twice.
    """

    def __init__(self, model: nn.Module) -> None:
        self._kept = {name: parameter.data for name, parameter in model.named_parameters()}
        self._dtypes = {name: tensor.dtype for name, tensor in self._kept.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._kept[name].to(self._dtypes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def take(self, name: str) -> Tensor:
        """Give a parameter back for the model, and drop its 16 bits, so that memory never holds all in both widths."""
        return self._kept.pop(name).to(self._dtypes[name])

    def narrow(self, name: str) -> None:
        """Keep a float32 parameter in 16 bits if all of its bits come back; the model must not use it meanwhile."""
        own = self._kept[name]
        if own.dtype != torch.float32 or own.numel() < MIN_SIZE:
            return
        for dtype in NARROW:
            narrow = own.to(dtype)
            # in pieces, so that the comparison needs no third copy of the whole
            if all(torch.equal(a.float(), b) for a, b in zip(narrow.chunk(PIECES), own.chunk(PIECES), strict=True)):
                self._kept[name] = narrow
                return
