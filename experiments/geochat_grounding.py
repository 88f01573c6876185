"""GeoChat in bfloat16 and under LLM.int8: boxes found where things are described."""

from __future__ import annotations

from papers import geochat
from published import Figure, main

EXPERIMENT = geochat(
    "grounding descriptions",
    tasks=("geochat-grounding:{data}",),
    unit="acc@0.5",
    figures=(
        Figure({}, 18.1),
        Figure({}, 42.4, "acc@0.25"),
        Figure({}, 18.1, "acc@0.5, read as clockwise"),
        Figure({}, 42.4, "acc@0.25, read as clockwise"),
        Figure({}, 18.1, "acc@0.5, read as diagonal"),
        Figure({}, 42.4, "acc@0.25, read as diagonal"),
        Figure({"*": 8}, 17.5),
        Figure({"*": 8}, 41.9, "acc@0.25"),
    ),
    traps=(
        "18.1 and 42.4 are the report's own replication; the original claim is 11.7 and 33.9. The slides compare "
        "quantised runs with the original claim and read a gain out of it; against the replication it is a small loss",
        "no box code was ever published: how corners and angle become a polygon is a reading of ours (turned "
        "anticlockwise, as in its demo; clockwise and as a diagonal stand beside it), and so is how several boxes are "
        "matched, one to one; `any match` is the lenient one",
        "the published batches are padded on the left without an attention mask; ours has one",
    ),
)

if __name__ == "__main__":
    main(EXPERIMENT, __file__)
