"""One `report.html` in the run folder that says what a training run did, and opens without a network."""

from __future__ import annotations

import importlib.resources
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mold.extras import missing_extra
from mold.files import json_lines, write_atomically
from mold.report import plots, results

MAPS_OPEN, MAPS_SHOWN, PREDICTIONS_SHOWN, FINDINGS_SHOWN = 2, 12, 12, 6
LAYER_WEIGHTS = ("teacher_layer_weights", "student_layer_weights_before", "student_layer_weights_after")
WHAT_IS_IN = {
    "attention_maps.json": "attention maps",
    "metrics.jsonl": "router weights and loss curves",
    "predictions_before.jsonl": "predictions before training",
    "predictions_after.jsonl": "predictions after training",
    "config.yaml": "configuration",
}


def write_report(run_folder: str | Path) -> Path:
    """Write report.html from the files that a training left in its folder; it is replaced in one move.

    Only summary.json must be there: what else is missing, or was cut short, the report says.

    Args:
        run_folder: of `mold train`.

    Returns:
        The report's path.

    Raises:
        FileNotFoundError: there is no summary.json.
        ValueError: a file is not what the training writes; names file and line.
        ImportError: the extra ``report`` is not installed.
    """
    folder = Path(run_folder)
    summary = _read_json(folder / "summary.json")
    there = {name: folder / name for name in WHAT_IS_IN if (folder / name).is_file()}
    notes = [f"{name} is not in this folder: no {what}." for name, what in WHAT_IS_IN.items() if name not in there]
    metrics = merged_metrics(there.get("metrics.jsonl"), notes)
    maps = _read_json(there["attention_maps.json"]) if "attention_maps.json" in there else []
    shown = []
    for entry in maps[:MAPS_SHOWN]:
        weighed = all(entry.get(name) for name in LAYER_WEIGHTS)
        weights = plots.teacher_student_layer_weights(entry) if weighed else None
        shown.append({"entry": entry, "map": plots.attention_comparison(entry), "weights": weights})
    has_router = any(row.get("router_weights") is not None for row in metrics)
    has_losses = any(
        row.get(when + name) is not None for row in metrics for name in plots.PANELS for when in ("", "eval_")
    )
    return _write_page(
        folder,
        "page.html",
        name=folder.resolve().name,
        summary=summary,
        sentence=_sentence(summary),
        rows=[_change(row) for row in summary.get("rows", [])],
        maps=shown,
        maps_open=MAPS_OPEN,
        maps_left_out=len(maps) - len(shown),
        router=plots.layer_weights_over_training(metrics) if has_router else None,
        losses=plots.loss_curves(metrics) if has_losses else None,
        config=there["config.yaml"].read_text("utf-8", errors="replace") if "config.yaml" in there else None,
        **_predictions(there, notes),
        notes=notes,
    )


def write_comparison(folder: Path, summary: Mapping[str, Any], trainings: Sequence[tuple[str, str | None]]) -> Path:
    """Write report.html of variants that were compared: what came of it, pictures, tables, the trainings' own reports.

    Args:
        folder: of `mold run`.
        summary: of `mold.evaluation.comparison.summarise`.
        trainings: of each its name and its report's path from the folder, None where it has none.

    Raises:
        ImportError: the extra ``report`` is not installed.
    """
    tables, figures = results.sections(summary), plots.comparison_figures(summary)
    shown = [
        {
            "title": title,
            "figure": figures.get(name),
            "remarks": [*remarks, *([tables[name][0].replace("**", "")] if name in tables else [])],
            "rows": tables[name][1] if name in tables else None,
        }
        for name, title, *remarks in (
            ("results", "", "A ring is a seed, a dot their mean, a line its interval. Further right is better."),
            ("differences", f"Differences to {summary['baseline']}"),
            ("sizes", "By number of training examples"),
        )
        if name in figures
    ]
    found = results.findings(summary)
    if len(found) > FINDINGS_SHOWN:
        found = [f"{len(summary['variants'])} variants, compared with {summary['baseline']}."]
    name = folder.resolve().name
    return _write_page(folder, "comparison.html", name=name, findings=found, sections=shown, trainings=trainings)


