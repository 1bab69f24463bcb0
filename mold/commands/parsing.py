"""How a command's options are read, checked and shown.

They come from defaults, a YAML file (--config) and the command line, each winning over the one before.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.utils import logging

from mold.commands.options import GROUPS, NEEDS, OURS, PLACE, TAKES, Options, names
from mold.commands.verbosity import is_quiet
from mold.files import check_writable
from mold.training.config import MoldConfig

logger = logging.get_logger(__name__)

_LISTS = {option.name for group in GROUPS.values() for option in fields(group) if "list" in str(option.type)}

# A plan and a look need no device of their own, and must not be refused for one that is not here.
_FIXED = {"plan": {"use_cpu": True}, "inspect": {"use_cpu": True}}


def pick(command: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the values that the command takes as options."""
    return {name: value for name, value in values.items() if name in TAKES[command]}


def check_known(source: str, values: Mapping[str, Any], commands: Sequence[str]) -> None:
    """Raise a ValueError that names the source unless every key is an option of one of the commands."""
    for name in values:
        if not any(name in TAKES[command] for command in commands):
            raise ValueError(f"{source} has the unknown option {name!r}{_hint(str(name), commands)}")


def make_options(command: str, chosen: Mapping[str, Any], arguments: Sequence[str] = (), source: str = "") -> Options:
    """Options from chosen values and from command-line arguments, which win.

    Args:
        command: of mold.
        chosen: values by option name.
        arguments: such as ["--beta", "3"].
        source: where the chosen values come from, for messages.

    Raises:
        ValueError: an option is none of this command, has a value that it must not have, or is missing.
    """
    check_known(source, chosen, [command])
    flat = []
    for name, value in chosen.items():
        if isinstance(value, list):
            if name not in _LISTS:
                raise ValueError(f"{name}: is {value!r}, must be one value")
            flat += [f"--{name}", *map(str, value)]
        elif value is not None:
            flat.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    found, unknown = Parser([*_parsed_groups(command)]).parse_known_args([*flat, *arguments])
    if unknown:
        name = unknown[0].partition("=")[0]
        hint = _hint(name.lstrip("-").replace("-", "_"), [command]) if name.startswith("-") else ""
        raise ValueError(f"{name}: is no option of mold {command}{hint}")
    for name in NEEDS[command]:
        if getattr(found, name) is None:
            raise ValueError(f"{name}: is not given, must be: mold {command} --{name} ...")
    groups = {}
    for attribute, group in GROUPS.items():
        values = {name: getattr(found, name) for name in names(group) if name in TAKES[command]}
        if group is MoldConfig:
            values |= _FIXED.get(command, {})
        groups[attribute] = group(**values)
    options = Options(**groups)
    options.training.disable_tqdm |= is_quiet()  # no option that was chosen: a run goes on without it
    return options


def parse(command: str, arguments: Sequence[str], defaults: Mapping[str, Any] | None = None) -> Options:
    """A command's options from defaults, the YAML file of --config and the command line.

    What the file has for other commands is left out, and said.

    Raises:
        ValueError: as of `make_options`; the file has an option that no command has; output_dir cannot be written.
    """
    config, arguments = Parser([_File]).parse_known_args(arguments)
    chosen = dict(defaults or {})
    if config.config is not None:
        values, source = read_yaml(Path(config.config), "--config"), f"--config: {config.config}"
        check_known(source, values, list(TAKES))
        chosen |= pick(command, values)
        if others := sorted(values.keys() - chosen.keys()):
            logger.warning(f"{source}: left out what mold {command} does not take: {', '.join(others)}")
    options = make_options(command, chosen, arguments)
    if "output_dir" in NEEDS[command]:
        check_writable(options.folder, "output_dir")
    return options


@dataclass
class _File:
    config: str | None = field(default=None, metadata={"help": "YAML file of options; the command line wins."})


class Parser(HfArgumentParser):
    """An argument parser whose errors are ValueErrors of one line."""

    def __init__(self, groups: Sequence[type] = (), **options):
        super().__init__(groups, allow_abbrev=False, add_help=False, **options)

    def error(self, message: str):
        # argparse: argument --a_b/--a-b: invalid float value: 'x'
        if wrong := re.fullmatch(r"argument --(\w+)(?:/\S+)?: invalid (\w+) value: (.*)", message, re.DOTALL):
            raise ValueError(f"{wrong[1]}: is {wrong[3]}, must be {wrong[2]}")
        raise ValueError(re.sub(r"^argument --(\w+)(?:/\S+)?:", r"\1:", message))


