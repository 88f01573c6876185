"""verify(): loads an export in a fresh process and compares each answer with the trial's."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from sensitivity.formats.gguf import exporter as gguf
from sensitivity.formats.table import EXPECTED
from sensitivity.formats.writing import manifest, own_process
from sensitivity.formats.writing.manifest import Manifest, TrialFacts
from sensitivity.spec.errors import UserError, shell_word
from sensitivity.study import answers as stored_answers

if TYPE_CHECKING:
    from sensitivity.formats.halved.model import Running
    from sensitivity.measure.evaluation import Rows
    from sensitivity.tasks.examples.types import Task

# format -> other runtimes that read it and compute otherwise, and what they do; their answers are compared, too
FURTHER = {"onnx": {"onnx-int8": "with what quantized layers read rounded to 8 bits, as --runtime onnx-int8 runs it"}}
# format -> what it adds to the words of a verdict, given the folder and whether all answers are as measured
REMARKS: dict[str, Callable[[Path, bool], str]] = {"gguf": gguf.remark}
# differences of the negative log-likelihood up to this are not mentioned: the order of sums in float32 causes smaller
# ones, and one rounding step causes larger ones
NLL_TOLERANCE = 1e-4


def verify(folder: Path | str, device: str = "cpu") -> dict[str, object]:
    """Check that an export is undamaged and answers as measured, and store the outcome in the export.

    Examples:
        >>> from sensitivity import verify
        >>> verify(folder)["verdict"]
        'as measured'
    """
    folder = Path(folder)
    facts = manifest.read(folder)
    outcome: dict[str, object] = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "key": facts["key"]}
    if damage := manifest.damaged_files(folder, facts):
        outcome |= {"verdict": "damaged", "words": f"not as it was written: {'; '.join(damage)}; export again"}
    elif facts["format"] == "plan":
        outcome |= {
            "verdict": "whole",
            "words": "the plan is as it was written; it holds no weights that could answer: "
            f"`sensitivity export {shell_word(folder / 'plan.json')} --format NAME --out DIR` writes some",
        }
    elif not facts["runs"]:
        outcome |= {
            "verdict": "whole",
            "words": f"every file is as it was written; the format {facts['format']} is loaded by its own runtime, so "
            "its answers were not compared",
        }
    elif not (folder / EXPECTED).exists():
        outcome |= {
            "verdict": "whole",
            "words": "every file is as it was written; the plan was never measured, so there are no answers to "
            "compare: `sensitivity recommend`, of a study that a sweep has made, measures the plan that it chooses",
        }
    else:
        expected = _expected(folder, facts)
        format = facts["format"]
        found = compare_answers(expected, _in_fresh_process(folder, facts, device, format))
        if remark := REMARKS.get(format):
            found["words"] = f"{found['words']}{remark(folder, found['verdict'] == 'as measured')}"
        for runtime, does in FURTHER.get(format, {}).items():
            other = found[runtime] = compare_answers(expected, _in_fresh_process(folder, facts, device, runtime))
            found["words"] = f"{found['words']}; {does}, {other['words']}"
        outcome |= found
    manifest.store_verification(folder, outcome)
    return outcome


def _expected(folder: Path, facts: Manifest) -> pd.DataFrame:
    """The measured answers, or an error if the manifest does not say on which data they were measured."""
    meta = facts["trial"].get("meta", {})
    if lacking := [name for name in ("tasks", "n", "seed", "data") if name not in meta]:
        raise UserError(f"{folder} does not say on which data it was measured ({lacking[0]} is missing); export again")
    try:
        return stored_answers.read(folder / EXPECTED)
    except stored_answers.Damaged as error:
        raise UserError(f"{folder / EXPECTED} is damaged ({error}); export again") from error


def compare_answers(expected: pd.DataFrame, answered: pd.DataFrame) -> dict[str, object]:
    """Compare answers and scores example by example; returns the verdict, its words and the counts."""
    both = expected.merge(answered, on=["task", "example"], how="outer", suffixes=("", "_found"), indicator=True)
    missing = int((both["_merge"] != "both").sum())
    both = both[both["_merge"] == "both"]
    answers = int((both["answer"] != both["answer_found"]).sum())
    scores = int((both["score"] != both["score_found"]).sum())
    nll = float((both["nll"] - both["nll_found"]).abs().max()) if len(both) else float("nan")
    # log-likelihoods do not decide: their last bits depend on the order of float sums
    same = not (missing or answers or scores)
    n = len(both)
    if same:
        words = f"all {n} answers and scores are those that were measured"
        words += "" if nll <= NLL_TOLERANCE or nll != nll else f", although log-likelihoods differ by up to {nll:.2g}"
    else:
        words = f"{answers} of {n} answers and {scores} scores differ from those that were measured"
        words += f"; {missing} examples are not in both" if missing else ""
    return {
        "verdict": "as measured" if same else "different",
        "words": words,
        "examples": n,
        "answers_that_differ": answers,
        "scores_that_differ": scores,
        "largest_nll_difference": nll,
        "mean_score": {str(task): float(rows["score_found"].mean()) for task, rows in both.groupby("task", sort=False)},
    }


def _in_fresh_process(folder: Path, facts: Manifest, device: str, runtime: str) -> pd.DataFrame:
    """The answers of an export in a runtime, which `rerun` computes in a separate process."""
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "rows.parquet"
        asked = {
            "folder": str(folder), "target": str(target), "dtype": facts["dtype"], "trial": dict(facts["trial"]),
            "device": device, "runtime": runtime,
        }  # fmt: skip
        # a fresh process sees only the files: nothing that this one has loaded or patched can help
        ended = own_process.call(rerun, **asked)
        if ended.status:
            raise UserError(f"{folder} cannot be loaded and run: {ended.last_line or 'it was killed'}")
        return pd.read_parquet(target)


def rerun(folder: str, target: str, dtype: str, trial: TrialFacts, device: str, runtime: str | None = None) -> None:
    """Load the export, run the trial's tasks and write the rows to `target`; this runs in the fresh process."""
    import torch

    from sensitivity.tasks.table import task as find_task

    meta = trial["meta"]
    # the order of float sums depends on the number of threads
    torch.set_num_threads(int((trial.get("versions") or {}).get("threads", torch.get_num_threads())))
    runtime = runtime or manifest.read(Path(folder))["format"]
    answers = _answers(Path(folder), dtype, device, trial.get("path") == "plain", runtime)
    frames = []
    for source in dict.fromkeys(meta["tasks"]):
        task = find_task(source, "evaluation", meta["n"], meta["seed"], meta.get("whole_answers", False))
        data = f"{len(task.examples)} examples {task.fingerprint}"
        if meta["data"].get(task.name) != data:
            raise UserError(
                f"the data of {task.name} are not those of the trial: {data}, then {meta['data'][task.name]}"
            )
        frames.append(pd.DataFrame(answers(task)))
    pd.concat(frames).to_parquet(target, index=False)


