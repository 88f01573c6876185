"""BLIP-2 under GPTQ, questions of GQA: widths of ViT, Q-Former and language model against accuracy."""

from __future__ import annotations

from papers import questions
from published import main

EXPERIMENT = questions("BLIP-2", "GPTQ", "GQA", {"vision": 22.6, "connector": 0.7, "language": 76.7})

if __name__ == "__main__":
    main(EXPERIMENT, __file__)
