"""BLIP-2 under AWQ, captions of COCO: widths of ViT, Q-Former and language model against CIDEr."""

from __future__ import annotations

from papers import WIDTHS, captions
from published import Figure, alone, main, mixed

# of one reading: the 27 with all parts at 6 bits or more have a standard deviation of .011
HALF = round(1.96 * 0.011, 3)

EXPERIMENT = captions(
    "AWQ",
    grid=dict.fromkeys(("vision", "connector", "language"), WIDTHS),
    figures=(
        Figure({}, 1.2542, half=HALF),
        Figure({}, 0.2813, "METEOR"),
        *alone("*", {2: 0.001, 3: 0.805, 4: 1.182, 5: 1.190, 6: 1.236, 8: 1.222}, half=HALF),
        *alone("vision", {2: 0.736, 3: 1.275, 4: 1.272, 5: 1.257, 6: 1.247, 8: 1.229}, half=HALF),
        *alone("connector", {2: 1.121, 3: 1.229, 4: 1.261, 5: 1.253, 6: 1.252, 8: 1.253}, half=HALF),
        *alone("language", {2: 0.005, 3: 0.789, 4: 1.164, 5: 1.195, 6: 1.245, 8: 1.249}, half=HALF),
        *mixed({(2, 8, 8): 0.735, (3, 4, 4): 1.179, (4, 4, 3): 0.804, (4, 8, 8): 1.269}, half=HALF),
    ),
    spread="1.96 times .011, the spread of the 27 readings with all parts at 6 bits or more",
    shares={"": {"vision": 17.1, "connector": 2.5, "language": 80.5}},
    traps=("with readings at 16 bits left out the published importance is found again to .1 per cent",),
)

if __name__ == "__main__":
    main(EXPERIMENT, __file__)
