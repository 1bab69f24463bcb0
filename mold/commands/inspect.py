"""mold inspect: one example laid open, its text, steps, key words, token spans, and the teacher's attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from rich import get_console
from rich.table import Table
from rich.text import Text

from mold.commands.inputs import load_signals, read_data
from mold.commands.options import Options
from mold.commands.parsing import parse
from mold.data.chat import choose_template, render_for
from mold.data.encoding import encode_example, shortened
from mold.data.examples import Example
from mold.models import load_tokenizer
from mold_kernels import teacher_layer_weights

STEPS_A_TABLE = 6  # what 80 columns hold


def main(arguments: Sequence[str]) -> None:
    """Show the example."""
    for part in describe(parse("inspect", arguments)):
        get_console().print(part)


def describe(options: Options) -> Iterator[Text | Table]:
    """What `mold inspect` prints of an example. Steps and key words are counted from 1.

    Args:
        options: the data set and which example of it; the student's or the teacher's name for its tokenizer; a cache
            if there is one.

    Raises:
        ValueError: there is no such example, or no model is named.
    """
    name, revision = options.student.model_name_or_path, options.student.model_revision
    if name is None:
        name, revision = options.teacher.teacher_model_name_or_path, options.teacher.teacher_model_revision
    if name is None:
        raise ValueError(
            "teacher_model_name_or_path: is not given, must name a model (or model_name_or_path) to inspect"
        )
    examples = read_data(options.data, rationales=options.data.rationales)
    example, tokenizer = _find(examples, options.inspection.example), load_tokenizer(name, revision=revision)
    template = options.training.template = choose_template(options.training.template, examples, tokenizer)
    encoded = encode_example(
        *(example, tokenizer, template), max_length=options.training.max_length, segments=options.training.segments
    )
    yield Text(f"{example.id}: {len(encoded.input_ids)} tokens of {name}", style="bold")
    yield Text(render_for(example, template, tokenizer).text)
    for title, texts, spans in (
        ("step", encoded.step_texts, encoded.row_spans),
        ("key word", encoded.key_word_texts, encoded.key_spans),
    ):
        table = Table(title, "text", "tokens", "decoded tokens", title=f"{len(spans)} {title}s")
        for index, (text, (start, end)) in enumerate(zip(texts, spans, strict=True), 1):
            pieces = "|".join(tokenizer.decode([token]) for token in encoded.input_ids[start:end])
            table.add_row(str(index), Text(text), f"{start}..{end - 1}", Text(pieces.replace("\n", "\\n")))
        yield table
    if said := shortened([encoded]):
        yield Text(said)
    if not options.signals_folder.exists():
        yield Text(f"no teacher signals in {options.signals_folder}")
        return
    signals = load_signals(options)
    attention = signals.signal(example, encoded)
    if attention is None:
        yield Text("no key words, so no attention")
        return
    counts = torch.tensor([attention.shape[1]]), torch.tensor([attention.shape[2]])
    weights = teacher_layer_weights(attention[:, None], *counts, options.training.tau_1)[0]
    mixed = torch.einsum("l,lsm->sm", weights, attention)
    # Key words run down the page: there are more of them than steps.
    for first in range(0, len(mixed), STEPS_A_TABLE):
        steps = range(first, min(first + STEPS_A_TABLE, len(mixed)))
        table = Table("key word", *(f"step {step + 1}" for step in steps))
        table.title = f"attention of {signals.settings.teacher}, {options.training.row_reduction} over a step's rows"
        for index, text in enumerate(encoded.key_word_texts):
            table.add_row(f"{index + 1}: {text}", *(f"{value:.3f}" for value in mixed[steps.start : steps.stop, index]))
        yield table
    if signals.settings.signal_layers == "mixture":
        return
    most = weights.topk(min(5, len(weights)))
    named = ", ".join(f"{layer} ({weight:.3f})" for weight, layer in zip(*map(torch.Tensor.tolist, most), strict=True))
    yield Text(f"layers that count most, of {len(weights)}: {named}")


def _find(examples: list[Example], which: str) -> Example:
    for example in examples:
        if example.id == which:
            return example
    if which.isdigit() and int(which) < len(examples):
        return examples[int(which)]
    raise ValueError(f"example: is {which!r}, must be an id or a number from 0 to {len(examples) - 1}")
