"""Readers of public data sets, and how many rows they kept.

A data set is read in two steps. A container (JSON lines, a JSON array, CSV, ASDiv's XML, Parquet, a set of the hub)
gives rows with the places they stand at; a format turns a row into question, answer and whatever else it has. Any
format may come in any container.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from mold.data.conversations import ANSWERS, COLUMNS, NoAnswerError, checked_example, question_row
from mold.data.equations import EquationError, equation_rationale, find_equations
from mold.data.examples import Example, question_key
from mold.extras import missing_extra
from mold.files import json_errors, json_lines, json_object, text_lines

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".xml", ".parquet")
RATIONALES_FILE = "rationales.jsonl"
RATIONALE_FORMS = ("text", "equations")
# Columns of CSV that hold more than a text.
_LISTS = ("messages", "conversations", "history", "keywords", "facts", "choices", "options", "lSolutions")
# A hub name with an optional configuration: "owner/name" or "owner/name:configuration".
_HUB_NAME = re.compile(r"(?P<name>[\w-]+/[\w.-]+)(?::(?P<config>[\w.-]+))?")


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
    path: str | Path,
    format: str = "auto",
    *,
    split: str | None = None,
    rationales: str | Path | None = None,
    rationale_form: str = "text",
    require_rationale: bool = True,
) -> tuple[list[Example], ReadReport]:
    """Read examples from a file, a folder or the hub.

    Args:
        path: a .jsonl, .json (an array, or JSON lines), .csv, .tsv, .xml or .parquet file, a folder of them, or the
            name of a data set on the hub ("owner/name" or "owner/name:configuration"; needs the extra ``data``, as
            Parquet does). Text is UTF-8, or what a byte-order mark says.
        format: "plain" (rows with question, answer, rationale and optionally id, keywords, correct, and what
            `mold.data.conversations.question_row` reads), "gsm8k", "svamp", "asdiv", "singleeq", "multiarith", "aqua",
            "commonsense_qa", "strategyqa", "s1k", "openr1", or "auto": found from the first row.
        split: "train", "test", ...: which file of a folder (its name starts with it), which split of the hub.
        rationales: JSONL rows with question, rationale and optionally correct and keywords. They take the place of the
            rationales that the data set has; a question with several becomes several examples. In a folder, its
            rationales.jsonl.
        rationale_form: "text", or "equations": the equations that the rows have, an operation a step (see
            `mold.data.equations`). GSM8K has them in its calculator marks, SVAMP, ASDiv, SingleEq and MultiArith as
            published in their equations, plain rows where their rationales state calculations.
        require_rationale: whether examples are to be trained on. Without, every question is kept once, whatever its
            rationale.

    Returns:
        The examples, and how many rows were read and left out: without a rationale, with one that leads to a wrong
        answer (`"correct": false`), conversations in which no answer is found, without equations or with ones that are
        wrong or end in another answer, and repetitions of an earlier row.

    Raises:
        ValueError: the data set is missing, empty, malformed, or of no known format; names the file and line.
    """
    if format != "auto" and format not in FORMATS:
        raise ValueError(f"dataset_format: is {format!r}, must be auto, {', '.join(FORMATS)}")
    if rationale_form not in RATIONALE_FORMS:
        raise ValueError(f"rationale_form: is {rationale_form!r}, must be one of {', '.join(RATIONALE_FORMS)}")
    if rationale_form == "equations" and rationales is not None:
        raise ValueError("rationales: is given, must not be with rationale_form='equations', which takes the rows' own")
    name, rows = _open(str(path), split)
    if (
        rationale_form == "text"
        and rationales is None
        and Path(path).is_dir()
        and (Path(path) / RATIONALES_FILE).is_file()
    ):
        rationales = Path(path) / RATIONALES_FILE
    written = None if rationales is None else _read_rationales(Path(rationales))
    report = ReadReport()
    examples: list[Example] = []
    places: dict[str, str] = {}
    seen: set[tuple[str, str, str | None]] = set()
    asked: set[str] = set()
    first_without = ""
    for place, row in rows:
        report.rows += 1
        format = _detect(row) if format == "auto" else format
        try:
            base = FORMATS[format].read(row)
        except NoAnswerError as error:
            report.left_out["without an answer"] += 1
            first_without = first_without or f"; {place}: {error}"
            continue
        except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
            reason = f"has no {error}" if isinstance(error, KeyError) else f"is malformed: {error}"
            raise ValueError(f"{place}: {reason} (read as {format})") from error
        base = {"id": f"{name}-{report.rows}"} | base
        if rationale_form == "equations":
            try:
                base["rationale"] = equation_rationale(_row_equations(base), str(base["answer"]))
            except EquationError as error:
                if require_rationale:
                    report.left_out[str(error)] += 1
                    continue
                base["rationale"] = None
        key = question_key(str(base.get("question")))
        variants = [base]
        if written is not None:
            variants = [{**base, **found} for found in written.get(key, [])]
            for number, variant in enumerate(variants[1:], 2):
                variant["id"] = f"{base['id']}-{number}"
            if not variants and not require_rationale:
                variants = [base]
        asked.add(key)
        if not require_rationale:
            variants = variants[:1]
        elif not variants:
            report.left_out["without a rationale"] += 1
        for variant in variants:
            if require_rationale and variant.get("correct") is False:
                report.left_out["with a wrong rationale"] += 1
                continue
            try:
                example = checked_example(variant, require_rationale)
            except ValueError as error:
                raise ValueError(f"{place}: {error}; the row has {', '.join(map(str, row))}") from error
            if example.id in places:
                raise ValueError(f"{place}: has the id {example.id!r} of {places[example.id]}")
            places[example.id] = place
            identity = key, example.answer, example.rationale if require_rationale else None
            if identity in seen:
                report.left_out["repeated"] += 1
                continue
            seen.add(identity)
            examples.append(example)
    if strangers := sum(len(found) for key, found in (written or {}).items() if key not in asked):
        report.left_out["rationales of no question"] += strangers
    report.kept = len(examples)
    if not examples:
        raise ValueError(f"dataset: {path} holds no usable example ({report}){first_without}")
    return examples, report


def read_mixture(
    paths: Sequence[str | Path], format: str = "auto", **options
) -> tuple[list[Example], dict[str, ReadReport]]:
    """Read examples from several places, one after the other, each as `read_examples` reads it.

    An example that an earlier place has too, with the same answer and rationale, is left out and counted. An id that an
    earlier place has is made another by its place's name.

    Args:
        paths: as of `read_examples`, each once.
        format: of all, or "auto": of each its own.
        **options: of `read_examples`, for all.

    Returns:
        The examples, and for each place what was read and left out.

    Raises:
        ValueError: as of `read_examples`; a place is named twice; rationales for several are given.
    """
    named = [str(path) for path in paths]
    if len(set(named)) < len(named):
        raise ValueError(f"dataset: is {', '.join(named)}, must name each once")
    if len(named) > 1 and options.get("rationales") is not None:
        raise ValueError("rationales: is given, must not be with several data sets: a folder may hold its own")
    examples: list[Example] = []
    reports: dict[str, ReadReport] = {}
    seen: dict[tuple[str, str, str | None], str] = {}
    taken: set[str] = set()
    for path in named:
        found, reports[path] = read_examples(path, format, **options)
        kept = []
        for example in found:
            rationale = example.rationale if options.get("require_rationale", True) else None
            identity = question_key(example.question), example.answer, rationale
            if seen.setdefault(identity, path) != path:
                reports[path].left_out[f"that {seen[identity]} has too"] += 1
                continue
            if example.id in taken:
                example = replace(example, id=f"{'/'.join(Path(path).parts[-2:])}: {example.id}")
                if example.id in taken:
                    raise ValueError(
                        f"dataset: {path} has the id {example.id!r} of an earlier place, must have its own"
                    )
            kept.append(example)
        taken |= {example.id for example in kept}
        reports[path].kept = len(kept)
        examples += kept
    return examples, reports


def is_hub_name(path: str) -> bool:
    """Whether `read_examples` would look for a data set on the hub."""
    found = Path(path)
    return not found.exists() and found.suffix not in SUFFIXES and _HUB_NAME.fullmatch(path) is not None


def _open(path: str, split: str | None) -> tuple[str, Iterator[tuple[str, dict]]]:
    """The name a data set's examples go by, and its rows."""
    found = Path(path)
    if is_hub_name(path) and (hub := _HUB_NAME.fullmatch(path)):
        return hub["name"].partition("/")[2], _hub_rows(hub["name"], hub["config"], split)
    if not found.exists():
        raise ValueError(f"dataset: {path} does not exist")
    if found.is_dir():
        found = _file_of(found, split)
    if found.suffix not in SUFFIXES:
        raise ValueError(f"dataset: {found} ends in {found.suffix!r}, must end in {', '.join(SUFFIXES)}")
    container = {
        ".jsonl": _json_rows,
        ".json": _json_rows,
        ".csv": _csv_rows,
        ".tsv": _csv_rows,
        ".xml": _asdiv_xml,
        ".parquet": _parquet_rows,
    }
    return found.stem, container[found.suffix](found)


