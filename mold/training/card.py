"""What a model card says: where the weights are from, how the model was taught, what came of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import ModelCard
from transformers import PretrainedConfig

from mold.method.signals import SignalCache
from mold.models import name_of

TAGS = ("mold", "distillation", "stepwise-attention")

# What transformers and TRL write: that a model from a folder was trained from scratch, or is a version of None; that
# its data are unknown; headings with nothing below.
_ORIGIN = re.compile(r"^This model (was trained from scratch|is a fine-tuned version of) .*$", re.MULTILINE)
_NOTHING = re.compile(r"^## [^\n]+\n+More information needed\n+", re.MULTILINE)
_TITLE = re.compile(r"^# (Model Card for )?(.*)$", re.MULTILINE)
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")

_TAUGHT = """Beside cross-entropy on rationales and answers this model was taught where {teacher} looks while it
reasons: how much attention each reasoning step pays to each key word of the problem (MoLSAKI, EMNLP 2025,
[arXiv:2604.15701](https://arxiv.org/abs/2604.15701))."""
_NOT_TAUGHT = "This model was trained with cross-entropy alone, without its teacher's attention."
_ORDINARY = "It is an ordinary model: running it needs no further package."


def add_method_section(
    path: Path,
    student: PretrainedConfig,
    num_examples: int | None,
    options: Mapping[str, object],
    signals: SignalCache | None,
    layer_weights: Sequence[float] | None,
    trains_attention: bool = True,
) -> None:
    """Make a trainer's draft of a model card say where the model is from, and add how it was taught.

    Args:
        path: of the README.md that the trainer wrote.
        student: its configuration, which knows where its weights were loaded from.
        num_examples: that it was trained on, None where nobody has counted them.
        options: of the method, by name.
        signals: the teacher's; None if the model was trained without a cache.
        layer_weights: the router's mean weight of each student layer over the last logged steps, None before.
        trains_attention: whether the teacher's attention was part of the loss.
    """
    facts = {code(name): code(repr(value)) for name, value in options.items()}
    if signals is not None and trains_attention:
        facts |= {f"signals: {name}": code(repr(value)) for name, value in signals.about().items()}
    layers = student.get_text_config().num_hidden_layers
    examples = "" if num_examples is None else f", trained on {num_examples} examples"
    name = code(name_of(student)) if student.name_or_path else escaped(name_of(student))
    parts = [_NOT_TAUGHT]
    if trains_attention:
        teacher = "its teacher" if signals is None else code(signals.settings.teacher)
        parts = [_TAUGHT.format(teacher=teacher)]
    parts = [f"{parts[0]} {_ORDINARY}", table(("option", "value"), list(facts.items()))]
    if trains_attention:
        parts.append("The router's layer weights were not logged in this run.")
        if layer_weights is not None:
            listed = ", ".join(f"{layer}: {weight:.3f}" for layer, weight in enumerate(layer_weights))
            parts[-1] = f"The router's mean weight of each student layer in the last logged steps: {listed}."
    card = ModelCard.load(path)
    text = _NOTHING.sub("", card.text).replace('model="None"', f'model="{path.resolve().parent.name}"')
    text = _TITLE.sub(lambda match: f"# {escaped(match[2])}", text, count=1)
    origin = f"This model has {layers} layers; its weights are from {name}{examples}."
    card.text = _ORIGIN.sub(lambda _: origin, text).rstrip() + "\n"
    base = card.data.base_model
    if isinstance(base, str) and not _HUB_NAME.fullmatch(base):  # the hub refuses a card with another
        card.data.base_model = None
    tags = card.data.tags or []
    card.data.tags = [*tags, *(tag for tag in TAGS if tag not in tags)]
    card.save(path)
    add_section(path, "Stepwise attention distillation" if trains_attention else "Method", "\n\n".join(parts))


def add_section(path: Path, title: str, text: str, first: bool = False) -> None:
    """Put a section into a model card, in place of one that is called so.

    Args:
        path: of the card.
        title: of the section.
        text: in Markdown.
        first: whether it comes before all other sections, else behind them.
    """
    card = ModelCard.load(path)
    others = re.sub(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", "", card.text, flags=re.MULTILINE | re.DOTALL)
    section = f"## {title}\n\n{text.strip()}\n\n"
    place = others.find("\n## ") + 1 if first else 0
    place = place or len(others)
    card.text = f"{others[:place].rstrip()}\n\n{section}{others[place:]}".rstrip() + "\n"
    card.save(path)


def table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; its cells are escaped already."""
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def escaped(text: str) -> str:
    """The text in one line of Markdown, whatever signs it has."""
    return re.sub(r"([\\`*_{}\[\]<>#|~!&])", r"\\\1", " ".join(text.split()))


def block(text: str) -> str:
    """The text as a block of code, line ends and all."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}\n{text}\n{fence}"


def code(text: str) -> str:
    """The text as code in Markdown, in a table's cell too, whatever signs it has."""
    text = " ".join(text.split()).replace("|", "\\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if "`" in text else ""
    return f"{fence}{space}{text}{space}{fence}"
