"""Curves of a training, and pictures of variants that were compared, as matplotlib Figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mold.report.drawing import (
    BLUE,
    CHARACTER,
    DASHED,
    DIVERGING,
    FAINT,
    GREY,
    INK,
    MUTED,
    ORANGE,
    VERMILION,
    WIDTH,
    Plot,
    add_axes,
    around,
    colour_bar,
    colours,
    display_width,
    from_zero,
    make_figure,
    mark_not_finite,
    printable,
)
from mold.report.results import number, row_name, without_difference

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = {
    "loss": ("loss", "weighted sum of the terms"),
    "loss_rationale": ("rationale loss", "nats a token"),
    "loss_answer": ("answer loss", "nats a token"),
    "loss_attention": ("attention loss", "KL, nats"),
    "router_entropy": ("router entropy", "nats"),
    "grad_norm": ("gradient norm", "norm"),
    "learning_rate": ("learning rate", "learning rate"),
    "signal_share": ("examples with a signal", "share"),
}
"""Title and unit of what is logged."""


def layer_weights_over_training(metrics: Sequence[Mapping[str, Any]]) -> Plot:
    """The router's mean weight of every student layer over the training steps, as far from 1 / L as it went.

    Args:
        metrics: rows of metrics.jsonl in the order of their steps; those without router_weights are passed over.

    Returns:
        The map, or a remark where the weights stayed within a thousandth of each other.

    Raises:
        ValueError: no row has router weights, or their numbers differ.
        ImportError: matplotlib is not installed.
    """
    rows = [row for row in metrics if row.get("router_weights") is not None]
    if len({len(row["router_weights"]) for row in rows}) != 1:
        raise ValueError(f"router_weights: is in {len(rows)} rows, must be in at least one, of the same length in all")
    steps = np.array([row["step"] for row in rows], float)
    weights = np.array([row["router_weights"] for row in rows], float)
    layers = weights.shape[1]
    if weights.max() - weights.min() < 1e-3 / layers:
        alike = f"All {layers} layers weighed {1 / layers:.3g}" if layers > 1 else "The only layer weighed 1"
        return Plot(None, [f"{alike} at each of the {len(rows)} logged steps."])
    # Logging steps need not be even: every column of the picture takes the logged step nearest to it.
    first, last = (steps[0], steps[-1]) if len(steps) > 1 else (steps[0] - 0.5, steps[0] + 0.5)
    middles = first + (np.arange(400) + 0.5) * (last - first) / 400
    nearest = np.searchsorted((steps[1:] + steps[:-1]) / 2, middles)
    height, scale = min(max(0.16 * layers, 1.0), 4.5), around(1 / layers, weights)
    figure = make_figure(WIDTH, height + 0.85)
    axes = add_axes(figure, 0.55, 0.45, 8.5, height, "router weight of every layer", "step", "student layer")
    cells, extent = colours(weights[nearest].T, scale, DIVERGING), (first, last, -0.5, layers - 0.5)
    axes.imshow(cells, aspect="auto", interpolation="none", origin="lower", extent=extent)
    axes.set_yticks(range(0, layers, math.ceil(0.16 * layers / height)))
    axes.locator_params(axis="x", integer=True)
    even = 1 / layers, f"1/{layers}"
    colour_bar(figure, 9.2, 0.45, height, scale, "weight", DIVERGING, even)
    return Plot(figure, [f"The scale has its middle at 1/{layers}, what each layer has where none counts more."])


def loss_curves(metrics: Sequence[Mapping[str, Any]]) -> Plot:
    """A panel for every term that was logged and varies, training as a line, evaluation as points.

    Above 100 logged steps the strong line is a running mean, the pale one what was logged. An axis is logarithmic if
    its values are positive and span more than a factor of 30. A value that is not finite is a cross at its step.

    Args:
        metrics: rows of metrics.jsonl in the order of their steps.

    Returns:
        The panels, and a remark for every term that is the same wherever it was logged.

    Raises:
        ValueError: nothing was logged.
        ImportError: matplotlib is not installed.
    """
    series, remarks = [], []
    for name, about in PANELS.items():
        training, evaluation = _series(metrics, name), _series(metrics, f"eval_{name}")
        values = np.concatenate([training[1], evaluation[1]])
        if values.size and (values == values[0]).all():
            times = f"all {values.size} times that it was logged" if values.size > 1 else "the one time it was logged"
            remarks.append(f"{about[0].capitalize()}: {number(values[0])} {times}.")
        elif values.size:
            series.append((*about, training, evaluation))
    if not series and not remarks:
        raise ValueError(f"metrics: is {len(metrics)} rows without a loss, must have at least one")
    if not series:
        return Plot(None, remarks)
    lines = -(-len(series) // 3)
    figure = make_figure(WIDTH, 2.3 * lines + 0.2)
    for place, (title, unit, training, evaluation) in enumerate(series):
        line, column = divmod(place, 3)
        finite = np.concatenate([training[1], evaluation[1]])
        finite = finite[np.isfinite(finite)]
        log = finite.size and finite.min() > 0 and finite.max() > 30 * finite.min() and title != "learning rate"
        unit += ", log scale" if log else ""
        axes = add_axes(figure, 0.7 + column * 3.3, (lines - 1 - line) * 2.3 + 0.45, 2.5, 1.5, title, "step", unit)
        if training.shape[1] > 100 and title != "learning rate":
            axes.plot(*training, color=BLUE, linewidth=0.7, alpha=0.3)
            training = np.stack([training[0], _running_mean(training[1], training.shape[1] // 50)])
        marker = "o" if np.isfinite(training[1]).sum() == 1 else None
        axes.plot(*training, color=BLUE, marker=marker, ms=4, label="training")
        if evaluation.size:
            axes.plot(*evaluation, "o", color=VERMILION, ms=4, label="evaluation")
        if evaluation.size and not figure.legends:
            figure.legend(*axes.get_legend_handles_labels(), fontsize=7.5, frameon=False, labelcolor=INK, ncols=2)
        axes.set_yscale("log" if log else "linear")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
        axes.minorticks_off()
        at, values = np.concatenate([training, evaluation], axis=1)
        mark_not_finite(axes, at, values, "step")
        axes.grid(axis="y", color=FAINT, linewidth=0.6)
        axes.locator_params(axis="x", nbins=5, integer=True)
    return Plot(figure, remarks)


def comparison_figures(summary: Mapping[str, Any]) -> dict[str, Figure]:
    """What can be drawn of a comparison: "results", "differences" and "sizes", as far as there.

    Args:
        summary: of `mold.evaluation.comparison.summarise`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    found = {"results": variant_results(summary["variants"])}
    alike = without_difference(summary["comparisons"])
    if differing := [entry for entry in summary["comparisons"] if (entry["measure"], entry["set"]) not in alike]:
        found["differences"] = variant_differences(differing)
    if len({entry["size"] for entry in summary["variants"].values()}) > 1:
        found["sizes"] = accuracy_by_size(summary["variants"])
    return found