def _write_page(folder: Path, template: str, **values) -> Path:
    """The folder's report.html. A figure among the values becomes SVG where it is printed."""
    try:
        from jinja2 import Environment, FunctionLoader
        from markupsafe import Markup
    except ImportError as error:
        raise missing_extra("the report", "jinja2", "report") from error

    def svg(figure):
        return Markup(_themed(plots.figure_to_svg(figure), figure.get_figwidth()))  # the figures' own SVG, not input

    files = importlib.resources.files("mold.report")
    loader = FunctionLoader(lambda name: (files / name).read_text("utf-8"))
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": number, "svg": svg}
    html = environment.get_template(template).render(**values)
    path = folder / "report.html"
    write_atomically(path, html.encode("utf-8", "replace"))  # a lone surrogate in a completion
    return path


def number(value: float | str | None) -> str:
    """A number as a reader wants it: four significant digits, NaN as NaN, a dash for what was not measured."""
    if value is None:
        return "\N{EN DASH}"
    value = float(value)
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else f"{value:+}"
    return str(int(value)) if value.is_integer() and abs(value) < 1e9 else f"{value:.4g}"


def _rows(path: Path | None, notes: list[str]) -> list[tuple[str, dict]]:
    """The rows of a file that may be missing, with their places; a torn last line is left out and noted."""
    if path is None:
        return []
    note = f"The last line of {path.name} is half written and is left out."
    return list(json_lines(path, "run_folder", lambda: notes.append(note)))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: is no JSON ({error})") from error


def merged_metrics(path: Path | None, notes: list[str]) -> list[dict]:
    """Rows in the order of their steps. A resumed run logs steps again: its last row counts, training and evaluation
    apart, because both may be logged at one step."""
    last = {}
    for place, row in _rows(path, notes):
        if not isinstance(row.get("step"), int | float):
            raise ValueError(f"{place}: step is {row.get('step')!r}, must be a number")
        last[row["step"], any(key.startswith("eval_") for key in row)] = row
    return [last[key] for key in sorted(last)]


def _change(row: Mapping[str, Any]) -> dict[str, Any]:
    before, after = row.get("before"), row.get("after")
    change = verdict = None
    if before is not None and after is not None:
        change = after - before
        if math.isnan(after) and not math.isnan(before):
            verdict = "worse"
        elif change and not math.isnan(change):
            verdict = "better" if (change > 0) == (row["better"] == "higher") else "worse"
    sign = "+" if change is not None and change > 0 else ""
    return {**row, "change": sign + number(change).replace("-", "\N{MINUS SIGN}"), "verdict": verdict or ""}


def _sentence(summary: Mapping[str, Any]) -> str:
    text = f"{summary.get('model') or 'The student'} learnt from {summary.get('teacher') or 'its teacher'}"
    if summary.get("num_train") is not None:
        text += f" on {summary['num_train']:,} examples"
    if summary.get("num_without_signal"):
        text += f" ({summary['num_without_signal']:,} of them without an attention signal)"
    measured = [row for row in summary.get("rows", []) if None not in (row.get("before"), row.get("after"))]
    if measured:
        row = measured[0]
        text += f"; {row['metric']} went from {number(row['before'])} to {number(row['after'])}"
        if summary.get("num_eval") is not None:
            text += f" on {summary['num_eval']:,} held-out problems"
    return text + "."


def _predictions(there: Mapping[str, Path], notes: list[str]) -> dict[str, Any]:
    """The first problems as they come, not chosen, and how many of all turned right or wrong."""
    files = {when: there.get(f"predictions_{when}.jsonl") for when in ("before", "after")}
    problems: dict[str, dict[str, Any]] = {}
    for when, path in files.items():
        for _, row in _rows(path, notes):
            problem = problems.setdefault(row["id"], {"question": row["question"], "answer": row["answer"]})
            problem[when] = row
    turns = [
        (p["before"]["correct"], p["after"]["correct"]) for p in problems.values() if "before" in p and "after" in p
    ]
    names = {(False, True): "turned right", (True, False): "turned wrong"}
    names |= {(True, True): "were right both times", (False, False): "wrong both times"}
    return {
        "times": [when for when, path in files.items() if path],
        "problems": list(problems.values())[:PREDICTIONS_SHOWN],
        "num_problems": len(problems),
        "counts": [(name, turns.count(turn)) for turn, name in names.items()] if turns else [],
    }


def _themed(svg: str, inches: float) -> str:
    """Let the page's light and dark colours reach into a figure, and its width follow the page within limits."""
    for colour, name in plots.THEME.items():
        svg = svg.replace(colour, f"var(--{name})")
    size = f"width:100%;max-width:{inches:.2f}in;min-width:{0.8 * inches:.2f}in;height:auto"
    return svg.replace("<svg ", f'<svg role="img" style="{size}" ', 1)
