"""BLIP-2 under GPTQ, questions of VQAv2: widths of ViT, Q-Former and language model against accuracy."""

from __future__ import annotations

from papers import questions
from published import main

EXPERIMENT = questions("BLIP-2", "GPTQ", "VQAv2", {"vision": 25.3, "connector": 1.5, "language": 73.1})

if __name__ == "__main__":
    main(EXPERIMENT, __file__)
