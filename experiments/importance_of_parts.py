"""The paper's table 1: importance of the parts by model, method and task, from the studies that the others wrote.

python experiments/importance_of_parts.py    # after the experiments it names; writes runs/importance_of_parts.md
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from beside import importance
from published import ROOT

from sensitivity.files import write_again
from sensitivity.trials import Study

NAMES = (
    *(f"blip2_{method}_{task}" for method in ("gptq", "awq") for task in ("coco", "gqa", "vqav2", "flickr")),
    *(f"llava_{method}_{task}" for method in ("gptq", "awq") for task in ("gqa", "vqav2")),
)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "runs", help="where the other experiments keep their studies"
    )
    args = parser.parse_args(argv)
    lines = [
        "# Importance of the parts, beside the paper's table 1",
        "",
        "    python experiments/importance_of_parts.py",
        "",
    ]
    for name in NAMES:
        experiment = importlib.import_module(name).EXPERIMENT
        lines += [f"## {experiment.title}", ""]
        if (args.runs / name).exists():
            lines += importance(experiment, Study(args.runs / name))[2:]
        else:
            lines += [f"Not run yet: `python experiments/{name}.py --data FOLDER`.", ""]
    write_again(args.runs / "importance_of_parts.md", "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
