"""Whether an image file is whole: from its end where its kind marks it, otherwise by decoding all of it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sensitivity.fields import MISSING, Misfit, not_a_file
from sensitivity.tasks import Stored, opened, stream

ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
TAIL = 4096  # bytes at the end of a file that are searched: cameras write things of their own behind the picture


def unusable(image: NDArray[np.uint8] | Stored) -> str | None:
    """Why an image cannot be used; None where it can."""
    if isinstance(image, np.ndarray):
        return None
    if isinstance(image, Path) and (trouble := not_a_file(image)):
        return "no image file" if trouble == MISSING else f"no image file: {trouble}"
    try:
        return None if _whole(image) else "a truncated image"
    except Image.DecompressionBombError:
        return "an image of more pixels than Pillow holds to be safe"
    except Misfit:
        return "an image far longer than wide"
    except FileNotFoundError:  # of a data set that keeps its images elsewhere
        return "no image file"
    except Exception:  # on a damaged file, each of Pillow's readers has errors of its own
        return "an image that cannot be read"


def _whole(image: Stored) -> bool:
    with opened(image) as picture:
        if (mark := ENDS.get(picture.format or "")) is not None and mark in _tail(image):
            if picture.format == "PNG":
                picture.verify()  # its checksums, without decoding; a JPEG has none
            return True
    with opened(image) as picture:
        try:
            picture.load()
        except OSError:
            return False
    return True


def _tail(image: Stored) -> bytes:
    source = stream(image)
    with source.open("rb") if isinstance(source, Path) else source as file:
        file.seek(max(file.seek(0, os.SEEK_END) - TAIL, 0))
        return file.read()
