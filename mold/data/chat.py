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

from mold.data.examples import ASSISTANT, Example, RenderedText, check_template, render
from mold.data.tokens import check_no_special_tokens

CHAT_TEMPLATE = "{question}{assistant}{rationale}\nAnswer: {answer}"
"""The template for models with a chat template: the question is the user's message."""

TODAY = datetime(2024, 7, 26)
"""The date and time that every chat template is told, so that what is extracted today is trained on tomorrow: the date
that Llama's templates have without a clock."""
_NOW = re.compile(r"""strftime_now\s*\(\s*(["'])(.*?)\1\s*\)""")


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