def _file_of(folder: Path, split: str | None) -> Path:
    files = sorted(f for f in folder.iterdir() if f.suffix in SUFFIXES and f.name != RATIONALES_FILE)
    chosen = [file for file in files if split is None or file.name.startswith(split)]
    if len(chosen) != 1:
        names = ", ".join(file.name for file in files) or "no data file"
        raise ValueError(f"dataset: {folder} holds {names}; name one of them, or dataset_split (is {split})")
    return chosen[0]


def _json_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """The rows of a JSON array or of JSON lines, whatever the file's name says."""
    first = next((line.lstrip()[0] for line in text_lines(path) if line.strip()), "")
    return _json_array(path) if first == "[" else json_lines(path)


def _json_array(path: Path) -> Iterator[tuple[str, dict]]:
    # Element by element, so that a malformed row is told by its line.
    text, decoder, line, counted = "".join(text_lines(path)), json.JSONDecoder(), 1, 0
    position = _skip(text, 0)
    while True:
        position = _skip(text, position + 1)
        line, counted = line + text.count("\n", counted, position), position
        place = f"{path}:{line}"
        if text[position : position + 1] == "]":
            return
        with json_errors(path, line, whole=True):
            row, position = decoder.raw_decode(text, position)
        yield place, json_object(place, row)
        position = _skip(text, position)
        if text[position : position + 1] == "]":
            return
        if text[position : position + 1] != ",":
            raise ValueError(f"{place}: the array ends or goes on without a comma behind this row")


