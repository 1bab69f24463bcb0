"""Examples as conversations, rendered by a tokenizer's chat template.

A template that holds {assistant} is a chat: what stands before it is the user's message, what stands behind it the
assistant's. The tokenizer's chat template is applied to the two messages with the placeholders still in them. That
gives an ordinary template of the whole text, so question, rationale and answer are found as in any other, however the
chat template moves them; and that the chat template says the same of the real messages is checked for every example.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from mold.data.examples import ASSISTANT, DEFAULT_TEMPLATE, Example, RenderedText, check_template, render
from mold.data.tokens import check_no_special_tokens

logger = logging.get_logger(__name__)

CHAT_TEMPLATE = "{question}{assistant}{rationale}\nAnswer: {answer}"
"""The template for models with a chat template: the question is the user's message."""

TODAY = datetime(2024, 7, 26)
"""The date and time that every chat template is told, so that what is extracted today is trained on tomorrow: the date
that Llama's templates have without a clock."""
_RECORD = "mold_template"
_NOW = re.compile(r"""strftime_now\s*\(\s*(["'])(.*?)\1\s*\)""")


def choose_template(
    template: str | None,
    examples: Sequence[Example],
    *tokenizers: PreTrainedTokenizerBase,
    tasks: Sequence[str] = ("joint",),
) -> str:
    """The one template of all texts of a run: the given one, else that of the chats, else `DEFAULT_TEMPLATE`.

    Args:
        template: None: chosen from the data, `CHAT_TEMPLATE` where they are chats.
        examples: the training examples.
        tokenizers: of the models that read the texts, the student's, the teacher's.
        tasks: what the texts are for (see `mold.data.examples.render`); only "joint" can be a chat.

    Raises:
        ValueError: the given one does not fit; none is given and some of the examples are chats, but not all, or some
            of the tokenizers have a chat template, but not all.
    """
    if template is not None:
        check_template(template)
        return template
    chats = sum(example.chat or bool(example.history) for example in examples)
    if not chats:
        return DEFAULT_TEMPLATE
    can_chat = [bool(tokenizer.chat_template) for tokenizer in tokenizers]
    plain = "the tokenizer has no chat template" if not any(can_chat) else ""
    if tuple(tasks) != ("joint",):
        plain = f"texts of the task {tasks[0]!r} are no chats"
    if plain:
        logger.warning(
            f"template: {chats} of {len(examples)} examples are chats, written as {DEFAULT_TEMPLATE!r}: {plain}"
        )
        return DEFAULT_TEMPLATE
    if not all(can_chat):
        raise ValueError(
            f"template: is not given, must be one without {ASSISTANT} such as {DEFAULT_TEMPLATE!r}: {chats} examples "
            "are chats, but not all models' tokenizers have a chat template"
        )
    if chats < len(examples):
        raise ValueError(
            f"template: is not given, must be {CHAT_TEMPLATE!r}, {DEFAULT_TEMPLATE!r} or another: {chats} examples are "
            f"chats, {len(examples) - chats} are not"
        )
    return CHAT_TEMPLATE


def record_template(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Note with a student's tokenizer, which is saved with it, which texts it is trained on."""
    tokenizer.init_kwargs[_RECORD] = template


def recorded_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The template that the tokenizer's model was trained with, None where nothing says it."""
    return tokenizer.init_kwargs.get(_RECORD)


def render_for(
    example: Example, template: str, tokenizer: PreTrainedTokenizerBase, task: str = "joint"
) -> RenderedText:
    """The training text of an example for a model.

    Args:
        example: question, rationale, answer and the messages before them.
        template, task: see `mold.data.examples.render`; with {assistant} it is rendered by the tokenizer's chat
            template.
        tokenizer: the model's.

    Raises:
        ValueError: the template does not fit, the tokenizer has no chat template, or one that changes what the messages
            say, or refuses them; the example has messages before the question, which only a chat has, or holds the
            spelling of a special token.
    """
    parts = [("question", example.question), ("rationale", example.rationale), ("answer", example.answer)]
    check_no_special_tokens(tokenizer, [*parts, *((f"message of {role}", text) for role, text in example.history)])
    if ASSISTANT not in template:
        if example.history:
            raise ValueError(
                f"template: is {template!r}, must hold {ASSISTANT} for an example with messages before the question "
                f"(for instance {CHAT_TEMPLATE!r})"
            )
        return render(example, template, task)
    if task != "joint":
        raise ValueError(f"template: holds {ASSISTANT}, must be without it for texts of the task {task!r}")
    check_template(template)
    if not tokenizer.chat_template:
        raise ValueError(
            f"template: holds {ASSISTANT}, but {type(tokenizer).__name__} has no chat template; use a template without"
        )
    layout = _apply(tokenizer, example.history, template)
    check_template(layout)
    rendered = render(example, layout)._replace(special_tokens=False)
    filling = {"{question}": example.question, "{rationale}": example.rationale, "{answer}": example.answer}
    filled = re.sub("|".join(filling), lambda found: filling[found[0]], template)
    if _apply(tokenizer, example.history, filled) != rendered.text:
        raise ValueError(
            f"template: the chat template of {type(tokenizer).__name__} changes the messages of this text, so its "
            f"steps cannot be found: {rendered.text!r}"
        )
    return rendered


def _apply(tokenizer: PreTrainedTokenizerBase, history: Sequence[tuple[str, str]], template: str) -> str:
    user, assistant = template.split(ASSISTANT)
    turns = [*history, ("user", user), ("assistant", assistant)]
    messages = [{"role": role, "content": content} for role, content in turns]
    # White space behind the end of the last turn is nothing to learn.
    return apply_chat_template(tokenizer, messages).rstrip()


def apply_chat_template(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], add_generation_prompt: bool = False
) -> str:
    """The text of messages in the tokenizer's chat template, whose clock stands at `TODAY`.

    Raises:
        ValueError: the template refuses them (a system message, two turns of a user), is none, or asks for a time whose
            format is no text in it.
    """
    try:
        # transformers hands a template no clock but its own.
        template = _NOW.sub(lambda asked: repr(TODAY.strftime(asked[2])), tokenizer.get_chat_template())
        if re.search(r"strftime_now\s*\(", template):
            raise ValueError("it asks strftime_now for today's date in a format that is no text")
        return tokenizer.apply_chat_template(
            list(messages),
            chat_template=template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            date_string=TODAY.strftime("%d %b %Y"),
        )
    except Exception as error:  # a template raises jinja's errors and Python's own, of whatever it computes
        roles = ", ".join(message["role"] for message in messages)
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"messages: are of {roles}, which the chat template of {type(tokenizer).__name__} refuses: {reason}"
        ) from error