def _in_openvino(folder: Path) -> Running:
    import torch

    from sensitivity.formats.openvino.run import running

    return running(folder, torch.get_num_threads())


def _in_onnx_runtime(folder: Path, accuracy_level: int | None = None) -> Running:
    import torch

    from sensitivity.formats.onnx.run import running

    return running(folder, torch.get_num_threads(), accuracy_level)


def _in_llama_cpp(folder: Path) -> Running:
    import torch

    from sensitivity.formats.gguf.run import running

    return running(folder, torch.get_num_threads())


# runtimes of their own in which formats are run -> the function that opens an export there
RUNTIMES: dict[str, Callable[[Path], Running]] = {
    "openvino": _in_openvino,
    "onnx": _in_onnx_runtime,
    "onnx-int8": partial(_in_onnx_runtime, accuracy_level=4),
    "gguf": _in_llama_cpp,
}


def _answers(folder: Path, dtype: str, device: str, plain: bool, runtime: str) -> Callable[[Task], Rows]:
    """A function that runs an export on a task: in a runtime of its own, or else in transformers."""
    if runtime in RUNTIMES:
        if device != "cpu":
            raise UserError(f"an export for {runtime} is verified on the cpu, not on {device}; leave out --device")
        return RUNTIMES[runtime](folder).evaluate
    from sensitivity.measure.evaluation import evaluate
    from sensitivity.models.loading import load

    vlm = load(str(folder), device=device, dtype=dtype, quantized=True)
    return lambda task: evaluate(vlm, task, plain)
