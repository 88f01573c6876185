"""Table 1 of Gautam et al. 2026: importance of the parts by model, method and task, from studies that were run before.

python -m experiments.published.importance_table    # writes runs/importance_of_parts.md
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from experiments.published.mmq import STUDIES
from experiments.published.page import importance
from sensitivity.spec.files import overwrite
from sensitivity.study.study import Study

ROOT = Path(__file__).parents[2]
NAMES = (
    *(f"blip2_{method}_{task}" for method in ("gptq", "awq") for task in ("coco", "gqa", "vqav2", "flickr")),
    *(f"llava_{method}_{task}" for method in ("gptq", "awq") for task in ("gqa", "vqav2")),
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="the folder of the studies (default: runs)")
    args = parser.parse_args(argv)
    lines = ["# Importance of the parts, beside the paper's table 1", ""]
    lines += ["    python -m experiments.published.importance_table", ""]
    for name in NAMES:
        lines += [f"## {STUDIES[name].title}", ""]
        if (args.runs / name).exists():
            lines += importance(STUDIES[name], Study(args.runs / name))[2:]
        else:
            lines += [f"Not run yet: `python -m experiments.published {name} --data FOLDER`.", ""]
    overwrite(args.runs / "importance_of_parts.md", "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
