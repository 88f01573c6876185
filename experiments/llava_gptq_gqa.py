"""LLaVA-1.5 under GPTQ, questions of GQA: widths of ViT and language model against accuracy."""

from __future__ import annotations

from papers import questions
from published import main

EXPERIMENT = questions("LLaVA-1.5", "GPTQ", "GQA", {"vision": 20.87, "language": 79.13})

if __name__ == "__main__":
    main(EXPERIMENT, __file__)
