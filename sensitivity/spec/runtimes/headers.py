"""Bounds on the bytes of an export's files beside its tensors: headers, graphs, and a vocabulary."""

from __future__ import annotations

from sensitivity.spec.components import VOCABULARY, ComponentMap
from sensitivity.spec.sizes import GB
from sensitivity.spec.stored_bits import GGUF_MATRICES

GRAPH_ENTRY = 16_000  # upper bound on the bytes of a weight and its operations in an OpenVINO graph: usually 9,000
GGUF_TOKEN = 80  # upper bound on the bytes of a token in a GGUF file: its text, score and type, and its BPE merge
GGUF_SETTINGS = 40_000  # upper bound on the bytes of a GGUF file's settings, chat template included
ONNX_ENTRY = 6_000  # upper bound on the bytes of a weight and its operations in an ONNX graph: usually 3,000
HEADER_ENTRY = 112  # upper bound on the bytes of a tensor's entry in a header, in safetensors without its name


def header_bytes(parts: ComponentMap, format: str | None) -> int:
    """An upper bound on the bytes of files beside the tensors: headers, with a vocabulary in GGUF, or graphs.

    In safetensors a packed weight becomes four tensors or fewer, and each takes its name and about 90 characters more.
    Without a format there are no files, and the bound is 0.
    """
    if format is None:
        return 0
    if format == "openvino":
        return GRAPH_ENTRY * len(parts.weights)
    if format == "onnx":
        return ONNX_ENTRY * len(parts.weights)
    if format == "gguf":
        return _gguf_headers(parts)
    packed = sum(4 * (len(weight.name) + HEADER_ENTRY) for weight in parts.weights)
    return packed + sum(len(kept.name) + HEADER_ENTRY for kept in parts.kept)


def _gguf_headers(parts: ComponentMap) -> int:
    """An upper bound on the bytes beside the tensors: settings, vocabulary, names, and gaps of less than 32 bytes."""
    width = min((weight.cols for weight in parts.weights if weight.part == "language"), default=1)
    vocabulary = [weight.rows for weight in parts.weights if weight.kind in VOCABULARY]
    vocabulary += [kept.numel // width for kept in parts.kept if kept.reason in GGUF_MATRICES]
    tensors = 3 * (len(parts.weights) + len(parts.kept))  # a weight that holds q, k and v becomes three
    return GGUF_SETTINGS + GGUF_TOKEN * max(vocabulary, default=0) + HEADER_ENTRY * tensors


def bpw_in_gb(parts: ComponentMap, gb: float, headers: int = 0) -> float:
    """The bits per weight that fit in so many GB of files, whose headers take so many bytes."""
    return max(8 * (gb * GB - headers), 1) / parts.numel
