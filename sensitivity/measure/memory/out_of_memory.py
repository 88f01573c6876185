"""Out of memory: a batch that does not fit on the device is run again at half its size, with a warning."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

from sensitivity.spec.errors import Notice, UserError

T = TypeVar("T")


def run_or_halve(
    run: Callable[[], T], at_once: int, what: str, device: torch.device, release: Callable[[], bool] | None = None
) -> T | None:
    """The result of `run` on `at_once` examples; None if it ran out of memory and half as many may fit.

    None for a single example, too, if `release` freed memory that plans share: it may fit now. The caller retries
    after this function has returned, not inside it: an exception that is being handled keeps alive the tensors that
    did fit.
    """
    try:
        return run()
    except torch.OutOfMemoryError as error:
        if at_once == 1 and not (release and release()):
            why = f"a single example of {what} does not fit into the memory of {device}"
            raise UserError(f"{why}; choose a narrower --dtype or another --device") from error
    if device.type == "cuda":
        torch.cuda.empty_cache()
    halved = f"batches of {what} are halved"
    slower = "plans share no more hidden states from here on, which takes longer"
    warnings.warn(f"out of memory on {device}: {halved if at_once > 1 else slower}", Notice, stacklevel=2)
    return None


def room_beside(device: torch.device, weights: int, one_in: int = 4) -> int:
    """Bytes that hidden states, and as many again that codes, may take on a GPU; sys.maxsize elsewhere.

    One part in four of what is free beside a plan's quantized weights, of which `weights` is the size: half is for the
    batches, of which a question alone may take as much as an image. Elsewhere the user's own limit is enough.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return sys.maxsize
    free, _ = torch.cuda.mem_get_info(device)
    return max(free - weights, 0) // one_in
