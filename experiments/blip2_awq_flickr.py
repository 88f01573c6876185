"""BLIP-2 under AWQ, retrieval on Flickr30k: widths of ViT and Q-Former against recall."""

from __future__ import annotations

from papers import WIDTHS, retrieval
from published import Figure, main

# (ViT, Q-Former) -> R@1 of images among texts, of texts among images
RECALLS = {
    (16, 16): (97.9, 89.46),
    (8, 8): (97.9, 89.44),
    (4, 4): (97.6, 89.68),
    (3, 3): (97.2, 88.54),
    (2, 2): (67.5, 61.32),
    (2, 16): (84.1, 71.24),
    (16, 2): (88.0, 83.28),
    (3, 16): (97.4, 88.68),
}

EXPERIMENT = retrieval(
    "AWQ",
    grid=dict.fromkeys(("vision", "connector"), WIDTHS),
    figures=tuple(
        Figure({"vision": vision, "connector": connector}, value, metric)
        for (vision, connector), both in RECALLS.items()
        for value, metric in zip(both, ("text R@1", "image R@1"), strict=True)
    ),
    shares={
        "text R@1": {"vision": 73.2, "connector": 26.8},
        "image R@1": {"vision": 84.7, "connector": 15.3},
    },
)

if __name__ == "__main__":
    main(EXPERIMENT, __file__)
