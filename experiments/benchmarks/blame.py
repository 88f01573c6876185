"""Whether blame is right: planted noise is found, and putting back what has most blame mends answers.

    python -m experiments.benchmarks.blame [--models scenes-llava,...] [--cases 13] [--answers 60] [--only tokens,parts]

For each embedded model and each part of this program, a row of reports/blame.csv, which is not run again:

* tokens: the vision tower (and the projector of a LLaVA) at 3 and at 2 bits. Of each answer that was right and is
  wrong now, the 10 % of image tokens with most blame, or others, get their float features back behind the tower.
* parts: everything at 3 bits; the linears with most blame, up to 10 % of all weights, are put back to float, or others.
* component: all at 8 or at 4 bits by group.kind, and in one component noise of the size of its rounding error at 2
  bits; is that the component with the most blame, and if not, which of the two does more damage?
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import pandas as pd
from scipy import stats

from experiments.benchmarks.planted_defects import component
from experiments.benchmarks.put_back import SHARE, parts_back, tokens
from sensitivity import load
from sensitivity.spec.files import overwrite

ROOT = Path(__file__).parent.parent.parent
TABLE = ROOT / "reports" / "blame.csv"
MODELS = ("scenes-llava", "scenes-llava-heavy", "scenes-blip2")
PUT_BACK = ("asked", "flipped", "most", "random", "least", "all")
COLUMNS = ("model", "what", *PUT_BACK, "cases", "found", "missed", "worse", "cpu_s")


def page(table: pd.DataFrame) -> str:
    lines = [f"| model | put back | {' | '.join(PUT_BACK)} | most : random |", "|---|---|" + "---|" * 7]
    for _, row in table[table["what"].str.contains("tokens|parts")].iterrows():
        counts = " | ".join(f"{row[name]:.4g}" for name in PUT_BACK)
        lines.append(f"| {row['model']} | {row['what']} | {counts} | {row['most'] / max(row['random'], 0.5):.1f} |")
    planted = table[table["what"].str.contains("component")]
    lines += [
        "",
        "Noise planted in one component: it has the most blame, or another one has, which does more damage when",
        "each of the two is put back (`worse`). 95 % intervals of cases in which blame is right are exact.",
        "",
        "| model | beside all others at | cases | found | worse | right | missed |",
        "|---|---|---|---|---|---|---|",
    ]
    for _, row in planted.iterrows():
        right = stats.binomtest(int(row["found"] + row["worse"]), int(row["cases"])).proportion_ci()
        missed = row["missed"] if isinstance(row["missed"], str) else "–"
        lines.append(
            f"| {row['model']} | {row['what'].partition(', ')[2]} | {row['cases']:g} | {row['found']:g} | "
            f"{row['worse']:g} | {right.low:.0%} to {right.high:.0%} | {missed} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--cases", type=int, default=13)
    parser.add_argument("--answers", type=int, default=60)
    parser.add_argument("--only", default="tokens,parts,component")
    args = parser.parse_args()
    wanted = {
        "tokens": [(f"tokens, {bits} bits", lambda vlm, bits=bits: tokens(vlm, args.answers, bits)) for bits in (3, 2)],
        "parts": [("parts, 3 bits", lambda vlm: parts_back(vlm, 2 * args.answers))],
        "component": [
            (f"component, {bits} bits", lambda vlm, bits=bits: component(vlm, args.cases, bits)) for bits in (8, 4)
        ],
    }
    for what in args.only.split(","):
        for model in args.models.split(","):
            for name, compute in wanted[what]:
                table = pd.read_csv(TABLE) if TABLE.exists() else pd.DataFrame(columns=list(COLUMNS))
                if ((table["model"] == model) & (table["what"] == name)).any():
                    continue
                began = time.process_time()
                row = {"model": model, "what": name, **compute(load(f"embedded:{model}", dtype="float32"))}
                row["cpu_s"] = round(time.process_time() - began, 1)
                print(row, flush=True)
                rows = [*table.to_dict("records"), row]
                overwrite(TABLE, pd.DataFrame(rows, columns=list(COLUMNS)).to_csv(index=False))
    table = pd.read_csv(TABLE)
    overwrite(
        ROOT / "reports" / "blame.md",
        "# Whether blame is right\n\n"
        f"`python -m experiments.benchmarks.blame --cases {args.cases} --answers {args.answers}`; its first lines say\n"
        f"what each part does. {SHARE:.0%} of the image tokens, or of the weights, are put back to float, and answers\n"
        "are counted that are right again; `random` is a mean of draws, `all` is everything put back.\n"
        f"Together {table['cpu_s'].sum():.0f} CPU s.\n\n"
        f"{page(table)}\n",
    )


if __name__ == "__main__":
    main()
