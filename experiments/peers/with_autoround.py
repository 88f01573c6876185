"""AutoRound's own AutoScheme on the language tower beside our DeltaLoss: do they score and choose layers alike?

    pip install --no-deps --target SOMEWHERE auto-round py-cpuinfo
    PYTHONPATH=SOMEWHERE python -m experiments.peers.with_autoround [--model scenes-llava-heavy] [--n 16]

Both see the same calibration examples one by one, with images, and the same loss, a mean over an answer's tokens.
AutoScheme would read texts from the hub; its data loader alone is replaced. Layers are rounded to nearest per row from
their least to their largest value, by each one's own rule, all layers of the language tower at once. Their choice is by
dynamic programming at an average number of bits, ours by one price of a bit, which may leave some of the bits unused.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from auto_round.auto_scheme import delta_loss as theirs  # type: ignore[import-not-found,import-untyped,unused-ignore]
from auto_round.auto_scheme.gen_auto_scheme import (  # type: ignore[import-not-found,import-untyped,unused-ignore]
    AutoScheme,
)
from auto_round.schemes import QuantizationScheme  # type: ignore[import-not-found,import-untyped,unused-ignore]
from scipy import stats

from experiments.peers.autoround import delta_loss
from sensitivity import inspect, load, scheme
from sensitivity.api.scoring import scored
from sensitivity.measure.attribution.calibrated import Scores
from sensitivity.measure.passes.token_batches import TokenBatch
from sensitivity.spec.files import overwrite

ROOT = Path(__file__).parent.parent.parent
OUT = ROOT / "reports" / "peers-autoround.md"
BITS = (2, 3, 4, 6, 8)
AVERAGE = 3.5  # bits per weight that both choose for


def labeled(batches: list[TokenBatch]) -> Iterator[dict[str, torch.Tensor]]:
    """Batches as AutoScheme reads them: with the whole answers appended, and labels for their tokens alone."""
    for batch in batches:
        assert batch.targets is not None
        end, inputs = batch.targets[:, -1:], dict(batch.inputs)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], end], dim=1)
        if "attention_mask" in inputs:
            inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(end)], dim=1)
        labels = torch.full_like(inputs["input_ids"], -100)
        labels[:, -batch.targets.shape[1] :] = batch.targets
        yield {**inputs, "labels": labels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="scenes-llava-heavy")
    parser.add_argument("--task", default="vqa")
    parser.add_argument("--n", type=int, default=16)
    args = parser.parse_args()
    vlm = load(f"embedded:{args.model}", dtype="float32")
    parts = inspect(vlm, by="linear")
    schemes = [scheme("rtn", bits, symmetric=False) for bits in BITS]  # as QuantizationScheme(sym=False) below
    found = scored(vlm, parts, schemes, [args.task], (), args.n, cache_gb=0)
    linears = {one.name: one.weights[0] for one in parts.components}
    layers = {name: one.reader for name, one in linears.items() if one.part == "language" and not one.is_embedding}
    began = time.process_time()
    mine = delta_loss(found.given, 1, list(layers))
    seconds_ours = time.process_time() - began

    kept: list[dict[str, list[float]]] = []
    vlm.model.config._name_or_path = None  # by which AutoScheme would read scores of earlier runs from a cache
    score, data = theirs.get_score_for_scheme, list(labeled(list(found.given.data(1))))
    theirs.get_dataloader = lambda *_, **__: data
    theirs.get_score_for_scheme = lambda *given, **named: kept.append(score(*given, **named)) or kept[-1]
    options = [QuantizationScheme(bits=bits, group_size=-1, sym=False, act_bits=16) for bits in BITS]
    asked = AutoScheme(AVERAGE, options, ignore_scale_zp_bits=True, nsamples=len(data), batch_size=1,
                       low_gpu_mem_usage=False, enable_torch_compile=False)  # fmt: skip
    began = time.process_time()
    chosen = theirs.gen_layer_config(
        asked, vlm.model, list(layers.values()), {}, dataset="none", tokenizer=vlm.processor, device_map="cpu",
        enable_torch_compile=False, low_gpu_mem_usage=False, min_avg_bit_scheme=options[0],
    )  # fmt: skip
    seconds = time.process_time() - began
    theirs_of = {name: chosen[reader]["bits"] for name, reader in layers.items()}
    mine_of = best_bits(mine, {name: linears[name].rows * linears[name].cols for name in layers})
    both = np.array([
        (kept[place][reader][1], mine[name][one])
        for place, one in enumerate(found.schemes) for name, reader in layers.items()
    ])  # fmt: skip
    both = both[(both > 0).all(axis=1)]
    low, middle, high = np.percentile(both[:, 0] / both[:, 1], (25, 50, 75))
    row = {
        "version": version("auto-round"), "model": args.model, "task": args.task, "n": args.n, "choices": len(both),
        "rank_correlation": stats.spearmanr(*both.T).statistic, "ratio": middle, "low": low, "high": high,
        "same": sum(theirs_of[name] == mine_of[name] for name in layers), "layers": len(layers),
        "cost": total(mine, theirs_of) / total(mine, mine_of), "seconds_theirs": seconds, "seconds_ours": seconds_ours,
    }  # fmt: skip
    print(row)
    overwrite(OUT, page(row))


def best_bits(scores: Scores, numel: Mapping[str, int]) -> dict[str, int]:
    """The widths with the least sum of scores at AVERAGE bits per weight, on the convex hull: by a price of a bit."""
    least, budget = dict.fromkeys(numel, min(BITS)), AVERAGE * sum(numel.values())
    for price in np.geomspace(1e6, 1e-12, 4000):
        bits = {}
        for name, count in numel.items():
            costs = {width: score + price * width * count for width, score in by_bits(scores, name).items()}
            bits[name] = min(costs, key=lambda width: costs[width])
        if sum(bits[name] * numel[name] for name in numel) > budget:
            return least
        least = bits
    return least


def by_bits(scores: Scores, name: str) -> dict[int, float]:
    return {one.bits: score for one, score in scores[name].items()}


def total(scores: Scores, bits: Mapping[str, int]) -> float:
    return sum(by_bits(scores, name)[width] for name, width in bits.items())


def page(row: Mapping[str, Any]) -> str:
    command = f"python -m experiments.peers.with_autoround --model {row['model']} --task {row['task']} --n {row['n']}"
    middle = f"{row['low']:.2f} to {row['high']:.2f}"
    return (
        "# AutoRound's AutoScheme beside our DeltaLoss\n\n"
        f"`{command}`, whose\n"
        f"first lines say what to install and what is compared: AutoRound {row['version']}, the same examples and\n"
        f"loss, {row['layers']} layers of the language tower at {', '.join(map(str, BITS))} bits, and the choice at\n"
        f"an average of {AVERAGE:g} bits; `our score of theirs` is the sum of our scores over their choice, as a\n"
        "multiple of that over ours.\n\n"
        "| layers x widths | rank correlation | theirs / ours: median | middle half | same width | "
        "our score of theirs | CPU s | ours |\n|---|---|---|---|---|---|---|---|\n"
        f"| {row['choices']} | {row['rank_correlation']:.4f} | {row['ratio']:.3f} | {middle} | "
        f"{row['same']} of {row['layers']} | {row['cost']:.3f} | {row['seconds_theirs']:.1f} | "
        f"{row['seconds_ours']:.1f} |\n"
    )


if __name__ == "__main__":
    main()
