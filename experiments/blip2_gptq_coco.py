"""BLIP-2 under GPTQ, captions of COCO: widths of ViT, Q-Former and language model against CIDEr."""

from __future__ import annotations

from papers import captions
from published import Figure, alone, main, mixed

# of one reading: the 64 with all parts at 6 bits or more have a standard deviation of .032
HALF = round(1.96 * 0.032, 3)
SEVEN = (2, 3, 4, 5, 6, 7, 8, 16)  # this table has 7 bits too, and no language model at 2


EXPERIMENT = captions(
    "GPTQ",
    grid={"vision": SEVEN, "connector": SEVEN, "language": SEVEN[1:]},
    figures=(
        Figure({}, 1.2041, half=HALF),
        Figure({}, 0.2733, "METEOR"),
        *alone("*", {3: 0.240, 4: 1.009, 5: 1.153, 6: 1.223, 8: 1.261}, half=HALF),
        *alone("vision", {2: 0.005, 3: 1.102, 4: 1.199, 5: 1.192, 6: 1.228, 8: 1.222}, half=HALF),
        *alone("connector", {2: 1.089, 3: 1.212, 4: 1.248, 5: 1.145, 6: 1.159, 8: 1.211}, half=HALF),
        *alone("language", {3: 0.215, 4: 0.997, 5: 1.175, 6: 1.242, 8: 1.228}, half=HALF),
        *mixed({(2, 8, 8): 0.010, (4, 4, 3): 0.138, (3, 3, 4): 0.856, (8, 8, 4): 0.951, (4, 8, 8): 1.138}, half=HALF),
    ),
    spread="1.96 times .032, the spread of the 64 readings with all parts at 6 bits or more",
    shares={"": {"vision": 50.4, "connector": 2.0, "language": 47.6}},
    traps=(
        "every reading has an evaluation subset of its own, about 1,024 images drawn anew, and CIDEr weighs words by "
        "the images evaluated: do not read differences below about .06",
        "the language model was never tried at 2 bits, the ViT was",
    ),
)

if __name__ == "__main__":
    main(EXPERIMENT, __file__)
