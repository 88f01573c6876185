"""Run a script in the environment of another library, and format its comparison with ours."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


def ask(
    peer: str, script: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any], *more: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Run a script of this folder with the interpreter `peer`; tensors are passed both ways as safetensors files."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "ours.safetensors", Path(folder) / "theirs.safetensors"
        save_file(
            {name: t.contiguous().clone() for name, t in tensors.items()},
            source,
            metadata={name: json.dumps(value) for name, value in about.items()},
        )
        command = [peer, "-W", "ignore", str(Path(__file__).with_name(script)), str(source), str(target), *more]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        with safe_open(target, "pt") as stored:
            names = list(stored.keys())
            return {name: stored.get_tensor(name) for name in names}, json.loads(stored.metadata()["facts"])


def cell(ratios: Sequence[float] | None) -> str:
    """Geometric mean over layers, and the worst layer."""
    return f"{np.exp(np.mean(np.log(ratios))):.3f} ({max(ratios):.3f})" if ratios else "–"
