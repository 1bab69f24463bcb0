"""How much a command says: --verbosity, of every command. Nothing heavy is imported here: it decides before imports.

`quiet` says results, warnings and errors; `normal` what is being done too, a line a logging step and our progress bars;
`debug` whatever any library says, and where an error is from.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings

OPTION = "--verbosity"
LEVELS = ("quiet", "normal", "debug")

_chosen = "normal"

_FRACTION = re.compile(r"_steps: 0?\.\d+ \(from args\)")


def choose(arguments: list[str]) -> list[str]:
    """Take --verbosity from a command's arguments, do what it says, and return the other arguments.

    Raises:
        ValueError: it is none of `LEVELS`.
    """
    global _chosen
    level, rest, given = "normal", [], iter(arguments)
    for argument in given:
        name, equals, value = argument.partition("=")
        if name != OPTION:
            rest.append(argument)
            continue
        level = value if equals else next(given, "")
        if level not in LEVELS:
            raise ValueError(f"verbosity: is {level!r}, must be one of {', '.join(LEVELS)}")
    _chosen = level
    loggers = [
        logging.getLogger(name)
        for name in ("bitsandbytes.backends.cpu.ops", "transformers.trainer_utils", "transformers.modelcard")
    ]
    for logger in loggers:
        logger.removeFilter(_is_for_the_user)
    if level == "debug":
        os.environ["TRANSFORMERS_VERBOSITY"] = "info"
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
        return rest
    if "tqdm" not in sys.modules:
        os.environ["TQDM_DISABLE"] = "1"  # bars that nobody asked for by an argument, as ours are
    for logger in loggers:
        logger.addFilter(_is_for_the_user)
    # peft reads it, whatever was asked for.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    return rest


def is_quiet() -> bool:
    """Whether results, warnings and errors are all that is asked for."""
    return _chosen == "quiet"


def is_debug() -> bool:
    """Whether all that there is is asked for."""
    return _chosen == "debug"


def _is_for_the_user(record: logging.LogRecord) -> bool:
    """Not bitsandbytes' line, wherever it is installed without `kernels`, about a CPU kernel that nobody asked for; not
    transformers' that a card lacks results, which ours has in a section of its own, and that a share of the steps is
    another number than the steps themselves, in a checkpoint."""
    message = record.getMessage()
    if "from kernels-community" in message or message.startswith("Dropping the following result"):
        return False
    differing = message.count("(from args)")
    return not differing or len(_FRACTION.findall(message)) < differing