def _parsed_groups(command: str) -> Iterator[type]:
    """The command's groups with the fields that it takes, for the parser."""
    for group in GROUPS.values():
        hints, taken = get_type_hints(group), []
        for option in fields(group):
            if option.name not in TAKES[command]:
                continue
            # Ours are checked by the group itself, in words of ours.
            theirs = option.name in names(TrainingArguments)
            metadata = {k: v for k, v in option.metadata.items() if theirs or k == "help"}
            default = option.default
            if default is dataclasses.MISSING:
                made = field(default_factory=option.default_factory, metadata=metadata)
            else:
                made = field(default=default, metadata=metadata)
            taken.append((option.name, hints[option.name], made))
        if taken:
            yield dataclasses.make_dataclass(group.__name__, taken)


def help_text(command: str) -> str:
    """All options of a command, those of its own first and those of transformers last."""
    sections: dict[str, list] = {}
    for group in (*GROUPS.values(), _File):
        for option in fields(group):
            if group is not _File and option.name not in TAKES[command]:
                continue
            title = (group.__doc__ or "").partition(".")[0]
            if group is _File or option.name in PLACE:
                title = "Run"
            elif group is MoldConfig:
                title = "Texts and method" if option.name in OURS else "transformers' training options"
            sections.setdefault(title, []).append(option)
    width, lines = max(80, min(120, shutil.get_terminal_size().columns)), []
    last = "transformers' training options"
    for title in sorted(sections, key=lambda name: name == last):
        lines.append(f"{title}:")
        for option in sections[title]:
            lines += _help_lines(option, width)
    return "\n".join(lines)


def _help_lines(option: dataclasses.Field, width: int, column: int = 31) -> list[str]:
    text = " ".join(option.metadata.get("help", "").split())
    if option.name in names(TrainingArguments):  # theirs are paragraphs
        text = text.partition(". ")[0].rstrip(".") + "."
    default = option.default
    if default not in (dataclasses.MISSING, None, False, ""):
        default = getattr(default, "value", default)
        if not (isinstance(default, str) and not default.isprintable()):  # as a template is
            text += f" [{default}]"
    name = f"  --{option.name}"
    wrapped = textwrap.wrap(text, width - column, break_on_hyphens=False) or [""]
    if len(name) + 1 > column:
        return [name, *(" " * column + line for line in wrapped)]
    return [name.ljust(column) + wrapped[0], *(" " * column + line for line in wrapped[1:])]


def read_yaml(path: Path, name: str) -> dict:
    """The mapping in a YAML file.

    Raises:
        ValueError: there is no such file, it is no YAML, or holds something else; begins with `name`.
    """
    if not path.is_file():
        raise ValueError(f"{name}: {path} does not exist")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: {path} is no UTF-8 ({error})") from error
    loaded = parse_yaml(text, f"{name}: {path}")
    loaded = {} if loaded is None else loaded
    if not isinstance(loaded, dict):
        raise ValueError(f"{name}: {path} holds {type(loaded).__name__}, must hold options (key: value)")
    return loaded


def parse_yaml(text: str, source: str):
    """What a YAML text holds.

    Raises:
        ValueError: it is no YAML; begins with `source`.
    """
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{source} is no YAML ({' '.join(str(error).split())})") from error
    except RecursionError as error:
        raise ValueError(f"{source} is nested too deep to be read") from error


def _hint(name: str, commands: Sequence[str]) -> str:
    """What may have been meant by an option that none of the commands takes."""
    ours = {option for command in commands for option in TAKES[command]}
    everywhere = {option for taken in TAKES.values() for option in taken}
    for known in (ours, everywhere):
        for close in difflib.get_close_matches(name, sorted(known), 1, 1.0 if name in everywhere else 0.6):
            owners = ", ".join(command for command in TAKES if close in TAKES[command])
            if close == name:
                return f"; it is one of mold {owners}"
            return f"; did you mean {close}{'' if close in ours else f', of mold {owners}'}?"
    return "; --help lists them"
