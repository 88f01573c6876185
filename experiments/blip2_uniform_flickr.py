"""BLIP-2 under uniform min-max quantisation, retrieval on Flickr30k: part, third and kind of layer against recall."""

from __future__ import annotations

from papers import retrieval
from published import main

EXPERIMENT = retrieval(
    "uniform",
    by="group.kind",
    alone=(3, 4, 5, 6, 8),
    missing=("the published recalls under uniform quantisation: they are in figures only",),
)

if __name__ == "__main__":
    main(EXPERIMENT, __file__)
