"""What a time depends on besides the model: the processor, its vector instructions, and versions."""

from __future__ import annotations

import platform
import re
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypedDict

from sensitivity.measure.loop import versions

CPU = Path("/proc/cpuinfo")
VECTORS = ("avx", "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "asimd")


class Machine(TypedDict):
    """A processor as the operating system names it."""

    processor: str
    instructions: list[str]


def this_machine() -> Machine:
    """The processor of this machine, and which vector instructions it has."""
    text = CPU.read_text() if CPU.exists() else ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    known = set(flags[1].split()) if flags else set()
    return {
        "processor": name[1] if name else platform.processor() or platform.machine(),
        "instructions": [word for word in VECTORS if word in known],
    }


def versions_of(runtime: str) -> dict[str, str]:
    """Versions of the libraries on which times in a runtime depend."""
    package = {"gguf": "xllamacpp", "onnx": "onnxruntime", "onnx-int8": "onnxruntime"}.get(runtime, runtime)
    with suppress(PackageNotFoundError):  # a runtime that has no package of its own name
        return {package: version(package), **versions()}
    return versions()
