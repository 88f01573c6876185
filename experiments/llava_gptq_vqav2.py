"""LLaVA-1.5 under GPTQ, questions of VQAv2: widths of ViT and language model against accuracy."""

from __future__ import annotations

from papers import questions
from published import main

EXPERIMENT = questions("LLaVA-1.5", "GPTQ", "VQAv2", {"vision": 27.85, "language": 72.15})

if __name__ == "__main__":
    main(EXPERIMENT, __file__)
