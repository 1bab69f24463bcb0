"""The README's picture: what a training step with the attention loss takes, in units of one without.

python -m benchmarks.picture                          # docs/training_step.svg
python -m benchmarks.picture --output picture.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]
SERIES = {"eager": ("T x T attention maps", "#b3543a"), "ours": ("MoLD", "#2b6ca3")}


def draw(result: dict, path: Path) -> None:
    """Draw the rows that `benchmarks.training_step --output` wrote."""
    plt.rcParams.update({"svg.hashsalt": "mold", "font.size": 11})
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axis, key, title in zip(
        axes, ("time_ratio", "memory_ratio"), ("Time of a step", "Peak memory of a step"), strict=True
    ):
        lengths = sorted({row["length"] for row in result["rows"]})
        for contender, (label, colour) in SERIES.items():
            ratios = [row[key] for row in result["rows"] if row["contender"] == contender]
            axis.plot(lengths, ratios, "o-", color=colour, label=label)
            for length, ratio in zip(lengths, ratios, strict=True):
                above = contender == "eager"
                axis.annotate(
                    f"{ratio:.2f}", (length, ratio), (0, 7 if above else -15), textcoords="offset points", ha="center"
                )
        axis.axhline(1, color="#888888", linewidth=1, linestyle="--", label="without attention loss")
        axis.set(title=title, xlabel="tokens", xscale="log", ylim=(0.5, 3))
        axis.set_xlim(lengths[0] / 1.25, lengths[-1] * 1.25)
        axis.set_xticks(lengths, [str(length) for length in lengths], minor=False)
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("/ a step without it")
    axes[0].legend(frameon=False, loc="upper left")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "training_step.svg")
    arguments = parser.parse_args()
    draw(json.loads((ROOT / "benchmarks" / "results" / "training_step.json").read_text()), arguments.output)


if __name__ == "__main__":
    main()
