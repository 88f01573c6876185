"""The page of choosers side by side: where a score is as good as measuring, and where it is not."""

from __future__ import annotations

import pandas as pd

from experiments.peers.choosers import BASE, PLANS, SETTINGS, WHO
from sensitivity.measure.loop import versions

MARGIN = 0.01  # a loss of the mean score that counts
GOOD, BAD, OPEN = "as good", "worse", "open"


def verdict(low: float, high: float) -> str:
    """As good: less than MARGIN is lost, with 95 %; worse: more is. Else it is open."""
    return GOOD if low > -MARGIN else BAD if high < -MARGIN else OPEN


def page(table: pd.DataFrame) -> str:
    known = [name for name in SETTINGS if name in set(table["setting"])]
    first = table.iloc[0]
    used = ", ".join(f"{name} {number}" for name, number in versions().items() if name != "threads")
    lines = [
        "# What others would pick, side by side", "",
        f"`python -m experiments.peers --settings \"{','.join(known)}\" --n {first['n']} --test {first['test']}`; its",
        "first lines say how. Differences are to the plans that a sweep of 60 plans chose, on the same examples, which",
        "no chooser saw, as a mean over three budgets, with 95 % intervals clustered by image.", "",
        f"*{GOOD}*: the whole interval lies above -{MARGIN:g}. *{BAD}*: it lies below. *{OPEN}*: neither. Seconds",
        "compare within a setting alone: settings ran on machines of different speed and load. `plan` has none where",
        "it ran again later than the others.",
        f"Versions: {used}.", "",
        *said(table, known), "", *matrix(table, known), "", *counted(table),
    ]  # fmt: skip
    for name in known:
        lines += ["", *of_setting(table[table["setting"] == name], name)]
    return "\n".join(lines) + "\n"


def said(table: pd.DataFrame, known: list[str]) -> list[str]:
    """A line for each setting."""
    lines = []
    for name in known:
        rows = means(table, name)
        groups = {what: [one for one, row in rows.iterrows() if one not in (BASE, *PLANS, "uniform", "one at a time")
                         and verdict(row["low"], row["high"]) == what] for what in (GOOD, BAD, OPEN)}  # fmt: skip
        texts = [f"{what} as measuring: {', '.join(own)}" if what == GOOD else f"{what}: {', '.join(own)}"
                 for what, own in groups.items() if own]  # fmt: skip
        quick = [f"`{plan}`: {verdict(*rows.loc[plan, ['low', 'high']])}" for plan in PLANS if plan in rows.index]
        lines.append(f"* **{name}** ({SETTINGS[name].model}, {SETTINGS[name].says}). Scores {'; '.join(texts)}. "
                     f"{'; '.join(quick)}.")  # fmt: skip
    return lines


def counted(table: pd.DataFrame) -> list[str]:
    """In how many settings each chooser is as good, worse or open, and what it loses at the worst single budget."""
    lines = [f"| chooser | settings | {GOOD} | {BAD} | {OPEN} | worst budget of all |", "|---|---|---|---|---|---|"]
    rows = []
    for chooser, own in table[table["chooser"] != BASE].groupby("chooser"):
        means = own[own["bpw"] == "mean"]
        found = [verdict(low, high) for low, high in zip(means["low"], means["high"], strict=True)]
        worst = own.loc[own[own["bpw"] != "mean"]["to_sweep"].idxmin()]
        rows.append((found.count(BAD), -found.count(GOOD), chooser, len(found), found.count(OPEN), worst))
    for bad, good, chooser, settings, open_, worst in sorted(rows, key=lambda row: row[:3]):
        lines.append(
            f"| {chooser} | {settings} | {-good} | {bad} | {open_} | "
            f"{worst['to_sweep']:+.3f} ({worst['setting']}, {worst['bpw']} bpw) |"
        )
    return lines


def means(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """The mean over budgets of every chooser in a setting, the best first."""
    rows = table[(table["setting"] == name) & (table["bpw"] == "mean")].set_index("chooser")
    return rows.sort_values("to_sweep", ascending=False)


def matrix(table: pd.DataFrame, known: list[str]) -> list[str]:
    order = table[table["bpw"] == "mean"].groupby("chooser")["to_sweep"].mean().sort_values(ascending=False).index
    lines = [f"| chooser | {' | '.join(known)} |", "|---|" + "---|" * len(known)]
    for chooser in order:
        cells = []
        for name in known:
            rows = means(table, name)
            row = rows.loc[chooser] if chooser in rows.index else None
            cells.append("–" if row is None else f"{verdict(row['low'], row['high'])} ({row['to_sweep']:+.3f})")
        lines.append(f"| {chooser} | {' | '.join(cells)} |")
    return lines


def of_setting(rows: pd.DataFrame, name: str) -> list[str]:
    setting = SETTINGS[name]
    asked, bpw = setting.asked, [one for one in rows["bpw"].unique() if one != "mean"]
    lines = [
        f"## {name}", "",
        f"{setting.model}, {setting.task}, {', '.join(map(str, asked.schemes))}: {setting.says}; {asked.examples}",
        f"calibration examples of {asked.calibration or setting.task}. Seconds of scores are what they take after",
        "calibration; those of `plan` and `sweep` hold everything.", "",
        f"| chooser | scores at {', '.join(bpw)} bpw | mean difference | worst budget | CPU s |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    for chooser, mean in means(rows, name).iterrows():
        own = rows[(rows["chooser"] == chooser) & (rows["bpw"] != "mean")]
        worst = own.loc[own["to_sweep"].idxmin()]
        seconds = "–" if pd.isna(mean["cpu_s"]) else f"{mean['cpu_s']:.0f}"
        called = f"{chooser} ({WHO[str(chooser)]})" if chooser in WHO else f"**{chooser}**"
        lines.append(
            f"| {called} | {', '.join(f'{score:.3f}' for score in own['score'])} | {interval(mean)} | "
            f"{interval(worst)} at {worst['bpw']} | {seconds} |"
        )
    return lines


def interval(row: pd.Series) -> str:
    return f"{row['to_sweep']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]"
