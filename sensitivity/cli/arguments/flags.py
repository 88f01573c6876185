"""Flags that several verbs share, and checks of flags against each other."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from sensitivity.cli.arguments import path_values, values
from sensitivity.cli.arguments.values import WIDEST
from sensitivity.spec.errors import UserError

T = TypeVar("T")
WIDTHS = (2, 3, 4, 5, 6, 8)  # `inspect` lists the sizes of uniform plans at these widths by default


def add_model(p: argparse.ArgumentParser) -> None:
    """Add MODEL."""
    p.add_argument(
        "model",
        type=values.model_or_task,
        metavar="MODEL",
        help="a folder, a hub name, or an embedded model such as embedded:scenes-llava; ADAPTER@BASE is an adapter with"
        " another base model than its configuration names",
    )


def add_device(p: argparse.ArgumentParser) -> None:
    """Add --device and --dtype."""
    p.add_argument(
        "--device",
        type=values.name,
        default="cpu",
        help="cpu, cuda, cuda:1, mps, or auto for all devices (default: cpu)",
    )
    dtypes = "fp32, bf16 or fp16 (default: the study's; for a new study the checkpoint's, or fp32 where that is faster)"
    p.add_argument("--dtype", type=values.name, help=dtypes)


def add_source(p: argparse.ArgumentParser) -> None:
    """Add STUDY|plan.json."""
    about = "a study, or a plan.json that recommend, plan, legalize or export wrote"
    p.add_argument("source", type=path_values.path, metavar="STUDY|plan.json", help=about)


def add_runtime(p: argparse.ArgumentParser, about: str, required: bool = False) -> None:
    """Add --runtime."""
    p.add_argument("--runtime", type=values.name, required=required, metavar="NAME", help=about)


def add_moved_model(p: argparse.ArgumentParser) -> None:
    """Add --model, for a model whose folder has moved since the sweep."""
    p.add_argument("--model", type=values.model_or_task, help="folder of the model, if it has moved since the sweep")


def add_pairs(p: argparse.ArgumentParser, flag: str, value: Callable[[str], object], metavar: str, about: str) -> None:
    """Add a flag that takes NAME=VALUE and may be repeated."""
    p.add_argument(flag, type=values.pair_of(value), action="append", default=[], metavar=metavar, help=about)


def add_granularity(p: argparse.ArgumentParser, default: str) -> None:
    """Add --by, the granularity of components."""
    p.add_argument(
        "--by",
        type=values.name,
        default=default,
        metavar="GRANULARITY",
        help=f"part, group, kind, group.kind, block or linear (default: {default})",
    )


def add_include(p: argparse.ArgumentParser) -> None:
    """Add --include, for weights that otherwise stay at native precision."""
    p.add_argument(
        "--include",
        type=values.comma_separated(values.choice("embedding", "head")),
        default=(),
        metavar="W[,W]",
        help="quantize the embedding or the output head too (default: both are kept); if tied, they are one component",
    )


def add_widths(p: argparse.ArgumentParser, bits: Sequence[int]) -> None:
    """Add --bits."""
    p.add_argument(
        "--bits",
        type=values.comma_separated(values.width),
        default=tuple(bits),
        metavar="B,B,...",
        help=f"widths to try, beside native precision (default: {','.join(map(str, bits))})",
    )


def add_grid(p: argparse.ArgumentParser) -> None:
    """Add --group and --symmetric."""
    p.add_argument(
        "--group", type=values.group, metavar="N|row|tensor", help="weights that share a scale (default: the method's)"
    )
    p.add_argument(
        "--symmetric", action=argparse.BooleanOptionalAction, help="a grid without zero points (default: the method's)"
    )


def add_methods(p: argparse.ArgumentParser, bits: Sequence[int], method: str, several: bool = False) -> None:
    """Add the flags that choose schemes: --bits, --method and the settings of methods."""
    add_widths(p, bits)
    if several:
        p.add_argument(
            "--method",
            type=values.comma_separated(values.name),
            default=(method,),
            metavar="M[,M]",
            help=f"how weights are quantized; of several, the search chooses for each component (default: {method})",
        )
    else:
        p.add_argument(
            "--method", type=values.name, default=method, help=f"how weights are quantized (default: {method})"
        )
    add_grid(p)
    p.add_argument(
        "--biases",
        action="store_true",
        default=None,
        help="quantize biases too (default: only the method paper-uniform does)",
    )
    add_pairs(p, "--set", values.setting, "NAME=VALUE", "a setting of the method's own, such as damp=0.05 for gptq")
    p.add_argument(
        "--backend",
        type=values.name,
        metavar="gptqmodel",
        help="GPTQModel's solver for --method gptq (default: our own)",
    )


def add_run_time(p: argparse.ArgumentParser) -> None:
    """Add the flags of activations and of the cache, which are rounded in each forward pass."""
    g = p.add_argument_group(
        "activations and cache", "rounded in each forward pass; they add nothing to what a plan stores"
    )
    g.add_argument(
        "--activation-bits",
        type=values.comma_separated(values.rounded_width),
        default=(WIDEST,),
        metavar="B,B,...",
        help="widths to try for the inputs of layers: 2 to 8, or 16, which leaves them unrounded (default: 16)",
    )
    g.add_argument(
        "--activation-scale",
        type=values.choice("token", "tensor", "norm", "blocks", "released"),
        metavar="SCALE",
        help="what shares a scale: token, tensor, norm (as in RepQ-ViT), blocks or released (both as in Q-VLM); all but"
        " token take their scales from calibration data (default: the method's, most often token)",
    )
    g.add_argument(
        "--cache-bits",
        type=values.comma_separated(values.rounded_width),
        default=(WIDEST,),
        metavar="B,B,...",
        help="widths to try for the language model's keys and values: 2 to 8, or 16, which leaves them unrounded"
        " (default: 16)",
    )
    g.add_argument(
        "--cache-group",
        type=values.channels,
        metavar="N",
        help="channels of a key or value that share a scale (default: 32)",
    )


def add_budget(p: argparse.ArgumentParser) -> None:
    """Add --bpw."""
    p.add_argument(
        "--bpw",
        type=values.bpw,
        default=4.0,
        metavar="X",
        help="budget in bits per weight, counting all that is stored (default: 4.0)",
    )


def add_study(p: argparse.ArgumentParser) -> None:
    """Add STUDY."""
    p.add_argument("study", type=path_values.path, metavar="STUDY", help="the folder of a sweep, such as runs/demo")


def add_tasks(p: argparse.ArgumentParser, default: str = "vqa") -> None:
    """Add --task for verbs that run tasks."""
    p.add_argument(
        "--task",
        type=values.task_names,
        default=("vqa",),
        metavar="T[,T]",
        help="vqa, caption, scene, ground, retrieval; DATASET:FOLDER such as vqav2:FOLDER; your own FILE.jsonl, or"
        " SCORER:FILE.jsonl with exact, choice, number, yesno, anls, vqa, caption, iou or recall; lmms-eval:TASK[,TASK]"
        f" or lmms-eval:TASK:FOLDER; the same with vlmeval: (default: {default})",
    )


def add_budgets(p: argparse.ArgumentParser) -> None:
    """Add --bpw and --gb, each a list."""
    p.add_argument(
        "--bpw",
        type=values.comma_separated(values.bpw),
        default=(4.0,),
        metavar="X[,X]",
        help="budgets in bits per weight, counting all that is stored in the files of --runtime (default: 4.0)",
    )
    p.add_argument(
        "--gb",
        type=values.comma_separated(values.size),
        metavar="X[,X]",
        help="budgets in GB (10^9 bytes), instead of --bpw",
    )


def add_study_folder(p: argparse.ArgumentParser) -> None:
    """Add --out, the folder of a study."""
    p.add_argument(
        "--out",
        type=path_values.out_folder,
        required=True,
        metavar="runs/NAME",
        help="folder of the study; the same command again continues it",
    )


def add_task(p: argparse.ArgumentParser, about: str = "the task that decides (default: the study's first)") -> None:
    """Add --task for verbs that read a study and decide by one task."""
    p.add_argument("--task", type=values.name, metavar="T", help=about)


def add_samples(p: argparse.ArgumentParser, n: int = 1000) -> None:
    """Add --n and --seed."""
    p.add_argument(
        "--n", type=values.examples, default=n, help=f"examples per task, drawn with the seed (default: {n})"
    )
    p.add_argument("--seed", type=values.seed, default=0, help="seed of the examples and of the search (default: 0)")


def add_calibration(p: argparse.ArgumentParser) -> None:
    """Add the flags of calibration as a group of their own."""
    g = p.add_argument_group("calibration", "for methods that use the inputs of a layer, such as gptq and awq")
    g.add_argument(
        "--calibration",
        type=values.task_names,
        metavar="T[,T]",
        help="tasks whose calibration split is used (default: those of --task)",
    )
    g.add_argument(
        "--calibration-n", type=values.examples, default=128, metavar="N", help="calibration examples (default: 128)"
    )
    g.add_argument(
        "--path",
        type=values.name,
        metavar="float|exposed|both",
        help="inputs of the float model, those behind quantized layers, or both side by side (the last two are slow:"
        " they calibrate again for each plan; default: float, or both for methods that need both)",
    )
    g.add_argument(
        "--cache-gb",
        type=values.gigabytes,
        default=8.0,
        help="calibration statistics to keep on disk; 0 keeps none (default: 8)",
    )


def add_prior(p: argparse.ArgumentParser) -> None:
    """Add --prior."""
    p.add_argument(
        "--prior",
        type=values.comma_separated(path_values.path),
        default=(),
        metavar="STUDY[,STUDY]",
        help="studies of another method, task, size or model, or atlases of such studies; the surrogate expects the"
        " damage that they measured, until scores of this study disagree; the study keeps that, and 'none' forgets it",
    )


def add_limits(p: argparse.ArgumentParser) -> None:
    """Add --allow and --tie, which restrict plans."""
    widths = "widths that a component may have, such as vision=4,8 or '*.ff=4'; 16 is native precision"
    add_pairs(p, "--allow", values.allowed, "NAME=B,B,...", widths)
    p.add_argument(
        "--tie",
        type=values.comma_separated(values.name),
        action="append",
        default=[],
        metavar="NAME,NAME",
        help="components that must have the same scheme, such as vision,language",
    )


def distinct(flag: str, pairs: Sequence[tuple[str, T]]) -> Sequence[tuple[str, T]]:
    """The NAME=VALUE pairs of a flag that may be repeated, with an error if a name is repeated."""
    names = [name for name, _ in pairs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{flag} names '{twice[0]}' twice; give it once")
    return pairs


def without_effect(args: argparse.Namespace, flags: Iterable[str], where: str) -> None:
    """Raise an error for flags that were given and would have no effect, so that nobody relies on them."""
    # `given` holds the flags that took a value (see Once); a switch that is on is True in the namespace, and a flag
    # that may be repeated has a list
    switched = {name for name, value in vars(args).items() if value is True or (isinstance(value, list) and value)}
    given = getattr(args, "given", set()) | switched
    if getattr(args, "symmetric", None) is False:  # --no-symmetric; other switches are False where they are not given
        given = given | {"symmetric"}
    if idle := [flag for flag in flags if flag.removeprefix("--").replace("-", "_") in given]:
        raise UserError(f"{' and '.join(idle)} would do nothing {where}; leave it out")
