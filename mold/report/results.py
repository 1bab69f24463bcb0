"""What came of a training, and of variants that were compared, as tables of text and sentences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

_LOSSES = {"attention KL": "nats", "rationale loss": "nats a token", "answer loss": "nats a token"}
_NOTE = "Accuracy in %, mean over seeds, with the 95 % interval for the set's size; losses of held-out examples."
_COMPARED = (
    "Differences to {baseline}, paired over questions and seeds, with their 95 % intervals: accuracy in points, "
    "log-likelihoods in nats an example. **Bold**: the interval does not hold 0, of at least three seeds; every other "
    "difference may be chance. {count} intervals are shown, about {chance} of which miss the truth by chance."
)
_NEEDED = (
    "Training examples with which {baseline} is as often right as the variant is with the given number, read off "
    "{baseline}'s curve, with 95 % intervals."
)


def number(value: float | str | None) -> str:
    """A number as a reader wants it: four significant digits, NaN as NaN, a dash for what was not measured."""
    if value is None:
        return "\N{EN DASH}"
    value = float(value)
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else f"{value:+}"
    return str(int(value)) if value.is_integer() and abs(value) < 1e9 else f"{value:.4g}"


def training_rows(summary: Mapping) -> list[dict[str, str]]:
    """What came of a training, a row a measure, in words: metric (with its unit), before, after, change, verdict.

    A verdict is there where an interval is (see `mold.evaluation.statistics.change`), and where a measure became NaN.

    Args:
        summary: as summary.json has it.
    """
    return [_training_row(row) for row in summary.get("rows", [])]


def _training_row(row: Mapping) -> dict[str, str]:
    before, after, intervals = row.get("before"), row.get("after"), row.get("intervals", {})
    change, verdict = None, row.get("verdict", "")
    if before is not None and after is not None:
        change = after - before
        if math.isnan(after) and not math.isnan(before):
            verdict = "worse"
    scale = 100 if row.get("unit") == "%" else 1

    def said(value: float | None, name: str) -> str:
        if value is None or not math.isfinite(value):
            return number(value)
        sign = "+" if name == "change" else ""
        one, *ends = (
            f"{scale * v:{sign}.1f}" if scale == 100 else sign * (v > 0) + number(v)
            for v in (value, *intervals.get(name, ()))
        )
        return (f"{one} ({ends[0]} to {ends[1]})" if ends else one).replace("-", "\N{MINUS SIGN}")

    unit = f", {row['unit']}" if row.get("unit") else ""
    values = {name: said(value, name) for name, value in (("before", before), ("after", after), ("change", change))}
    return {"metric": row["metric"] + unit, **values, "verdict": verdict}


def training_sentences(summary: Mapping) -> list[str]:
    """The first measure before and after, and who learnt what from whom."""
    found = []
    asked = "" if summary.get("num_eval") is None else f" on {summary['num_eval']:,} held-out problems"
    for row in training_rows(summary)[:1]:
        name, _, unit = row["metric"].partition(", ")
        name = name[:1].upper() + name[1:] + asked + (f", in {unit}" if unit else "")
        if row["before"] == number(None):
            found.append(f"{name}: {row['after']} after training; not measured before.")
        else:
            change = row["change"] + (f": {row['verdict']}" if row["verdict"] else "")
            found.append(f"{name}: {row['after']} after training, {row['before']} before; change {change}.")
    text = f"{summary.get('model') or 'The student'} learnt from {summary.get('teacher') or 'its teacher'}"
    if summary.get("num_train") is not None:
        text += f" on {summary['num_train']:,} examples"
    if summary.get("num_without_signal"):
        text += f" ({summary['num_without_signal']:,} of them without an attention signal)"
    return [*found, text + "."]


def table(summary: Mapping) -> Iterator[list[str]]:
    """Rows of text, the heading first: a row a variant, a column a test set, the mean of these, held-out losses.

    Args:
        summary: of `mold.evaluation.comparison.summarise`.
    """
    variants = summary["variants"]
    sets = list(dict.fromkeys(name for entry in variants.values() for name in entry["sets"]))
    losses = [name for name in _LOSSES if any(name in entry["held_out"] for entry in variants.values())]
    sizes = {name: found["total"] for entry in variants.values() for name, found in entry["sets"].items()}
    columns = [f"{name}, % of {sizes[name]}" for name in sets]
    yield ["variant", "seeds", *columns, "mean, %", *(f"{name}, {_LOSSES[name]}" for name in losses)]
    for name, entry in variants.items():
        cells = [
            f"{100 * s['mean']:.1f} ({100 * s['low']:.1f} to {100 * s['high']:.1f})"
            for s in (entry["sets"][one] for one in sets)
        ]
        mean = sum(entry["sets"][one]["mean"] for one in sets) / len(sets)
        values = [f"{entry['held_out'][loss]:.4g}" if loss in entry["held_out"] else "" for loss in losses]
        yield [name, str(len(entry["seeds"])), *cells, f"{100 * mean:.1f}", *values]


def difference_table(comparisons: Sequence[Mapping]) -> Iterator[list[str]]:
    """Rows of text, the heading first: a row a variant and size, a column a set and measure."""
    columns = list(dict.fromkeys((entry["set"], entry["measure"]) for entry in comparisons))
    rows: dict[str, dict[tuple[str, str], Mapping]] = {}
    for entry in comparisons:
        rows.setdefault(row_name(entry), {})[entry["set"], entry["measure"]] = entry
    yield ["variant", *(f"{name}: {measure}" for name, measure in columns)]
    for name, cells in rows.items():
        yield [name, *(_difference(cells[column]) if column in cells else "" for column in columns)]


def row_name(entry: Mapping) -> str:
    """How a comparison's row is called."""
    return entry["variant"] if entry["size"] is None else f"{entry['variant']}, {entry['size']}"


