"""Attention maps of an example, and the layers that they are mixed from."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from mold.report.drawing import (
    BLUE,
    CHARACTER,
    DASHED,
    FAINT,
    FONT,
    GREY,
    INK,
    MUTED,
    ON_DEEP_CELL,
    ON_PALE_CELL,
    ORANGE,
    WIDTH,
    Plot,
    add_axes,
    colour_bar,
    colours,
    display_width,
    from_zero,
    make_figure,
    mark_not_finite,
    wrapped,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_DRAWN = 40
"""Rows and columns of a map; more are drawn in groups."""


def attention_comparison(map_entry: Mapping[str, Any]) -> Plot:
    """Teacher | student before | student after, on one colour scale: each step's shares over the key words.

    Of more than 40 steps or key words consecutive ones are drawn together: the mean of the steps, the sum of the key
    words.

    Args:
        map_entry: one element of attention_maps.json.

    Returns:
        Panels that stand below each other where there are too many key words to read side by side.

    Raises:
        ValueError: a map is not [S, M]; names the example.
        ImportError: matplotlib is not installed.
    """
    panels = [("teacher", map_entry["teacher"])]
    for when in ("before", "after"):
        kl = map_entry.get(f"kl_{when}")
        title = f"student {when}" + ("" if kl is None else f", KL {kl:.3g} nats".replace("nan", "NaN"))
        panels.append((title, map_entry[f"student_{when}"]))
    steps, key_words = map_entry["steps"], map_entry["key_words"]
    try:
        shares = _shares(panels, len(steps), len(key_words))
    except ValueError as error:
        raise ValueError(f"attention map of example {map_entry.get('id')!r}: {error}") from error
    if not (shares != shares.flat[0]).any():
        why = "there is one key word" if len(key_words) == 1 else "no step looks at another more than at the rest"
        return Plot(None, [f"Every share is {shares.flat[0]:.3g}, of teacher and student: {why}."])
    rows, columns = _groups(len(steps)), _groups(len(key_words))
    grouped = np.add.reduceat(np.add.reduceat(shares, rows[:-1], axis=1), columns[:-1], axis=2)
    grouped /= np.diff(rows)[:, None]
    numbers = [[_span(edges, i) for i in range(len(edges) - 1)] for edges in (rows, columns)]
    words = [f"{key_words[a]} +{b - a - 1}" if b - a > 1 else key_words[a] for a, b in itertools.pairwise(columns)]
    remarks = []
    if len(steps) > MOST_DRAWN:
        remarks.append(f"The {len(steps)} steps are drawn as {len(rows) - 1} groups of consecutive ones: their mean.")
    if len(key_words) > MOST_DRAWN:
        groups = f"{len(columns) - 1} groups of consecutive ones, called by their first: their sum"
        remarks.append(f"The {len(key_words)} key words are drawn as {groups}.")
    titles = [title for title, _ in panels]
    return Plot(_maps(titles, grouped, [steps[a] for a in rows[:-1]], words, *numbers), remarks)


def _shares(panels: Sequence[tuple[str, ArrayLike]], s: int, m: int) -> np.ndarray:
    """[panels, S, M], each row by its sum."""
    for title, attention in panels:
        if np.shape(attention) != (s, m) or not s * m:
            raise ValueError(f"{title}: is {np.shape(attention)}, must be ({s}, {m}) and not empty")
    maps = np.array([attention for _, attention in panels], float)
    sums = maps.sum(axis=2, keepdims=True)
    return maps / np.where(sums == 0, 1, sums)


def _groups(count: int) -> np.ndarray:
    """Where each group begins, and where the last one ends."""
    return np.linspace(0, count, min(count, MOST_DRAWN) + 1).round().astype(int)


def _span(edges: np.ndarray, group: int) -> str:
    first, last = edges[group] + 1, edges[group + 1]
    return f"{first}" if first == last else f"{first}\N{EN DASH}{last}"


def _maps(
    titles: Sequence[str],
    maps: np.ndarray,
    steps: Sequence[str],
    key_words: Sequence[str],
    step_numbers: Sequence[str],
    key_numbers: Sequence[str],
) -> Figure:
    _, s, m = maps.shape
    scale = from_zero(maps)
    top = float(scale.vmax or 1)
    stacked = m > 16
    across, down = (1, len(titles)) if stacked else (len(titles), 1)
    cell_height = 0.36 if s <= 14 else 0.22
    labels = [wrapped(step, 32, 2 if s <= 14 else 1) for step in steps]
    words = [wrapped(word, 14, 1)[0] for word in key_words]
    numbered = 0.06 * max(map(len, step_numbers)) + 0.15
    left = numbered + 0.2 + CHARACTER * max(display_width(line) for lines in labels for line in lines)
    room, longest = WIDTH - left - 0.75, CHARACTER * max(display_width(word) for word in words)
    width = max(room, 0.13 * m) if stacked else min(max(0.45 * m, 1.75), room / 3 - 0.2)
    turned = longest > 0.92 * width / m
    height, above, below, foot = cell_height * s, 0.6, (longest if turned else 0.15) + 0.3, 0.22
    figure = make_figure(left + across * (width + 0.2) + 0.7, foot + down * (above + height + below))
    for i, title in enumerate(titles):
        x = left if stacked else left + i * (width + 0.2)
        y = foot + below + ((down - 1 - i) * (above + height + below) if stacked else 0)
        name, _, kl = title.partition(", ")  # below each other: a panel may be narrower than both
        axes = add_axes(figure, x, y, width, height, name, "key word", pad=25)
        corner, points = "axes fraction", "offset points"
        axes.annotate(kl, (0, 1), (0, 14), xycoords=corner, textcoords=points, fontsize=FONT, color=MUTED)
        axes.patch.set(edgecolor=FAINT, hatch="//////")
        cells = colours(maps[i], scale)
        cells[maps[i] == 0] = 0
        axes.imshow(cells, aspect="auto", interpolation="none")
        axes.set_xticks(range(m))
        axes.set_xticklabels(words, rotation=90 if turned else 0, parse_math=False)
        axes.tick_params(length=0, labelleft=False)
        every = math.ceil(0.05 * max(map(len, key_numbers)) * m / width)
        for j in range(0, m, every):
            axes.text(j, -0.5 - 0.03 / cell_height, key_numbers[j], fontsize=5.5, color=MUTED, ha="center")
        if stacked or i == 0:
            _step_labels(axes, labels, step_numbers, left, numbered)
        if width / m >= 0.22 and cell_height >= 0.2 and top > 0.1:
            for (row, column), value in np.ndenumerate(maps[i]):
                text = "" if value == 0 else f"{value:.2f}".removeprefix("0").replace("nan", "NaN")
                colour = ON_PALE_CELL if value <= 0.35 * top else ON_DEEP_CELL
                axes.text(column, row, text, fontsize=6.5, color=colour, ha="center", va="center")
    bar, top_panel = min(height, 2.4), figure.get_figheight() - above - height
    colour_bar(figure, figure.get_figwidth() - 0.75, top_panel + height - bar, bar, scale, "share of attention")
    note = "colour: share of the step's attention to key words; hatched: none, the key word comes after the step"
    note += "; orange-red: NaN" if np.isnan(maps).any() else ""
    figure.text(left / figure.get_figwidth(), 0.05 / figure.get_figheight(), note, fontsize=7, color=MUTED)
    return figure


def _step_labels(
    axes: Axes, labels: Sequence[Sequence[str]], numbers: Sequence[str], left: float, numbered: float
) -> None:
    where: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "center"}
    for i, (lines, number) in enumerate(zip(labels, numbers, strict=True)):
        axes.annotate(number, (0, i), (72 * (numbered - left), 0), ha="right", fontsize=6, color=MUTED, **where)
        place = (72 * (numbered + 0.1 - left), 0)
        text = axes.annotate("\n".join(lines), (0, i), place, fontsize=FONT, color=INK, **where)
        text.set_parse_math(False)
    where |= {"xycoords": "axes fraction", "va": "bottom"}
    axes.annotate("step", (0, 1), (72 * (numbered + 0.1 - left), 3), fontsize=FONT, color=MUTED, **where)


def teacher_student_layer_weights(map_entry: Mapping[str, Any]) -> Plot:
    """The layer weights of one example: teacher's, student's before and after. Dashed: all alike, 1 / L.

    Args:
        map_entry: one element of attention_maps.json.

    Returns:
        A panel each for teacher and student; none, and a remark, for one whose layers all weigh the same.

    Raises:
        ImportError: matplotlib is not installed.
    """
    student = [("before", "student_layer_weights_before", GREY), ("after", "student_layer_weights_after", BLUE)]
    drawn, remarks = [], []
    for title, bars in (("teacher", [("", "teacher_layer_weights", ORANGE)]), ("student", student)):
        shown = [(label, np.asarray(map_entry[name], float), colour) for label, name, colour in bars]
        if all(weights.max() - weights.min() < 1e-3 / len(weights) for _, weights, _ in shown):
            layers = len(shown[0][1])
            alike = f"All {layers} layers of the {title} weigh {1 / layers:.3g}" if layers > 1 else ""
            remarks.append(
                (alike or f"The {title}'s one layer weighs 1") + (", before and after." if student is bars else ".")
            )
        else:
            drawn.append((title, shown))
    if not drawn:
        return Plot(None, remarks)
    figure = make_figure(WIDTH, 1.95)
    for place, (title, shown) in enumerate(drawn):
        axes = add_axes(figure, 0.65 + place * 4.95, 0.5, 4.2, 1.1, f"{title} layers", "layer", "weight")
        for i, (label, weights, colour) in enumerate(shown):
            at = np.arange(len(weights)) + (i - (len(shown) - 1) / 2) * 0.8 / len(shown)
            axes.bar(at, weights, 0.8 / len(shown), color=colour, label=label)
            mark_not_finite(axes, at, weights, "layer")
        axes.axhline(1 / len(weights), color=MUTED, linewidth=0.8, linestyle=DASHED, label=f"1/{len(weights)}")
        axes.set_xlim(-0.6, len(weights) - 0.4)
        axes.set_xticks(range(0, len(weights), math.ceil(len(weights) / 16)))
        axes.locator_params(axis="y", nbins=4)
        handles = [pair for pair in zip(*axes.get_legend_handles_labels(), strict=True) if pair[1]]
        style = {"fontsize": 7.5, "frameon": False, "labelcolor": INK, "ncols": 3, "loc": "lower right"}
        axes.legend(*zip(*handles, strict=True), bbox_to_anchor=(1.02, 0.94), **style)
    return Plot(figure, remarks)
