"""The attention modules of a model that a watch may be of, and those that are named."""

from __future__ import annotations

import fnmatch
import inspect
import re
from typing import Any

import torch


def choose_modules(model, layers) -> dict[str, torch.nn.Module]:
    """The attention modules that `layers` of `mold.watch` names, as it names them."""
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"model: is {model!r}, must be a loaded model")
    kinds = {kind for kind in set(map(type, model.modules())) if _calls_interface(kind)}
    found = {name: module for name, module in model.named_modules() if type(module) in kinds}
    if not found:
        raise ValueError(
            f"{type(model).__name__}: its attention cannot be watched (no layer of it asks transformers' attention "
            "interface for the function that computes it); use a model family that does, for example Llama or BERT"
        )
    names = [layers] if isinstance(layers, str | int) else layers
    if names is not None and all(isinstance(name, str) for name in names) and names:
        return _named(names, found)
    decoder: Any = getattr(model, "get_decoder", lambda: model)()
    inside = set(decoder.modules())
    stack = [name for name, module in found.items() if module in inside] or list(found)
    stack = [name for name in stack if _pattern(name) == _pattern(stack[0])]
    if names is None:
        return {name: found[name] for name in stack}
    numbers = [re.findall(r"\d+", name) for name in stack]
    known = list(range(len(stack)))
    if all(len(number) == 1 for number in numbers):
        known = [int(number) for (number,) in numbers]
    of_number: dict[Any, str] = dict(zip(known, stack, strict=True))
    count = max(known) + 1
    chosen = [number + count if isinstance(number, int) and number < 0 else number for number in names]
    wrong = [given for given, number in zip(names, chosen, strict=True) if number not in of_number]
    if wrong or not chosen:
        raise ValueError(
            f"layers: is {layers}, must be numbers of {first_to_last(stack)} ({first_to_last(map(str, known))}), or "
            f"names: {', '.join(dict.fromkeys(map(_pattern, found)))}"
        )
    return {of_number[number]: found[of_number[number]] for number in chosen}


def _named(names, found):
    chosen: dict[str, torch.nn.Module] = {}
    for pattern in names:
        of_pattern = {name: module for name, module in found.items() if fnmatch.fnmatchcase(name, pattern)}
        if not of_pattern:
            raise ValueError(
                f"layers: {pattern!r} is no attention module of the model that can be watched, must be one of "
                f"{', '.join(dict.fromkeys(map(_pattern, found)))}"
            )
        chosen |= of_pattern
    return chosen


def _pattern(name):
    return re.sub(r"\d+", "*", name)


def first_to_last(names) -> str:
    """The names, of which an error shows no more than two."""
    first, *rest = names
    return f"{first} to {rest[-1]}" if rest else first


def _calls_interface(kind: type) -> bool:
    """Whether a module class asks transformers for its attention function."""
    functions = (value for base in kind.__mro__[: -len(torch.nn.Module.__mro__)] for value in vars(base).values())
    return any(
        "get_interface" in inspect.unwrap(function).__code__.co_names
        for function in functions
        if inspect.isfunction(inspect.unwrap(function))
    )
