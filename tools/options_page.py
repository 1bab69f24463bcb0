"""docs/options.md: the options of every command, from the code.

python -m tools.options_page > docs/options.md
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable, Iterator

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
    sections = (section for name in COMMANDS for section in ("", f"## mold {name}", "", *_command(name)))
    return "\n".join([HEAD.rstrip(), *sections, "", *_transformers(), ""])


def _command(name: str) -> Iterator[str]:
    yield COMMANDS[name]
    if name not in TAKES:
        actions = [] if name == "info" else run._parser("demo" if name == "demo" else None)._actions
        yield from ("", *(_table(map(_of_action, actions)) if actions else ["It has no options."]))
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
            yield from ("", f"**{title}**", "", *_table(map(_of_field, ours)))
    if name == "train":
        theirs = ["[all that can be followed](#of-transformers-trainingarguments)"]
    if theirs:
        yield from ("", f"Of transformers: {', '.join(theirs)}.")


def _table(rows: Iterable[tuple[str, str, str]]) -> Iterator[str]:
    yield from ("| option | default | |", "| --- | --- | --- |")
    for name, default, text in rows:
        said = " ".join(text.split()).replace("|", "\\|")
        yield f"| `{name}` | {default} | {said} |"


def _of_field(option: dataclasses.Field) -> tuple[str, str, str]:
    default = option.default
    if default is None and option.name in PRESETS["paper"]:
        said = f"`{PRESETS['paper'][option.name]}`, of the preset"
    else:
        said = "" if default is None or default is dataclasses.MISSING else f"`{default}`"
    return f"--{option.name}", said, option.metadata["help"]


def _of_action(action: argparse.Action) -> tuple[str, str, str]:
    name = action.option_strings[0] if action.option_strings else action.dest.upper()
    return name, f"`{action.default}`" if action.default not in (None, []) else "", action.help or ""


def _transformers() -> Iterator[str]:
    yield from ("## Of transformers' TrainingArguments", "", "`MoldConfig` and `mold train` know them all.", "")
    yield f"**Followed**: {', '.join(f'`{name}`' for name in sorted(FOLLOWED))}."
    yield ""
    yield f"**Without effect on the loss**: {', '.join(f'`{name}`' for name in sorted(NO_EFFECT))}."
    yield from ("", "**Refused**, unless they are as they are by default:", "", "| option | why |", "| --- | --- |")
    yield from (f"| `{name}` | {reason} |" for name, reason in sorted(REFUSED.items()))


if __name__ == "__main__":
    print(page(), end="")
