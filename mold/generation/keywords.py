"""Key words of commonsense questions, named by a teacher and checked against the text.

Source: MoLSAKI, EMNLP 2025: few-shot prompting of the teacher; the prompt, the parsing and the checks are ours.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mold.data.examples import Example
from mold.data.segmentation import find_keywords
from mold.generation.batches import Journal, generate_all
from mold.generation.prompting import PromptFile, example_prompt_ids

MARKER = "Key words:"
MOST_KEYWORDS, MOST_WORDS = 12, 6
_OPENING = f"\n{MARKER}"


def name_keywords(
    examples: Sequence[Example],
    journal: Journal,
    teacher: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    prompt: PromptFile,
    *,
    chat: bool = False,
    batch_size: int = 16,
    max_new_tokens: int = 64,
    progress: bool = True,
) -> tuple[list[Example], Counter]:
    """The examples with the key words that the teacher names; the journal's batches are not asked again.

    A key word counts when it stands in question or rationale. An answer that is no list, or none of whose key words
    stands there, leaves the example the key words that it came with, or none; both are counted.

    Args:
        examples: with rationales, distinct ids.
        journal: of this stage; its settings must tell everything below apart.
        teacher: model and tokenizer.
        prompt: what the teacher is told; its shots have question, rationale and keywords.
        chat: whether the prompt is a chat.
        batch_size: prompts a batch.
        max_new_tokens: most tokens of an answer.
        progress: whether to show a progress bar.

    Returns:
        The examples, in their order, and counts of what happened.
    """
    model, tokenizer = teacher
    turns = [(_asked(shot["question"], shot["rationale"]), "; ".join(shot["keywords"])) for shot in prompt.shots]
    if chat:
        turns = [(asked, f"{MARKER} {answered}") for asked, answered in turns]
    prompts = [
        example_prompt_ids(tokenizer, prompt.instruction, turns, e, _asked(e.question, e.rationale), _OPENING, chat)
        for e in examples
    ]
    answers = generate_all(
        model,
        tokenizer,
        prompts,
        "keywords",
        batch_size=batch_size,
        journal=journal,
        title="Key words",
        progress=progress,
        max_new_tokens=max_new_tokens,
        stop=None if chat else "\n",
    )
    counts: Counter = Counter()
    return [_with_keywords(e, answer.text, counts) for e, answer in zip(examples, answers, strict=True)], counts


def parse_keywords(answer: str) -> list[str] | None:
    """The key words in a teacher's answer, None where it is no list of them.

    A list is one line, behind "Key words:" or alone, of 1 to 12 phrases of at most 6 words, separated by semicolons.
    """
    answer = answer.strip()
    if MARKER.casefold() in answer.casefold():
        answer = re.split(re.escape(MARKER), answer, flags=re.IGNORECASE)[-1].strip()
    line = answer.partition("\n")[0]
    phrases = [phrase.strip(" .\"'*") for phrase in line.split(";")]
    phrases = list(dict.fromkeys(phrase for phrase in phrases if phrase))
    if not 1 <= len(phrases) <= MOST_KEYWORDS or any(len(phrase.split()) > MOST_WORDS for phrase in phrases):
        return None
    return phrases


def _asked(question: str, rationale: str) -> str:
    return f"Question: {question}\nReasoning: {rationale}"


def _with_keywords(example: Example, answer: str, counts: Counter) -> Example:
    named = parse_keywords(answer)
    if named is None:
        counts["answers that are no list"] += 1
        named = []
    text = f"{example.question}\n{example.rationale}"
    found = [phrase for phrase in named if find_keywords(text, [phrase])]
    counts["key words named"] += len(named)
    counts["key words not in the text"] += len(named) - len(found)
    if found:
        counts["examples with key words of the teacher"] += 1
    else:
        found = list(example.keywords or ())
        counts["examples that keep their own key words" if found else "examples without key words"] += 1
    return replace(example, keywords=tuple(found))
