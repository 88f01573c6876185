"""sensitivity inspect: lists the components of a model, and what is kept and why."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sensitivity.cli.arguments import flags
from sensitivity.cli.arguments.scheme_flags import schemes
from sensitivity.cli.output.tables import print_table
from sensitivity.spec.sizes import bytes_in_words

if TYPE_CHECKING:
    from sensitivity.models.vlm import VLM
    from sensitivity.spec.components import ComponentMap
    from sensitivity.spec.sizes import Size

ABOUT = "list the components of a model, what is kept and why, and what uniform plans weigh"
EXAMPLE = "sensitivity inspect embedded:scenes-llava --by part"


def arguments(p: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    flags.add_model(p)
    flags.add_granularity(p, "group.kind")
    flags.add_include(p)
    flags.add_methods(p, flags.WIDTHS, "rtn")
    p.add_argument("--config-only", action="store_true", help="read config.json alone; no weights are needed")


def run(args: argparse.Namespace) -> dict[str, object]:
    """List components, kept weights and the sizes of uniform plans."""
    from sensitivity.models.discovery import inspect
    from sensitivity.models.loading import load
    from sensitivity.spec.components import granularity
    from sensitivity.spec.sizes import uniform_sizes

    asked = schemes(args)
    granularity(args.by)
    vlm = load(args.model, config_only=args.config_only)
    parts = inspect(vlm, by=args.by, include=args.include)
    kept: dict[str, list[int]] = {}
    for weight in parts.kept:
        kept.setdefault(weight.reason, []).append(weight.numel)
    sizes = uniform_sizes(parts, asked)
    if not args.json:
        show(vlm, parts, kept, sizes, args.method)
    return {
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


def show(
    vlm: VLM, parts: ComponentMap, kept: Mapping[str, Sequence[int]], sizes: Mapping[int, Size], method: str
) -> None:
    """Print the three tables; `kept` has, for each reason, the number of elements of each weight kept for it."""
    print(f"{vlm.name}: {type(vlm.model).__name__}, {parts.numel:,} parameters")
    if vlm.note:
        print(vlm.note)
    print_table(
        "Components",
        ("name", "modules", "parameters", "share"),
        [(c.name, len(c.weights), f"{c.numel:,}", f"{100 * c.numel / parts.numel:.1f} %") for c in parts.components],
    )
    print_table(
        "Kept at native precision",
        ("why", "tensors", "parameters", "share"),
        [(why, len(n), f"{sum(n):,}", f"{100 * sum(n) / parts.numel:.1f} %") for why, n in kept.items()],
    )
    print_table(
        f"Uniform plans ({method})",
        ("bits", "bpw, all stored", "bpw, codes only", "size"),
        [(bits, f"{one.bpw:.3f}", f"{one.bpw_codes:.3f}", bytes_in_words(one.bytes)) for bits, one in sizes.items()],
    )
