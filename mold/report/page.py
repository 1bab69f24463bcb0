"""One `report.html` in the run folder that says what a training run did, and opens without a network."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mold.extras import missing_extra
from mold.files import json_lines, write_atomically
from mold.report import drawing, maps, plots, results

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
    entries = _read_json(there["attention_maps.json"]) if "attention_maps.json" in there else []
    shown = []
    for entry in entries[:MAPS_SHOWN]:
        weighed = all(entry.get(name) for name in LAYER_WEIGHTS)
        weights = maps.teacher_student_layer_weights(entry) if weighed else None
        shown.append({"entry": entry, "map": maps.attention_comparison(entry), "weights": weights})
    has_router = any(row.get("router_weights") is not None for row in metrics)
    has_losses = any(
        row.get(when + name) is not None for row in metrics for name in plots.PANELS for when in ("", "eval_")
    )
    return _write_page(
        folder,
        "page.html",
        name=folder.resolve().name,
        summary=summary,
        sentences=results.training_sentences(summary),
        rows=results.training_rows(summary),
        maps=shown,
        maps_open=MAPS_OPEN,
        maps_left_out=len(entries) - len(shown),
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
    alike = [
        f"No variant differs in {measure} on {name}."
        for measure, name in results.without_difference(summary["comparisons"])
    ]
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
            ("differences", f'Differences to "{summary["baseline"]}"', *alike),
            ("sizes", "By number of training examples"),
        )
        if name in tables or name in figures
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
        return Markup(_themed(drawing.figure_to_svg(figure), figure.get_figwidth()))  # the figures' own SVG, not input

    files = importlib.resources.files("mold.report")
    loader = FunctionLoader(lambda name: (files / name).read_text("utf-8"))
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": results.number, "svg": svg}
    html = environment.get_template(template).render(**values)
    path = folder / "report.html"
    write_atomically(path, html.encode("utf-8", "replace"))  # a lone surrogate in a completion
    return path


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
    for colour, name in drawing.THEME.items():
        svg = svg.replace(colour, f"var(--{name})")
    size = f"width:100%;max-width:{inches:.2f}in;min-width:{0.8 * inches:.2f}in;height:auto"
    return svg.replace("<svg ", f'<svg role="img" style="{size}" ', 1)
