"""LLaVA-1.5 under AWQ, questions of VQAv2: widths of ViT and language model against accuracy."""

from __future__ import annotations

from papers import questions
from published import main

EXPERIMENT = questions("LLaVA-1.5", "AWQ", "VQAv2", {"vision": 6.11, "language": 93.89})

if __name__ == "__main__":
    main(EXPERIMENT, __file__)
