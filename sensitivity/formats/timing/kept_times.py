"""Stores the times of layers measured on this machine, by shapes, runtime, processor, threads and versions."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from sensitivity.formats.timing.machine import this_machine, versions_of
from sensitivity.measure.calibrate.cache import cache_folder
from sensitivity.spec import schema
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.errors import UserError, shell_word
from sensitivity.spec.files import write_atomically
from sensitivity.spec.runtimes.layer_times import LAYOUTS, NATIVE, LayerTimes, check_timed
from sensitivity.spec.threads import threads_in_words


def keep(parts: ComponentMap, times: LayerTimes) -> None:
    """Store the times of a model's layers on this machine.

    Times of other layouts stay in the file, if they were measured with the same numbers of tokens: as they would be at
    the speed that the machine had now, or full precision would be compared with what ran at another speed.
    """
    file = file_of(parts, times.runtime, times.threads)
    file.parent.mkdir(parents=True, exist_ok=True)
    with suppress(UserError):  # no times are stored yet, or they cannot be read
        before = _read(file, "")
        if (before.at_once, before.tokens) == (times.at_once, times.tokens):
            earlier = {key: took * _slower(before, times, key[-1]) for key, took in before.layers.items()}
            layers, memory = {**earlier, **times.layers}, {**before.memory, **times.memory}
            times = replace(times, layers=layers, memory=memory)
    write_atomically(file, (json.dumps(times.to_json(), indent=1) + "\n").encode())


def _slower(before: LayerTimes, now: LayerTimes, at_once: int) -> float:
    """How many times as long the layers in full precision took, which both have timed with so many tokens at once."""
    both = [key for key in before.layers.keys() & now.layers.keys() if (key[2], key[3]) == (NATIVE, at_once)]
    took, takes = (sum(one.layers[key] for key in both) for one in (before, now))
    return takes / took if took and takes else 1.0


def load_kept_times(parts: ComponentMap, runtime: str, threads: int = 0) -> LayerTimes:
    """The times that `profile` measured here for a model of these shapes, or an error that says what to type."""
    check_timed(runtime)
    threads = threads or torch.get_num_threads()
    file = file_of(parts, runtime, threads)
    again = f"`sensitivity profile {shell_word(parts.model)} --runtime {runtime} --threads {threads}` measures them"
    if not file.exists():
        raise UserError(
            f"the layers of {parts.model} were not timed on this machine with {threads_in_words(threads)}; {again}"
        )
    return _read(file, again)


def kept_times_if_any(parts: ComponentMap, runtime: str | None, threads: int = 0) -> LayerTimes | None:
    """The times that `profile` measured here, or None."""
    with suppress(UserError):
        return load_kept_times(parts, runtime, threads) if runtime in LAYOUTS else None
    return None


def _read(file: Path, remedy: str) -> LayerTimes:
    return LayerTimes.from_json(schema.read(file, "layer_times", remedy))


def file_of(parts: ComponentMap, runtime: str, threads: int) -> Path:
    """The file that stores the times of a model."""
    shapes = sorted([weight.name, weight.rows, weight.cols] for weight in parts.weights)
    facts = [shapes, runtime, versions_of(runtime).get(runtime), dict(this_machine()), threads]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "layer-times" / f"{digest[:24]}.json"
