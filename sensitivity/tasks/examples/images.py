"""Opens images, and finds truncated files by the marker at their end or by decoding them."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from sensitivity.spec.errors import UserError, reason
from sensitivity.spec.fields import MISSING, InvalidValue, not_a_file
from sensitivity.tasks.examples import videos
from sensitivity.tasks.examples.types import ImageSource

END_MARKERS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
TAIL = 4096  # bytes at the end of a file in which the marker is searched, since cameras append data of their own


def why_unusable(image: NDArray[np.uint8] | ImageSource) -> str | None:
    """Why an image cannot be used; None if it can."""
    if isinstance(image, np.ndarray):
        return None
    if isinstance(image, videos.Frame):
        return image.why_unusable()
    if isinstance(image, Path) and (trouble := not_a_file(image)):
        return "no image file" if trouble == MISSING else f"no image file: {trouble}"
    try:
        return None if _is_complete(image) else "a truncated image"
    except Image.DecompressionBombError:
        return "an image of more pixels than Pillow opens"
    except InvalidValue:
        return "an image far longer than wide"
    except FileNotFoundError:  # the rows of a saved data set may name image files elsewhere
        return "no image file"
    except Exception:  # on a damaged file, each of Pillow's readers has errors of its own
        return "an image that cannot be read"


def _is_complete(image: ImageSource) -> bool:
    """Whether an image is complete: by the end marker of its format or, where none is found, by decoding it."""
    with opened_image(image) as picture:
        if (mark := END_MARKERS.get(picture.format or "")) is not None and mark in _tail(image):
            if picture.format == "PNG":
                picture.verify()  # checks the checksums without decoding; a JPEG has none
            return True
    # without an end marker only decoding shows whether anything is missing
    with opened_image(image) as picture:
        try:
            picture.load()
        except OSError:
            return False
    return True


def _tail(image: ImageSource) -> bytes:
    source = image_stream(image)
    with source.open("rb") if isinstance(source, Path) else source as file:
        file.seek(max(file.seek(0, os.SEEK_END) - TAIL, 0))
        return file.read()


MAX_ASPECT = 200  # of a long side to the short one: enlarged to a model's input, a thinner image takes gigabytes


def open_image(source: NDArray[np.uint8] | ImageSource) -> Image.Image:
    """An upright RGB image from an array or from any file that Pillow reads."""
    if isinstance(source, np.ndarray):
        return Image.fromarray(source)
    try:
        with opened_image(source) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # 16 bits per channel, which convert() would clip to white
                return Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8)).convert("RGB")
            return upright.convert("RGB")
    except FileNotFoundError:
        raise UserError(f"no image at {source}") from None
    except Exception as error:  # on a damaged file, each of Pillow's readers has errors of its own
        raise UserError(f"cannot read the image {source}: {reason(error)}") from error


@contextmanager
def opened_image(source: ImageSource) -> Iterator[Image.Image]:
    """An image whose header is read and whose pixels are not.

    Anything but a regular file is refused, since opening a pipe could wait forever.
    """
    if isinstance(source, Path) and (trouble := not_a_file(source)):
        raise FileNotFoundError(source) if trouble == MISSING else InvalidValue(trouble)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # Pillow raises an error at twice that size
        with Image.open(image_stream(source)) as image:
            if max(image.size) > MAX_ASPECT * min(image.size):
                raise InvalidValue(f"it is {image.width} by {image.height} pixels, and {MAX_ASPECT} to 1 is the most")
            yield image


def image_key(image: NDArray[np.uint8] | ImageSource) -> Hashable:
    """A small key by which images are compared: the hash of an array, or what `resolve` returns."""
    if isinstance(image, np.ndarray):
        return image.shape, hashlib.blake2b(image.tobytes()).digest()
    return image.resolve()


def image_stream(source: ImageSource) -> Path | io.BytesIO:
    """What Pillow can open: a path, from which it reads only what it needs, or all bytes."""
    return source if isinstance(source, Path) else io.BytesIO(source.read_bytes())
