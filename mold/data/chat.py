"""Examples as conversations, rendered by a tokenizer's chat template.

A template that holds {assistant} is a chat: what stands before it is the user's message, what stands behind it the
assistant's. The tokenizer's chat template is applied to the two messages with the placeholders still in them. That
gives an ordinary template of the whole text, so question, rationale and answer are found as in any other, however the
chat template moves them; and that the chat template says the same of the real messages is checked for every example.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from mold.data.examples import ASSISTANT, Example, RenderedText, check_template, render

CHAT_TEMPLATE = "{question}{assistant}{rationale}\nAnswer: {answer}"
"""The template for models with a chat template: the question is the user's message."""


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
            say; the example has messages before the question, which only a chat has.
    """
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
    parts = {"{question}": example.question, "{rationale}": example.rationale, "{answer}": example.answer}
    filled = re.sub("|".join(parts), lambda found: parts[found[0]], template)
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
    return tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=False).rstrip()
