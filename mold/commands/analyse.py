"""mold analyse: attention to key words by step and layer, of any models on any data set with rationales."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rich import get_console
from rich.table import Table

from mold.commands.inputs import labels, read_data
from mold.commands.options import Options
from mold.commands.parsing import parse
from mold.data.chat import choose_template
from mold.evaluation.analysis import key_word_mass
from mold.files import write_atomically
from mold.models import load_model, load_tokenizer
from mold.processes import require_one_process
from mold.report import drawing, plots


def main(arguments: Sequence[str]) -> None:
    """Analyse, and show a table and where the plot is."""
    require_one_process("mold analyse")
    options = parse("analyse", arguments)
    table = Table("attention to key words, %", "beginning", "end", "evenly spread: beginning", "end", "examples")
    for name, entry in analyse(options).items():
        layers = [sum(layer[place] for layer in entry["mass"]) / len(entry["mass"]) for place in (0, -1)]
        shares = [f"{100 * value:.2f}" for value in (*layers, entry["even"][0], entry["even"][-1])]
        table.add_row(name, *shares, f"{entry['examples']} ({entry['without_key_words']} without key words)")
    get_console().print(table)
    get_console().print(str(options.folder / "analysis.svg"), soft_wrap=True)


def analyse(options: Options) -> dict[str, dict]:
    """Attention to key words by step and layer of every model on the data set; writes analysis.json and analysis.svg.

    Args:
        options: the data set, how many of its examples (eval_limit), and models (teacher and student where not given).

    Returns:
        By model, what `mold.evaluation.analysis.key_word_mass` found.
    """
    names = options.evaluation.models or [
        name
        for name in (options.teacher.teacher_model_name_or_path, options.student.model_name_or_path)
        if name is not None
    ]
    if not names:
        raise ValueError("models: is not given, must name the models to analyse (or a teacher, a student)")
    examples = read_data(options.data, rationales=options.data.rationales)[: options.evaluation.eval_limit]
    tokenizers = [load_tokenizer(name) for name in names]
    template = choose_template(options.training.template, examples, *tokenizers)
    found = {}
    for name, label in zip(names, labels(names), strict=True):
        model, tokenizer = load_model(name, dtype=options.teacher.teacher_dtype)
        found[label] = key_word_mass(
            model.to(options.training.device),
            tokenizer,
            examples,
            template,
            batch_size=options.teacher.extract_batch_size,
            max_length=options.training.max_length,
            progress=not options.training.disable_tqdm,
        )
    options.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(options.folder / "analysis.json", json.dumps(found, indent=1).encode())
    svg = drawing.figure_to_svg(plots.key_word_attention(found), "white")
    write_atomically(options.folder / "analysis.svg", svg.encode())
    return found
