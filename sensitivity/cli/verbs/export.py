"""sensitivity export: writes a plan as files that a runtime loads."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sensitivity.cli.arguments import flags, path_values, values
from sensitivity.cli.output.progress import show_stages
from sensitivity.cli.output.tables import print_table
from sensitivity.spec.errors import shell_word, unknown

if TYPE_CHECKING:
    from sensitivity.formats.writing.manifest import Manifest

ABOUT = "write a plan as files that a runtime loads"
EXAMPLE = "sensitivity export runs/first --bpw 4.0 --format compressed-tensors --out out/first"
FORMAT_NAMES = (
    "plan, fake, compressed-tensors, gptq, awq, auto-round, openvino, onnx, gguf, llm-compressor, bnb, torchao, "
    "modelopt, llama.cpp or mlx"
)


def arguments(p: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    flags.add_source(p)
    p.add_argument("--bpw", type=values.bpw, metavar="X", help="the budget, where the source is a study")
    p.add_argument("--format", type=values.name, default="plan", help=f"{FORMAT_NAMES} (default: plan)")
    flags.add_runtime(p, "runtime that will load the export, such as vllm (default: that of the format)")
    flags.add_moved_model(p)
    p.add_argument("--out", type=path_values.out, required=True, help="the folder to write")
    p.add_argument(
        "--path",
        type=values.name,
        metavar="exposed",
        help="calibrate again on inputs behind quantized layers, and measure what that gains",
    )
    p.add_argument("--force", action="store_true", help="replace an earlier export that is there")


def run(args: argparse.Namespace) -> dict[str, object]:
    """Write the export, and return its path and sizes."""
    from sensitivity.api import exporting
    from sensitivity.formats.writing import manifest

    _check(args)
    if left := exporting.remove_unfinished(args.out.parent, but=args.out):
        print(f"removed the unfinished folders of killed exports: {', '.join(map(str, left))}", file=sys.stderr)
    with show_stages(args.json):
        path = exporting.export_from(
            args.source, args.bpw, args.out, args.format, args.force,
            model=args.model, runtime=args.runtime, path=args.path,
        )  # fmt: skip
    known = manifest.read(path) if (path / manifest.MANIFEST).exists() else None
    if not args.json:
        show(path, known)
    facts: dict[str, object] = {"path": str(path), "format": args.format}
    if known is not None:
        facts |= {"path_gain": known["trial"].get("path_gain"), "size": known["size"]}
        facts |= {name: known[name] for name in ("predicted_size", "written") if name in known}
    return facts


def _check(args: argparse.Namespace) -> None:
    """Check what can be checked before the model is loaded."""
    from sensitivity.formats.table import FORMATS
    from sensitivity.measure.calibrate.statistics import check_path
    from sensitivity.spec.runtimes.table import runtime

    if args.format not in FORMATS:
        raise unknown("format", args.format, FORMATS)
    runtime(args.runtime or args.format)
    if args.path is not None:
        check_path(args.path)
    if args.source.suffix == ".json":
        flags.without_effect(args, ["--bpw"], "beside a plan.json, which is one plan")
    if args.format == "plan" and args.path is None:
        flags.without_effect(args, ["--model"], "with --format plan, which holds no weights")


def show(path: Path, known: Manifest | None) -> None:
    """Print where the export is, its size, and what to type next; a plan.json has no manifest."""
    from sensitivity.study.exports import path_gain_sentences

    print(f"wrote {path}")
    if known is None:
        print(f"next: sensitivity export {shell_word(path)} --format NAME --out DIR")
        return
    if gain := known["trial"].get("path_gain"):
        print(path_gain_sentences(gain))
    planned, predicted = known["size"], known["predicted_size"]
    if written := known.get("written"):
        # `fake` stores values, whose dtype may be wider than the model's
        stored_as = f"fake, in {known['dtype']}" if known["format"] == "fake" else known["format"]
        print_table(
            "Size",
            ("", "bytes of tensors", "bpw, all stored"),
            [
                ("the plan", f"{planned['bytes']:,}", f"{planned['bpw']:.3f}"),
                (f"predicted for {stored_as}", f"{predicted['bytes']:,}", f"{predicted['bpw']:.3f}"),
                ("written", f"{written['bytes']:,}", f"{written['bpw']:.3f}"),
            ],
        )
        print(f"next: sensitivity verify {shell_word(path)}")
        if known["format"] == "compressed-tensors":
            print(f'load it: from sensitivity import load; vlm = load("{path}", quantized=True)')
    else:
        print(f"a configuration: the runtime's own tool makes the weights, as {path}/README.md says")
        print(f"predicted: {predicted['bytes']:,} bytes, {predicted['bpw']:.3f} bpw, all stored")
