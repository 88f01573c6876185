"""Model cards of exports and of recommended plans: plan, scores with intervals, size, how to load it, license."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sensitivity.formats.writing.job import Job, Written, predicted_size
from sensitivity.formats.writing.manifest import TrialFacts
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.plan import Plan, Scheme
from sensitivity.spec.sizes import bits_of, component_bits, kept_bits, size
from sensitivity.study.exports import path_gain_sentences
from sensitivity.study.sharing.markdown import escaped, yaml_text

COUNTED = {
    "to_wrong": "right → wrong",
    "to_right": "wrong → right",
    "empty": "empty answers",
    "cut": "cut off",
    "malformed": "malformed",
}
RECOMMENDED = "under a mixed-precision plan, recommended by sensitivity"  # by which a plan's card is known as ours


def card(job: Job, written: Written, format: str, facts: TrialFacts) -> str:
    """The model card as Markdown."""
    return "\n".join(_lines(job, written, format, facts))


def _lines(job: Job, written: Written, format: str, facts: TrialFacts) -> Iterator[str]:
    """The lines of the card: front matter, plan, size, scores, loading, license."""
    license = job.source.license
    model = escaped(Path(job.parts.model).name)
    yield from (
        "---",
        f"license: {yaml_text(license)}",
        f"base_model: {yaml_text(Path(job.parts.model).name)}",
        "---",
        "",
    )
    yield from (f"# {model}, {escaped(job.plan.describe())}", "")
    yield f"{model} under a mixed-precision plan, exported as `{format}` by sensitivity."
    yield from ("", "## Plan", "")
    yield from _table(job, written, format)
    yield from ("", "## Size", "", *_size(job, written, format), "", "## Scores", "")
    yield from _scores(facts)
    if measured := list(_measured(job.plan, facts)):
        yield from ("", "## How it was measured", "", *measured)
    yield from (
        "",
        "## How to load it",
        "",
        f"```{'python' if 'import' in written.load else 'text'}",
        written.load.rstrip(),
        "```",
    )
    for note in written.notes:
        yield from ("", note)
    if written.unread:
        yield from ("", f"Left out, since the model never reads them: {', '.join(written.unread)}.")
    yield from ("", "`sensitivity verify FOLDER` says whether the files are whole and answer as measured.", "")
    yield from ("## License", "")
    if license == "unknown":
        yield "The card of the base model names no license; whatever holds for the base model holds for these weights."
    else:
        yield f"{escaped(license)}, as the base model; any license files of the base model lie beside this card."
    yield ""


def _table(job: Job, written: Written, format: str) -> Iterator[str]:
    """The plan as a table, with the bytes of each component as predicted, without what is left out, and as written."""
    yield "| component | method | bits | group | grid | weights | predicted bytes | written bytes |"
    yield "|---|---|---|---|---|---|---|---|"
    stored_as, unread = job.stored_as(format), set(written.unread)
    for component in job.parts.components:
        scheme = job.plan[component.name]
        left_out = bits_of(job.parts, job.plan, unread & {weight.name for weight in component.weights}, stored_as)
        predicted = (component_bits(job.parts, component.name, scheme, stored_as) - left_out) // 8
        stored = f"{written.bytes[component.name]:,}" if written.bytes else "–"
        yield f"| {escaped(component.name)} | {_scheme(scheme)} | {component.numel:,} | {predicted:,} | {stored} |"
    kept = sum(k.numel for k in job.parts.kept)
    stored = f"{written.bytes['kept']:,}" if written.bytes else "–"
    left_out = bits_of(job.parts, job.plan, unread & {k.name for k in job.parts.kept}, stored_as)
    predicted = (kept_bits(job.parts, stored_as) - left_out) // 8
    sizes = f"{kept:,} | {predicted:,} | {stored}"
    yield f"| kept ({_reasons(job.parts)}) | native | | | | {sizes} |"


def why_foreign_card(file: Path) -> str:
    """Why a file is not the card of a recommended plan that we wrote; an empty string if it is one."""
    try:
        ours = f" {RECOMMENDED}: " in file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        ours = False
    return "" if ours else "it is not a model card that `sensitivity` wrote"


def plan_card(parts: ComponentMap, plan: Plan, facts: TrialFacts, verdict: str) -> str:
    """The card of a recommended plan that is not exported yet."""
    return "\n".join(_plan_lines(parts, plan, facts, verdict))


def _plan_lines(parts: ComponentMap, plan: Plan, facts: TrialFacts, verdict: str) -> Iterator[str]:
    """The lines of the card: plan, size, verdict, scores, and how it was measured."""
    model, weighs = escaped(Path(parts.model).name), size(parts, plan)
    yield from (f"# {model}, {escaped(plan.describe())}", "")
    yield f"{model} {RECOMMENDED}: {escaped(verdict)}"
    yield from ("", "## Plan", "", "| component | method | bits | group | grid | weights | bytes |")
    yield "|---|---|---|---|---|---|---|"
    for component in parts.components:
        stored = component_bits(parts, component.name, plan[component.name]) // 8
        sizes = f"{component.numel:,} | {stored:,}" if parts.sized else "– | –"
        yield f"| {escaped(component.name)} | {_scheme(plan[component.name])} | {sizes} |"
    if parts.kept:
        kept = sum(one.numel for one in parts.kept)
        yield f"| kept ({_reasons(parts)}) | native | | | | {kept:,} | {kept_bits(parts) // 8:,} |"
    if parts.sized:
        lacks = "" if parts.shaped else f" {weighs.counted}"
        total = (
            f"{weighs.bytes:,} bytes, {weighs.bpw:.3f} bits per weight{lacks} (codes alone: {weighs.bpw_codes:.3f})."
        )
    else:
        total = f"{weighs.bpw:.3f} bits per weight, {weighs.counted}."
    yield from ("", total)
    yield from ("", "## Scores", "", *_scores(facts))
    if measured := list(_measured(plan, facts)):
        yield from ("", "## How it was measured", "", *measured)
    yield from ("", "`sensitivity export` writes the plan for a runtime, with a card that says how to load it.", "")


def _scheme(scheme: Scheme | None) -> str:
    if scheme is None:
        return "native | | | "
    return f"{scheme.method} | {scheme.widths} | {scheme.group} | {'symmetric' if scheme.symmetric else 'asymmetric'}"


def _reasons(parts: ComponentMap) -> str:
    return escaped(", ".join(dict.fromkeys(kept.reason for kept in parts.kept)))


def _size(job: Job, written: Written, format: str) -> Iterator[str]:
    """Planned, predicted and written size in words."""
    planned, predicted = size(job.parts, job.plan), predicted_size(job, written, format)
    bpw = f"{planned.bpw:.3f} bits per weight (codes alone: {planned.bpw_codes:.3f})"
    yield f"Planned: {planned.bytes:,} bytes, {bpw}."
    if written.bytes:
        yield f"Predicted as `{format}` stores it: {predicted.bytes:,} bytes, {predicted.bpw:.3f} bits per weight."
        total = sum(written.bytes.values())
        yield (
            f"Written: {total:,} bytes of tensors, {8 * total / job.parts.numel:.3f} bits per weight, and "
            f"{written.headers:,} bytes of names and shapes."
        )
    else:
        yield "This format is a configuration: the runtime's own tool makes the weights from it."


def _scores(facts: TrialFacts) -> Iterator[str]:
    """The measured scores as a table, beside full precision."""
    measured = facts.get("scores") or {}
    if not measured:
        yield "This plan was not measured on a task."
        return
    yield f"| task | score | 95 % interval | n | full precision | {' | '.join(COUNTED.values())} |"
    yield f"|---|---|---|---|---|{'---|' * len(COUNTED)}"
    for task, score in measured.items():
        full = (facts.get("full_precision_scores") or {}).get(task)
        interval = f"{score['low']:.4f} to {score['high']:.4f}" if score.get("low") is not None else "–"
        native = "–" if full is None else f"{full['mean']:.4f}"
        counted = next((row for row in facts.get("answers", ()) if row["task"] == task and row["kind"] is None), {})
        counts = " | ".join("–" if counted.get(name) is None else str(counted[name]) for name in COUNTED)
        n = score.get("n", f"{score['repetitions']} repetitions" if "repetitions" in score else "–")
        yield f"| {escaped(task)} | {score['mean']:.4f} | {interval} | {n} | {native} | {counts} |"
    yield from ("", *_changes(facts))
    if gain := facts.get("path_gain"):
        yield from (
            "",
            path_gain_sentences(
                {escaped(name): escaped(value) if isinstance(value, str) else value for name, value in gain.items()}
            ),
        )
    if facts.get("note"):
        yield from ("", f"Note: {escaped(str(facts['note']))}.")


def _changes(facts: TrialFacts) -> Iterator[str]:
    """What the counts mean, and the kinds of question that lost most."""
    yield "Changes are against full precision on the same examples; of a graded score, wrong means lower, right higher."
    kinds = [row for row in facts.get("answers", ()) if row["kind"] is not None and row["to_wrong"]]
    if kinds:
        lost = sorted(kinds, key=lambda row: -int(str(row["to_wrong"])))[:5]
        words = (f"{escaped(str(row['kind']))} {row['to_wrong']} of {row['n']}" for row in lost)
        yield f"Right to wrong by kind of question: {', '.join(words)}."


def _measured(plan: Plan, facts: TrialFacts) -> Iterator[str]:
    """On which data, with which methods, calibration and versions the plan was measured."""
    meta = facts.get("meta") or {}
    for source in meta.get("tasks", ()):
        head, colon, path = source.rpartition(":")
        named = f"{head}{colon}{Path(path).name}"  # without the folders of this machine, which are private
        yield f"* benchmark: {escaped(named)}, at most {meta.get('n', 0):,} examples drawn with seed {meta.get('seed')}"
    for task, data in meta.get("data", {}).items():
        yield f"* data of {escaped(task)}: {escaped(data)} (a hash of questions, answers and images)"
    for method, settings in sorted({(s.method, _calibration(s)) for _, s in plan.schemes if s}):
        yield f"* method: {escaped(method)}{settings}"
    if versions := facts.get("versions"):
        yield f"* versions: {escaped(', '.join(f'{name} {version}' for name, version in sorted(versions.items())))}"


def _calibration(scheme: Scheme) -> str:
    """The end of a method's line: on which data the scheme was calibrated, or that it was not."""
    named = scheme.get("calibration")
    if named is None:
        return ", without calibration"
    tasks = ", ".join(Path(task).name for task in str(named).split(","))
    examples, seed, path = (scheme.get(name) for name in ("examples", "seed", "path"))
    return f", calibrated on {examples} examples of {escaped(tasks)} (seed {seed}, {path} path)"
