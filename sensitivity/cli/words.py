"""Words of the command line that several verbs share, and how they are read."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sensitivity.plan import Scheme

WIDTHS = (2, 3, 4, 5, 6, 8)
MOST = 1024  # threads, or processes


def model(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "model",
        metavar="MODEL",
        help="a folder, a hub name, or an embedded model: embedded:scenes-llava; an adapter may be"
        " ADAPTER@BASE, where its base model is not as it says",
    )


def device(p: argparse.ArgumentParser) -> None:
    p.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 or mps; auto spreads it (default: cpu)")
    dtypes = "fp32, bf16 or fp16 (default: as the study; a new one as stored, or float32 where that is quicker)"
    p.add_argument("--dtype", help=dtypes)


def by(p: argparse.ArgumentParser, default: str) -> None:
    p.add_argument(
        "--by",
        default=default,
        metavar="GRANULARITY",
        help=f"part, group, kind, group.kind, block or linear (default: {default})",
    )


def include(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--include",
        type=names,
        default=(),
        metavar="W[,W]",
        help="embedding, head or both as components of their own, which are kept otherwise; tied ones are one, a head",
    )


def methods(p: argparse.ArgumentParser, bits: Sequence[int], method: str) -> None:
    p.add_argument(
        "--bits",
        type=numbers,
        default=tuple(bits),
        metavar="B,B,...",
        help=f"widths to try (default: {','.join(map(str, bits))})",
    )
    p.add_argument("--method", default=method, help=f"how weights are quantised (default: {method})")
    p.add_argument(
        "--group", type=group_size, metavar="N|row|tensor", help="weights that share a scale (default: the method's)"
    )
    p.add_argument(
        "--symmetric", action=argparse.BooleanOptionalAction, help="a grid around zero (default: the method's)"
    )
    p.add_argument("--biases", action="store_true", default=None, help="quantise biases too, as the paper's code did")
    p.add_argument(
        "--set",
        type=setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of the method's own, such as damp=0.05 for gptq",
    )
    p.add_argument("--backend", metavar="gptqmodel", help="GPTQModel's solver for --method gptq (default: our own)")


def budget(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--bpw",
        type=float,
        default=4.0,
        metavar="X",
        help="budget in bits per weight, all that is stored counted (default: 4.0)",
    )


def study(p: argparse.ArgumentParser) -> None:
    p.add_argument("study", type=Path, metavar="STUDY", help="the folder of a sweep, such as runs/demo")


def task(p: argparse.ArgumentParser) -> None:
    p.add_argument("--task", metavar="T", help="the task that decides (default: the study's first)")


def samples(p: argparse.ArgumentParser) -> None:
    p.add_argument("--n", type=int, default=1000, help="examples per task, drawn with the seed (default: 1000)")
    p.add_argument("--seed", type=int, default=0, help="of the examples and of any search (default: 0)")


def calibration(p: argparse.ArgumentParser) -> None:
    g = p.add_argument_group("calibration", "for methods that look at what a layer reads, such as gptq and awq")
    g.add_argument("--calibration", type=names, metavar="T[,T]", help="whose calibration split (default: the tasks')")
    g.add_argument("--calibration-n", type=int, default=128, metavar="N", help="how many examples (default: 128)")
    g.add_argument(
        "--path",
        default="float",
        metavar="float|exposed",
        help="inputs of the float model, or of layers behind quantised ones (slow: anew for each plan; default: float)",
    )
    g.add_argument("--cache-gb", type=amount, default=8.0, help="of statistics kept on disk; 0 keeps none (default: 8)")


def numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(piece) for piece in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of whole numbers such as 2,3,4") from None


def names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(piece.strip() for piece in text.split(",") if piece.strip()))


def budgets(text: str) -> tuple[float, ...]:
    try:
        return tuple(dict.fromkeys(float(piece) for piece in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a budget such as 4, or a list such as 3,3.5,4") from None


def amount(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}' is not an amount such as 8 or 0.5")
    return value


def processes(text: str) -> int | str:
    return text if text == "auto" else count(text)


def count(text: str) -> int:
    if not (text.isdecimal() and 1 <= int(text) <= MOST):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number from 1 to {MOST:,}")
    return int(text)


def group_size(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def pair(text: str) -> tuple[str, str]:
    left, equals, right = text.partition("=")
    if not (left and equals and right):
        raise argparse.ArgumentTypeError(f"'{text}' is not like NAME=VALUE")
    return left, right


def setting(text: str) -> tuple[str, Any]:
    """A value that looks like a number, true or false is one; anything else is a word."""
    name, value = pair(text)
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def share(text: str) -> tuple[str, float]:
    task, _, number = text.partition("=")
    try:
        return task, float(number.rstrip("%")) / (100 if number.endswith("%") else 1)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not like ground=0.95") from None


def allowed(text: str) -> tuple[str, tuple[int, ...]]:
    part, widths = pair(text)
    return part, numbers(widths.replace("native", "16"))


def limits(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--allow",
        type=allowed,
        action="append",
        default=[],
        metavar="PART=B,B,...",
        help="only these widths for a part, 16 for native, such as vision=4,8",
    )
    p.add_argument(
        "--tie",
        type=names,
        action="append",
        default=[],
        metavar="PART,PART",
        help="parts that must have the same width",
    )


def schemes(args: argparse.Namespace) -> list[Scheme]:
    from sensitivity.quantize import scheme

    own = {name: getattr(args, name) for name in ("group", "symmetric", "biases", "backend")} | dict(args.set)
    return [scheme(args.method, bits, **own) for bits in args.bits]
