"""mold generate: a teacher's rationales for a data set's questions.

It goes on where a killed run stopped (see `mold.generation.batches.Journal`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich import get_console
from rich.table import Table

from mold.commands.inputs import load_teacher, read_data
from mold.commands.options import Options
from mold.commands.parsing import parse
from mold.data.examples import DEFAULT_TEMPLATE
from mold.files import digest, write_atomically, write_jsonl
from mold.generation.batches import Journal
from mold.generation.prompting import load_prompt, prompt_for, use_chat
from mold.generation.rationales import Sampling, read_given, write_rationales
from mold.models import weights_fingerprint
from mold.processes import require_one_process

RATIONALES = "rationales.jsonl"
JOURNAL = "journal.jsonl"


def main(arguments: Sequence[str]) -> None:
    """Generate, and show what came of it."""
    require_one_process("mold generate")
    options = parse("generate", arguments)
    show_counts(generate(options), options.folder / RATIONALES)


def generate(options: Options) -> Counter:
    """A teacher's rationales for the data set's questions; writes rationales.jsonl and generate.json.

    Rationales from elsewhere (`rationales`) come first; without a teacher they are checked alone.

    Returns:
        Counts of what happened, as in generate.json.
    """
    prompting, name = options.prompting, options.teacher.teacher_model_name_or_path
    examples = read_data(options.data, require_rationale=False)[: options.data.num_train]
    given, strangers = (None, 0)
    if options.data.rationales is not None:
        given, strangers = read_given(options.data.rationales, examples)
    if name is None and given is None:
        raise ValueError("teacher_model_name_or_path: is not given, must name the teacher (or give rationales)")
    sampling = _sampling(options)
    teacher = prompt = None
    chat = False
    template = options.training.template or DEFAULT_TEMPLATE
    settings = {"sampling": asdict(sampling), "template": template}
    settings |= {
        "questions": digest([(e.id, e.question, e.answer, e.history) for e in examples]),
        "given": digest(given),
    }
    if name is not None:
        task = prompt_for(examples) if prompting.prompt == "auto" else prompting.prompt
        prompt = load_prompt(task, prompting.num_shots)
        teacher = load_teacher(options)
        chat = use_chat(teacher[1], prompting.chat)
        settings |= teacher_settings(teacher, prompt, chat)
    rows, counts = write_rationales(
        examples,
        Journal(options.folder / JOURNAL, {"stage": "generate", "teacher": name, **settings}),
        sampling,
        teacher=teacher,
        prompt=prompt,
        chat=chat,
        template=template,
        given=given,
        progress=not options.training.disable_tqdm,
    )
    if strangers:
        counts["given: of no question"] = strangers
    write_jsonl(options.folder / RATIONALES, rows)
    write_atomically(options.folder / "generate.json", json.dumps(counts, indent=1).encode())
    return counts


def check_prompting(options: Options) -> None:
    """Raise a ValueError if a teacher cannot be prompted with these options, as far as that is known without it."""
    _sampling(options)
    if options.prompting.prompt != "auto":
        load_prompt(options.prompting.prompt, options.prompting.num_shots)


def _sampling(options: Options) -> Sampling:
    prompting = options.prompting
    return Sampling(
        prompting.temperature,
        prompting.top_p,
        prompting.num_tries,
        prompting.hint,
        options.training.seed,
        options.generation.generate_batch_size,
        options.generation.max_new_tokens,
    )


def teacher_settings(teacher, prompt, chat: bool) -> dict:
    """What decides a teacher's answers, for a journal."""
    model, _ = teacher
    weights = {"weights": weights_fingerprint(model), "dtype": str(model.dtype)}
    return {**weights, "prompt": digest(asdict(prompt)), "chat": chat}


def show_counts(counts: dict, path: Path) -> None:
    """The counts of a stage, and where its rows are."""
    table = Table("what", "count")
    for name, count in sorted(counts.items()):
        table.add_row(name, str(count))
    get_console().print(table)
    get_console().print(str(path), soft_wrap=True)
