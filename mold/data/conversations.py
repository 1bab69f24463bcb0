"""Rows of conversations, as chat data sets have them, become rows of question, rationale and answer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mold.data.examples import Example

_ANSWER_MARKER = re.compile(
    r"####|(?:\b(?:so|thus|therefore|hence),?\s+)?(?:\bthe\s+)?(?:\bfinal\s+)?\banswer(?:\s+is\b:?|\s*:)",
    re.IGNORECASE,
)
_THOUGHT = re.compile(r"^\s*<think>(?P<thought>.*?)</think>(?P<rest>.*)$", re.DOTALL)


def example_from_row(row: Example | Mapping[str, Any], place: str) -> Example:
    """An example from a row of a data set: the fields of `Example`, or a conversation (see `question_row`).

    Args:
        row: as `datasets`, TRL and JSON have them.
        place: what to call the row in messages, and its id if it has none.

    Raises:
        ValueError: a field is missing, unknown or malformed; names the place.
    """
    if isinstance(row, Example):
        return row
    fields = {"id": place, **question_row(row, place)}
    try:
        return Example(**fields)
    except TypeError as error:
        raise ValueError(f"{place}: has the keys {', '.join(sorted(row))} ({error})") from error


def question_row(row: Mapping[str, Any], place: str) -> dict[str, Any]:
    """A conversation's row as question, rationale, answer and history; any other row as it is.

    Conversations are {"messages": [...]} that end with the assistant, and {"prompt", "completion"}, each a text or a
    list of messages. The last user message is the question, what stands before it is the history. The assistant's
    message is the rationale up to its answer: "Answer: ...", "the answer is ..." or "#### ..." at its end; or its
    reasoning_content, thinking or <think> ... </think>, and the rest is the answer. A row's own "answer" wins.

    Raises:
        ValueError: the messages are malformed, or no answer is found; names the place.
    """
    if "messages" in row:
        turns = _turns(row["messages"], "messages", place)
    elif "prompt" in row:
        if "completion" not in row:
            raise ValueError(f"{place}: has a prompt, must have a completion too")
        turns = [*_turns(row["prompt"], "prompt", place, "user"), *_turns(row["completion"], "completion", place)]
    else:
        return dict(row) | {"history": _history(row.get("history"), place)}
    roles = [role for role, _, _ in turns]
    if roles[-2:] != ["user", "assistant"]:
        raise ValueError(f"{place}: has messages of {', '.join(roles)}; must end with user, assistant")
    *history, (_, question, _), (_, content, thought) = turns
    if (found := _THOUGHT.match(content)) and not thought:
        thought, content = found["thought"], found["rest"]
    rationale, answer = _split_answer(content)
    if thought:
        rationale, answer = thought, answer or content
    if row.get("answer") is not None:
        answer = row["answer"]
    if answer is None:
        raise ValueError(
            f'{place}: no answer found in {content[-80:]!r}; it must end with "Answer: ..." or "#### ...", or the row '
            "must have an answer"
        )
    kept = {key: row[key] for key in ("id", "keywords", "correct") if row.get(key) is not None}
    history = tuple((role, text) for role, text, _ in history)
    return kept | {
        "question": question.strip(),
        "rationale": rationale.strip(),
        "answer": answer.strip() if isinstance(answer, str) else answer,
        "history": history,
    }


def _split_answer(content: str) -> tuple[str, str | None]:
    """What stands before the last answer marker, and the answer: the one line behind it."""
    for found in reversed(list(_ANSWER_MARKER.finditer(content))):
        answer = content[found.end() :].strip()
        if answer and "\n" not in answer:
            return content[: found.start()], answer.rstrip(".")
    return content, None


def _turns(messages, name: str, place: str, role: str = "assistant") -> list[tuple[str, str, str | None]]:
    """(role, content, reasoning or None) of each message; a text is one message of the role."""
    if isinstance(messages, str):
        messages = [{"role": role, "content": messages}]
    if not isinstance(messages, Sequence) or not messages:
        raise ValueError(f"{place}: {name} is {messages!r}, must be a text or a list of messages")
    turns = []
    for message in messages:
        if not isinstance(message, Mapping) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise ValueError(f"{place}: {name} holds {message!r}, must hold messages with the texts role and content")
        if message.get("tool_calls"):
            raise ValueError(f"{place}: {name} holds tool calls, which cannot be trained on yet")
        turns.append((message["role"], message["content"], message.get("reasoning_content") or message.get("thinking")))
    return turns


def _history(history, place: str) -> tuple[tuple[str, str], ...]:
    pairs = tuple(tuple(turn) if isinstance(turn, list | tuple) else turn for turn in history or ())
    if not all(isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(x, str) for x in pair) for pair in pairs):
        raise ValueError(f"{place}: history is {history!r}, must be a list of [role, text]")
    return pairs
