"""Tables of plans that were measured before, or planted: they replace the model where searches are judged.

Truth is known for planted tables, and for grids of embedded models from examples that no reading saw. For a noisy
published table it is the table smoothed by a Gaussian process, for one without noise the table itself. The published
tables are read from SENSITIVITY_SHARED or ../shared and left out where they are not.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

from experiments.benchmarks.measured_grids import Grid, grids
from sensitivity.analysis.surrogate.space import Space
from sensitivity.spec.components import ComponentMap, Kept, Weight
from sensitivity.spec.plan import Plan, Scheme
from sensitivity.spec.sizes import size

ROOT = Path(__file__).parent.parent.parent
SHARED = Path(os.environ.get("SENSITIVITY_SHARED", ROOT.parent / "shared")) / "data" / "published"
GRIDS = ROOT / "runs" / "grids"  # made by the commands in measured_grids.py; left out where they are not
SIZES = {"vision": 984_023_040, "connector": 104_988_672, "language": 2_516_582_400}
TOTAL = 3_744_761_856


@dataclass(frozen=True)
class Table:
    """Distinct plans, one measured score of each, their true scores and sizes."""

    name: str
    parts: ComponentMap
    plans: list[Plan]
    reading: np.ndarray
    truth: np.ndarray
    noise: float | None
    factors: np.ndarray | None = None  # where not every combination exists: the table's own columns, as levels
    noises: np.ndarray | None = None  # standard errors of readings
    native: bool = True  # whether some plan keeps one component native and quantizes another

    @property
    def space(self) -> Space:
        return Space.of(self.plans)

    @property
    def bpw(self) -> np.ndarray:
        return np.array([size(self.parts, plan).bpw for plan in self.plans])


def part_map(sizes: dict[str, int], total: int) -> ComponentMap:
    weights = tuple(Weight(f"{n}.weight", 1, s, n.split(".")[0], None, 0, None) for n, s in sizes.items())
    return ComponentMap("table", "linear", weights, (Kept("rest", total - sum(sizes.values()), "rest"),))


def plan_of(names: list[str], bits: np.ndarray) -> Plan:
    schemes = (None if b == 16 else Scheme("codes", int(b)) for b in bits)
    return Plan(tuple(zip(names, schemes, strict=True)))


def gptq(score: str) -> Table:
    table = pd.read_csv(SHARED / "blip2_gptq_coco.csv")
    bits = table[["vit_bits", "qformer_bits", "llm_bits"]].to_numpy(dtype=float)
    kernel = ConstantKernel(1) * RBF([1, 1, 1], (0.3, 20)) + WhiteKernel(0.01)
    reading = table[score].to_numpy(dtype=float)
    process = GaussianProcessRegressor(kernel, normalize_y=True, n_restarts_optimizer=2, random_state=0)
    truth = process.fit(np.log2(bits), reading).predict(np.log2(bits))
    parts = part_map(SIZES, TOTAL)
    return Table(f"GPTQ {score}", parts, [plan_of(list(SIZES), row) for row in bits], reading, truth, None)


def uniform() -> Table:
    table = pd.read_csv(SHARED / "blip2_uniform_coco.csv")
    parts = {"VIT": "vision", "QFORMER": "connector", "LLM": "language"}
    thirds = ("FIRST", "MIDDLE", "LAST")
    on = {f"{p}.{t}.{k}": table[f"{c}_{t}"].to_numpy() * np.isin(table["type"], [w, "BOTH"])
          for c, p in parts.items() for t in thirds for k, w in (("attn", "ATTENTION"), ("ff", "MLP"))}  # fmt: skip
    bits = np.column_stack([np.where(column == 1, table["bit_size"], 16) for column in on.values()])
    switches = table[[f"{c}_{t}" for c in parts for t in thirds]].to_numpy()
    patterns = switches.reshape(-1, 3, 3) @ [4, 2, 1]
    kind = table["type"].map({"MLP": 0, "ATTENTION": 1, "BOTH": 2}).to_numpy()
    width = np.searchsorted([3, 4, 5, 6, 8, 16], table["bit_size"])
    _, first = np.unique(bits, axis=0, return_index=True)  # plans that change the same weights are one plan
    names = list(on)
    components = part_map({n: SIZES[n.split(".")[0]] // 6 for n in names}, TOTAL)
    score = table["CIDEr"].to_numpy(dtype=float)[first]
    plans = [plan_of(names, row) for row in bits[first]]
    return Table(
        "uniform CIDEr", components, plans, score, score, None, np.column_stack([width, kind, patterns])[first]
    )


def planted(name: str, cross: float, noise: float, seed: int) -> Table:
    """Synthetic: four components at five bit widths; `cross` adds damage where vision and language are both low."""
    draw = np.random.default_rng(seed)
    names = ["vision.front", "vision.end", "connector", "language"]
    bits = np.array([*itertools.product((2, 3, 4, 6, 16), repeat=4)], dtype=float)
    harm = np.exp(-(bits - draw.uniform(0, 3, 4)))
    harm[bits == 16] = 0
    truth = np.exp(-harm.sum(axis=1) - cross * harm[:, 0] * harm[:, 3])
    parts = part_map(dict(zip(names, (300, 320, 60, 2500), strict=True)), 3300)
    reading = truth + noise * draw.standard_normal(len(truth))
    return Table(name, parts, [plan_of(names, row) for row in bits], reading, truth, noise)


def bent(name: str, noise: float, seed: int) -> Table:
    """Three kinds of questions that fail at different damages of different parts: no curve of one sum."""
    draw, like = np.random.default_rng(seed), planted(name, 0.0, 0.0, seed)
    harm = damages(like, draw)
    weights, hurt = draw.dirichlet(np.ones(3)), np.exp(draw.normal(0, 1, (3, 4)))
    truth = sum(w * np.exp(-((harm @ h) ** power)) for w, h, power in zip(weights, hurt, (0.5, 1.0, 1.5), strict=True))
    return read_with(like, np.asarray(truth), noise, draw)


def worst(name: str, noise: float, seed: int) -> Table:
    """The worst part decides almost alone."""
    draw, like = np.random.default_rng(seed), planted(name, 0.0, 0.0, seed)
    harm = damages(like, draw)
    return read_with(like, np.exp(-harm.max(axis=1) - 0.2 * harm.sum(axis=1)), noise, draw)


def uneven(name: str, noise: float, seed: int) -> Table:
    """Damages that neighboring plans misjudge alike, and scores that lie a little above and below any curve."""
    draw, like = np.random.default_rng(seed), planted(name, 0.0, 0.0, seed)
    harm = damages(like, draw)
    octaves = np.log2([[one.bits if one else 16 for _, one in plan.schemes] for plan in like.plans])
    alike = np.exp(-0.5 * ((octaves[:, None] - octaves[None]) ** 2).sum(axis=-1))
    field = np.linalg.cholesky(alike + 1e-8 * np.eye(len(alike))) @ draw.standard_normal(len(alike))
    return read_with(like, np.exp(-harm.sum(axis=1) * np.exp(0.5 * field)) + 0.004 * field, noise, draw)


def damages(table: Table, draw: np.random.Generator) -> np.ndarray:
    bits = np.array([[one.bits if one else 16 for _, one in plan.schemes] for plan in table.plans], dtype=float)
    return np.where(bits == 16, 0.0, np.exp(-(bits - draw.uniform(0, 3, bits.shape[1]))))


def read_with(table: Table, truth: np.ndarray, noise: float, draw: np.random.Generator) -> Table:
    reading = truth + noise * draw.standard_normal(len(truth))
    return Table(table.name, table.parts, table.plans, reading, truth, noise or None)


def of_grid(grid: Grid) -> Table:
    return Table(grid.name, grid.parts, grid.plans, grid.reading, grid.truth, None, None, grid.noise, native=False)


def tables(only: str | None) -> Iterator[Table]:
    made: dict[str, Callable[[], Table]] = {}
    if SHARED.exists():
        made |= {"gptq": lambda: gptq("cider"), "meteor": lambda: gptq("meteor"), "uniform": uniform}
    made |= {
        "planted": lambda: planted("planted", 0.0, 0.03, 0),
        "planted-pairs": lambda: planted("planted, pairs", 4.0, 0.03, 1),
        "planted-quiet": lambda: planted("planted, quiet", 0.0, 0.002, 2),
        "bent": lambda: bent("bent", 0.0, 3),
        "bent-noisy": lambda: bent("bent, noisy", 0.02, 4),
        "uneven": lambda: uneven("uneven", 0.0, 3),
        "uneven-noisy": lambda: uneven("uneven, noisy", 0.02, 3),
        "worst": lambda: worst("worst part", 0.0, 5),
    }
    made |= {grid.name: partial(of_grid, grid) for grid in grids(GRIDS)}
    for name, make in made.items():
        if only is None or name in only.split(","):
            yield make()
