"""Examples, the text they are trained as, and readers of public data sets."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from mold.conversations import question_row
from mold.text import Span

DEFAULT_TEMPLATE = "Question: {question}\nReasoning: {rationale}\nAnswer: {answer}"
_PLACEHOLDERS = ("{question}", "{rationale}", "{answer}")
ASSISTANT = "{assistant}"
"""Where the assistant's message begins in the template of a chat (see `mold.chat`)."""
TASK_PREFIXES = {"joint": "", "explain": "explain: ", "predict": "predict: ", "answer": ""}
"""The texts an example can be trained as: joint holds question, rationale and answer; explain and predict are the two
tasks of distilling step-by-step, question and rationale, question and answer; answer is predict without its prefix."""


@dataclass(frozen=True)
class Example:
    """A question, a teacher's rationale and the answer.

    keywords: the key information of a commonsense question; None where it is every number.
    history: (role, text) of the messages before the question, where the example is a conversation.
    """

    id: str
    question: str
    rationale: str
    answer: str
    keywords: tuple[str, ...] | None = None
    history: tuple[tuple[str, str], ...] = ()


class RenderedText(NamedTuple):
    """A training text with the character spans of its parts.

    prompt: what generation starts from, the text before what is learned without trailing spaces.
    rationale: empty where the task has none.
    answer: behind a rationale from its end to the end of the text, so the marker before the answer is learned too;
        empty where the task has none.
    special_tokens: whether the tokenizer adds its special tokens; a chat template has written them into the text.
    """

    text: str
    prompt: str
    question: Span
    rationale: Span
    answer: Span
    special_tokens: bool = True


def check_template(template: str) -> None:
    """Raise a ValueError unless the template holds each placeholder once, in the order of the text.

    A chat's template holds {assistant} too, between question and rationale.
    """
    expected = list(_PLACEHOLDERS)
    if ASSISTANT in template:
        expected.insert(1, ASSISTANT)
    places = [template.find(placeholder) for placeholder in expected]
    if any(template.count(placeholder) != 1 for placeholder in expected) or places != sorted(places):
        raise ValueError(f"template: is {template!r}, must hold {', '.join(expected)} once each, in this order")


def render(example: Example, template: str = DEFAULT_TEMPLATE, task: str = "joint") -> RenderedText:
    """The training text of an example, for a template without {assistant} (see `mold.chat.render_for`).

    Args:
        example: question, rationale and answer.
        template: of the joint task; the other tasks leave out the rationale, or the answer and its marker.
        task: one of TASK_PREFIXES.

    Raises:
        ValueError: the template does not fit (see `check_template`).

    Source: the prefixes are those of Distilling Step-by-Step (arXiv:2305.02301).
    """
    check_template(template)
    if ASSISTANT in template:
        raise ValueError(f"template: holds {ASSISTANT}, must be rendered for a tokenizer (mold.chat.render_for)")
    before, rest = template.split("{question}")
    between, rest = rest.split("{rationale}")
    marker, after = rest.split("{answer}")
    before = TASK_PREFIXES[task] + before
    question = (len(before), len(before) + len(example.question))
    if task in ("predict", "answer"):
        prompt = before + example.question + marker
        text, prompt = prompt + example.answer + after, prompt.rstrip(" ")
        return RenderedText(text, prompt, question, (len(prompt), len(prompt)), (len(prompt), len(text)))
    prompt = before + example.question + between
    rationale = (len(prompt), len(prompt) + len(example.rationale))
    text = prompt + example.rationale
    if task == "joint":
        text += marker + example.answer + after
    return RenderedText(text, prompt.rstrip(" "), question, rationale, (rationale[1], len(text)))


