"""Whether an image file is whole: from its end where its kind marks it, otherwise by decoding all of it."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from sensitivity.tasks import Stored

ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
TAIL = 4096  # bytes at the end of a file that are searched: cameras write things of their own behind the picture


def unusable(image: NDArray[np.uint8] | Stored) -> str | None:
    """Why an image cannot be used; None where it can."""
    if isinstance(image, np.ndarray):
        return None
    try:
        with image.open("rb") if isinstance(image, Path) else io.BytesIO(image.read_bytes()) as file:
            return None if _whole(file) else "a truncated image"
    except FileNotFoundError:
        return "no image file"
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError):
        return "an image that cannot be read"


def _whole(file: io.BufferedReader | io.BytesIO) -> bool:
    with Image.open(file) as opened:
        if (mark := ENDS.get(opened.format or "")) is not None:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - TAIL, 0))
            if mark in file.read():
                return True
    file.seek(0)
    with Image.open(file) as opened:
        try:
            opened.load()
        except OSError:
            return False
    return True
