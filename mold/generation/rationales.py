"""Rationales written by a teacher: prompted for, their answers checked, the wrong ones tried again with a hint.

Stages, each for the questions that have no right rationale yet: "given" (from elsewhere, if there are any), "plain"
(the question alone, in one or several tries), "hint" (the question with its right answer). Source: MoLSAKI, EMNLP 2025,
which takes the two stages of prompting from earlier work; tries and prompts are ours.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mold.data.answers import answer_kind, extract_answer, judge_answer, split_completion
from mold.data.examples import ASSISTANT, DEFAULT_TEMPLATE, Example, question_key
from mold.files import json_lines
from mold.generation.batches import Completion, Journal, generate_all
from mold.generation.prompting import PromptFile, example_prompt_ids

# A rationale that speaks of the hint is none that a student could find.
_MENTIONS_HINT = re.compile(
    r"\bhint|\b(?:given|provided|known|stated) (?:that the )?(?:right |correct |final )?(?:answer|result|choice)"
    r"|\b(?:answer|result|choice) (?:is|was) (?:already )?(?:given|provided|known|stated)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Sampling:
    """How a teacher writes.

    temperature: 0 is greedy. top_p: of sampling. num_tries: attempts at a question before the hint, more than one only
    when sampling. hint: whether there is a second stage.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    num_tries: int = 1
    hint: bool = True
    seed: int = 0
    batch_size: int = 16
    max_new_tokens: int = 256

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(f"temperature: is {self.temperature}, must be at least 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: is {self.top_p}, must be greater than 0 and at most 1")
        if self.num_tries < 1 or (self.num_tries > 1 and self.temperature == 0):
            raise ValueError(
                f"num_tries: is {self.num_tries} at temperature {self.temperature}, must be at least 1, and 1 for "
                "greedy generation, whose tries are all alike"
            )


def write_rationales(
    examples: Sequence[Example],
    journal: Journal,
    sampling: Sampling,
    *,
    teacher: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None,
    prompt: PromptFile | None = None,
    chat: bool = False,
    template: str = DEFAULT_TEMPLATE,
    given: Mapping[str, Sequence[Mapping]] | None = None,
    progress: bool = True,
) -> tuple[list[dict], Counter]:
    """A rationale for every question that gets a right one; the journal's batches are not written again.

    Args:
        examples: questions with their answers, distinct ids.
        journal: of this stage; its settings must tell everything below apart.
        sampling: how to generate.
        teacher: model and tokenizer; None checks the given rationales alone.
        prompt: what the teacher is told.
        chat: whether the prompt is a chat.
        template: of the training text: its markers tell rationale from answer.
        given: rationales from elsewhere by example id: {"rationale", maybe "prediction", "correct"}.
        progress: whether to show progress bars.

    Returns:
        An entry an example, in their order: id, question, rationale, answer, prediction, correct, stage ("given",
        "plain", "hint", or None where nothing was written), keywords and history where the example has some. The
        rationale is the first right one, else the last wrong one, with "correct" false. And counts of what happened.
    """
    best: dict[str, dict] = {}
    counts: Counter = Counter()
    for example in examples:
        for entry in (given or {}).get(example.id, ()):
            _consider(best, example, _check_given(example, entry, template), counts)
    if teacher is not None:
        stages = [("plain", number) for number in range(sampling.num_tries)]
        if sampling.hint and prompt is not None and prompt.hint:
            stages.append(("hint", 0))
        model, tokenizer = teacher
        for stage, number in stages:
            # Which questions are left depends on the stages before alone: a run that goes on finds the same batches.
            left = [example for example in examples if not best.get(example.id, {}).get("correct")]
            prompts = [_prompt_of(tokenizer, prompt, example, stage, template, chat) for example in left]
            completions = generate_all(
                model,
                tokenizer,
                prompts,
                f"{stage}-{number}",
                batch_size=sampling.batch_size,
                seed=sampling.seed,
                journal=journal,
                title=f"Rationales, {stage}" + f" {number + 1}" * (number > 0),
                progress=progress,
                max_new_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                stop=None if chat else _next_question(template),
            )
            for example, completion in zip(left, completions, strict=True):
                _consider(best, example, _check_written(example, completion, stage, template), counts)
    rows = [_row(example, best.get(example.id)) for example in examples]
    counts["right"] = sum(row["correct"] for row in rows)
    counts["never right"] = len(rows) - counts["right"]
    return rows, counts


