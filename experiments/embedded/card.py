"""Sentences and tables that the model cards of the embedded models share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def score_rows(card: dict[str, Any]) -> str:
    """One row of a Markdown table per kind of question and metric."""
    lines = []
    for kind, metrics in card["kinds"].items():
        for name, m in metrics.items():
            interval = f"{m['low']:.3f} to {m['high']:.3f}" if "low" in m else ""
            prior = f"{m['prior']:.3f}" if "prior" in m else ""
            target = f"{m['target']:.2f}" if "target" in m else ""
            cells = (kind, name, f"{m['n']:,}", f"{m['mean']:.3f}", interval, f"{m['shuffled']:.3f}", prior, target)
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def targets_met(card: dict[str, Any]) -> str:
    """Whether every target was reached, or which were missed and by how much."""
    missed = [
        f"{kind} ({name}): {m['mean']:.3f}, {m['target'] - m['mean']:.3f} short of {m['target']:.2f}"
        for kind, metrics in card["kinds"].items()
        for name, m in metrics.items()
        if "target" in m and m["mean"] < m["target"]
    ]
    return "Every target is reached." if not missed else "Targets not reached: " + "; ".join(missed) + "."


def stage_rows(card: dict[str, Any], learns: Mapping[str, str]) -> str:
    """One row of a Markdown table per training stage: what it trains, and the last line of its log."""
    lines = []
    for stage, what in learns.items():
        last = card["training"][stage]
        values = ", ".join(f"{name} {value:.3f}" for name, value in last.items() if name != "step")
        lines.append(f"| {stage} | {last['step']:,} | {what} | {values} |")
    return "\n".join(lines)
