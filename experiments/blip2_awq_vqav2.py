"""BLIP-2 under AWQ, questions of VQAv2: widths of ViT, Q-Former and language model against accuracy."""

from __future__ import annotations

from papers import questions
from published import main

EXPERIMENT = questions("BLIP-2", "AWQ", "VQAv2", {"vision": 1.5, "connector": 0.2, "language": 98.3})

if __name__ == "__main__":
    main(EXPERIMENT, __file__)
