"""sensitivity inspect: lists the components of a model, and what is kept and why."""

from __future__ import annotations

import argparse
from typing import Any

from sensitivity.cli.arguments import flags
from sensitivity.cli.output.tables import table

ABOUT = "list the parts of a model, what is kept and why, and what uniform plans weigh"
EXAMPLE = "sensitivity inspect embedded:scenes-llava --by part"


def arguments(p: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    flags.model(p)
    flags.by(p, "group.kind")
    flags.include(p)
    flags.methods(p, flags.WIDTHS, "rtn")
    p.add_argument("--config-only", action="store_true", help="read config.json alone; no weights are needed")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """List components, kept weights and the sizes of uniform plans."""
    from sensitivity.models.discover import inspect
    from sensitivity.models.loading import load
    from sensitivity.spec.components import granularity
    from sensitivity.spec.sizes import uniform_sizes

    asked = flags.schemes(args)
    granularity(args.by)
    vlm = load(args.model, config_only=args.config_only)
    parts = inspect(vlm, by=args.by, include=args.include)
    kept: dict[str, list[int]] = {}
    for weight in parts.kept:
        kept.setdefault(weight.reason, []).append(weight.numel)
    sizes = uniform_sizes(parts, asked)
    facts: dict[str, Any] = {
        "model": vlm.name,
        "class": type(vlm.model).__name__,
        "parameters": parts.numel,
        "by": parts.by,
        "components": [
            {"name": c.name, "modules": len(c.weights), "parameters": c.numel, "share": c.numel / parts.numel}
            for c in parts.components
        ],
        "kept": [{"reason": why, "tensors": len(n), "parameters": sum(n)} for why, n in kept.items()],
        "uniform": [{"bits": bits, **size.to_json()} for bits, size in sizes.items()],
        "note": vlm.note,
    }
    if not args.json:
        show_inspect(facts, args)
    return facts


def show_inspect(facts: dict[str, Any], args: argparse.Namespace) -> None:
    """Print the three tables."""
    print(f"{facts['model']}: {facts['class']}, {facts['parameters']:,} parameters")
    if facts["note"]:
        print(facts["note"])
    total = facts["parameters"]
    table(
        "Components",
        ("name", "modules", "parameters", "share"),
        [(c["name"], c["modules"], f"{c['parameters']:,}", f"{c['share']:.1%}") for c in facts["components"]],
    )
    table(
        "Kept at native precision",
        ("why", "tensors", "parameters", "share"),
        [(k["reason"], k["tensors"], f"{k['parameters']:,}", f"{k['parameters'] / total:.1%}") for k in facts["kept"]],
    )
    table(
        f"Uniform plans ({args.method})",
        ("bits", "bpw, all stored", "bpw, codes only", "MB"),
        [(u["bits"], f"{u['bpw']:.3f}", f"{u['bpw_codes']:.3f}", f"{u['bytes'] / 1e6:,.1f}") for u in facts["uniform"]],
    )
