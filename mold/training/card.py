"""The part of a model card that says how the model was taught."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import ModelCard

from mold.method.signals import SignalCache

TAGS = ("mold", "distillation", "stepwise-attention")

_SECTION = """
## Stepwise attention distillation

Beside cross-entropy on rationales and answers this model was taught where {teacher} looks while it reasons: how much
attention each reasoning step pays to each key word of the problem (MoLSAKI, EMNLP 2025,
[arXiv:2604.15701](https://arxiv.org/abs/2604.15701)). It is an ordinary model: running it needs no further package.

| | |
|---|---|
{rows}

{mixture}
"""


def add_method_section(
    path: Path,
    options: Mapping[str, object],
    signals: SignalCache | None,
    layer_weights: Sequence[float] | None,
) -> None:
    """Add the method, the fingerprint of the teacher's signals and the learned mixture to a model card.

    Args:
        path: of the README.md that the trainer wrote.
        options: of the method, by name.
        signals: the teacher's; None if the model was trained without a cache.
        layer_weights: the router's mean weight of each student layer over the last logged steps, None before.
    """
    facts = {f"`{name}`": f"`{value!r}`" for name, value in options.items()}
    if signals is not None:
        facts |= {f"signals: {name}": f"`{value!r}`" for name, value in signals.about().items()}
    mixture = "The router's layer weights were not logged in this run."
    if layer_weights is not None:
        listed = ", ".join(f"{layer}: {weight:.3f}" for layer, weight in enumerate(layer_weights))
        mixture = f"The router's mean weight of each student layer in the last logged steps: {listed}."
    card = ModelCard.load(path)
    card.text = (
        card.text.rstrip()
        + "\n"
        + _SECTION.format(
            teacher="its teacher" if signals is None else f"`{signals.settings.teacher}`",
            rows="\n".join(f"| {name} | {value.replace('|', chr(92) + '|')} |" for name, value in facts.items()),
            mixture=mixture,
        )
    )
    tags = card.data.tags or []
    card.data.tags = [*tags, *(tag for tag in TAGS if tag not in tags)]
    card.save(path)
