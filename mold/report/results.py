"""Tables of a comparison of variants, in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

_LOSSES = ("attention KL", "rationale loss", "answer loss")
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


def table(summary: Mapping) -> Iterator[list[str]]:
    """Rows of text, the heading first: a row a variant, a column a test set, the mean of these, held-out losses.

    Args:
        summary: of `mold.evaluation.comparison.summarise`.
    """
    variants = summary["variants"]
    sets = list(dict.fromkeys(name for entry in variants.values() for name in entry["sets"]))
    losses = [name for name in _LOSSES if any(name in entry["held_out"] for entry in variants.values())]
    yield ["variant", "seeds", *sets, "mean", *losses]
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
            difference = f"{_difference(entry).strip('*')} points of accuracy"
            asked = f"{entry['questions']} questions of {entry['set']}, {seeds}"
            found.append(f"{row_name(entry)} against {summary['baseline']}: {difference} on {asked}: {verdict}.")
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
