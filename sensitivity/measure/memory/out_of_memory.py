"""Halving: what does not fit into a device's memory is tried again with half as much at once, and that is said once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

from sensitivity.spec.errors import Notice, UserError

T = TypeVar("T")


def run_or_halve(run: Callable[[], T], at_once: int, what: str, device: torch.device) -> T | None:
    """What `run` gives with so many examples at once; None where it runs out of memory, and half as many may do.

    The caller goes on with fewer when this has returned: an error that is being handled holds on to the tensors that
    did fit.
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