def _skip(text: str, position: int) -> int:
    return re.compile(r"\s*").match(text, position).end()  # type: ignore[union-attr]  # matches anything


def _csv_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """The rows of comma-separated values (or semicolons, or tabs: whatever the header has most of); an empty cell is
    none, and lists stand there as JSON."""
    limit = csv.field_size_limit(2**31 - 1)
    try:
        # newline="": line ends in quotes belong to the text.
        lines = text_lines(path, newline="")
        header = next(lines, "")
        delimiter = max(",;\t", key=header.count)
        reader = csv.reader(itertools.chain([header], lines), delimiter=delimiter, strict=True)
        columns = [column.strip() for column in next(reader, [])]
        if not all(columns) or len(set(columns)) < len(columns):
            raise ValueError(f"{path}:1: has the columns {', '.join(map(repr, columns))}, must name each, once")
        line = reader.line_num + 1
        for cells in reader:
            place, line = f"{path}:{line}", reader.line_num + 1
            if not cells:
                continue
            if len(cells) != len(columns):
                raise ValueError(f"{place}: has {len(cells)} values, must have {len(columns)}: {', '.join(columns)}")
            yield place, {c: _cell(place, c, v) for c, v in zip(columns, cells, strict=True) if v.strip()}
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: is no CSV ({error})") from error
    finally:
        csv.field_size_limit(limit)


def _cell(place: str, column: str, text: str):
    value, is_answer = text.strip(), column.lower() in (*ANSWERS, "final_ans")
    if (is_answer or column == "correct") and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if is_answer and re.fullmatch(r"-?\d{1,15}\.0", value):  # a whole number in a column that has a gap
        return int(value.partition(".")[0])
    if column not in _LISTS:
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: {column} is {reprlib.repr(text)}, must be a list in JSON") from error


def _asdiv_xml(path: Path) -> Iterator[tuple[str, dict]]:
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise ValueError(f"{path}:{error.position[0]}: is no XML ({error})") from error
    except (ValueError, LookupError) as error:  # of the encoding that it says it has
        raise ValueError(f"{path}:1: is no XML that can be read ({error})") from error
    for problem in root.iter("Problem"):
        row = {element.tag: element.text or "" for element in problem}
        yield f"{path}, problem {problem.get('ID')}", {"ID": problem.get("ID"), **row}


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise missing_extra(f"{path}, which is Parquet", "pyarrow", "data") from error
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: is no Parquet that can be read ({str(error).splitlines()[0]})") from error


