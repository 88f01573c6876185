"""FORMATS: every export format by its name, and write(), which writes one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NotRequired, TypedDict

from sensitivity.formats import plan_json
from sensitivity.formats.checkpoints import auto_round, awq, compressed_tensors, fake, gptq
from sensitivity.formats.gguf import exporter as gguf
from sensitivity.formats.onnx import exporter as onnx
from sensitivity.formats.openvino import exporter as openvino
from sensitivity.formats.recipes import bnb, llama_cpp, llm_compressor, mlx, modelopt, torchao
from sensitivity.formats.writing import manifest
from sensitivity.formats.writing.job import Job, Written, predicted_size
from sensitivity.formats.writing.manifest import StoredJson, TrialFacts
from sensitivity.formats.writing.model_card import card
from sensitivity.formats.writing.unfinished import staging_folder
from sensitivity.measure.calibrate.cache import cache_folder
from sensitivity.models.vlm import VLM
from sensitivity.spec import plan_file
from sensitivity.spec.errors import UserError, unknown
from sensitivity.spec.files import check_may_write
from sensitivity.spec.runtimes.rules import check
from sensitivity.spec.sizes import SizeJson

# name -> the function that writes a job's plan into a new folder and returns what it wrote
FORMATS: dict[str, Callable[[Job, Path], Written]] = {
    "plan": plan_json.write,
    "fake": fake.write,
    "compressed-tensors": compressed_tensors.write,
    "gptq": gptq.write,
    "awq": awq.write,
    "auto-round": auto_round.write,
    "openvino": openvino.write,
    "onnx": onnx.write,
    "gguf": gguf.write,
    "llm-compressor": llm_compressor.write,
    "bnb": bnb.write,
    "torchao": torchao.write,
    "modelopt": modelopt.write,
    "llama.cpp": llama_cpp.write,
    "mlx": mlx.write,
}
# formats that hold weights
CHECKPOINTS = ("fake", "compressed-tensors", "gptq", "awq", "auto-round", "openvino", "onnx", "gguf")

# for runtimes that we run ourselves: a check, before any slow work, that one is installed and can run a model
CHECKS: dict[str, Callable[[VLM | str], None]] = {
    "openvino": openvino.check,
    "onnx": onnx.check,
    "onnx-int8": onnx.check,
    "gguf": gguf.check,
}
EXPECTED = "expected.parquet"  # per-example answers of the trial, for `verify`


class ExportSummary(TypedDict):
    """The format and the sizes of an export."""

    format: str
    predicted_size: SizeJson
    written: NotRequired[StoredJson]  # only for formats that hold weights


def write(
    job: Job,
    out: Path,
    format: str,
    force: bool = False,
    facts: TrialFacts | None = None,
    runtime: str | None = None,
    expected: Path | None = None,
    notes: Callable[[], Sequence[str]] = tuple,
) -> ExportSummary:
    """Write a plan in a format, and return a summary; an earlier export at `out` is replaced only with `force`.

    `facts` (scores, data, seeds) and `expected` (per-example answers) are those of the plan's trial and are stored with
    the export. `notes` returns notes for the model card that are known only after the weights are written.
    """
    if format not in FORMATS:
        raise unknown("format", format, FORMATS)
    may_be_written(out, format, force, job.reads)
    check(job.parts, job.plan, runtime or format)
    if format == "plan" and out.suffix == ".json":
        plan_file.write_file(job.parts, job.plan, job.facts, out)
        return _summary(job, Written(load=""), format)
    with staging_folder(out) as folder:
        written = FORMATS[format](job, folder)
        if not isinstance(written, Written):
            raise UserError(f"the function of the format {format} returned a {type(written).__name__}, and no Written")
        written = replace(written, notes=(*written.notes, *notes()))
        (folder / "README.md").write_text(card(job, written, format, facts or {}), encoding="utf-8")
        if expected is not None:
            shutil.copyfile(expected, folder / EXPECTED)
        summary = _summary(job, written, format)
        trial = {
            "trial": dict(facts or {}),
            "dtype": job.dtype_name,
            "runtime": runtime or format,
        }
        document = plan_file.document(job.parts, job.plan, job.facts)
        # last, since it holds the hash of every other file
        manifest.write(folder, {**document, **summary, **trial, "runs": written.runs}, written.hashes)
    return summary


def may_be_written(out: Path, format: str, force: bool, keep: Iterable[Path] = ()) -> None:
    """Raise an error if writing to `out` would replace something that is no export, or an export without `force`."""
    if format == "plan" and out.suffix == ".json":
        if out.is_dir():
            raise UserError(f"{out} is a folder; name a file, such as {out / 'plan.json'}")
        check_may_write(out, force, plan_file.why_foreign, keep)
    else:
        check_may_write(out, force, manifest.why_foreign, [cache_folder(), *keep])


def _summary(job: Job, written: Written, format: str) -> ExportSummary:
    predicted = predicted_size(job, written, format)
    facts: ExportSummary = {"format": format, "predicted_size": predicted.to_json()}
    if written.bytes:
        total = sum(written.bytes.values())
        facts["written"] = {
            "bytes": total,
            "bpw": 8 * total / job.parts.numel,
            "components": dict(written.bytes),
            "headers": written.headers,
        }
    return facts