def _prompt_of(tokenizer, prompt, example, stage, template, chat) -> list[int]:
    opening, reasoning, marker = _parts(template)
    turns = [(f"{opening}{shot['question']}", f"{shot['rationale']}{marker}{shot['answer']}") for shot in prompt.shots]
    question = example.question
    if stage == "hint":
        question = prompt.hint.format(question=question, answer=example.answer)
    asked, reasoning = opening + question, reasoning.rstrip(" ")
    return example_prompt_ids(tokenizer, prompt.instruction, turns, example, asked, reasoning, chat)


def _parts(template: str) -> tuple[str, str, str]:
    """What stands before the question, between it and the rationale, and before the answer."""
    opening, rest = template.replace(ASSISTANT, "").split("{question}")
    reasoning, rest = rest.split("{rationale}")
    return opening, reasoning, rest.split("{answer}")[0]


def _next_question(template: str) -> str | None:
    opening = _parts(template)[0].strip()
    return f"\n{opening}" if opening else None


def _check_written(example: Example, completion: Completion, stage: str, template: str) -> dict:
    prediction = extract_answer(completion.text, template, answer_kind(example.answer))
    rationale = split_completion(completion.text, template)
    wrong = None
    if completion.truncated:
        wrong = "cut off at max_new_tokens"
    elif not rationale:
        wrong = "empty"
    elif prediction is None:
        wrong = "without an answer"
    elif wrong_answer := _wrong_answer(prediction, example.answer):
        wrong = wrong_answer
    elif stage == "hint" and _MENTIONS_HINT.search(rationale):
        wrong = "that speak of the hint"
    return {"rationale": rationale, "prediction": prediction, "stage": stage, "wrong": wrong}


def _check_given(example: Example, entry: Mapping, template: str) -> dict:
    rationale, kind = entry["rationale"], answer_kind(example.answer)
    prediction = entry.get("prediction") or extract_answer(rationale, template, kind)
    if entry.get("correct") is None:
        wrong = _wrong_answer(prediction, example.answer)
    else:
        wrong = None if entry["correct"] else "with a wrong answer"
    return {"rationale": split_completion(rationale, template), "prediction": prediction, "stage": "given"} | {
        "wrong": wrong
    }


def _wrong_answer(prediction: str | None, right: str) -> str | None:
    verdict = judge_answer(prediction, right)
    return {True: None, False: "with a wrong answer", None: "with an answer that cannot be judged"}[verdict]


def _consider(best: dict, example: Example, found: dict, counts: Counter) -> None:
    counts[f"{found['stage']}: {found['wrong'] or 'right'}"] += 1
    if best.get(example.id, {}).get("correct"):
        return
    best[example.id] = {key: found[key] for key in ("rationale", "prediction", "stage")}
    best[example.id]["correct"] = found["wrong"] is None


def _row(example: Example, found: dict | None) -> dict:
    found = found or {"rationale": "", "prediction": None, "stage": None, "correct": False}
    row = {"id": example.id, "question": example.question, "answer": example.answer, **found}
    if example.keywords is not None:
        row["keywords"] = list(example.keywords)
    return row | {name: value for name in ("history", "chat") if (value := getattr(example, name))}


def read_given(path: str | Path, examples: Sequence[Example]) -> tuple[dict[str, list[dict]], int]:
    """Rationales from elsewhere by the id of the example they belong to, and how many belong to none.

    Args:
        path: JSONL rows with rationale and id or question; maybe prediction, correct.
        examples: that they are for; matched by id, else by question (see `question_key`).

    Raises:
        ValueError: the file is missing or malformed; names file and line.
    """

    ids = {example.id for example in examples}
    by_question = {question_key(example.question): example.id for example in examples}
    found: dict[str, list[dict]] = {}
    strangers = 0
    for place, row in json_lines(Path(path), "rationales"):
        if not isinstance(row.get("rationale"), str) or not ({"id", "question"} & row.keys()):
            raise ValueError(f"{place}: has {', '.join(sorted(row))}; must have rationale, and id or question")
        name: str | None = str(row.get("id"))
        if name not in ids:
            name = by_question.get(question_key(str(row.get("question"))))
        if name is None:
            strangers += 1
        else:
            found.setdefault(name, []).append(row)
    return found, strangers
