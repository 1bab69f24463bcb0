"""One `report.html` in the run folder that says what a training run did, and opens without a network."""

import json
import math
import os
from pathlib import Path

from . import plots

MAPS_OPEN, MAPS_SHOWN, PREDICTIONS_SHOWN = 2, 12, 12
LAYER_WEIGHTS = ("teacher_layer_weights", "student_layer_weights_before", "student_layer_weights_after")
WHAT_IS_IN = {
    "attention_maps.json": "attention maps",
    "metrics.jsonl": "router weights and loss curves",
    "predictions_before.jsonl": "predictions before training",
    "predictions_after.jsonl": "predictions after training",
    "config.yaml": "configuration",
}


def write_report(run_folder):
    """Write `report.html` from the files that the trainer left in `run_folder`; the file is replaced in one move.

    Only `summary.json` must be there: what else is missing, or was cut short, the report says.

    Returns: the report's path.
    Raises: FileNotFoundError without `summary.json`; ValueError that names file and line if a file is not what the
    trainer writes; ImportError without the `report` extra.
    """
    try:
        from jinja2 import Environment
        from markupsafe import Markup
    except ImportError as error:
        raise ImportError('the report needs jinja2: pip install "mold-distill[report]"') from error
    folder = Path(run_folder)
    summary = _read_json(folder / "summary.json")
    there = {name: folder / name for name in WHAT_IS_IN if (folder / name).is_file()}
    notes = [f"{name} is not in this folder: no {what}." for name, what in WHAT_IS_IN.items() if name not in there]
    metrics = _merged(there.get("metrics.jsonl"), notes)
    maps = _read_json(there["attention_maps.json"]) if "attention_maps.json" in there else []

    def svg(figure):
        return Markup(_themed(plots.figure_to_svg(figure), figure.get_figwidth()))  # the figures' own SVG, not input

    shown = []
    for entry in maps[:MAPS_SHOWN]:
        weighed = all(entry.get(name) for name in LAYER_WEIGHTS)
        weights = svg(plots.teacher_student_layer_weights(entry)) if weighed else None
        shown.append({"entry": entry, "map": svg(plots.attention_comparison(entry)), "weights": weights})
    has_router = any(row.get("router_weights") is not None for row in metrics)
    has_losses = any(
        row.get(when + name) is not None for row in metrics for name in plots.PANELS for when in ("", "eval_")
    )
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = number
    html = environment.from_string(TEMPLATE).render(
        name=folder.resolve().name,
        summary=summary,
        sentence=_sentence(summary),
        rows=[_change(row) for row in summary.get("rows", [])],
        maps=shown,
        maps_open=MAPS_OPEN,
        maps_left_out=len(maps) - len(shown),
        router=svg(plots.layer_weights_over_training(metrics)) if has_router else None,
        losses=svg(plots.loss_curves(metrics)) if has_losses else None,
        config=there["config.yaml"].read_text("utf-8", errors="replace") if "config.yaml" in there else None,
        css=Markup(CSS),
        **_predictions(there, notes),
        notes=notes,
    )
    path = folder / "report.html"
    unfinished = folder / f".report.html.{os.getpid()}"
    try:
        unfinished.write_text(html, encoding="utf-8", errors="replace")  # a lone surrogate in a completion
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def number(value):
    """A number as a reader wants it: four significant digits, NaN as NaN, a dash for what was not measured."""
    if value is None:
        return "\N{EN DASH}"
    value = float(value)
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else f"{value:+}"
    return str(int(value)) if value.is_integer() and abs(value) < 1e9 else f"{value:.4g}"


def read_json_lines(path, notes):
    """The objects of a JSON-lines file; a torn last line is left out and noted, a torn line elsewhere is an error."""
    lines = [(i, line) for i, line in enumerate(path.read_bytes().split(b"\n"), 1) if line.strip()]
    rows = []
    for i, line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if i != lines[-1][0]:
                raise ValueError(
                    f"{path.name}, line {i}: was {line[:60]!r}, must be a JSON object ({error})"
                ) from error
            notes.append(f"The last line of {path.name} is half written and is left out.")
            continue
        if not isinstance(rows[-1], dict):
            raise ValueError(f"{path.name}, line {i}: was {line[:60]!r}, must be a JSON object")
    return rows


