"""BLIP-2 under GPTQ, retrieval on Flickr30k: widths of ViT and Q-Former against recall."""

from __future__ import annotations

from papers import WIDTHS, retrieval
from published import main

EXPERIMENT = retrieval(
    "GPTQ",
    grid=dict.fromkeys(("vision", "connector"), WIDTHS),
    shares={
        "text R@1": {"vision": 70.3, "connector": 29.7},
        "image R@1": {"vision": 78.4, "connector": 21.6},
    },
)

if __name__ == "__main__":
    main(EXPERIMENT, __file__)