def text_hash(example: Example, template: str) -> str:
    """A hash of everything that decides an example's text and its steps and key words."""
    parts = [example.question, example.rationale, example.answer, example.keywords, template]
    if example.history:
        parts.append(example.history)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def split_examples(examples: Sequence[Example], num_eval: int, seed: int) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples: shuffled by the seed, no question in both.

    Args:
        examples: in any order.
        num_eval: held-out examples.
        seed: of the shuffle.

    Returns:
        (training, held out). Examples that repeat a held-out question belong to neither.
    """
    shuffled = list(examples)
    random.Random(seed).shuffle(shuffled)
    held_out, rest = shuffled[:num_eval], shuffled[num_eval:]
    asked = {_normalised(example.question) for example in held_out}
    return [example for example in rest if _normalised(example.question) not in asked], held_out


@dataclass
class ReadReport:
    """How many rows a reader saw, and why it left some out."""

    rows: int = 0
    kept: int = 0
    left_out: Counter = field(default_factory=Counter)

    def __str__(self) -> str:
        reasons = "".join(f", {count} {reason}" for reason, count in sorted(self.left_out.items()))
        return f"{self.rows} rows, {self.kept} kept{reasons}"


def read_examples(
    path: str | Path, format: str = "auto", *, rationales: str | Path | None = None, require_rationale: bool = True
) -> tuple[list[Example], ReadReport]:
    """Read examples from a file or folder.

    Args:
        path: a file, or a folder of svamp or commonsense_qa.
        format: "jsonl" (rows with question, rationale, answer and optionally id, keywords, correct), "gsm8k", "svamp"
            (SVAMP.json), "commonsense_qa" (dev.jsonl), "singleeq" (questions.json, has no rationales), or "auto".
        rationales: JSONL rows with question, rationale and optionally correct, for svamp and commonsense_qa; in a
            folder, its rationales.jsonl.
        require_rationale: whether a row without rationale is an error; evaluation needs none.

    Returns:
        The examples, and how many rows were read and left out. Rows that say `"correct": false` are left out and
        counted: their rationale leads to a wrong answer.

    Raises:
        ValueError: the file is missing, empty, malformed, or of no known format; names the file and line.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"dataset: {path} does not exist")
    if format == "auto":
        format = _detect(path)
    if format not in _READERS:
        raise ValueError(f"dataset_format: is {format!r}, must be auto, {', '.join(_READERS)}")
    report, examples, seen = ReadReport(), [], {}
    for place, row in _READERS[format](path, rationales and Path(rationales)):
        report.rows += 1
        if row is None:
            report.left_out["without a rationale"] += 1
            continue
        if row.get("correct") is False:
            report.left_out["with a wrong rationale"] += 1
            continue
        example = _example(place, row, require_rationale)
        if example.id in seen:
            raise ValueError(f"{place}: has the id {example.id!r} of {seen[example.id]}")
        seen[example.id] = place
        examples.append(example)
    report.kept = len(examples)
    if not examples:
        raise ValueError(f"dataset: {path} holds no usable example ({report})")
    return examples, report


def _example(place: str, row: dict, require_rationale: bool) -> Example:
    row = question_row(row, place)
    values = {}
    for key in ("question", "rationale", "answer"):
        value = row.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and key == "answer":
            value = f"{value:g}" if abs(value) < 1e6 else str(value).removesuffix(".0")
        if value is None and key == "rationale" and not require_rationale:
            value = ""
        if not isinstance(value, str) or (not value.strip() and (key != "rationale" or require_rationale)):
            raise ValueError(f"{place}: {key} is {value!r}, must be a text that is not empty")
        values[key] = value.strip()
    keywords = row.get("keywords")
    if keywords is not None and (not isinstance(keywords, list) or not all(isinstance(k, str) for k in keywords)):
        raise ValueError(f"{place}: keywords is {keywords!r}, must be a list of texts")
    stem, _, line = place.rpartition(":")
    name = row.get("id", f"{Path(stem).stem}-{line}")
    keywords = None if keywords is None else tuple(keywords)
    return Example(str(name), **values, keywords=keywords, history=row.get("history", ()))


def _json_lines(path: Path) -> Iterator[tuple[str, dict]]:
    if not path.is_file():
        raise ValueError(f"dataset: {path} does not exist")
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{place}: is no JSON ({error})") from error
            if not isinstance(row, dict):
                raise ValueError(f"{place}: is a {type(row).__name__}, must be an object")
            yield place, row


def _json_list(path: Path) -> Iterator[tuple[str, dict]]:
    if not path.is_file():
        raise ValueError(f"dataset: {path} does not exist")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: is no JSON ({error.msg})") from error
    for number, row in enumerate(rows, 1):
        yield f"{path}:{number}", row


