"""The table of a recipe's results: means over seeds, a row a variant, a column a test set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from mold.evaluation.predictions import wilson_interval


def summarise(results: Mapping[str, Sequence[dict]]) -> dict:
    """Means over seeds.

    Args:
        results: by variant, an entry a seed: seed, sets (of `mold.commands.eval.compare`), held_out (losses by name).

    Returns:
        {"variants": {name: {"seeds", "sets": {set: {"accuracies", "mean", "low", "high", "total"}}, "held_out": {name:
        mean}}}}. low and high: the 95 % interval of the mean for a test set of its size, `total`; the seeds answer the
        same questions, so more seeds do not make it narrower. How much trainings differ is told by the accuracies.
    """
    summary = {}
    for name, runs in results.items():
        sets: dict[str, dict] = {}
        for entry in (entry for result in runs for entry in result["sets"]):
            found = sets.setdefault(entry["set"], {"accuracies": [], "total": entry["total"]})
            found["accuracies"].append(entry["accuracy"])
        for found in sets.values():
            found["mean"] = sum(found["accuracies"]) / len(found["accuracies"])
            found["low"], found["high"] = wilson_interval(found["mean"] * found["total"], found["total"])
        losses = {key for result in runs for key in result["held_out"] if key != "accuracy"}
        held_out = {
            key: sum(result["held_out"][key] for result in runs) / len(runs)
            for key in sorted(losses)
            if all(key in result["held_out"] for result in runs)
        }
        summary[name] = {"seeds": [result["seed"] for result in runs], "sets": sets, "held_out": held_out}
    return {"variants": summary}


def table(summary: dict) -> Iterator[list[str]]:
    """Rows of text, the heading first: a row a variant, a column a test set, the mean of these, held-out losses."""
    variants = summary["variants"]
    sets = list(dict.fromkeys(name for entry in variants.values() for name in entry["sets"]))
    losses = [
        name
        for name in ("attention KL", "rationale loss", "answer loss")
        if any(name in e["held_out"] for e in variants.values())
    ]
    yield ["variant", "seeds", *sets, "mean", *losses]
    for name, entry in variants.items():
        cells = [
            f"{100 * s['mean']:.1f} ({100 * s['low']:.1f} to {100 * s['high']:.1f})"
            for s in (entry["sets"][one] for one in sets)
        ]
        mean = sum(entry["sets"][one]["mean"] for one in sets) / len(sets)
        values = [f"{entry['held_out'][loss]:.4g}" if loss in entry["held_out"] else "" for loss in losses]
        yield [name, str(len(entry["seeds"])), *cells, f"{100 * mean:.1f}", *values]


def markdown(summary: dict) -> str:
    """The table of results."""
    rows = list(table(summary))
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    note = "Accuracy in %, mean over seeds, with the 95 % interval for the set's size; losses of held-out examples."
    return "\n".join([note, "", *lines, ""])
