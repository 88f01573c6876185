"""Traces the two halves of a model into OpenVINO graphs, whose weights are inputs, so that none is read or copied."""

from __future__ import annotations

import hashlib
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sensitivity.formats.halved.traceable import prepared
from sensitivity.models.loading import quiet
from sensitivity.models.vlm import VLM
from sensitivity.spec.errors import UserError, reason

if TYPE_CHECKING:
    from openvino import Model

_kept: Path | None = None  # inside `kept`: the folder of graphs that are traced already


@contextmanager
def kept() -> Iterator[None]:
    """Inside the block, each half of a model is traced only once: tracing takes longer than writing a small model.

    Graphs are kept as files, since cloning a traced Qwen2-VL-2B in memory ended the process.
    """
    global _kept
    with tempfile.TemporaryDirectory() as folder:
        _kept = Path(folder)
        try:
            yield
        finally:
            _kept = None


def traced(vlm: VLM, half: str) -> Model:
    """One half of a model as an openvino.Model; the input of parameter P is named `parameter_input(P)`."""
    if _kept is None:
        return _traced(vlm, half)
    import openvino

    xml = _kept / hashlib.sha256(vlm.name.encode()).hexdigest() / f"{half}.xml"
    if not xml.exists():
        xml.parent.mkdir(exist_ok=True)
        openvino.serialize(_traced(vlm, half), str(xml))
    return openvino.Core().read_model(xml)


def _traced(vlm: VLM, half: str) -> Model:
    from transformers.exporters.configs import OpenVINOConfig
    from transformers.exporters.exporter_openvino import OpenVINOExporter

    module, inputs, shapes = prepared(vlm, half)
    config = OpenVINOConfig(dynamic_shapes=shapes)
    try:
        with quiet(), warnings.catch_warnings():  # warnings about versions and deprecations do not help a user
            warnings.simplefilter("ignore")
            program, _ = OpenVINOExporter().export_program(module, inputs, config)  # type: ignore[no-untyped-call]
    except Exception as error:
        raise UserError(f"the {half} half of {vlm.name} cannot be traced for openvino ({reason(error)})") from error
    return program