def without_difference(comparisons: Sequence[Mapping]) -> list[tuple[str, str]]:
    """The (measure, set) in which no variant differs from the baseline at all."""
    largest: dict[tuple[str, str], float] = {}
    for entry in comparisons:
        key = entry["measure"], entry["set"]
        largest[key] = max(largest.get(key, 0), *(abs(entry[end]) for end in ("mean", "low", "high")))
    return [key for key, value in largest.items() if value < 1e-9]


def needed_table(needed: Sequence[Mapping]) -> Iterator[list[str]]:
    """Rows of text, the heading first: a row a variant and size, a column a set."""
    sets = list(dict.fromkeys(entry["set"] for entry in needed))
    rows: dict[tuple[str, int], dict[str, Mapping]] = {}
    for entry in needed:
        rows.setdefault((entry["variant"], entry["examples"]), {})[entry["set"]] = entry
    largest = max(entry["examples"] for entry in needed)
    smallest = min(entry["examples"] for entry in needed)

    def said(value: float | None) -> str:
        if value is None:
            return f"more than {largest}"
        return f"fewer than {smallest}" if value < smallest else f"{value:.0f}"

    yield ["variant", "examples", *sets]
    for (variant, examples), cells in rows.items():
        entries = [cells.get(name) for name in sets]
        values = [e and f"{said(e['needed'])} ({said(e['low'])} to {said(e['high'])})" for e in entries]
        yield [variant, str(examples), *(value or "" for value in values)]


def sections(summary: Mapping) -> dict[str, tuple[str, list[list[str]]]]:
    """All tables of a comparison, with what is said of them: "results", "differences" and "sizes", as far as there."""
    found = {"results": (_NOTE, list(table(summary)))}
    baseline, comparisons = summary["baseline"], summary["comparisons"]
    if comparisons:
        count = len(comparisons)
        said = _COMPARED.format(baseline=baseline, count=count, chance=max(1, round(0.05 * count)))
        found["differences"] = said, list(difference_table(comparisons))
    if summary["examples_needed"]:
        found["sizes"] = _NEEDED.format(baseline=baseline), list(needed_table(summary["examples_needed"]))
    return found


def markdown(summary: Mapping) -> str:
    """All tables of a comparison."""
    return "\n\n".join(part for said, rows in sections(summary).values() for part in (said, _lines(rows))) + "\n"


def findings(summary: Mapping) -> list[str]:
    """What came of each variant's accuracy, a sentence a variant, size and test set."""
    found = []
    for entry in summary["comparisons"]:
        if entry["measure"] == "accuracy" and entry["set"] in summary["variants"][row_name(entry)]["sets"]:
            verdict = {"undecided": "may be chance"}.get(entry["verdict"], entry["verdict"])
            seeds = f"{entry['seeds']} seed{'s' if entry['seeds'] > 1 else ''}"
            asked = f"{entry['questions']} questions of {entry['set']}, {seeds}"
            base = summary["baseline"] if entry["size"] is None else f"{summary['baseline']}, {entry['size']}"
            mean, theirs = (100 * summary["variants"][n]["sets"][entry["set"]]["mean"] for n in (row_name(entry), base))
            found.append(
                f"{row_name(entry)}: {mean:.1f} % right, {base}: {theirs:.1f} %, of {asked}; "
                f"difference {_difference(entry).strip('*')} points: {verdict}."
            )
    return found


def _difference(entry: Mapping) -> str:
    scale, digits = (100, 1) if entry["measure"] == "accuracy" else (1, 3)
    mean, low, high = (f"{scale * entry[key]:+.{digits}f}" for key in ("mean", "low", "high"))
    text = f"{mean} ({low} to {high})"
    return text if entry["verdict"] == "undecided" else f"**{text}**"


def _lines(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines)
