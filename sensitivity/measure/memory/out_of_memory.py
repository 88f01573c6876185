"""Out of memory: a batch that does not fit on the device is run again at half its size, with a warning."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

from sensitivity.spec.errors import Notice, UserError

T = TypeVar("T")


def run_or_halve(run: Callable[[], T], at_once: int, what: str, device: torch.device) -> T | None:
    """The result of `run` on `at_once` examples; None if it ran out of memory and half as many may fit.

    The caller retries after this function has returned, not inside it: an exception that is being handled keeps alive
    the tensors that did fit.
    """
    try:
        return run()
    except torch.OutOfMemoryError as error:
        if at_once == 1:
            why = f"a single example of {what} does not fit into the memory of {device}"
            raise UserError(f"{why}; choose a narrower --dtype or another --device") from error
    if device.type == "cuda":
        torch.cuda.empty_cache()
    warnings.warn(f"out of memory on {device}: batches of {what} are halved", Notice, stacklevel=2)
    return None
