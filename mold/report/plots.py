"""Pictures of a training run, as matplotlib Figures: attention maps, layer weights, loss curves.

matplotlib is an extra (`report`), imported when the first figure is made, without pyplot and its global state. Layout
is in inches and reckoned from the labels' display width, not measured: the SVG keeps its text as text, and the viewer's
fonts set the CJK and emoji that matplotlib's has no glyph for.
"""

from __future__ import annotations

import io
import math
import textwrap
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from mold.extras import missing_extra
from mold.report.results import row_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The report swaps the colours of THEME for its own light and dark ones.
INK, MUTED, FAINT = "#1f2329", "#69707b", "#d3d7dd"
ON_PALE_CELL, ON_DEEP_CELL = "#12202e", "#fdfeff"
# Okabe and Ito's colours, told apart by colour-blind readers.
BLUE, ORANGE, VERMILION, GREY = "#0072b2", "#e69f00", "#d55e00", "#9aa1ab"
THEME = {INK: "ink", MUTED: "muted", FAINT: "faint", ON_PALE_CELL: "pale", ON_DEEP_CELL: "deep", BLUE: "accent"}
SCALE = ["#eff4f9", "#b5d3e7", "#5fa2cc", "#1f6ca8", "#0a3a6b"]

FONT = 8.0
CHARACTER = 0.56 * FONT / 72  # inches of one narrow character
PANELS_WIDTH = 10.0
PANELS = {"loss": "loss", "loss_rationale": "rationale loss", "loss_answer": "answer loss"}
PANELS |= {"loss_attention": "attention loss", "router_entropy": "router entropy", "grad_norm": "gradient norm"}
PANELS |= {"learning_rate": "learning rate", "signal_share": "share of examples with a signal"}


def attention_heat_map(
    attention: ArrayLike, steps: Sequence[str], key_words: Sequence[str], title: str = "", row_norm: str = "l1"
) -> Figure:
    """One map of steps x key words.

    Args:
        attention: [S, M].
        steps: S texts.
        key_words: M texts.
        title: of the map.
        row_norm: "l1" shows each step's attention as shares of its sum over the key words, "none" as it is.

    Raises:
        ValueError: the sizes do not agree, or row_norm is unknown.
        ImportError: matplotlib is not installed.
    """
    return _map_figure([(title, attention)], steps, key_words, row_norm)


def attention_comparison(map_entry: Mapping[str, Any], row_norm: str = "l1") -> Figure:
    """Teacher | student before | student after, on one colour scale.

    Args:
        map_entry: one element of attention_maps.json.
        row_norm: as of `attention_heat_map`.

    Returns:
        Panels that stand below each other where there are too many key words to read side by side.

    Raises:
        ValueError: a map is not [S, M]; names the example.
        ImportError: matplotlib is not installed.
    """
    panels = [("teacher", map_entry["teacher"])]
    for when in ("before", "after"):
        kl = map_entry.get(f"kl_{when}")
        title = f"student {when}" + ("" if kl is None else f", KL {kl:.3g}".replace("nan", "NaN"))
        panels.append((title, map_entry[f"student_{when}"]))
    try:
        return _map_figure(panels, map_entry["steps"], map_entry["key_words"], row_norm)
    except ValueError as error:
        raise ValueError(f"attention map of example {map_entry.get('id')!r}: {error}") from error