def _hub_rows(name: str, config: str | None, split: str | None) -> Iterator[tuple[str, dict]]:
    try:
        import datasets
    except ImportError as error:
        raise missing_extra(f"{name}, which is no file here but may be on the hub", "datasets", "data") from error
    if split is None:
        raise ValueError(f"dataset_split: is not given, must name a split of {name} on the hub, such as train")
    try:
        loaded = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError) as error:
        raise ValueError(f"dataset: cannot load {name} from the hub: {str(error).splitlines()[0]}") from error
    for number, row in enumerate(loaded, 1):
        yield f"{name}, {split} row {number}", row


def _read_rationales(path: Path) -> dict[str, list[dict]]:
    """Rationale, correct and keywords of every question in a JSON-lines file."""
    found: dict[str, list[dict]] = {}
    for place, row in json_lines(path, "rationales"):
        if "question" not in row or "rationale" not in row:
            raise ValueError(f"{place}: has {', '.join(sorted(row))}; must have the keys question and rationale")
        kept = {key: row[key] for key in ("rationale", "correct", "keywords") if row.get(key) is not None}
        found.setdefault(question_key(str(row["question"])), []).append(kept)
    return found


# --- formats: a row as published -> question, answer and whatever else of an example it has ---


class Format(NamedTuple):
    """How a published row is known (it has all keys of one of the sets) and read."""

    keys: tuple[set[str], ...]
    read: Callable[[dict], dict]


def _row_equations(base: dict) -> list[str]:
    """The equations of a row that was read: published ones, or those in its rationale."""
    return base["equations"] if "equations" in base else find_equations(base.get("rationale") or "")


def _plain(row: dict) -> dict:
    columns = ", ".join(map(str, row))
    row = question_row(row, "the row")
    if "question" not in row:
        raise ValueError(f"has the columns {columns}; must have {COLUMNS}")
    return {key: row[key] for key in ("id", *Example.__dataclass_fields__, "correct") if row.get(key) is not None}


def _gsm8k(row: dict) -> dict:
    rationale, separator, answer = re.sub(r"<<[^<>]*>>", "", row["answer"]).rpartition("####")
    if not separator:
        raise ValueError("answer has no '#### result'")
    equations = re.findall(r"<<([^<>]*)>>", row["answer"])
    answer = answer.replace(",", "")
    return {"question": row["question"], "rationale": rationale, "answer": answer, "equations": equations}


def _svamp(row: dict) -> dict:
    question = _joined(row["Body"], row["Question"])
    return {"id": row["ID"], "question": question, "answer": row["Answer"], "equations": [row["Equation"]]}


def _asdiv(row: dict) -> dict:
    row = {key.lower(): value for key, value in row.items()}
    answer = row["answer"]
    if isinstance(answer, str):
        # "9 (apples)": the unit is no part of the answer, nor the blanks before it.
        *before, last = re.split(r"\([^()]*\)", answer)
        answer = "".join(part.rstrip() for part in before) + last
    name = row.get("id") or row.get("@id")
    question, equations = _joined(row["body"], row["question"]), row["formula"].split(";")
    return {"question": question, "answer": answer, "equations": equations} | ({"id": name} if name else {})


def _singleeq(row: dict) -> dict:
    if "final_ans" in row:
        return {"question": row["question"], "answer": row["final_ans"], "equations": row.get("lEquations", [])}
    (solution,) = row["lSolutions"]
    return {"question": row["sQuestion"], "answer": solution, "equations": row.get("lEquations", [])}


def _aqua(row: dict) -> dict:
    options = [str(option).partition(")") for option in row["options"]]
    if row["correct"] not in {label for label, _, _ in options}:
        raise ValueError(f"correct is {row['correct']!r}, must be the letter of one of the options")
    choices = " ".join(f"({label}) {text.strip()}" for label, _, text in options)
    question = f"{row['question'].rstrip()} Answer Choices: {choices}"
    return {"question": question, "rationale": row.get("rationale"), "answer": row["correct"]}


