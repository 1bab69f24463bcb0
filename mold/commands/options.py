"""All options of a command, from a dictionary and the command line."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from transformers import HfArgumentParser

from mold.commands.train import Options
from mold.training.config import DataOptions, EvalOptions, MoldConfig, PromptOptions, StudentOptions, TeacherOptions


def make_options(chosen: Mapping, arguments: Sequence[str], command: str, source: str) -> Options:
    """Options from chosen values and from command-line arguments, which win.

    Args:
        chosen: values by option name.
        arguments: such as ["--beta", "3"].
        command: of mold, for messages.
        source: where the chosen values come from, for messages.

    Raises:
        ValueError: an option is unknown or has a value that it must not have.
    """
    parser = HfArgumentParser(
        (DataOptions, TeacherOptions, StudentOptions, MoldConfig, PromptOptions, EvalOptions),
        prog=f"mold {command}",
        allow_abbrev=False,
        epilog="--config FILE: a YAML file of these options (key: value); the command line wins.",
    )
    known = sorted(name.removeprefix("--") for action in parser._actions for name in action.option_strings)
    flat = []
    for key, value in chosen.items():
        if key not in known:
            raise ValueError(f"{source} has the unknown option {key!r}{_nearest(key, known)}")
        if value is None:
            continue
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        flat += [f"--{key}", *map(str, values)]
    *groups, unknown = parser.parse_args_into_dataclasses(
        [*flat, *arguments], look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        name = unknown[0].removeprefix("--").partition("=")[0]
        raise ValueError(f"{unknown[0]}: is no option of mold {command}{_nearest(name, known)}")
    return Options(*groups)


def read_yaml(path: Path, name: str) -> dict:
    """The mapping in a YAML file.

    Raises:
        ValueError: there is no such file, it is no YAML, or holds something else; begins with `name`.
    """
    if not path.is_file():
        raise ValueError(f"{name}: {path} does not exist")
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{name}: {path} is no YAML ({' '.join(str(error).split())})") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{name}: {path} holds {type(loaded).__name__}, must hold options (key: value)")
    return loaded


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {close[0]}?" if close else "; --help lists them"
