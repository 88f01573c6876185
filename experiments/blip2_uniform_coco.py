"""BLIP-2 under uniform min-max quantisation, captions of COCO: which part, third and kind of layer against CIDEr."""

from __future__ import annotations

from papers import captions
from published import Figure, alone, main

# what the published code really quantised where it says a part, or all of them
VIT, LLM, QFORMER = "vision", "language.*.ff", "connector.*.attn"


def together(width: int) -> dict[str, int]:
    return {VIT: width, LLM: width, QFORMER: width}


EXPERIMENT = captions(
    "uniform",
    by="group.kind",
    alone=(3, 4, 5, 6, 8),
    figures=(
        Figure({}, 1.2853),
        Figure({}, 0.2785, "METEOR"),
        *alone(VIT, {4: 0.000, 5: 0.028, 6: 1.017, 8: 1.270}),
        *alone("vision.*.attn", {4: 0.034, 5: 1.064, 6: 1.189, 8: 1.275}),
        *alone(LLM, {3: 0.000, 4: 0.001, 5: 0.204, 6: 1.108, 8: 1.278}),
        *(Figure(together(width), value) for width, value in {4: 0.000, 5: 0.001, 6: 0.861, 8: 1.260}.items()),
    ),
    traps=("theirs are the first 1,000 images; ours are drawn with the seed",),
)

if __name__ == "__main__":
    main(EXPERIMENT, __file__)
