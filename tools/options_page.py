"""docs/options.md: the options of every command, from the code.

python -m tools.options_page > docs/options.md
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator

from mold.commands import run
from mold.commands.cli import COMMANDS
from mold.commands.options import GROUPS, NEEDS, TAKES
from mold.training.config import PRESETS, MoldConfig
from mold.training.training_options import FOLLOWED, NO_EFFECT, REFUSED

HEAD = """# Options

Made from the code by `python -m tools.options_page`; `mold COMMAND --help` shows the same. Options come from
`--config FILE.yaml` and from the command line, which wins; one that a command does not know is an error, and so is a
value that it cannot have. A file may hold options of several commands: each takes its own and says what it left out.
`--traceback` beside any options shows where an error is from.

What a command takes of transformers' TrainingArguments is named, and described in
[transformers' documentation](https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments).
"""


def page() -> str:
    """The page, in Markdown."""
    os.environ["COLUMNS"] = "100"  # argparse asks for it
    sections = (section for name in COMMANDS for section in ("", f"## mold {name}", "", *_command(name)))
    return "\n".join([HEAD.rstrip(), *sections, "", *_transformers(), ""])


def _command(name: str) -> Iterator[str]:
    yield COMMANDS[name]
    if name not in TAKES:
        yield from ("", *(["It has no options."] if name == "info" else _as_argparse(name)))
        return
    if NEEDS[name]:
        yield f"Needed: {', '.join(f'`--{needed}`' for needed in NEEDS[name])}."
    theirs = []
    for group in GROUPS.values():
        taken = [option for option in dataclasses.fields(group) if option.name in TAKES[name]]
        # What is transformers' changes with its versions.
        ours = [option for option in taken if group is not MoldConfig or option.name in MoldConfig.__annotations__]
        theirs += [f"`--{option.name}`" for option in taken if option not in ours]
        if ours:
            title = "Texts, method and place" if group is MoldConfig else (group.__doc__ or "").partition(".")[0]
            yield from ("", f"**{title}**", "", "| option | default | |", "| --- | --- | --- |", *map(_row, ours))
    if name == "train":
        theirs = ["[all that can be followed](#of-transformers-trainingarguments)"]
    if theirs:
        yield from ("", f"Of transformers: {', '.join(theirs)}.")


def _row(option: dataclasses.Field) -> str:
    default = option.default
    if default is None and option.name in PRESETS["paper"]:
        said = f"`{PRESETS['paper'][option.name]}`, of the preset"
    elif default is None or default is dataclasses.MISSING:
        said = ""
    else:
        said = f"`{default}`"
    text = " ".join(option.metadata["help"].split()).replace("|", "\\|")
    return f"| `--{option.name}` | {said} | {text} |"


def _as_argparse(name: str) -> list[str]:
    return ["```text", run.help_text("demo" if name == "demo" else None), "```"]


def _transformers() -> Iterator[str]:
    yield from ("## Of transformers' TrainingArguments", "", "`MoldConfig` and `mold train` know them all.", "")
    yield f"**Followed**: {', '.join(f'`{name}`' for name in sorted(FOLLOWED))}."
    yield ""
    yield f"**Without effect on the loss**: {', '.join(f'`{name}`' for name in sorted(NO_EFFECT))}."
    yield from ("", "**Refused**, unless they are as they are by default:", "", "| option | why |", "| --- | --- |")
    yield from (f"| `{name}` | {reason} |" for name, reason in sorted(REFUSED.items()))


if __name__ == "__main__":
    print(page(), end="")
