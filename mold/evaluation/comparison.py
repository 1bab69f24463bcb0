"""Variants of a training, compared: means over seeds, paired differences to a baseline, examples that they save."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mold.evaluation.predictions import wilson_interval
from mold.evaluation.statistics import examples_needed, paired_difference
from mold.files import json_lines

HELD_OUT = "held out"
"""The name of the examples that were kept from training, beside the test sets."""
ACCURACY = "accuracy"
MEASURES = (ACCURACY, "rationale log-likelihood", "answer log-likelihood")


class Run(NamedTuple):
    """One training, and what came of it.

    variant: its name. size: how many examples it was trained on, None where that is no dimension of the comparison.
    seed: of the training. tasks: of its texts. sets: an entry a test set, as in comparison.json. held_out: losses by
    name. outcomes: by set and measure, the value of every question by id.
    """

    variant: str
    size: int | None
    seed: int
    tasks: tuple[str, ...]
    sets: list[dict]
    held_out: dict[str, float]
    outcomes: dict[tuple[str, str], dict[str, float]]

    @property
    def name(self) -> str:
        """Of its row in a table."""
        return self.variant if self.size is None else f"{self.variant}, {self.size}"


def read_run(student: Path, evaluated: Path, variant: str, size: int | None, seed: int) -> Run:
    """A training's results from the folder of its student and that of the student's evaluation."""
    sets = json.loads((evaluated / "comparison.json").read_text())
    rows = json.loads((student / "summary.json").read_text())["rows"]
    outcomes: dict[tuple[str, str], dict[str, float]] = {}
    for entry in sets:
        stem = f"{entry['model']}--{entry['set']}.jsonl"
        outcomes |= read_outcomes(entry["set"], evaluated / "predictions" / stem, evaluated / "likelihoods" / stem)
    outcomes |= read_outcomes(HELD_OUT, student / "predictions_after.jsonl", student / "likelihoods_after.jsonl")
    held_out = {row["metric"]: row["after"] for row in rows}
    return Run(variant, size, seed, tuple(sets[0]["tasks"]), sets, held_out, outcomes)


def read_outcomes(name: str, predictions: Path, likelihoods: Path) -> dict[tuple[str, str], dict[str, float]]:
    """The value of every question by id, by set and measure, from what an evaluation wrote of the set."""
    found = {(name, MEASURES[0]): {row["id"]: float(row["correct"]) for _, row in json_lines(predictions)}}
    rows = [row for _, row in json_lines(likelihoods)]
    for term, measure in (("rationale", MEASURES[1]), ("answer", MEASURES[2])):
        values = {row["id"]: row[term] for row in rows if row[term] is not None}
        if values:
            found[name, measure] = values
    return found


def summarise(runs: Iterable[Run], baseline: str | None = None) -> dict:
    """Means over seeds, differences to the baseline, and the training examples that it would need to keep up.

    Args:
        runs: of every variant, size and seed that there is.
        baseline: the variant that the others are compared with; None: no differences.

    Returns:
        "variants": by name, {"variant", "size", "seeds", "sets": {set: {"accuracies", "mean", "low", "high", "total"}},
        "likelihoods": {set: {measure: {"means", "mean", "low", "high"}}}, "held_out": {name: mean}}. low and high: the
        95 % interval of the mean; of an accuracy for a test set of its size, `total` (the seeds answer the same
        questions, so more seeds do not make it narrower), of log-likelihoods, in nats an example, over seeds and
        questions. Variants of other tasks than the baseline's (or the first's) have none that could be compared.
        "comparisons": an entry a variant, size, set and measure (see `compare`).
        "examples_needed": an entry a variant, set and size, where there are several sizes (see `needed_examples`).
    """
    grouped: dict[str, list[Run]] = {}
    for run in runs:
        grouped.setdefault(run.name, []).append(run)
    groups = list(grouped.values())
    tasks = next((group[0].tasks for group in groups if group[0].variant == baseline), groups[0][0].tasks)
    variants = {name: _means(group, tasks) for name, group in grouped.items()}
    comparisons = [] if baseline is None else compare(groups, baseline)
    needed = [] if baseline is None else needed_examples(groups, baseline)
    return {"variants": variants, "baseline": baseline, "comparisons": comparisons, "examples_needed": needed}


def _means(group: Sequence[Run], tasks: tuple[str, ...]) -> dict:
    sets: dict[str, dict] = {}
    for entry in (entry for run in group for entry in run.sets):
        found = sets.setdefault(entry["set"], {"accuracies": [], "total": entry["total"]})
        found["accuracies"].append(entry["accuracy"])
    for found in sets.values():
        found["mean"] = sum(found["accuracies"]) / len(found["accuracies"])
        found["low"], found["high"] = wilson_interval(found["mean"] * found["total"], found["total"])
    losses = {key for run in group for key in run.held_out if key != "accuracy"}
    held_out = {
        key: sum(run.held_out[key] for run in group) / len(group)
        for key in sorted(losses)
        if all(key in run.held_out for run in group)
    }
    first = group[0]
    likelihoods: dict[str, dict[str, dict]] = {}
    for name, measure in first.outcomes:
        if measure == MEASURES[0] or first.tasks != tasks:
            continue
        (values,) = _paired([group], name, measure)
        mean = paired_difference(values, np.zeros_like(values))
        found = {"means": values.mean(1).tolist(), "mean": mean.mean, "low": mean.low, "high": mean.high}
        likelihoods.setdefault(name, {})[measure] = found
    return {
        "variant": first.variant,
        "size": first.size,
        "seeds": [run.seed for run in group],
        "sets": sets,
        "likelihoods": likelihoods,
        "held_out": held_out,
    }


def compare(groups: Sequence[Sequence[Run]], baseline: str) -> list[dict]:
    """Every variant against the baseline of the same size, over the seeds that both have.

    Log-likelihoods are compared where both have the same tasks: an answer's is another thing behind a rationale than
    without one. They are in nats an example.

    Args:
        groups: the runs of each variant and size.
        baseline: a variant's name.

    Returns:
        An entry a variant, size, set and measure: these, and mean, low, high, seeds, questions and verdict of
        `mold.evaluation.statistics.Difference`.

    Raises:
        ValueError: two runs that are compared were asked different questions.
    """
    bases = {group[0].size: group for group in groups if group[0].variant == baseline}
    found = []
    for group in groups:
        first = group[0]
        base = bases.get(first.size)
        if first.variant == baseline or base is None:
            continue
        for name, measure in first.outcomes:
            if measure != MEASURES[0] and first.tasks != base[0].tasks:
                continue
            tables = _paired([group, base], name, measure)
            if not tables:
                continue
            difference = paired_difference(*tables)
            entry = {"variant": first.variant, "size": first.size, "set": name, "measure": measure}
            found.append(entry | asdict(difference) | {"verdict": difference.verdict})
    return found


def needed_examples(groups: Sequence[Sequence[Run]], baseline: str) -> list[dict]:
    """With how many examples the baseline is as often right as each variant is with its sizes.

    Returns:
        An entry a variant, set and size: variant, set, and `mold.evaluation.statistics.ExamplesNeeded` with None for
        infinity. Of the sizes and seeds that both have, where these are at least two sizes.
    """
    by_variant: dict[str, dict[int, Sequence[Run]]] = {}
    for group in groups:
        if group[0].size is not None:
            by_variant.setdefault(group[0].variant, {})[group[0].size] = group
    base = by_variant.pop(baseline, {})
    found = []
    for variant, sizes in by_variant.items():
        both = sorted(sizes.keys() & base.keys())
        if len(both) < 2:
            continue
        for name in dict.fromkeys(name for name, _ in sizes[both[0]][0].outcomes):
            tables = _paired([*(sizes[s] for s in both), *(base[s] for s in both)], name, MEASURES[0])
            if not tables:
                continue
            first, second = tables[: len(both)], tables[len(both) :]
            needed = examples_needed(dict(zip(both, first, strict=True)), dict(zip(both, second, strict=True)))
            found += [
                {"variant": variant, "set": name}
                | {key: None if math.isinf(value) else value for key, value in asdict(entry).items()}
                for entry in needed
            ]
    return found


def _paired(groups: Sequence[Sequence[Run]], name: str, measure: str) -> list[np.ndarray]:
    """Tables [seeds, questions] of each group, over the seeds that all have; none where no seed is."""
    by_seed: list[Mapping[int, Run]] = [
        {run.seed: run for run in group if (name, measure) in run.outcomes} for group in groups
    ]
    seeds = sorted(set.intersection(*(set(runs) for runs in by_seed)))
    if not seeds:
        return []
    questions = list(by_seed[0][seeds[0]].outcomes[name, measure])
    tables = []
    for runs in by_seed:
        rows = [runs[seed].outcomes[name, measure] for seed in seeds]
        for seed, row in zip(seeds, rows, strict=True):
            if row.keys() != set(questions):
                raise ValueError(
                    f"{runs[seed].name}, seed {seed}: was asked {len(row)} questions of {name} that are not the "
                    f"{len(questions)} of {by_seed[0][seeds[0]].name}, must be the same"
                )
        tables.append(np.array([[row[question] for question in questions] for row in rows]))
    return tables