def _commonsense_qa(row: dict) -> dict:
    # As published, or flat as the hub has it.
    inner = row["question"] if isinstance(row["question"], dict) else {**row, "stem": row["question"]}
    concept, choices = inner["question_concept"], inner["choices"]
    if isinstance(choices, dict):
        choices = [{"label": x, "text": y} for x, y in zip(choices["label"], choices["text"], strict=True)]
    if row["answerKey"] not in {choice["label"] for choice in choices}:
        raise ValueError(f"answerKey is {row['answerKey']!r}, must be one of the choices")
    question = f"{inner['stem']} Answer Choices: " + " ".join(f"({c['label']}) {c['text']}" for c in choices)
    keywords = [concept, *(choice["text"] for choice in choices)]
    return {"id": row["id"], "question": question, "answer": row["answerKey"], "keywords": keywords}


def _strategyqa(row: dict) -> dict:
    if not isinstance(row["answer"], bool):
        raise ValueError(f"answer is {row['answer']!r}, must be true or false")
    facts = row["facts"]
    rationale = facts if isinstance(facts, str) else " ".join(fact.strip() for fact in facts)
    values = {"question": row["question"], "rationale": rationale, "answer": "yes" if row["answer"] else "no"}
    return {"id": row["qid"], **values, "keywords": [row["term"]] if row.get("term") else []}


def _s1k(row: dict) -> dict:
    """The first thought whose attempt was not graded as wrong."""
    if "attempt" in row:
        tries = [("\n\n".join(row["thinking_trajectories"]), row["attempt"], None)]
    else:
        names = [name for name in ("deepseek", "gemini") if row.get(f"{name}_attempt")]
        tries = [
            (row[f"{name}_thinking_trajectory"], row[f"{name}_attempt"], row.get(f"{name}_grade")) for name in names
        ]
    thought, attempt, grade = next((found for found in tries if found[2] != "No"), tries[0])
    return _thought_through(row["question"], attempt, thought, grade != "No")


def _openr1(row: dict) -> dict:
    """The first generation that is complete and, where any was judged, judged right; where messages stand, those."""
    if row.get("messages"):
        return _plain(row)
    verdicts = [row[name] for name in ("correctness_math_verify", "correctness_llama") if row.get(name)]
    complete = row.get("is_reasoning_complete") or [True] * len(row["generations"])
    judged = itertools.zip_longest(row["generations"], complete, *verdicts)
    right = [text for text, done, *rights in judged if text and done and (not verdicts or any(rights))]
    return _thought_through(row["problem"], [*right, *row["generations"], ""][0], None, bool(right), row["answer"])


def _thought_through(question: str, content: str, thought: str | None, correct: bool, answer=None) -> dict:
    turn = {"role": "assistant", "content": content, "reasoning_content": thought}
    return _plain({"question": question, "completion": [turn], "correct": correct, "answer": answer})


def _joined(body: str, question: str) -> str:
    """SVAMP's bodies often lack their last full stop."""
    body = body.rstrip()
    return f"{body}{'' if not body or body.endswith(('.', '?', '!', ',')) else '.'} {question}".strip()


def _detect(row: dict) -> str:
    for name, format in FORMATS.items():
        if any(keys <= row.keys() for keys in format.keys) and (name != "gsm8k" or "####" in str(row["answer"])):
            return name
    return "plain"


FORMATS: dict[str, Format] = {
    "svamp": Format(({"Body", "Question", "Equation"},), _svamp),
    "asdiv": Format(({"Body", "Question", "Formula"}, {"body", "question", "formula"}), _asdiv),
    "singleeq": Format(({"sQuestion", "lSolutions"},), _singleeq),
    "multiarith": Format(({"question", "final_ans"},), _singleeq),
    "aqua": Format(({"question", "options", "correct"},), _aqua),
    "commonsense_qa": Format(({"answerKey", "question"},), _commonsense_qa),
    "strategyqa": Format(({"qid", "question", "answer", "facts"},), _strategyqa),
    "s1k": Format(
        (
            {"question", "thinking_trajectories", "attempt"},
            {"question", "deepseek_thinking_trajectory", "deepseek_attempt"},
        ),
        _s1k,
    ),
    "openr1": Format(({"problem", "generations", "answer"},), _openr1),
    "gsm8k": Format(({"question", "answer"},), _gsm8k),
    "plain": Format((), _plain),
}
