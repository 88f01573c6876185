"""A sweep with GPTQModel's solver against the same sweep with ours: same plans, calibration data and examples.

python -m experiments.parity.gptq_sweep --peer PYTHON-OF-A-VENV-WITH-GPTQMODEL-AND-THIS-PACKAGE
"""

from __future__ import annotations

import argparse
import subprocess
from dataclasses import replace

from scipy.stats import spearmanr

from experiments.methods.measured import write
from experiments.parity.gptq import ROOT
from sensitivity.spec.plan import Plan, Scheme
from sensitivity.study.study import Study

ASKED = "--task vqa,caption --by part --method gptq --set clip=false --bits 3,4,8"
BACKENDS = ("", " --backend gptqmodel")


def ours(plan: Plan) -> Plan:
    """The same plan with our solver instead of the library's."""

    def own(one: Scheme | None) -> Scheme | None:
        return one and replace(one, settings=tuple(pair for pair in one.settings if pair[0] != "backend"))

    return Plan(tuple((name, own(one)) for name, one in plan.schemes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="a python that has gptqmodel==7.6.0 and what this package needs")
    parser.add_argument("--model", default="embedded:scenes-llava")
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--work", default="runs/parity-gptq-sweep")
    parser.add_argument("--out", default="reports/parity-gptq-sweep.md")
    args = parser.parse_args()
    commands = [f"sensitivity sweep {args.model} {ASKED}{how} --n {args.n} --out {args.work}" for how in BACKENDS]
    for command in commands:
        subprocess.run([args.peer, "-m", *command.split()], check=True, cwd=ROOT)
    write(args.out, report(Study(ROOT / args.work), args.n, commands))


def report(study: Study, n: int, commands: list[str]) -> list[str]:
    table = study.table().set_index("key")
    theirs = [plan for plan in map(study.plan, table["number"]) if plan != ours(plan)]
    task_of = {task: [study.compare(ours(plan), plan, task) for plan in theirs] for task in study.tasks}
    lines = [
        "# A whole sweep with GPTQModel's solver, and with ours",
        "",
        "`python -m experiments.parity.gptq_sweep --peer PYTHON`, where PYTHON has gptqmodel 7.6.0 and this package.",
        "It runs",
        "",
        *(f"* `{command}`" for command in commands),
        "",
        f"into one study, and compares each plan's {n} examples of each task; calibration and order of columns are the",
        "same. Differences are ours less GPTQModel's, paired, with 95 % intervals.",
        "",
        "| plan | bpw | " + " | ".join(f"{task}, GPTQModel | ours | difference" for task in study.tasks) + " |",
        "|---" * (2 + 3 * len(study.tasks)) + "|",
    ]
    for i, plan in enumerate(theirs):
        row, cells = table.loc[plan.key], []
        for task in study.tasks:
            apart = task_of[task][i]
            assert apart is not None
            own = table.loc[ours(plan).key, task]
            cells.append(f"{row[task]:.3f} | {own:.3f} | {apart.mean:+.3f} ± {1.96 * apart.se:.3f}")
        lines.append(f"| {plan.describe()} | {row['bpw']:.2f} | {' | '.join(cells)} |")
    lines.append("")
    for task, found in task_of.items():
        means = [score.mean for score in found if score]
        beyond = sum(score.low > 0 or score.high < 0 for score in found if score)
        both = [[float(table.loc[key(plan).key, task]) for plan in theirs] for key in (lambda plan: plan, ours)]
        lines.append(
            f"* {task}: mean difference over the {len(means)} plans {sum(means) / len(means):+.4f}, largest "
            f"{max(means, key=abs):+.3f}; {beyond} intervals exclude zero. Rank correlation of the scores "
            f"{spearmanr(*both).statistic:.3f}."
        )
    return lines


if __name__ == "__main__":
    main()
