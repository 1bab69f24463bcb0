"""Prompts for a teacher: instructions and worked examples from data files, as a chat or as plain text."""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from transformers import PreTrainedTokenizerBase

from mold.data.answers import answer_kind
from mold.data.chat import apply_chat_template
from mold.data.examples import Example
from mold.data.tokens import check_no_special_tokens, tokenize

_BY_KIND = {"number": "math", "choice": "commonsense", "yes_no": "yes_no"}


@dataclass(frozen=True)
class PromptFile:
    """A task's prompt.

    instruction: what the teacher is told first.
    shots: worked examples; few-shot prompting shows them, zero-shot prompting none.
    hint: the question with the right answer, of the second stage; has {question} and {answer}. Empty: no such stage.
    """

    instruction: str
    shots: tuple[dict, ...]
    hint: str = ""


def load_prompt(name: str, num_shots: int | None = None) -> PromptFile:
    """A prompt of the package ("math", "commonsense", "yes_no", "keywords") or of a YAML file of the same form.

    Args:
        name: of the prompt or file.
        num_shots: how many of its worked examples to show; None: all, 0: zero-shot.

    Raises:
        ValueError: there is no such prompt, it lacks something, or it has fewer examples than num_shots.
    """
    packaged = importlib.resources.files("mold") / "prompts"
    names = sorted(Path(entry.name).stem for entry in packaged.iterdir() if entry.name.endswith(".yaml"))
    source = packaged / f"{name}.yaml" if name in names else Path(name)
    if not source.is_file():
        raise ValueError(f"prompt: is {name!r}, must be one of {', '.join(names)}, or a YAML file")
    try:
        loaded = yaml.safe_load(source.read_text(encoding="utf-8"))
        shots = tuple({key: value for key, value in shot.items()} for shot in loaded["shots"])
        prompt = PromptFile(loaded["instruction"], shots, loaded.get("hint", ""))
        prompt.hint.format(question="", answer="")
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"prompt: {source} must hold instruction, shots and maybe hint ({error!r})") from error
    if num_shots is None:
        return prompt
    if not 0 <= num_shots <= len(prompt.shots):
        raise ValueError(f"num_shots: is {num_shots}, must be from 0 to the {len(prompt.shots)} that {name!r} has")
    return PromptFile(prompt.instruction, prompt.shots[:num_shots], prompt.hint)


def prompt_for(examples: Sequence[Example]) -> str:
    """The name of the packaged prompt for a data set, told from its answers.

    Raises:
        ValueError: its answers are of several kinds, or of a kind no packaged prompt is for.
    """
    kinds = sorted({answer_kind(example.answer) for example in examples})
    if len(kinds) != 1 or kinds[0] not in _BY_KIND:
        raise ValueError(
            f"prompt: is auto, but the answers are of the kinds {', '.join(kinds)}; name a prompt or a YAML file"
        )
    return _BY_KIND[kinds[0]]


def use_chat(tokenizer: PreTrainedTokenizerBase, chat: str) -> bool:
    """Whether prompts are chats: "auto" where the tokenizer has a chat template, "on", "off".

    Raises:
        ValueError: it is "on" and the tokenizer has none, or it is something else.
    """
    if chat not in ("auto", "on", "off"):
        raise ValueError(f"chat: is {chat!r}, must be 'auto', 'on' or 'off'")
    if chat == "on" and not tokenizer.chat_template:
        raise ValueError("chat: is 'on', but the teacher's tokenizer has no chat template; must be 'off' or 'auto'")
    return chat == "on" or (chat == "auto" and bool(tokenizer.chat_template))


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    instruction: str,
    turns: Sequence[tuple[str, str]],
    question: str,
    opening: str,
    chat: bool,
    history: Sequence[tuple[str, str]] = (),
) -> list[int]:
    """Token ids of a prompt that ends where the teacher has to go on.

    Args:
        tokenizer: the teacher's.
        instruction: stands before everything else; in a chat at the head of the first message of a user, since not
            every chat template takes a system message.
        turns: what is asked and what is answered in each worked example.
        question: what is asked now.
        opening: what a plain prompt has between a question and its answer, such as "\\nReasoning:".
        chat: whether to use the tokenizer's chat template.
        history: (role, text) of the messages before the question; system messages stand before the worked examples.

    Raises:
        ValueError: there are messages before the question and the prompt is no chat; the chat template refuses the
            messages, or a text holds the spelling of a special token.
    """
    said = [(f"message of {role}", text) for role, text in history]
    check_no_special_tokens(tokenizer, [("question", question), *said])
    if not chat:
        if history:
            raise ValueError(
                "chat: is off, or the tokenizer has no chat template; must be on for an example with messages before "
                "the question"
            )
        worked = [f"{asked}{opening} {answered}" for asked, answered in turns]
        return tokenize(tokenizer, "\n\n".join([instruction, *worked, question + opening]))[0]
    messages = [{"role": role, "content": text} for role, text in history if role == "system"]
    first = len(messages)
    for asked, answered in turns:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    messages += [{"role": role, "content": text} for role, text in history if role != "system"]
    messages.append({"role": "user", "content": question})
    messages[first]["content"] = f"{instruction}\n\n{messages[first]['content']}"
    text = apply_chat_template(tokenizer, messages, add_generation_prompt=True)
    return tokenize(tokenizer, text, special_tokens=False)[0]


def example_prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    instruction: str,
    turns: Sequence[tuple[str, str]],
    example: Example,
    asked: str,
    opening: str,
    chat: bool,
) -> list[int]:
    """`prompt_ids` of an example, behind the messages before its question.

    Args:
        example: whose question it is.
        asked: what is asked about it.
        tokenizer, instruction, turns, opening, chat: see `prompt_ids`.

    Raises:
        ValueError: as `prompt_ids`; names the example.
    """
    try:
        return prompt_ids(tokenizer, instruction, turns, asked, opening, chat, example.history)
    except ValueError as error:
        raise ValueError(f"example {example.id}: {error}") from error
