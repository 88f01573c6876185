"""ModelOpt's own gradient scores beside `fisher`: do they rank the layers and widths of a model alike?

    pip install --no-deps --target SOMEWHERE nvidia-modelopt omegaconf antlr4-python3-runtime==4.9.3 pulp ninja \
        nvidia-ml-py
    PYTHONPATH=SOMEWHERE python -m experiments.peers.with_modelopt [--model scenes-llava-heavy] [--n 16]

Both see the same calibration batches and the same loss; layers are rounded to nearest per row, symmetric, by each one's
own rule. ModelOpt gives layers that must share a format one score, so ours are summed over the same layers.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq  # type: ignore[import-not-found,import-untyped,unused-ignore]
import numpy as np
from scipy import stats

from sensitivity import inspect, load, scheme
from sensitivity.api.scoring import scored
from sensitivity.measure.gradients.backward import answer_loss
from sensitivity.measure.passes.token_batches import calibration_pass
from sensitivity.spec.files import overwrite

ROOT = Path(__file__).parent.parent.parent
OUT = ROOT / "reports" / "peers-modelopt.md"
BITS = (3, 4, 6, 8)
ROWS = 8  # examples in a batch


def formats() -> list[dict[str, object]]:
    """Weights alone, rounded per row."""
    return [
        {
            "quant_cfg": [
                {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": bits, "axis": 0}},
                {"quantizer_name": "*input_quantizer", "enable": False},
            ],
            "algorithm": "max",
        }
        for bits in BITS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="scenes-llava-heavy")
    parser.add_argument("--task", default="vqa")
    parser.add_argument("--n", type=int, default=16)
    args = parser.parse_args()
    vlm = load(f"embedded:{args.model}", dtype="float32")
    parts = inspect(vlm, by="linear")
    schemes = [scheme("rtn", bits, symmetric=True) for bits in BITS]
    found = scored(vlm, parts, schemes, [args.task], ("fisher",), args.n, cache_gb=0)
    ours = {
        weight.reader: [found.scores[0].scores[component.name][one] for one in found.schemes]
        for component in parts.components
        for weight in component.weights
    }
    data = list(found.given.data(ROWS))
    began = time.process_time()
    _, state = mtq.auto_quantize(
        vlm.model,
        constraints={"effective_bits": 6.0},
        quantization_formats=formats(),
        data_loader=data,
        forward_step=lambda model, batch: calibration_pass(vlm, batch),
        forward_backward_step=lambda model, batch: answer_loss(vlm, batch).backward(),
        num_calib_steps=1,
        num_score_steps=len(data),
    )
    seconds = time.process_time() - began
    pairs = []
    for group in state["candidate_stats"].values():
        if all(name in ours for name in group["module_names"]):
            for recipe, score in zip(group["formats"], group["scores"], strict=True):
                bits = next((b for b in BITS if f"num_bits': {b}" in str(recipe.config.model_dump())), None)
                if bits is not None:
                    pairs.append((score, sum(ours[name][BITS.index(bits)] for name in group["module_names"])))
    theirs, mine = np.array([pair for pair in pairs if min(pair) > 0]).T
    low, middle, high = np.percentile(theirs / mine, (25, 50, 75))
    row = {
        "version": version("nvidia-modelopt"), "model": args.model, "task": args.task, "n": args.n,
        "choices": len(theirs), "rank_correlation": stats.spearmanr(theirs, mine).statistic, "ratio": middle,
        "low": low, "high": high, "seconds_theirs": seconds, "seconds_ours": found.scores[0].seconds,
    }  # fmt: skip
    print(row)
    overwrite(OUT, page(row))


def page(row: Mapping[str, Any]) -> str:
    command = f"python -m experiments.peers.with_modelopt --model {row['model']} --task {row['task']} --n {row['n']}"
    middle = f"{row['low']:.2f} to {row['high']:.2f}"
    return (
        "# ModelOpt's gradient scores beside `fisher`\n\n"
        f"`{command}`, whose\n"
        f"first lines say what to install and what is compared: ModelOpt {row['version']}, the same batches and loss,\n"
        f"weights rounded to nearest at {', '.join(map(str, BITS))} bits.\n\n"
        "| groups of layers x widths | rank correlation | theirs / ours: median | middle half | CPU s | ours |\n"
        "|---|---|---|---|---|---|\n"
        f"| {row['choices']} | {row['rank_correlation']:.4f} | {row['ratio']:.2f} | {middle} | "
        f"{row['seconds_theirs']:.1f} | {row['seconds_ours']:.1f} |\n"
    )


if __name__ == "__main__":
    main()
