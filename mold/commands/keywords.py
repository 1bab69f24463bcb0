"""mold keywords: the key words that a teacher names for a data set's examples.

It goes on where a killed run stopped (see `mold.generation.batches.Journal`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence

from mold.commands.generate import JOURNAL, RATIONALES, show_counts, teacher_settings
from mold.commands.inputs import load_teacher, read_data
from mold.commands.options import Options
from mold.commands.parsing import parse
from mold.files import digest, write_atomically, write_jsonl
from mold.generation.batches import Journal
from mold.generation.keywords import name_keywords
from mold.generation.prompting import load_prompt, use_chat
from mold.processes import require_one_process


def main(arguments: Sequence[str]) -> None:
    """Name the key words, and show what came of it."""
    require_one_process("mold keywords")
    options = parse("keywords", arguments)
    show_counts(keywords(options), options.folder / RATIONALES)


def keywords(options: Options) -> Counter:
    """The teacher's key words of the data set's examples; writes rationales.jsonl with them and keywords.json."""
    examples = read_data(options.data, rationales=options.data.rationales)[: options.data.num_train]
    prompting = options.prompting
    prompt = load_prompt("keywords" if prompting.prompt == "auto" else prompting.prompt, prompting.num_shots)
    teacher = load_teacher(options)
    chat = use_chat(teacher[1], prompting.chat)
    settings = {
        "stage": "keywords",
        "teacher": options.teacher.teacher_model_name_or_path,
        "examples": digest([(e.id, e.question, e.rationale, e.history) for e in examples]),
        "batch_size": options.generation.generate_batch_size,
        "max_new_tokens": options.generation.max_new_tokens,
        **teacher_settings(teacher, prompt, chat),
    }
    examples, counts = name_keywords(
        examples,
        Journal(options.folder / JOURNAL, settings),
        teacher,
        prompt,
        chat=chat,
        batch_size=options.generation.generate_batch_size,
        max_new_tokens=options.generation.max_new_tokens,
        progress=not options.training.disable_tqdm,
    )
    write_jsonl(options.folder / RATIONALES, [{**vars(e), "keywords": list(e.keywords)} for e in examples])
    write_atomically(options.folder / "keywords.json", json.dumps(counts, indent=1).encode())
    return counts