def _read_json(path):
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path.name}: must be JSON ({error})") from error


def _merged(path, notes):
    """Rows in the order of their steps. A resumed run logs steps again: its last row counts, training and evaluation
    apart, because both may be logged at one step."""
    last = {}
    for i, row in enumerate(read_json_lines(path, notes) if path else [], 1):
        if not isinstance(row.get("step"), int | float):
            raise ValueError(f"{path.name}, row {i}: step was {row.get('step')!r}, must be a number")
        last[row["step"], any(key.startswith("eval_") for key in row)] = row
    return [last[key] for key in sorted(last)]


def _change(row):
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


def _sentence(summary):
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


def _predictions(there, notes):
    """The first problems as they come, not chosen, and how many of all turned right or wrong."""
    files = {when: there.get(f"predictions_{when}.jsonl") for when in ("before", "after")}
    problems = {}
    for when, path in files.items():
        for row in read_json_lines(path, notes) if path else []:
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


def _themed(svg, inches):
    """Let the page's light and dark colours reach into a figure, and its width follow the page within limits."""
    for colour, name in plots.THEME.items():
        svg = svg.replace(colour, f"var(--{name})")
    size = f"width:100%;max-width:{inches:.2f}in;min-width:{0.8 * inches:.2f}in;height:auto"
    return svg.replace("<svg ", f'<svg role="img" style="{size}" ', 1)


CSS = """
:root { color-scheme: light dark; --page: #fff; --panel: #f6f7f9; --ink: #1f2329; --muted: #69707b; --faint: #dde1e6;
  --pale: #12202e; --deep: #fdfeff; --better: #0b6e4f; --worse: #b3261e; --accent: #0072b2 }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --panel: #1c2026; --ink: #e6e9ed; --muted: #9aa3af;
  --faint: #353b44; --pale: #e9f1f8; --deep: #0c1116; --better: #5fd0a5; --worse: #ff8a80; --accent: #5cb3ea }
  .plot image { filter: invert(1) hue-rotate(180deg) } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Noto Sans", sans-serif }
main { max-width: 66rem; margin: 0 auto; padding: 2.5rem 1.25rem 5rem }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .5rem; letter-spacing: -.015em }
h2 { font-size: 1.2rem; margin: 3rem 0 .75rem; letter-spacing: -.01em }
h3 { font-size: 1rem; margin: 0 0 .25rem }
p { max-width: 46rem; margin: .4rem 0; overflow-wrap: anywhere } .lead { font-size: 1.125rem }
.muted, .note { color: var(--muted); font-size: .875rem }
table { border-collapse: collapse; font-size: .925rem } .wide { overflow-x: auto }
th, td { text-align: left; vertical-align: top;
  padding: .45rem 1.25rem .45rem 0; border-bottom: 1px solid var(--faint) }
th { font-weight: 500; color: var(--muted); font-size: .8125rem; white-space: nowrap }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.better { color: var(--better) } .worse { color: var(--worse) } .strong { font-weight: 600 }
.card { border: 1px solid var(--faint); border-radius: .6rem; padding: 1rem 1.1rem; margin: 1rem 0 }
.plot { overflow-x: auto; margin: .75rem 0 0 } .plot svg { display: block }
.plot text { font-family: inherit !important }
summary { cursor: pointer; color: var(--accent); font-size: .875rem }
summary.title { color: var(--ink); font-size: 1rem }
pre { background: var(--panel); padding: .75rem .9rem; border-radius: .4rem; font-size: .8125rem; line-height: 1.5;
  white-space: pre-wrap; overflow-wrap: anywhere; margin: .4rem 0 }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); gap: 0 1rem }
.problems { width: 100%; min-width: 38rem } .problems .again td { padding-top: 0 } .problems .first td { border: 0 }
.question { width: 55%; overflow-wrap: anywhere }
"""

TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ name }}: distillation report</title><style>{{ css }}</style></head>
<body><main>
<h1>{{ name }}</h1>
<p class="lead">{{ sentence }}</p>
{% for note in notes %}<p class="note">{{ note }}</p>
{% endfor %}

