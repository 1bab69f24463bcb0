"""mold extract: the teacher's stepwise attention of a data set, into a cache."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from mold.commands.inputs import load_split, load_teacher, read_data
from mold.commands.options import DataOptions, Options
from mold.commands.parsing import parse
from mold.commands.progress import show
from mold.data.chat import choose_template
from mold.data.examples import Example
from mold.method.extraction import extract_signals
from mold.method.signal_settings import SignalSettings
from mold.method.signals import SignalCache


def main(arguments: Sequence[str]) -> None:
    """Extract, and say how many signals there are."""
    options = parse("extract", arguments)
    extract_and_say(options, examples_of(options.data))


def extract_and_say(options: Options, examples: Sequence[Example], teacher=None) -> float:
    """`extract`, with a line for the user; returns its seconds."""
    start = time.perf_counter()
    cache = extract(options, examples, teacher)
    seconds = time.perf_counter() - start
    show(f"{len(cache)} teacher signals in {options.signals_folder} ({seconds:.0f} s)", soft_wrap=True, highlight=False)
    return seconds


def examples_of(options: DataOptions) -> list[Example]:
    """All examples of the data set, or those that a training with num_train of them takes and holds out."""
    if options.num_train is None:
        return read_data(options, rationales=options.rationales)
    train, held_out = load_split(options)
    return train + held_out


def extract(options: Options, examples: Sequence[Example], teacher=None) -> SignalCache:
    """The teacher's signals of the examples, extracted where the cache does not have them yet."""
    model, tokenizer = teacher or load_teacher(options)
    settings = SignalSettings.of(
        model,
        options.teacher.teacher_model_name_or_path,
        choose_template(options.training.template, examples, tokenizer),
        options.training.row_reduction,
        options.teacher.teacher_model_revision,
        options.training.segments,
        **_stored(options),
    )
    return extract_signals(
        model.to(options.training.device),
        tokenizer,
        examples,
        options.signals_folder,
        settings,
        batch_size=options.teacher.extract_batch_size,
        shard_size=options.teacher.extract_shard_size,
        max_length=options.training.max_length,
        progress=not options.training.disable_tqdm,
    )


def _stored(options: Options) -> dict:
    """How the cache holds the teacher's layers."""
    stored: dict[str, Any] = {
        "signal_dtype": options.teacher.signal_dtype,
        "signal_layers": options.teacher.signal_layers,
    }
    if options.teacher.signal_layers == "mixture":
        left_out = options.training.mol_teacher_layers_left_out or []
        stored |= {"tau_1": options.training.tau_1, "teacher_layers_left_out": left_out}
    return stored