def variant_results(variants: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Accuracy and log-likelihoods of every variant, a line of panels a measure and a column a set.

    A ring each seed, a dot for their mean, a line for its interval.

    Args:
        variants: by name, as `mold.evaluation.comparison.summarise` has them.

    Raises:
        ValueError: there is no variant.
        ImportError: matplotlib is not installed.
    """
    if not variants:
        raise ValueError("variants: is empty, must hold at least one")
    found: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = {}
    for row, entry in enumerate(variants.values()):
        for name, accuracy in entry["sets"].items():
            found.setdefault(("accuracy", name), {})[row] = accuracy | {"means": accuracy["accuracies"]}
        for name, measures in entry["likelihoods"].items():
            for measure, likelihood in measures.items():
                found.setdefault((measure, name), {})[row] = likelihood
    figure, panels = _variant_panels(list(variants), list(found), {"accuracy": "accuracy, %"})
    for (measure, name), axes in panels.items():
        scale = 100 if measure == "accuracy" else 1
        for row, entry in found[measure, name].items():
            axes.plot([scale * entry["low"], scale * entry["high"]], [row, row], color=FAINT, linewidth=3, zorder=1)
            each = [scale * mean for mean in entry["means"]]
            axes.plot(each, [row] * len(each), "o", mfc="none", mec=GREY, ms=5, zorder=2)
            axes.plot(scale * entry["mean"], row, "o", color=BLUE, ms=4, zorder=3)
        axes.grid(axis="x", color=FAINT, linewidth=0.6)
    return figure


def variant_differences(comparisons: Sequence[Mapping[str, Any]]) -> Figure:
    """Differences to the baseline, a panel a set and measure: a dot for the mean, a line for its 95 % interval.

    Blue where the interval decides, grey where it does not.

    Args:
        comparisons: as `mold.evaluation.comparison.summarise` has them.

    Raises:
        ValueError: there is none.
        ImportError: matplotlib is not installed.
    """
    if not comparisons:
        raise ValueError("comparisons: is empty, must hold at least one")
    names = list(dict.fromkeys(row_name(entry) for entry in comparisons))
    keys = list(dict.fromkeys((entry["measure"], entry["set"]) for entry in comparisons))
    figure, panels = _variant_panels(names, keys, {"accuracy": "accuracy, points"})
    for axes in panels.values():
        axes.axvline(0, color=FAINT, linewidth=1, zorder=0)
    for entry in comparisons:
        axes, scale = panels[entry["measure"], entry["set"]], 100 if entry["measure"] == "accuracy" else 1
        row, colour = names.index(row_name(entry)), GREY if entry["verdict"] == "undecided" else BLUE
        axes.plot([scale * entry["low"], scale * entry["high"]], [row, row], color=colour, linewidth=1.5)
        axes.plot(scale * entry["mean"], row, "o", color=colour, ms=4)
    return figure


def _variant_panels(
    names: Sequence[str], keys: Sequence[tuple[str, str]], units: Mapping[str, str]
) -> tuple[Figure, dict[tuple[str, str], Axes]]:
    """A panel each (measure, set), measures below each other, sets side by side; a row of every panel is a name."""
    measures = list(dict.fromkeys(measure for measure, _ in keys))
    sets = list(dict.fromkeys(name for _, name in keys))
    left = 0.3 + CHARACTER * max(map(display_width, names))
    height, width = 0.24 * len(names) + 0.1, max(1.2, min(2.4, (WIDTH - left) / len(sets) - 0.25))
    figure = make_figure(left + len(sets) * (width + 0.25), len(measures) * (height + 0.95))
    panels = {}
    for measure, name in keys:
        place, bottom = sets.index(name), (len(measures) - 1 - measures.index(measure)) * (height + 0.95) + 0.5
        unit = units.get(measure, f"{measure}, nats")
        axes = add_axes(figure, left + place * (width + 0.25), bottom, width, height, name, unit)
        labelled = place == min(sets.index(n) for m, n in keys if m == measure)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_yticks(range(len(names)), [printable(n) for n in names] if labelled else [""] * len(names))
        axes.locator_params(axis="x", nbins=4)
        panels[measure, name] = axes
    return figure, panels


def accuracy_by_size(variants: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Accuracy over the number of training examples, a panel a test set, a line a variant.

    Args:
        variants: by name, as `mold.evaluation.comparison.summarise` has them.

    Raises:
        ValueError: no variant has sizes.
        ImportError: matplotlib is not installed.
    """
    sized = [entry for entry in variants.values() if entry["size"] is not None]
    if not sized:
        raise ValueError("variants: have no size, must be trained on several numbers of examples")
    names = list(dict.fromkeys(entry["variant"] for entry in sized))
    sets = list(dict.fromkeys(name for entry in sized for name in entry["sets"]))
    width = max(1.8, min(3.2, WIDTH / len(sets) - 0.6))
    figure = make_figure(len(sets) * (width + 0.6), 2.9 + 0.16 * len(names))
    for place, name in enumerate(sets):
        axes = add_axes(figure, place * (width + 0.6) + 0.5, 0.45, width, 2.0, name, "training examples", "accuracy, %")
        for index, variant in enumerate(names):
            curve = sorted((e["size"], 100 * e["sets"][name]["mean"]) for e in sized if e["variant"] == variant)
            style = "-" if index < 4 else "--"
            axes.plot(*zip(*curve, strict=True), style, color=_cycled(4)[index % 4], marker="o", ms=3, label=variant)
        axes.set_xscale("log")
        sizes = sorted({entry["size"] for entry in sized})
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.grid(axis="y", color=FAINT, linewidth=0.6)
    figure.legend(*axes.get_legend_handles_labels(), fontsize=7.5, frameon=False, labelcolor=INK, loc="upper left")
    return figure


def key_word_attention(models: Mapping[str, Mapping[str, Any]]) -> Figure:
    """How much of their attention models give to key words, over the course of the reasoning.

    On top the mean over layers, against what attention spread evenly over the visible tokens would give (dashed);
    below, a map of layers for each model on one colour scale.

    Args:
        models: by name, {"mass": [L][bins], "even": [bins]} of `mold.evaluation.analysis`.

    Raises:
        ValueError: there is no model.
        ImportError: matplotlib is not installed.
    """
    if not models:
        raise ValueError("models: is empty, must hold at least one")
    maps = {name: np.array(entry["mass"], float) for name, entry in models.items()}
    heights = {name: min(max(0.1 * len(mass), 0.9), 3.0) for name, mass in maps.items()}
    legend = 0.17 * (len(maps) + 1) + 0.1
    figure = make_figure(6.8, 2.75 + legend + sum(heights.values()) + 0.75 * len(maps))
    scale = from_zero(np.concatenate([mass.ravel() for mass in maps.values()]))
    bottom = figure.get_figheight() - 2.3 - legend
    course, shares = "share of the reasoning that is done, %", "attention, %"
    axes = add_axes(figure, 0.75, bottom, 5.0, 1.9, "", course, shares)
    title = "attention to key words, mean over layers"
    axes.set_title(title, loc="left", fontsize=9, fontweight="bold", color=INK, pad=8 + 72 * legend)
    for (name, mass), colour in zip(maps.items(), _cycled(len(maps)), strict=True):
        at = 100 * (np.arange(mass.shape[1]) + 0.5) / mass.shape[1]
        axes.plot(at, 100 * mass.mean(axis=0), color=colour, marker="o", ms=3, label=printable(name))
        even = 100 * np.array(models[name]["even"], float)
        axes.plot(at, even, color=colour, linewidth=0.9, linestyle=DASHED)
    axes.plot([], [], color=MUTED, linewidth=0.9, linestyle=DASHED, label="spread evenly over the text so far")
    axes.set_xlim(0, 100)
    axes.set_ylim(bottom=0)
    style = {"fontsize": 7.5, "frameon": False, "labelcolor": INK, "borderaxespad": 0.0}
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.03), **style)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    for name, mass in maps.items():
        bottom -= 0.75 + heights[name]
        axes = add_axes(figure, 0.75, bottom, 5.0, heights[name], name, course, "layer")
        extent = (0, 100, -0.5, len(mass) - 0.5)
        axes.imshow(colours(mass, scale), aspect="auto", interpolation="none", origin="lower", extent=extent)
        axes.locator_params(axis="y", integer=True)
        colour_bar(figure, 5.9, bottom, heights[name], scale, "share")
    return figure


def _cycled(count: int) -> list[str]:
    return [(ORANGE, BLUE, VERMILION, GREY)[index % 4] for index in range(count)]


def _series(metrics: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    rows = [(row["step"], row[name]) for row in metrics if row.get(name) is not None]
    return np.array(rows, float).reshape(-1, 2).T


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Of the finite values; one that is not stays as it is."""
    finite, kernel = np.isfinite(values), np.ones(window)
    sums = np.convolve(np.where(finite, values, 0), kernel, "same")
    return np.where(finite, sums / np.maximum(np.convolve(finite, kernel, "same"), 1), values)
