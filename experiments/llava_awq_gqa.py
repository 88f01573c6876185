"""LLaVA-1.5 under AWQ, questions of GQA: widths of ViT and language model against accuracy."""

from __future__ import annotations

from papers import questions
from published import main

EXPERIMENT = questions("LLaVA-1.5", "AWQ", "GQA", {"vision": 5.38, "language": 94.62})

if __name__ == "__main__":
    main(EXPERIMENT, __file__)
