"""What the plots are drawn with: figures and axes in inches, colours and their scales, texts that fit.

matplotlib is an extra (`report`), imported when the first figure is made, without pyplot and its global state. Layout
is in inches and reckoned from the labels' display width, not measured: the SVG keeps its text as text, and the viewer's
fonts set the CJK and emoji that matplotlib's has no glyph for.
"""

from __future__ import annotations

import io
import textwrap
import unicodedata
import warnings
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mold.extras import missing_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

# The report swaps the colours of THEME for its own light and dark ones.
INK, MUTED, FAINT = "#1f2329", "#69707b", "#d3d7dd"
ON_PALE_CELL, ON_DEEP_CELL = "#12202e", "#fdfeff"
# Okabe and Ito's colours, told apart by colour-blind readers.
BLUE, ORANGE, VERMILION, GREY = "#0072b2", "#e69f00", "#d55e00", "#9aa1ab"
THEME = {INK: "ink", MUTED: "muted", FAINT: "faint", ON_PALE_CELL: "pale", ON_DEEP_CELL: "deep", BLUE: "accent"}
SEQUENTIAL = ("#eff4f9", "#b5d3e7", "#5fa2cc", "#1f6ca8", "#0a3a6b")
DIVERGING = ("#8f4305", "#dd9f56", "#f5f5f3", "#6ba6cf", "#0a3a6b")
DASHED = (0, (4, 3))

FONT = 8.0
CHARACTER = 0.56 * FONT / 72  # inches of one narrow character
WIDTH = 10.0


class Plot(NamedTuple):
    """A figure, None where nothing in it would vary, and what is to be said beside or in place of it."""

    figure: Figure | None
    remarks: list[str]


def make_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("a plot", "matplotlib", "report") from error
    return Figure(figsize=(width, height))


def add_axes(
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
    """Axes at a place in inches."""
    across, down = figure.get_size_inches()
    axes = figure.add_axes((left / across, bottom / down, width / across, height / down), facecolor="none")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(labelsize=FONT, labelcolor=INK, color=FAINT, length=2.5)
    axes.set_title(printable(title), loc="left", fontsize=9, fontweight="bold", color=INK, pad=pad, parse_math=False)
    axes.set_xlabel(xlabel, fontsize=FONT, color=MUTED)
    axes.set_ylabel(ylabel, fontsize=FONT, color=MUTED)
    return axes


def figure_to_svg(figure: Figure, background: str = "none") -> str:
    """The figure as an `<svg>` element: text stays text, nothing refers to another file.

    Args:
        figure: to print.
        background: its colour; none in a page, which has its own.
    """
    import matplotlib

    out = io.StringIO()
    without = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mold"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(out, format="svg", metadata=without, facecolor=background)
    return "<svg" + out.getvalue().partition("<svg")[2]


def from_zero(values: np.ndarray) -> Normalize:
    """A scale from 0 to the largest value by the square root, on which small shares differ."""
    from matplotlib.colors import PowerNorm

    finite = values[np.isfinite(values)]
    return PowerNorm(0.5, 0, float(finite.max()) if finite.size and finite.max() > 0 else 1.0, clip=True)


def around(middle: float, values: np.ndarray) -> Normalize:
    """A scale as far to both sides of the middle as the farthest value is."""
    from matplotlib.colors import Normalize

    reach = float(np.nanmax(np.abs(np.where(np.isfinite(values), values, middle) - middle))) or 1.0
    return Normalize(middle - reach, middle + reach, clip=True)


def colours(values: np.ndarray, scale: Normalize, palette: tuple[str, ...] = SEQUENTIAL) -> np.ndarray:
    """RGBA of a map; a value that is not finite is vermilion."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    rgba = LinearSegmentedColormap.from_list("mold", palette)(np.asarray(scale(np.nan_to_num(values, posinf=0))))
    rgba[~np.isfinite(values)] = to_rgba(VERMILION)
    return rgba


def colour_bar(
    figure: Figure,
    left: float,
    bottom: float,
    height: float,
    scale: Normalize,
    label: str,
    palette: tuple[str, ...] = SEQUENTIAL,
    named: tuple[float, str] | None = None,
) -> None:
    """What the colours stand for, with round ticks.

    Args:
        figure: with room for 0.6 inches to the right of left.
        left, bottom, height: in inches.
        scale: of the values.
        label: what they are.
        palette: of the colours.
        named: a value that has a name of its own.
    """
    axes = add_axes(figure, left, bottom, 0.1, height)
    ramp = colours(np.asarray(scale.inverse(np.linspace(0, 1, 128)))[:, None], scale, palette)
    axes.imshow(ramp, aspect="auto", interpolation="none", origin="lower", extent=(0, 1, 0, 1))
    ticks = _round_ticks(scale, 0.18 / height, [] if named is None else [named[0]])
    names = [f"{tick:.4g}" if named is None or tick != named[0] else named[1] for tick in ticks]
    axes.set_yticks(np.asarray(scale(ticks)), names)
    axes.set_xticks([])
    axes.yaxis.tick_right()
    axes.yaxis.set_label_position("right")
    axes.set_ylabel(label if height >= CHARACTER * len(label) else "", fontsize=7, color=MUTED)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=7)


def _round_ticks(scale: Normalize, apart: float, ticks: list[float]) -> list[float]:
    """Multiples of powers of ten that stand apart on the scale, beside those ticks that there are."""
    from matplotlib.ticker import MaxNLocator

    low, high = float(scale.vmin or 0), float(scale.vmax or 1)
    if low == 0:
        powers = 10.0 ** np.arange(np.floor(np.log10(high)), np.floor(np.log10(high)) - 4, -1)
        candidates = [digit * power for power in powers for digit in (5, 4, 3, 2, 1)] + [0.0]
        # 0 first: the scale begins there.
        candidates.sort(key=lambda value: (value != 0, -value))
    else:
        candidates = list(MaxNLocator(max(2, int(0.7 / apart)), steps=[1, 2, 5, 10]).tick_values(low, high))
    for value in candidates:
        if low <= value <= high and all(abs(scale(value) - scale(other)) >= apart for other in ticks):
            ticks = [*ticks, value]
    return sorted(ticks)


def printable(text: object) -> str:
    """The text in one line, without what no font has."""
    text = "".join(c if c.isprintable() else " " for c in str(text).encode("utf-8", "replace").decode())
    return " ".join(text.split())


def display_width(text: str) -> int:
    """In narrow characters."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def wrapped(text: str, width: int, lines: int) -> list[str]:
    """At most so many lines of so many narrow characters."""
    text = printable(text)
    width = width * len(text) // display_width(text) if text else width
    return textwrap.wrap(text, width, max_lines=lines, placeholder="\N{HORIZONTAL ELLIPSIS}") or [""]


def mark_not_finite(axes: Axes, at: np.ndarray, values: np.ndarray, place: str) -> None:
    """A cross where a value is not finite, and what the first is."""
    wrong = ~np.isfinite(values)
    if not wrong.any():
        return
    axes.plot(at[wrong], [0.95] * wrong.sum(), "x", color=VERMILION, ms=5, transform=axes.get_xaxis_transform())
    text = f"{values[wrong][0]} at {place} {at[wrong][0]:.0f}".replace("nan", "NaN")
    text += f" and {wrong.sum() - 1} more" if wrong.sum() > 1 else ""
    axes.text(0.03, 0.85, text, transform=axes.transAxes, fontsize=7.5, color=VERMILION, va="top")
