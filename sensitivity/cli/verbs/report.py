"""sensitivity report: writes the report of a study as a page."""

from __future__ import annotations

import argparse

from sensitivity.cli.arguments import flags, path_values

ABOUT = "write a page with the frontier, the importance of each component, and what to do"
EXAMPLE = "sensitivity report runs/first"


def arguments(p: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    flags.add_study(p)
    p.add_argument("--out", type=path_values.out_folder, help="where to write (default: STUDY/report)")


def run(args: argparse.Namespace) -> dict[str, object]:
    """Write the report."""
    from sensitivity.analysis.recommending.kept_recommendation import recommended
    from sensitivity.analysis.reporting.page import report
    from sensitivity.study.storage import paths
    from sensitivity.study.study import Study

    study = Study(args.study)
    path = report(study, args.out or paths.report_folder(args.study), recommended(study))
    if not args.json:
        print(f"report: {path}")
    return {"report": str(path)}
