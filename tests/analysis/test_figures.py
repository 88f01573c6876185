"""Figures: what they draw, files of both kinds, hostile names, colors."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import numpy as np
import pandas as pd

from sensitivity.analysis.reporting import figures
from sensitivity.analysis.reporting.table_rows import frontier_rows

HOSTILE = '<script>alert("x")</script> $\\frac{1}{2}$ & {{ 7 * 7 }}'


def table(task: str = "vqa") -> pd.DataFrame:
    draw = np.random.default_rng(0)
    bits = draw.choice([2, 4, 8, 16], (40, 2)).astype(float)
    bits[0], bits[1] = 16, 4
    frame = pd.DataFrame(bits, columns=["vision", "language"])
    frame["bpw"], frame[task] = bits.mean(axis=1), 1 - np.exp(2 - bits.mean(axis=1)) - 0.01 * draw.random(40)
    frame[f"{task}.low"], frame[f"{task}.high"] = frame[task] - 0.02, frame[task] + 0.02
    frame["uniform"], frame["native"] = bits[:, 0] == bits[:, 1], (bits == 16).all(axis=1)
    frame["key"] = [f"k{i}" for i in range(40)]
    return frame


def test_the_frontier_holds_what_no_smaller_plan_outscores() -> None:
    frame = table()
    best = frontier_rows(frame, "vqa")
    for row in best.itertuples():
        assert not (frame[frame["bpw"] <= row.bpw]["vqa"] > row.vqa).any()
    rest = frame.drop(best.index)
    assert all((best[best["bpw"] <= row.bpw]["vqa"] >= row.vqa).any() for row in rest.itertuples())


def drawings(task: str = "vqa", part: str = "vision") -> dict[str, figures.Figure]:
    frame = table(task).rename(columns={"vision": part})
    names = [part, "language"]
    shares = {"consensus": [70, 30], "consensus.low": [60, 20], "consensus.high": [80, 40.0]}
    ranking = pd.DataFrame(shares, index=names)
    for name in ("forest", "permutation", "shap"):
        ranking[name] = ranking["consensus"]
    pairs = pd.DataFrame([{"a": part, "b": "language", "strength": 0.1, "both_low": -0.1}])
    moves = pd.DataFrame({"component": [part, part, "language"], "bits": [2, 4, 2], "shift": [-30.0, 2, 1]})
    seen = pd.DataFrame({"measured": [0.1, 0.9], "expected": [0.2, 0.8], "low": [0, 0.7], "high": [0.3, 1]})
    return {
        "pareto": figures.pareto(frame, task, 0.99, ["k3"]),
        "importance": figures.importance_shares(ranking),
        "by_bits": figures.by_bits(frame, task, names),
        "alone": figures.by_bits(frame, task, names, alone=True),
        "colored": figures.colored(frame, task, part),
        "pairwise": figures.pairwise(frame, task, part, "language"),
        "interactions": figures.interactions(pairs, names),
        "levels": figures.effect_of_widths(moves),
        "calibration": figures.predicted_against_measured(seen, task),
    }


def test_every_figure_is_a_picture_and_a_drawing() -> None:
    again = drawings()
    for name, figure in drawings().items():
        drawn = figures.svg(figure)
        ET.fromstring(drawn)
        assert figures.png(figure).startswith(b"\x89PNG"), name
        assert len(drawn) < 300_000, name
        assert drawn == figures.svg(again[name]), name  # the same rows, the same file


def test_hostile_names_are_text() -> None:
    for name, figure in drawings(HOSTILE, HOSTILE + " part").items():
        drawn = figures.svg(figure)
        assert "<script>" not in drawn, name
        ET.fromstring(drawn)
        figures.png(figure)


def test_colors_can_be_told_apart() -> None:
    assert len(set(figures.colors([f"c{i}" for i in range(18)]).values())) == 18
    assert list(figures.colors(["a", "b"]).values()) == list(figures.PALETTE[:2])
