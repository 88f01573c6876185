"""BLIP-2 under AWQ, questions of GQA: widths of ViT, Q-Former and language model against accuracy."""

from __future__ import annotations

from papers import questions
from published import main

EXPERIMENT = questions("BLIP-2", "AWQ", "GQA", {"vision": 1.0, "connector": 0.4, "language": 98.6})

if __name__ == "__main__":
    main(EXPERIMENT, __file__)
