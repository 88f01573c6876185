"""The schemes that flags ask for, those of them that a runtime can load, and checks that need no model."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sensitivity.cli.arguments import flags
from sensitivity.cli.arguments.values import WIDEST
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import ATTENTION, KEEP, MATCH, PRUNE, SOFTMAX, Scheme

if TYPE_CHECKING:
    from sensitivity.spec.components import ComponentMap
    from sensitivity.spec.limits import Allowed


def schemes(args: argparse.Namespace) -> list[Scheme]:
    """The schemes of each method and combination of widths, from the flags of `add_methods` and `add_run_time`."""
    from sensitivity.quantize.scheme_settings import schemes_of

    own_flags = ("group", "symmetric", "biases", "backend")
    settings = dict(flags.distinct("--set", args.set))
    for name in ("method", "bits", *own_flags, "activation_scale", "cache_group"):
        if name in settings:
            flag = name.replace("_", "-")
            raise UserError(f"--set {name}={settings[name]}: {name} is a flag of its own; type --{flag}")
    names = (args.method,) if isinstance(args.method, str) else args.method
    of_rounding = {name: settings.pop(name) for name in (SOFTMAX, ATTENTION, MATCH) if name in settings}
    given: dict[str, Any] = {**{flag: getattr(args, flag) for flag in own_flags}, **settings}
    requested: list[Scheme] = []
    for activations, cache in itertools.product(*_rounded_widths(args)):
        rounded: dict[str, Any] = {}
        if activations < WIDEST:
            rounded |= {"activations": activations, "activation_scale": args.activation_scale, **of_rounding}
        elif len(getattr(args, "activation_bits", ())) > 1:  # 16 is listed: not rounded, even if a preset rounds
            rounded |= {"activations": activations}
        else:
            rounded |= of_rounding
        if cache < WIDEST:
            rounded |= {"cache": cache, "cache_group": args.cache_group}
        requested += schemes_of(names, args.bits, **given, **rounded)
    # the method `keep` changes no weights: without rounded activations, a rounded cache or pruned image tokens it is
    # full precision, which every sweep measures anyway
    changing = [
        one for one in requested if one.method != KEEP or min(one.activations, one.cache) < WIDEST or one.get(PRUNE)
    ]
    if not changing:
        raise UserError("keep leaves weights as they are; name --activation-bits or --cache-bits below 16")
    return changing


def checked(
    args: argparse.Namespace, search: str, until: Sequence[str] = (), storage: str | None = None
) -> tuple[list[Scheme], bool]:
    """Make all checks that need no model; returns the schemes, and whether any of them needs calibration."""
    from sensitivity.api.sweeping import check_sweep

    requested, tasks = schemes(args), (*args.task, *(args.calibration or ()))
    calibrated = check_sweep(
        args.by, search, requested, tasks, args.device, args.dtype, args.path, args.runtime, until, args.out, storage
    )
    return requested, calibrated


def loadable_schemes(
    args: argparse.Namespace, parts: ComponentMap, requested: list[Scheme], allow: Allowed | None
) -> list[Scheme]:
    """The schemes that --runtime can load for at least one component within --allow; prints what is left out."""
    from sensitivity.spec.limits import warn_of_idle_widths
    from sensitivity.spec.runtimes.loadable import restrict

    warn_of_idle_widths(dict(args.allow), requested, "the widths here (--bits) are")
    if not args.runtime:
        return requested
    legal, left_out = restrict(parts, requested, args.runtime, allow)
    for line in left_out:
        print(f"{args.runtime} restricts the space: {line}", file=sys.stderr)
    return legal


def _rounded_widths(args: argparse.Namespace) -> tuple[Sequence[int], Sequence[int]]:
    """The widths of activations and of the cache, for verbs with and without these flags."""
    activations, cache = (getattr(args, name, (WIDEST,)) for name in ("activation_bits", "cache_bits"))
    if min(activations) == WIDEST:
        flags.without_effect(args, ["--activation-scale"], "without --activation-bits below 16")
    if min(cache) == WIDEST:
        flags.without_effect(args, ["--cache-group"], "without --cache-bits below 16")
    return activations, cache