def _need(place: str, row: dict, *keys: str) -> list:
    for key in keys:
        if key not in row:
            raise ValueError(f"{place}: has no {key!r}")
    return [row[key] for key in keys]


def _read_jsonl(path: Path, rationales: Path | None) -> Iterator[tuple[str, dict]]:
    return _json_lines(path)


def _read_gsm8k(path: Path, rationales: Path | None) -> Iterator[tuple[str, dict]]:
    for place, row in _json_lines(path):
        question, solution = _need(place, row, "question", "answer")
        rationale, separator, answer = re.sub(r"<<[^<>]*>>", "", solution).rpartition("####")
        if not separator:
            raise ValueError(f"{place}: answer has no '#### result'")
        yield place, {"question": question, "rationale": rationale, "answer": answer.replace(",", "")}


def _read_svamp(path: Path, rationales: Path | None) -> Iterator[tuple[str, dict | None]]:
    problems, written = _with_rationales(path, "SVAMP.json", rationales)
    for place, row in _json_list(problems):
        name, body, question, answer = _need(place, row, "ID", "Body", "Question", "Answer")
        body = body.rstrip()
        text = f"{body}{'' if body.endswith(('.', '?', '!', ',')) else '.'} {question}"
        found = written.get(_normalised(text))
        yield place, found and {**found, "id": name, "question": text, "answer": answer}


def _read_commonsense_qa(path: Path, rationales: Path | None) -> Iterator[tuple[str, dict | None]]:
    questions, written = _with_rationales(path, "dev.jsonl", rationales)
    for place, row in _json_lines(questions):
        name, answer, question = _need(place, row, "id", "answerKey", "question")
        stem, concept, choices = _need(place, question, "stem", "question_concept", "choices")
        text = f"{stem} Answer Choices: " + " ".join(f"({c['label']}) {c['text']}" for c in choices)
        found = written.get(_normalised(text))
        keywords = [concept, *(choice["text"] for choice in choices)]
        yield place, found and {**found, "id": name, "question": text, "answer": answer, "keywords": keywords}


def _read_singleeq(path: Path, rationales: Path | None) -> Iterator[tuple[str, dict]]:
    for place, row in _json_list(path):
        question, solutions, index = _need(place, row, "sQuestion", "lSolutions", "iIndex")
        yield place, {"id": f"singleeq-{index}", "question": question, "answer": solutions[0]}


def _with_rationales(path: Path, name: str, rationales: Path | None) -> tuple[Path, dict[str, dict]]:
    """The questions' file, and rows of rationales by their normalised question."""
    folder = path if path.is_dir() else path.parent
    written = rationales or folder / "rationales.jsonl"
    if not written.is_file():
        raise ValueError(f"rationales: {written} does not exist; {name} has no rationales of its own")
    rows = {_normalised(_need(place, row, "question")[0]): row for place, row in _json_lines(written)}
    return (path / name if path.is_dir() else path), rows


def _normalised(question: str) -> str:
    return re.sub(r"\W+", "", question).casefold()


def _detect(path: Path) -> str:
    if path.is_dir():
        names = {file.name for file in path.iterdir()}
        for name, format in (("SVAMP.json", "svamp"), ("dev.jsonl", "commonsense_qa"), ("questions.json", "singleeq")):
            if name in names:
                return format
        raise ValueError(f"dataset: {path} is a folder of no known data set; name a file, or dataset_format")
    if path.suffix == ".json":
        row = next(iter(_json_list(path)), (None, {}))[1]
    else:
        row = next(iter(_json_lines(path)), (None, {}))[1]
    for keys, format in (
        ({"Body", "Question"}, "svamp"),
        ({"sQuestion"}, "singleeq"),
        ({"answerKey"}, "commonsense_qa"),
        ({"question", "rationale"}, "jsonl"),
    ):
        if keys <= row.keys():
            return format
    if "####" in str(row.get("answer", "")):
        return "gsm8k"
    return "jsonl"


_READERS: dict[str, Callable] = {
    "jsonl": _read_jsonl,
    "gsm8k": _read_gsm8k,
    "svamp": _read_svamp,
    "commonsense_qa": _read_commonsense_qa,
    "singleeq": _read_singleeq,
}