<h2>Before and after</h2>
{% if rows %}
<div class="wide"><table>
<tr><th>held-out problems{% if summary.num_eval is not none %} ({{ summary.num_eval }}){% endif %}</th>
<th class="number">before</th><th class="number">after</th><th class="number">change</th><th></th></tr>
{% for row in rows %}
<tr><td>{{ row.metric }}</td><td class="number">{{ row.before | number }}</td>
<td class="number strong">{{ row.after | number }}</td>
<td class="number {{ row.verdict }}">{{ row.change }}</td><td class="{{ row.verdict }}">{{ row.verdict }}</td></tr>
{% endfor %}
</table></div>
{% else %}<p class="muted">summary.json holds no measurements.</p>{% endif %}

{% macro one_map(item) %}
<p>{{ item.entry.question }}</p>
<div class="plot">{{ item.map }}</div>
{% if item.weights %}<div class="plot">{{ item.weights }}</div>{% endif %}
<details><summary>rationale</summary><pre>{{ item.entry.rationale }}</pre></details>
{% endmacro %}
<h2>Where each step looks</h2>
{% if maps %}
<p class="muted">Rows are reasoning steps, the question first; columns are the key words in the order of the text. All
three maps share one colour scale. KL: how far the student's rows are from the teacher's.</p>
{% for item in maps %}
<section class="card">
{% if loop.index <= maps_open %}<h3>{{ item.entry.id }}</h3>{{ one_map(item) }}
{% else %}<details><summary class="title"><b>{{ item.entry.id }}</b></summary>{{ one_map(item) }}</details>{% endif %}
</section>
{% endfor %}
{% if maps_left_out %}<p class="muted">{{ maps_left_out }} more in attention_maps.json.</p>{% endif %}
{% else %}<p class="muted">No attention maps were stored.</p>{% endif %}

<h2>Which layers the router took</h2>
{% if router %}<div class="plot">{{ router }}</div>
{% else %}<p class="muted">No router weights were logged.</p>{% endif %}

<h2>Losses</h2>
{% if losses %}<div class="plot">{{ losses }}</div>
{% else %}<p class="muted">No losses were logged.</p>{% endif %}

<h2>Predictions</h2>
{% if problems %}
<p class="muted">The first {{ problems | length }} of {{ num_problems }} held-out problems, in their order.
{% for name, count in counts %}{{ count }} {{ name }}{{ "." if loop.last else ", " }}{% endfor %}</p>
<div class="wide"><table class="problems">
<tr><th>question</th><th>gold</th>{% for time in times %}<th>{{ time }}</th>{% endfor %}</tr>
{% for problem in problems %}
<tr class="first"><td class="question">{{ problem.question }}</td><td>{{ problem.answer }}</td>
{% for time in times %}{% set row = problem.get(time) %}
<td>{% if not row %}\N{EN DASH}
{% elif row.correct %}<span class="better" title="right">\N{CHECK MARK}</span>
{% else %}<span class="worse" title="wrong">\N{BALLOT X}</span>{% endif %}
&nbsp;{{ "no answer" if row and row.prediction is none else row.prediction }}</td>
{% endfor %}</tr>
<tr class="again"><td colspan="{{ 2 + times | length }}"><details><summary>completions</summary><div class="two">
{% for time in times %}{% if problem[time] %}
<div><span class="muted">{{ time }}</span><pre>{{ problem[time].completion }}</pre></div>
{% endif %}{% endfor %}</div></details></td></tr>
{% endfor %}
</table></div>
{% else %}<p class="muted">No predictions were stored.</p>{% endif %}

<h2>How it was run</h2>
{% for title, values in [("seconds", summary.seconds), ("versions", summary.versions)] %}{% if values %}
<details><summary>{{ title }}</summary><table>
{% for key, value in values.items() %}<tr><td>{{ key }}</td>
<td>{{ value | number if value is number else value }}</td></tr>
{% endfor %}</table></details>
{% endif %}{% endfor %}
{% if config is not none %}<details><summary>configuration</summary><pre>{{ config }}</pre></details>{% endif %}
</main></body></html>
"""
