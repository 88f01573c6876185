"""Recall from whole matrices of similarities: the plain version that retrieval in pools is compared with."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from sensitivity.tasks.retrieval import RANKS, ranks


def recalls(images_to_texts: ArrayLike, texts_to_images: ArrayLike, owner: ArrayLike) -> dict[str, float]:
    """R@1, 5 and 10 of captions by image (rows) and of images by caption (rows), and their means.

    There are two matrices, because a model that re-ranks the most similar does so separately in each direction. An
    image counts if any of its captions is among the k most similar, a caption if its own image is.
    """
    by_image, by_text = np.asarray(images_to_texts, float), np.asarray(texts_to_images, float)
    image_index = np.asarray(owner)
    assert by_image.shape == by_text.shape[::-1] == (len(set(image_index.tolist())), len(image_index))
    text = ranks(by_image, image_index[None, :] == np.arange(len(by_image))[:, None])
    image = ranks(by_text, image_index[:, None] == np.arange(len(by_image))[None, :])
    found = {f"text R@{k}": float((text < k).mean()) for k in RANKS}
    found |= {f"image R@{k}": float((image < k).mean()) for k in RANKS}
    for direction in ("text", "image"):
        found[f"{direction} mean"] = float(np.mean([found[f"{direction} R@{k}"] for k in RANKS]))
    return found | {"mean": (found["text mean"] + found["image mean"]) / 2}
