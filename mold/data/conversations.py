"""Rows of conversations, as chat data sets have them, become rows of question, rationale and answer."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from mold.data.answers import without_announcement
from mold.data.examples import Example
from mold.data.quantities import boxed, boxes

# "Answer: 9", "**Answer:** 9", "the answer is 9", "#### 9"; a heading alone on its line.
_ANSWER_MARKER = re.compile(
    r"####(?!#)|<answer>|(?<![A-Za-z])answer[*_`]*(?:\s+is\b:?|\s*:)[*_`]*"
    r"|^[#*_ \t]*(?:the[ \t]+)?(?:final[ \t]+)?answer[*_ \t]*$",
    re.IGNORECASE | re.MULTILINE,
)
_THOUGHT_MARKS = re.compile(r"</?(?:think|thinking|thought|reasoning)>", re.IGNORECASE)
_OTHER_MARKS = {
    "<|begin_of_thought|>": "<think>",
    "<|end_of_thought|>": "</think>",
    "<|begin_of_solution|>": "",
    "<|end_of_solution|>": "",
    "[THINK]": "<think>",
    "[/THINK]": "</think>",
}
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant", "model": "assistant"}
_CONVERSATIONS = ("messages", "conversations", "conversation")
# What public sets call the question, and the text that holds rationale and answer.
_QUESTIONS = ("question", "instruction", "problem", "query", "prompt")
_COMPLETIONS = ("completion", "output", "solution", "response", "generated_solution", "deepseek_solution")
# A thought in a column of its own, beside the completion that follows from it.
_THOUGHTS = ("reasoning", "reasoning_content", "thinking", "complex_cot", "deepseek_reasoning")
ANSWERS = ("answer", "final_answer", "expected_answer")
COLUMNS = (
    "question, answer and rationale; messages; prompt and completion; or one of "
    f"{', '.join(_QUESTIONS)} with one of {', '.join(_COMPLETIONS)}"
)
"""What the columns of a row may be, for messages."""


class NoAnswerError(ValueError):
    """A row is a conversation in which no answer is found."""


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
    if unknown := sorted(fields.keys() - Example.__dataclass_fields__.keys()):
        raise ValueError(f"{place}: has the keys {', '.join(map(str, row))}, must not have {unknown[0]!r}")
    try:
        return checked_example(fields)
    except ValueError as error:
        raise ValueError(f"{place}: has the keys {', '.join(map(str, row))} ({error})") from error


def checked_example(row: Mapping[str, Any], require_rationale: bool = True) -> Example:
    """An example from its fields; blanks around a text are none of it; an answer may be a number, or true or false
    for yes or no.

    Raises:
        ValueError: a field is missing, empty or malformed; names it.
    """
    values = {}
    for key in ("question", "rationale", "answer"):
        value = row.get(key)
        if key == "answer" and isinstance(value, bool):
            value = "yes" if value else "no"
        if key == "answer" and isinstance(value, int | float) and math.isfinite(value):
            value = str(int(value) if value == int(value) else value)
        if value is None and key == "rationale" and not require_rationale:
            value = ""
        if not isinstance(value, str) or (not value.strip() and (key != "rationale" or require_rationale)):
            raise ValueError(f"{key} is {reprlib.repr(value)}, must be a text that is not empty")
        values[key] = value.strip()
    keywords = row.get("keywords")
    if keywords is not None and (not isinstance(keywords, list) or not all(isinstance(k, str) for k in keywords)):
        raise ValueError(f"keywords is {keywords!r}, must be a list of texts")
    keywords = None if keywords is None else tuple(keywords)
    history, chat = row.get("history", ()), row.get("chat")
    chat = bool(history) if chat is None else chat
    if not isinstance(chat, bool):
        raise ValueError(f"chat is {reprlib.repr(chat)}, must be true or false")
    return Example(str(row["id"]), **values, keywords=keywords, history=history, chat=chat)


def question_row(row: Mapping[str, Any], place: str) -> dict[str, Any]:
    """A conversation's row as question, rationale, answer and history; any other row as it is.

    Conversations are {"messages": [...]} that end with the assistant (or "conversations", as ShareGPT has them, with
    from and value), and {"prompt", "completion"}, each a text or a list of messages. The last user message is the
    question, what stands before it is the history. The assistant's message is the rationale up to its answer: "Answer:
    ...", "the answer is ..." or "#### ..." at its end, or the last \\boxed{...}, which stays in its sentence; or its
    reasoning_content, thinking or <think> ... </think> (or as others mark it), and of the rest the answer, or all of
    it where it is one line. A row's own "answer" wins. Rows of messages, and those with any before the question, are
    chats.

    What other sets call prompt and completion is read as such: instruction (with input) and output, problem and
    solution, query and response, in lower or upper case; a system prompt and a history of pairs stand before them. A
    thought may stand in a column beside them: reasoning, Complex_CoT, deepseek_reasoning.

    Raises:
        NoAnswerError: no answer is found; names the place.
        ValueError: the messages are malformed or use tools; two columns say the same; names the place.
    """
    row = _common_columns(row, place)
    named = next((name for name in _CONVERSATIONS if name in row), None)
    if named is None and "prompt" not in row:
        return dict(row) | {"history": _history(row.get("history"), place)}
    if any(row.get(name) not in (None, "", "[]", "null", [], ()) for name in ("tools", "functions")):
        raise ValueError(f"{place}: has tools, must have none: messages that call tools cannot be trained on yet")
    if named is not None:
        turns = _turns(row[named], named, place)
        if isinstance(row.get("system"), str) and row["system"].strip():
            turns = [("system", row["system"], None), *turns]
    else:
        if "completion" not in row:
            raise ValueError(f"{place}: has a prompt, must have a completion too")
        turns = [*_turns(row["prompt"], "prompt", place, "user"), *_turns(row["completion"], "completion", place)]
    roles = [role for role, _, _ in turns]
    if roles[-2:] != ["user", "assistant"]:
        raise ValueError(f"{place}: has messages of {', '.join(roles)}; must end with user, assistant")
    *history, (_, question, _), (_, content, thought) = turns
    marked, content = _split_thought(content)
    thought = (thought or "").strip() or marked or _thought_column(row)
    rationale, answer = _split_answer(content)
    if thought:
        # A rest of several lines could never be found again in a completion.
        lines = [line for line in content.split("\n") if line.strip()]
        rationale, answer = thought, answer or boxed(content) or (content if len(lines) == 1 else None)
    if row.get("answer") is not None:
        answer = row["answer"]
    if answer is None:
        raise NoAnswerError(
            f'{place}: no answer found in {content[-80:]!r}; it must end with "Answer: ...", "#### ..." or a '
            "\\boxed{...}, or the row must have an answer"
        )
    kept = {key: row[key] for key in ("id", "keywords", "correct") if row.get(key) is not None}
    before = tuple((role, text) for role, text, _ in history)
    return kept | {
        "question": question.strip(),
        "rationale": rationale.strip(),
        "answer": answer.strip() if isinstance(answer, str) else answer,
        "history": before,
        "chat": named is not None or bool(before) or row.get("chat", False),
    }


def _common_columns(row: Mapping[str, Any], place: str) -> dict[str, Any]:
    """A row in our names: prompt and completion, or question, rationale and answer; any other row as it is."""
    lower = {str(key).strip().lower(): value for key, value in row.items()}
    if len(lower) < len(row):
        raise ValueError(f"{place}: has the columns {', '.join(map(str, row))}, must have each name once")
    if any(name in lower for name in _CONVERSATIONS):
        return lower
    question, completion, answer = (_only(lower, names, place) for names in (_QUESTIONS, _COMPLETIONS, ANSWERS))
    if question is None and "input" in lower:
        question = "input"
    if answer is not None:
        lower["answer"] = lower.pop(answer)
    if question is None or lower.get("rationale") is not None or (question == "question" and completion is None):
        return lower
    if completion is None:
        # Problems alone, to be answered; a prompt is never without a completion.
        return lower if question == "prompt" else lower | {"question": lower.pop(question)}
    prompt, context = lower.pop(question), lower.pop("input", None)
    chat = not isinstance(prompt, str) or not isinstance(lower[completion], str)
    if isinstance(prompt, str):
        text = f"{prompt}\n\n{context}" if isinstance(context, str) and context.strip() else prompt
        system = lower.get("system") or lower.get("system_prompt")
        prompt = [{"role": "system", "content": system}] if isinstance(system, str) and system.strip() else []
        for pair in lower.pop("history", None) or ():
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise ValueError(f"{place}: history holds {pair!r}, must hold pairs of question and answer")
            turns = (
                [pair] if pair[0] in ("system", "user", "assistant") else zip(("user", "assistant"), pair, strict=True)
            )
            prompt += [{"role": role, "content": part} for role, part in turns]
        prompt.append({"role": "user", "content": text})
    return lower | {"prompt": prompt, "completion": lower.pop(completion), "chat": chat}


def _only(row: Mapping[str, Any], names: Sequence[str], place: str) -> str | None:
    """The one of the names that the row has a value for."""
    found = [name for name in names if row.get(name) is not None]
    if len(found) > 1:
        raise ValueError(f"{place}: has {' and '.join(found)}, which say the same; must have one of them")
    return found[0] if found else None


def _thought_column(row: Mapping[str, Any]) -> str:
    thoughts = (row.get(name) for name in _THOUGHTS)
    # "reasoning" may also say whether there is any: "on".
    return next((text.strip() for text in thoughts if isinstance(text, str) and len(text.split()) > 1), "")


def _split_thought(content: str) -> tuple[str, str]:
    """The thought and what stands behind it; the opening mark may stand in the prompt, and blocks may be empty."""
    for mark, ours in _OTHER_MARKS.items():
        content = content.replace(mark, ours)
    parts = _THOUGHT_MARKS.split(content)
    if len(parts) == 1:
        return "", content
    marks = [mark[0] for mark in _THOUGHT_MARKS.finditer(content)]
    closed = max((place for place, mark in enumerate(marks) if mark.startswith("</")), default=None)
    if closed is None:  # never closed: a thought without an end, in which the answer has to be
        return "", "\n".join(parts).strip()
    thought = "\n".join(part.strip() for part in parts[: closed + 1] if part.strip())
    return thought, "\n".join(parts[closed + 1 :]).strip()


def _split_answer(content: str) -> tuple[str, str | None]:
    """What stands before the last answer marker, and the answer: the one line behind it, or the last box."""
    content = content.rstrip()
    last = content.rfind("\n") + 1
    # A marker at the end of the line before announces the last line.
    for found in reversed(list(_ANSWER_MARKER.finditer(content, _line_before(content, last)))):
        answer = content[found.end() :].strip().removesuffix("</answer>").strip(" *_`\n")
        if answer and "\n" not in answer:
            return without_announcement(content[: found.start()]), boxed(answer) or answer.rstrip(" .*_`")
    last_box = next(reversed(boxes(content)), None)
    if last_box and content.rfind("\n\n", 0, len(content)) < last_box.end:
        line = content.rfind("\n", 0, last_box.start) + 1
        alone = not (content[line : last_box.start] + content[last_box.end :]).strip(" \t\n$*_`#.\\[]()")
        return without_announcement(content[:line]) if alone else content, boxed(content)
    return content, None


def _line_before(content: str, last: int) -> int:
    """Where the last line with text before the place begins."""
    before = content[:last].rstrip()
    return before.rfind("\n") + 1


def _turns(messages, name: str, place: str, role: str = "assistant") -> list[tuple[str, str, str | None]]:
    """(role, content, reasoning or None) of each message; a text is one message of the role."""
    if isinstance(messages, str):
        messages = [{"role": role, "content": messages}]
    if not isinstance(messages, Sequence) or not messages:
        raise ValueError(f"{place}: {name} is {messages!r}, must be a text or a list of messages")
    turns: list[tuple[str, str, str | None]] = []
    for message in messages:
        if isinstance(message, Mapping) and "from" in message and "role" not in message:
            message = {**message, "role": message["from"], "content": message.get("value")}
        if not isinstance(message, Mapping) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise ValueError(
                f"{place}: {name} holds {message!r}, must hold messages with the texts role and content "
                "(or from and value)"
            )
        role = _ROLES.get(message["role"].casefold()) or message["role"]
        if message.get("tool_calls") or message.get("function_call") or role in ("tool", "function", "observation"):
            raise ValueError(f"{place}: {name} holds tool calls, which cannot be trained on yet")
        turns.append((role, message["content"], message.get("reasoning_content") or message.get("thinking")))
    return turns


def _history(history, place: str) -> tuple[tuple[str, str], ...]:
    pairs = tuple(tuple(turn) if isinstance(turn, list | tuple) else turn for turn in history or ())
    if not all(isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(x, str) for x in pair) for pair in pairs):
        raise ValueError(f"{place}: history is {history!r}, must be a list of [role, text]")
    return pairs
