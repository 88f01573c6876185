"""fake: a checkpoint that holds the dequantized values of the quantized weights, in the dtype of the study."""

from __future__ import annotations

from pathlib import Path

from sensitivity.formats.writing.checkpoint import bytes_beside_tensors, write_checkpoint
from sensitivity.formats.writing.job import Job, Written

LOAD = """\
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(FOLDER, dtype="{dtype}")
processor = AutoProcessor.from_pretrained(FOLDER)
"""


def write(job: Job, folder: Path) -> Written:
    """Write a checkpoint that loads everywhere and answers as the plan does, but is not smaller.

    It is for comparisons, and for methods whose codes no other format can hold.
    """
    # loaded in a narrower dtype than this, such as the checkpoint's own, the values would be rounded a second time
    weight, hashes = write_checkpoint(job, folder, None, {"dtype": job.dtype_name})
    return Written(
        load=LOAD.format(dtype=job.dtype_name),
        bytes=weight,
        hashes=hashes,
        headers=bytes_beside_tensors(folder, weight),
        notes=(
            f"The values are quantized, but the files are not smaller: they hold these in {job.dtype_name}, in which "
            "the plan was measured, and all other weights as in the base model.",
        ),
        runs=True,
    )
