"""The part of a model card that says how the model was taught."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import ModelCard
from transformers import PretrainedConfig

from mold.method.signals import SignalCache

TAGS = ("mold", "distillation", "stepwise-attention")

_UNKNOWN = re.compile(r"^This model .+ on an unknown dataset\.$", re.MULTILINE)
"""What transformers writes where a model is from a folder, or its trainer was given no data set's name."""

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
    student: PretrainedConfig,
    num_examples: int | None,
    options: Mapping[str, object],
    signals: SignalCache | None,
    layer_weights: Sequence[float] | None,
) -> None:
    """Add the method, the fingerprint of the teacher's signals and the learned mixture to a model card.

    Args:
        path: of the README.md that the trainer wrote.
        student: its configuration, which knows where its weights were loaded from.
        num_examples: that it was trained on, None where nobody has counted them.
        options: of the method, by name.
        signals: the teacher's; None if the model was trained without a cache.
        layer_weights: the router's mean weight of each student layer over the last logged steps, None before.
    """
    facts = {code(name): code(repr(value)) for name, value in options.items()}
    if signals is not None:
        facts |= {f"signals: {name}": code(repr(value)) for name, value in signals.about().items()}
    weights = code(student.name_or_path) if student.name_or_path else "a model that was made in Python"
    layers = student.get_text_config().num_hidden_layers
    examples = "" if num_examples is None else f", trained on {num_examples} examples"
    origin = f"This model has {layers} layers; its weights are from {weights}{examples}."
    mixture = "The router's layer weights were not logged in this run."
    if layer_weights is not None:
        listed = ", ".join(f"{layer}: {weight:.3f}" for layer, weight in enumerate(layer_weights))
        mixture = f"The router's mean weight of each student layer in the last logged steps: {listed}."
    card = ModelCard.load(path)
    card.text = (
        _UNKNOWN.sub(lambda _: origin, card.text).rstrip()
        + "\n"
        + _SECTION.format(
            teacher="its teacher" if signals is None else code(signals.settings.teacher),
            rows="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
            mixture=mixture,
        )
    )
    tags = card.data.tags or []
    card.data.tags = [*tags, *(tag for tag in TAGS if tag not in tags)]
    card.save(path)


def code(text: str) -> str:
    """The text as code in Markdown, in a table's cell too, whatever signs it has."""
    text = " ".join(text.split()).replace("|", "\\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if "`" in text else ""
    return f"{fence}{space}{text}{space}{fence}"
