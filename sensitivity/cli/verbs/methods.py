"""sensitivity methods: lists every quantization method, what it needs, what it stores and where it is from."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from sensitivity.cli.output.tables import print_table
from sensitivity.spec.plan import NOT_ROUNDED

ABOUT = "list the quantization methods: widths, calibration, stored bits beside claimed ones, and sources"
EXAMPLE = "sensitivity methods"
SIDE = 4096  # rows and columns of the weight whose stored bits are shown


def arguments(p: argparse.ArgumentParser) -> None:
    """The verb has no flags of its own."""


def run(args: argparse.Namespace) -> dict[str, Any]:
    """List the methods."""
    from sensitivity.quantize.method_seconds import MEASURED_BY, seconds_of
    from sensitivity.quantize.methods import METHODS, needs_both_paths, needs_data, needs_gradients
    from sensitivity.quantize.presets import PRESETS
    from sensitivity.quantize.scheme_settings import scheme
    from sensitivity.quantize.sources import SOURCES
    from sensitivity.spec.components import ComponentMap, Weight
    from sensitivity.spec.sizes import component_bits

    # the weights of an attention, since some methods store something for queries, keys and values together
    weights = (Weight(f"{n}.weight", SIDE, SIDE, "language", 0, 1, "attn", shares_input="q") for n in "qkv")
    layer = ComponentMap("", "part", tuple(weights), ())
    listed = []
    for name in (*METHODS, *PRESETS):
        row = METHODS[str(PRESETS.get(name, {"method": name})["method"])]
        one = scheme(name, row.widths[-1])
        source = SOURCES[name]
        stored = {bits: component_bits(layer, "language", scheme(name, bits)) / layer.numel for bits in row.widths}
        listed.append(
            {
                "name": name,
                "bits": list(row.widths),
                "stored": stored,
                "claimed": source.claimed,
                "activations": one.activations,
                "calibrated": needs_data(one),
                "gradients": needs_gradients(one),
                "both_paths": needs_both_paths(one),
                "seconds": seconds_of(name),
                "group": one.group,
                "settings": {**row.settings, **dict(one.settings)},
                "source": source.where,
                "read": source.read,
                "ours": source.ours,
            }
        )
    if not args.json:
        show_methods(listed)
        print(f"seconds: one thread, without what calibration takes ({MEASURED_BY})")
    return {"methods": listed, "side": SIDE, "seconds_by": MEASURED_BY}


def show_methods(listed: list[dict[str, Any]]) -> None:
    """Print two tables: what the methods take and store, and where they are from."""
    print_table(
        f"Methods (stored bits per weight and CPU seconds at {SIDE} x {SIDE}, default settings)",
        ("name", "bits", "stored", "seconds", "calibration", "published bits count"),
        [
            (
                m["name"],
                _range(m["bits"]),
                _range([f"{stored:.2f}" for stored in m["stored"].values()]),
                "–" if m["seconds"] is None else f"{m['seconds']:.1f}",
                _calibration(m),
                m["claimed"],
            )
            for m in listed
        ],
    )
    rounding = [f"{m['name']} to {m['activations']} bits" for m in listed if m["activations"] < NOT_ROUNDED]
    print(f"Inputs of layers are rounded, too, by {', '.join(rounding)}.\n")
    print_table(
        "Where they are from",
        ("name", "source", "read", "ours or inferred"),
        [(m["name"], m["source"], m["read"], m["ours"]) for m in listed],
    )


def _calibration(method: dict[str, Any]) -> str:
    """What a method needs of calibration data."""
    words = ["with gradients"] * method["gradients"] + ["on both paths"] * method["both_paths"]
    return ", ".join(words) or ("yes" if method["calibrated"] else "no")


def _range(values: Sequence[object]) -> str:
    """The first and the last of ascending values."""
    return f"{values[0]} to {values[-1]}" if len(values) > 1 else str(values[0])