def teacher_student_layer_weights(map_entry: Mapping[str, Any]) -> Figure:
    """The layer weights of one example: teacher's, student's before and after. Dashed: all alike, 1 / L.

    Args:
        map_entry: one element of attention_maps.json.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = _figure(PANELS_WIDTH, 1.75)
    student = [("before", "student_layer_weights_before", GREY), ("after", "student_layer_weights_after", BLUE)]
    panels = [("teacher layers", [("teacher", "teacher_layer_weights", ORANGE)]), ("student layers", student)]
    for place, (title, bars) in enumerate(panels):
        axes = _axes(figure, 0.55 + place * 4.95, 0.35, 4.4, 1.1, title)
        for i, (label, name, colour) in enumerate(bars):
            weights = np.asarray(map_entry[name], float)
            at = np.arange(len(weights)) + (i - (len(bars) - 1) / 2) * 0.8 / len(bars)
            axes.bar(at, weights, 0.8 / len(bars), color=colour, label=label)
            _mark_not_finite(axes, at, weights, "layer")
        axes.axhline(1 / len(weights), color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set_xlim(-0.6, len(weights) - 0.4)
        axes.set_xticks(range(0, len(weights), math.ceil(len(weights) / 16)))
        axes.locator_params(axis="y", nbins=4)
    axes.legend(fontsize=7.5, frameon=False, labelcolor=INK, ncols=2, loc="lower right", bbox_to_anchor=(1.02, 0.94))
    return figure


def layer_weights_over_training(metrics: Sequence[Mapping[str, Any]]) -> Figure:
    """The router's mean weight of every student layer over the training steps.

    Args:
        metrics: rows of metrics.jsonl in the order of their steps; those without router_weights are passed over.

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
    # Logging steps need not be even: every column of the picture takes the logged step nearest to it.
    first, last = (steps[0], steps[-1]) if len(steps) > 1 else (steps[0] - 0.5, steps[0] + 0.5)
    middles = first + (np.arange(400) + 0.5) * (last - first) / 400
    nearest = np.searchsorted((steps[1:] + steps[:-1]) / 2, middles)
    height, top = min(max(0.16 * layers, 1.0), 4.5), _top(weights)
    figure = _figure(PANELS_WIDTH, height + 0.85)
    axes = _axes(figure, 0.55, 0.45, 8.7, height, "router weight of every layer", "step", "student layer")
    colours, extent = _colours(weights[nearest].T, top), (first, last, -0.5, layers - 0.5)
    axes.imshow(colours, aspect="auto", interpolation="none", origin="lower", extent=extent)
    axes.set_yticks(range(0, layers, math.ceil(0.16 * layers / height)))
    _colour_bar(figure, 9.4, 0.45, height, top)
    return figure


