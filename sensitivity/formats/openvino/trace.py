"""Traces the two halves of a model into OpenVINO graphs, whose weights are inputs, so that none is read or copied."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from sensitivity.formats.halved.traceable import Half, Inputs
from sensitivity.formats.halved.tracing import write_traced
from sensitivity.models.loading import quiet

if TYPE_CHECKING:
    from openvino import Model

GRAPH = "graph.xml"  # and graph.bin, with OpenVINO's own constants


def read(graph: Path) -> Model:
    """One of the traced graphs."""
    import openvino

    return openvino.Core().read_model(graph / GRAPH)


def write_graphs(model: str, graphs: dict[str, str]) -> None:
    """Write the graphs of some halves; this runs in the process that traces."""
    write_traced(model, graphs, _write)


def _write(module: Half, inputs: Inputs, shapes: Inputs, folder: Path) -> object:
    import openvino
    from transformers.exporters.configs import OpenVINOConfig
    from transformers.exporters.exporter_openvino import OpenVINOExporter

    with quiet(), warnings.catch_warnings():  # warnings about versions and deprecations do not help a user
        warnings.simplefilter("ignore")
        made = OpenVINOExporter().export_program(  # type: ignore[no-untyped-call]
            module, inputs, OpenVINOConfig(dynamic_shapes=shapes)
        )
    openvino.serialize(made[0], folder / GRAPH)
    return made