def loss_curves(metrics: Sequence[Mapping[str, Any]]) -> Figure:
    """A panel for every term that was logged, training as a line, evaluation as points.

    Above 100 logged steps the strong line is a running mean, the pale one what was logged. An axis is logarithmic if
    its values are positive and span more than a factor of 30. A value that is not finite is a cross at its step.

    Args:
        metrics: rows of metrics.jsonl in the order of their steps.

    Raises:
        ValueError: there is nothing to draw.
        ImportError: matplotlib is not installed.
    """
    series = [(title, _series(metrics, name), _series(metrics, f"eval_{name}")) for name, title in PANELS.items()]
    series = [panel for panel in series if panel[1].size or panel[2].size]
    if not series:
        raise ValueError(f"metrics: is {len(metrics)} rows without a loss, must have at least one")
    lines = -(-len(series) // 3)
    figure = _figure(PANELS_WIDTH, 2.3 * lines + 0.2)
    for place, (title, training, evaluation) in enumerate(series):
        line, column = divmod(place, 3)
        finite = np.concatenate([training[1], evaluation[1]])
        finite = finite[np.isfinite(finite)]
        log = finite.size and finite.min() > 0 and finite.max() > 30 * finite.min()
        title += " (log)" if log else ""
        axes = _axes(figure, 0.55 + column * 3.3, (lines - 1 - line) * 2.3 + 0.45, 2.75, 1.5, title, "step")
        if training.shape[1] > 100 and title != PANELS["learning_rate"]:
            axes.plot(*training, color=BLUE, linewidth=0.7, alpha=0.3)
            training = np.stack([training[0], _running_mean(training[1], training.shape[1] // 50)])
        marker = "o" if np.isfinite(training[1]).sum() == 1 else None
        axes.plot(*training, color=BLUE, marker=marker, ms=4, label="training")
        if evaluation.size:
            axes.plot(*evaluation, color=VERMILION, marker="o", ms=4, lw=0.9, ls=(0, (2, 2)), label="evaluation")
        if evaluation.size and not figure.legends:
            figure.legend(*axes.get_legend_handles_labels(), fontsize=7.5, frameon=False, labelcolor=INK, ncols=2)
        axes.set_yscale("log" if log else "linear")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
        axes.yaxis.set_minor_formatter(lambda value, _: "")
        at, values = np.concatenate([training, evaluation], axis=1)
        _mark_not_finite(axes, at, values, "step")
        axes.grid(axis="y", color=FAINT, linewidth=0.6)
        axes.locator_params(axis="x", nbins=5)
    return figure


def comparison_figures(summary: Mapping[str, Any]) -> dict[str, Figure]:
    """What can be drawn of a comparison: "results", "differences" and "sizes", as far as there.

    Args:
        summary: of `mold.evaluation.comparison.summarise`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    found = {"results": variant_results(summary["variants"])}
    if summary["comparisons"]:
        found["differences"] = variant_differences(summary["comparisons"])
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
    left = 0.3 + CHARACTER * max(map(_units, names))
    height, width = 0.24 * len(names) + 0.1, max(1.2, min(2.4, (PANELS_WIDTH - left) / len(sets) - 0.25))
    figure = _figure(left + len(sets) * (width + 0.25), len(measures) * (height + 0.95))
    panels = {}
    for measure, name in keys:
        place, bottom = sets.index(name), (len(measures) - 1 - measures.index(measure)) * (height + 0.95) + 0.5
        unit = units.get(measure, f"{measure}, nats")
        axes = _axes(figure, left + place * (width + 0.25), bottom, width, height, name, unit)
        labelled = place == min(sets.index(n) for m, n in keys if m == measure)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_yticks(range(len(names)), [_printable(n) for n in names] if labelled else [""] * len(names))
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
    width = max(1.8, min(3.2, PANELS_WIDTH / len(sets) - 0.6))
    figure = _figure(len(sets) * (width + 0.6), 2.9 + 0.16 * len(names))
    for place, name in enumerate(sets):
        axes = _axes(figure, place * (width + 0.6) + 0.5, 0.45, width, 2.0, name, "training examples", "accuracy, %")
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
        models: by name, {"mass": [L][bins], "even": [bins]} of `mold.evaluation.analysis`; None where no step fell into
            a bin.

    Raises:
        ValueError: there is no model.
        ImportError: matplotlib is not installed.
    """
    if not models:
        raise ValueError("models: is empty, must hold at least one")
    maps = {name: np.array(entry["mass"], float) for name, entry in models.items()}
    heights = {name: min(max(0.1 * len(mass), 0.9), 3.0) for name, mass in maps.items()}
    figure = _figure(6.6, 2.75 + sum(heights.values()) + 0.75 * len(maps))
    top = _top(np.concatenate([mass.ravel() for mass in maps.values()]))
    bottom = figure.get_figheight() - 2.3
    axes = _axes(figure, 0.75, bottom, 5.0, 1.9, "attention to key words, mean over layers", "share of the reasoning")
    for (name, mass), colour in zip(maps.items(), _cycled(len(maps)), strict=True):
        at = (np.arange(mass.shape[1]) + 0.5) / mass.shape[1]
        axes.plot(at, mass.mean(axis=0), color=colour, marker="o", ms=3, label=_printable(name))
        even = np.array(models[name]["even"], float)
        axes.plot(at, even, color=colour, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7.5, frameon=False, labelcolor=INK)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    for name, mass in maps.items():
        bottom -= 0.75 + heights[name]
        axes = _axes(figure, 0.75, bottom, 5.0, heights[name], name, "share of the reasoning", "layer")
        extent = (0, 1, -0.5, len(mass) - 0.5)
        colours = _colours(np.nan_to_num(mass), top, blank_zeros=True)
        axes.imshow(colours, aspect="auto", interpolation="none", origin="lower", extent=extent)
        _colour_bar(figure, 5.9, bottom, heights[name], top)
    return figure


def _cycled(count: int) -> list[str]:
    return [(ORANGE, BLUE, VERMILION, GREY)[index % 4] for index in range(count)]


def figure_to_svg(figure: Figure) -> str:
    """The figure as an `<svg>` element to stand in HTML: text stays text, nothing refers to another file."""
    import matplotlib

    out = io.StringIO()
    without = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mold"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(out, format="svg", metadata=without)
    return "<svg" + out.getvalue().partition("<svg")[2]


def _map_figure(
    panels: Sequence[tuple[str, ArrayLike]], steps: Sequence[str], key_words: Sequence[str], row_norm: str
) -> Figure:
    if row_norm not in ("l1", "none"):
        raise ValueError(f'row_norm: is {row_norm!r}, must be "l1" or "none"')
    s, m = len(steps), len(key_words)
    for title, attention in panels:
        if np.shape(attention) != (s, m) or not s * m:
            raise ValueError(f"{title or 'attention'}: is {np.shape(attention)}, must be ({s}, {m}) and not empty")
    maps = np.array([attention for _, attention in panels], float)
    if row_norm == "l1":
        sums = maps.sum(axis=2, keepdims=True)
        maps /= np.where(sums == 0, 1, sums)
    top = _top(maps)

    stacked = m > 16
    across, down = (1, len(panels)) if stacked else (len(panels), 1)
    cell_height = 0.36 if s <= 14 else 0.22 if s <= 30 else 0.15
    labels = [_wrapped(step, 32, 2 if s <= 14 else 1) for step in steps]
    words = [_wrapped(word, 14, 1)[0] for word in key_words]
    left = 0.4 + CHARACTER * max(_units(line) for lines in labels for line in lines)
    room, longest = PANELS_WIDTH - left - 0.6, CHARACTER * max(_units(word) for word in words)
    width = max(room, 0.13 * m) if stacked else min(max(0.45 * m, 1.75), room / 3 - 0.2)
    turned = longest > 0.92 * width / m
    height, above, below, foot = cell_height * s, 0.45, (longest if turned else 0.15) + 0.12, 0.22
    figure = _figure(left + across * (width + 0.2) + 0.55, foot + down * (above + height + below))
    for i, (title, _) in enumerate(panels):
        x = left if stacked else left + i * (width + 0.2)
        y = foot + below + ((down - 1 - i) * (above + height + below) if stacked else 0)
        axes = _axes(figure, x, y, width, height, title, pad=14)
        axes.patch.set(edgecolor=FAINT, hatch="//////")
        axes.imshow(_colours(maps[i], top, blank_zeros=True), aspect="auto", interpolation="none")
        axes.set_xticks(range(m))
        axes.set_xticklabels(words, rotation=90 if turned else 0, parse_math=False)
        axes.tick_params(length=0, labelleft=False)
        for j in range(m):
            axes.text(j, -0.5 - 0.03 / cell_height, str(j + 1), fontsize=5.5, color=MUTED, ha="center")
        if stacked or i == 0:
            _step_labels(axes, labels, left)
        if width / m >= 0.22 and cell_height >= 0.2 and top > 0.1:
            for (row, column), value in np.ndenumerate(maps[i]):
                text = "" if value == 0 else f"{value:.2f}".removeprefix("0").replace("nan", "NaN")
                colour = ON_PALE_CELL if value <= 0.35 * top else ON_DEEP_CELL
                axes.text(column, row, text, fontsize=6.5, color=colour, ha="center", va="center")
    _colour_bar(figure, figure.get_figwidth() - 0.6, foot + below, min(height, 2.4), top)
    note = "colour: share of the step's attention to key words" if row_norm == "l1" else "colour: attention"
    note += "; hatched: none, the key word comes after the step" + ("; orange-red: NaN" if np.isnan(maps).any() else "")
    figure.text(left / figure.get_figwidth(), 0.05 / figure.get_figheight(), note, fontsize=7, color=MUTED)
    return figure


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("a plot", "matplotlib", "report") from error
    figure = Figure(figsize=(width, height))
    figure.patch.set_alpha(0)
    return figure


def _axes(
    figure: Figure,
    left: float,
    bottom: float,
    width: float,
    height: float,
    title: str = "",
    xlabel: str = "",
    ylabel: str = "",
    pad: float = 5,
) -> Axes:
    across, down = figure.get_size_inches()
    axes = figure.add_axes((left / across, bottom / down, width / across, height / down), facecolor="none")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(labelsize=FONT, labelcolor=INK, color=FAINT, length=2.5)
    axes.set_title(_printable(title), loc="left", fontsize=9, fontweight="bold", color=INK, pad=pad, parse_math=False)
    axes.set_xlabel(xlabel, fontsize=FONT, color=MUTED)
    axes.set_ylabel(ylabel, fontsize=FONT, color=MUTED)
    return axes


def _printable(text: object) -> str:
    text = "".join(c if c.isprintable() else " " for c in str(text).encode("utf-8", "replace").decode())
    return " ".join(text.split())


def _units(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _wrapped(text: str, width: int, lines: int) -> list[str]:
    text = _printable(text)
    width = width * len(text) // _units(text) if text else width
    return textwrap.wrap(text, width, max_lines=lines, placeholder="\N{HORIZONTAL ELLIPSIS}") or [""]


def _step_labels(axes: Axes, labels: Sequence[Sequence[str]], left: float) -> None:
    where: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "center"}
    for i, lines in enumerate(labels):
        axes.annotate(str(i + 1), (0, i), (72 * (0.2 - left), 0), ha="right", fontsize=6, color=MUTED, **where)
        text = axes.annotate("\n".join(lines), (0, i), (72 * (0.3 - left), 0), fontsize=FONT, color=INK, **where)
        text.set_parse_math(False)


def _top(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.max()) if finite.size and finite.max() > 0 else 1.0


def _colours(values: np.ndarray, top: float, blank_zeros: bool = False) -> np.ndarray:
    """RGBA of a map on a square-root scale, on which small shares differ; NaN is vermilion."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    scale = LinearSegmentedColormap.from_list("mold", SCALE)
    rgba = scale(np.sqrt(np.clip(np.nan_to_num(values, posinf=0, neginf=0) / top, 0, 1)))
    rgba[(values == 0) & blank_zeros] = 0
    rgba[~np.isfinite(values)] = to_rgba(VERMILION)
    return rgba


def _colour_bar(figure: Figure, left: float, bottom: float, height: float, top: float) -> None:
    axes = _axes(figure, left, bottom, 0.1, height)
    ramp = _colours(np.linspace(0, 1, 128)[:, None] ** 2, 1)
    axes.imshow(ramp, aspect="auto", interpolation="none", origin="lower", extent=(0, 1, 0, 1))
    shares = [1] if height < 0.5 else [0, 0.25, 1] if height < 1 else [0, 0.05, 0.25, 0.5, 1]
    axes.set_yticks([math.sqrt(share) for share in shares], [f"{share * top:.2g}" for share in shares])
    axes.set_xticks([])
    axes.yaxis.tick_right()
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=7)


def _series(metrics: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    rows = [(row["step"], row[name]) for row in metrics if row.get(name) is not None]
    return np.array(rows, float).reshape(-1, 2).T


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Of the finite values; one that is not stays as it is."""
    finite, kernel = np.isfinite(values), np.ones(window)
    sums = np.convolve(np.where(finite, values, 0), kernel, "same")
    return np.where(finite, sums / np.maximum(np.convolve(finite, kernel, "same"), 1), values)


def _mark_not_finite(axes: Axes, at: np.ndarray, values: np.ndarray, place: str) -> None:
    wrong = ~np.isfinite(values)
    if not wrong.any():
        return
    axes.plot(at[wrong], [0.95] * wrong.sum(), "x", color=VERMILION, ms=5, transform=axes.get_xaxis_transform())
    text = f"{values[wrong][0]} at {place} {at[wrong][0]:.0f}".replace("nan", "NaN")
    text += f" and {wrong.sum() - 1} more" if wrong.sum() > 1 else ""
    axes.text(0.03, 0.85, text, transform=axes.transAxes, fontsize=7.5, color=VERMILION, va="top")
